"""The progress of a study and its current workers, read from STUDY_DIR alone, without JAX and without writing.

Ages compare this machine's clock with those of the workers, so they are as accurate as the clocks.
"""

import ast
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from etils import epath

from codellm_jax.results.files import Damaged, read_object, read_provenance, require_members, require_plain_runs
from codellm_jax.runtime.leases import LEASE, RECORD, Holder, State, as_holder, as_record
from codellm_jax.runtime.progress import duration, read_records
from codellm_jax.settings import Configuration
from codellm_jax.study.pace import Pace, ToDo, seconds_left

ENDED = ("done", "failed", "skipped")


class OfRun(NamedTuple):
    """The state of a run according to its files."""

    state: str  # "done", "failed", "skipped", "training", "evaluating", "no heartbeat", "trained", "begun", "to do"
    step: int
    steps: int
    holder: Holder | None = None
    note: str = ""
    left: float | None = None  # seconds of remaining work


def directory_of(configuration: Configuration) -> str:
    """The STUDY_DIR of these settings. Raises ValueError if they describe no study."""
    value = configuration.resolved("study.directory")
    try:
        directory = ast.literal_eval(value or "")
    except (ValueError, SyntaxError):
        directory = None
    if not isinstance(directory, str):
        raise ValueError("the gin files describe no study: add one such as gin/study.gin.")
    return directory


class OfStudy(NamedTuple):
    """The state of a study according to its files.

    Attributes:
      directory: as given.
      plan: by run name, the run's entry in study.json; parents come first.
      runs: the progress of each.
      others: lines about work that is not a run, such as the search for contamination.
      workers: how many train or evaluate now.
      seconds_left: with these workers; None while it is unknown, or if nobody works.
      read_at: in seconds of the wall clock.
    """

    directory: str
    plan: Mapping[str, Mapping[str, Any]]
    runs: Mapping[str, OfRun]
    others: Sequence[str]
    workers: int
    seconds_left: float | None
    read_at: float

    @property
    def arms(self) -> dict[str, list[str]]:
        """The names of the runs of each arm."""
        found: dict[str, list[str]] = {}
        for name, planned in self.plan.items():
            found.setdefault(str(planned.get("arm", name)), []).append(name)
        return found

    @property
    def summary(self) -> str:
        """The progress of the study, in one line."""
        states = [of_run.state for of_run in self.runs.values()]
        failed, left = states.count("failed") + states.count("skipped"), sum(state not in ENDED for state in states)
        return (f"{self.directory}: {states.count('done')} of {len(states)} runs are done"
                + f", {failed} failed or depend on one that did" * bool(failed)
                + f", {left} are left" * bool(left)
                + (f"; {self.workers or 'no'} worker{'s' * (self.workers != 1)} at work" if left else "")
                + (f", about {duration(self.seconds_left)} left with {self.workers}" if self.seconds_left else "")
                + ".")


def read_status(directory: str, now: float | None = None) -> OfStudy:
    """The progress of a study.

    Args:
      directory: STUDY_DIR, local or gs://.
      now: in seconds of the wall clock; the current time by default.

    Raises:
      FileNotFoundError: no study has started there.
      ValueError: study.json is damaged.
    """
    now = time.time() if now is None else now
    root = epath.Path(directory).expanduser()
    found_plan = read_object(root / "study.json", {"runs": list}, ("runs",))
    if found_plan is None:
        raise FileNotFoundError(f"{directory} holds no study.json: no study has started there.")
    require_plain_runs(root / "study.json", found_plan["runs"])
    for run in found_plan["runs"]:
        require_members(run, {"from": (str, type(None)), "steps": int}, ("from", "steps"), f"{root / 'study.json'}")
    plan = {str(run["run"]): run for run in found_plan["runs"]}
    state = State(directory)
    holders = {name: holder for name, (value, _) in state.read_all(state.names(LEASE), LEASE).items()
               if (holder := as_holder(value))}
    recorded = {name: value for name, (value, _) in state.read_all(state.names(RECORD), RECORD).items()}
    costs = _costs(recorded.pop("plan", None) or {})
    records = {name: record for name, value in recorded.items() if (record := as_record(value))}
    with ThreadPoolExecutor(32) as pool:  # each file on gs:// takes a while
        read = list(pool.map(lambda name: _read(root / "runs" / name), plan))
    found: dict[str, OfRun] = {}
    for (name, run), files in zip(plan.items(), read, strict=True):  # parents come first
        found[name] = _found(run, files, costs.get(name, {}), holders.get(name), records.get(name, {}),
                             found.get(_parent(run)), now)
    found = _with_time_left(found, records, costs, now)
    others = [f"{holder.worker} has {name}" for name, holder in holders.items() if name not in plan and not
              _is_silent(holder, now)]
    workers = len({of_run.holder.worker for of_run in found.values()
                   if of_run.holder and of_run.state in ("training", "evaluating")})
    # Active runs first, because they already have their workers.
    to_do = [ToDo(name, _parent(plan[name]), of_run.left) for name, of_run in sorted(
        found.items(), key=lambda item: item[1].holder is None) if of_run.state not in ENDED]
    return OfStudy(directory, plan, found, others, workers, seconds_left(to_do, workers) if workers else None, now)


def _costs(recorded: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The recorded costs of each run, without damaged records."""
    return {name: cost for name, cost in recorded.items() if isinstance(cost, dict)
            and isinstance(cost.get("flops", 0.0), int | float) and isinstance(cost.get("error", ""), str)}


def status(directory: str, now: float | None = None) -> str:
    """The progress of a study as a page of text."""
    study = read_status(directory, now)
    return "\n".join([*_table(study.runs, study.read_at), "", *study.others, study.summary])


def _parent(run: Mapping[str, Any]) -> str:
    """The name of the run from which a run starts; empty if it starts outside of the study."""
    return str(run["from"]).rpartition("@")[0] or str(run["from"])


def _is_silent(holder: Holder, now: float) -> bool:
    return holder.is_gone or now - holder.beat_at > holder.expires


class _Files(NamedTuple):
    """The content of a run's directory."""

    begun: bool
    finished: bool  # of training
    step: int  # of the last record


def _read(folder: epath.Path) -> _Files:
    try:
        provenance = read_provenance(folder, ("finished",))
    except Damaged:  # the run moves it aside when it continues
        provenance = None
    return _Files(provenance is not None, bool(provenance and provenance["finished"]),
                  max((line["step"] for line in read_records(str(folder))), default=0))


def _found(
    run: Mapping[str, Any], files: _Files, cost: Mapping[str, Any], holder: Holder | None, record: Mapping[str, Any],
    parent: OfRun | None, now: float,
) -> OfRun:
    """The state of one run according to its files."""
    step, steps = files.step, run["steps"]
    if record.get("state") == "done" and files.begun and (holder is None or _is_silent(holder, now)):
        return OfRun("done", steps, steps)
    if holder is not None:
        state = "evaluating" if files.finished else "training"
        return OfRun("no heartbeat" if _is_silent(holder, now) else state, step, steps, holder)
    if record.get("state") == "failed":
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(record["when"]))
        return OfRun("failed", step, steps, note=f"{record['why']} ({record['worker']}, {when})")
    if parent is not None and parent.state in ("failed", "skipped"):
        return OfRun("skipped", step, steps, note=f"because of {_parent(run)}, from which it starts")
    if "error" in cost:
        return OfRun("failed", step, steps, note=cost["error"])
    return OfRun("trained" if files.finished else "begun" if step else "to do", step, steps)


def _with_time_left(
    found: Mapping[str, OfRun], records: Mapping[str, Any], costs: Mapping[str, Any], now: float
) -> dict[str, OfRun]:
    """The same runs with the remaining seconds of each, where they are known."""
    pace = Pace()
    for name, record in records.items():
        if record.get("train_seconds") and "flops" in costs.get(name, {}):
            pace.trained(costs[name]["flops"], record["train_seconds"])
        if record.get("eval_seconds"):
            pace.evaluated(record["eval_seconds"])
    evaluations = int(any(record.get("eval_seconds") for record in records.values()))

    def left(name: str, of_run: OfRun) -> float | None:
        if of_run.state in ENDED:
            return None
        to_evaluate = pace.seconds(0.0, evaluations)
        if of_run.state in ("trained", "evaluating"):
            return to_evaluate if evaluations else None
        part = 1 - of_run.step / max(1, of_run.steps)
        holder = of_run.holder
        if holder is not None and of_run.state == "training" and of_run.step > holder.step:  # its own pace is best
            seconds = (now - holder.since) / (of_run.step - holder.step) * (of_run.steps - of_run.step)
            return seconds + (to_evaluate or 0.0)
        flops = costs.get(name, {}).get("flops")
        return None if flops is None else pace.seconds(flops * part, evaluations)

    return {name: of_run._replace(left=left(name, of_run)) for name, of_run in found.items()}


def _table(found: Mapping[str, OfRun], now: float) -> list[str]:
    width = max(map(len, ["run", *found]))
    lines = [f"{'run':<{width}}  {'state':<15} {'step':>15}  {'since':>8}  {'left':>8}  worker, or error"]
    for name, of_run in found.items():
        holder, is_open = of_run.holder, of_run.state not in ENDED
        step = f"{of_run.step:,}/{of_run.steps:,}" if of_run.step else f"{of_run.steps:,}"
        since = duration(now - holder.since) if holder else ""
        left = duration(of_run.left) if is_open and of_run.left is not None else ""
        note = of_run.note
        if holder is not None:
            note = holder.worker
            if of_run.state == "no heartbeat":
                note += ", whose process has ended" if holder.is_gone else f" for {duration(now - holder.beat_at)}"
        lines.append(f"{name:<{width}}  {of_run.state:<15} {step:>15}  {since:>8}  {left:>8}  {note}".rstrip())
    return lines
