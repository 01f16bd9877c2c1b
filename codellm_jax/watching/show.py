"""`t5x show`: the current state of a run, a study or a folder of runs.

    t5x show runs/mixed_pretrain

It reads files alone, so it also works for a run that trains on another machine.
"""

import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from codellm_jax.mixture.ledger import rows_of_code, stages_of
from codellm_jax.results.tables import short_score
from codellm_jax.runtime.progress import duration
from codellm_jax.study.status import ENDED, OfStudy, read_status
from codellm_jax.watching.runs import OfRun, is_run, read_run

POOLS = ("text", "code")
SHOWN = 12  # runs of a study that are not done, in a table


def show(path: str, command: str = "t5x") -> str:
    """A run, a study or a folder of runs as a page of text.

    Args:
      path: a directory, local or gs://.
      command: how to call `t5x` in the printed commands.

    Raises:
      FileNotFoundError: there is no such directory, or it contains neither a run nor a study.
      ValueError: study.json is damaged.
    """
    folder = epath.Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no directory {path}: name a run, a study or a folder of runs.")
    if (folder / "study.json").exists():
        return study_page(read_status(path), read_runs(folder / "runs"), command)
    if is_run(folder):
        return run_page(read_run(folder), command)
    if runs := read_runs(folder):
        one = shlex.quote(f"{path.rstrip('/')}/{runs[0].name}")
        return "\n".join([*runs_table(runs), "", f"One of them:  {command} show {one}",
                          f"All of them:  {command} report {shlex.quote(path)}"])
    raise FileNotFoundError(f"{path} holds neither a run nor a study: no study.json and no directory with "
                            "provenance.json, metrics.jsonl, config.gin or checkpoints.")


def read_runs(folder: epath.Path) -> list[OfRun]:
    """The runs in a folder, by name."""
    below = sorted(folder.iterdir(), key=lambda path: path.name) if folder.is_dir() else []
    with ThreadPoolExecutor(16) as pool:  # each file on gs:// takes a while
        found = pool.map(lambda path: read_run(path) if path.is_dir() and is_run(path) else None, below)
        return [run for run in found if run is not None]


def run_page(run: OfRun, command: str = "t5x") -> str:
    """One run: state, losses, speed, training data, checkpoints, results, and the next commands."""
    known = run.provenance
    ledger = _ledger(run)
    facts = [f"arm {known['arm']}" if known.get("arm") else "", f"seed {known['seed']}" if "seed" in known else "",
             f"{known['parameters']:,} parameters" if known.get("parameters") else "",
             _devices(known.get("devices") or {})]
    return "\n".join([
        f"{run.path}: {describe_state(run)}", ", ".join(filter(None, facts)), "",
        *_losses(run), *_scores(run), *_speed(run), "", *ledger_lines(ledger), *_kept(run), "",
        *(f"WARNING: {note}" for note in known.get("notes", ())), *_next(run, command)]).replace("\n\n\n", "\n\n")


def describe_state(run: OfRun, now: float | None = None) -> str:
    """The progress of a run, in words; `now` is in seconds of the wall clock."""
    of = f"step {run.step:,}" + (f" of {run.last_step:,}" if run.last_step else "")
    age = None if run.changed_at is None else max(0.0, (time.time() if now is None else now) - run.changed_at)
    last = f"; the last record is {duration(age)} old" if age is not None else ""
    if run.state == "trained":
        return f"trained to the end, {of}"
    if run.state == "training":
        left = f", about {duration(run.seconds_left)} left" if run.seconds_left else ""
        return f"training, {of}{left}{last}"
    if run.state == "stopped":
        return f"stopped normally after {of}"
    if run.state == "to do":
        return "nothing is trained yet"
    here = ("no process of this machine trains it" if run.is_held is False else
            "unknown whether a process trains it")
    return f"not ended, {of}; {here}{last}"


def _devices(devices: Mapping[str, Any]) -> str:
    return f"{devices['count']} x {devices['kind']}" if {"count", "kind"} <= devices.keys() else ""


def _losses(run: OfRun) -> list[str]:
    rows = []
    for title, line, name in (("training", run.last("train"), "loss"), ("held out", run.last("eval"), "loss"),
                              ("held out, bits per byte", run.last("eval"), "bits_per_byte")):
        values = [line.get(name), *(line.get(f"{name}/{pool}") for pool in POOLS)]
        if any(value is not None for value in values):
            rows.append(f"  {title:<26} {line['step']:>9,} " + " ".join(
                f"{'-' if value is None else format(value, '.4f'):>9}" for value in values))
    return [f"{'loss, nats per token':<28} {'step':>9} {'all':>9} {'text':>9} {'code':>9}", *rows, ""] if rows else []


def _scores(run: OfRun) -> list[str]:
    if run.results:
        step = max(result["checkpoint"]["step"] for result in run.results.values())
        return [f"scores after step {step:,}, in per cent",
                *(f"  {task:<26} {short_score({'measured': True, 'interval': None, **result})}"
                  for task, result in run.results.items()), ""]
    scores = {name.removeprefix("score/"): value for name, value in run.last("eval").items()
              if name.startswith("score/") and value is not None}
    return [f"scores while training, in per cent, after step {run.last('eval')['step']:,}",
            *(f"  {task:<26} {100 * value:.1f}" for task, value in scores.items()), ""] if scores else []


def _speed(run: OfRun) -> list[str]:
    rate = run.tokens_per_second
    sessions = run.provenance.get("sessions") or []
    spent = [session["seconds"] for session in sessions if session.get("seconds") is not None]
    use = run.last("train").get("model_flops_utilization")
    told = ", ".join(filter(None, [
        f"{rate:,.0f} tokens/s" if rate else "", f"model FLOPs utilization {use:.1%}" if use else "",
        f"{duration(sum(spent))} in {len(spent)} session{'s' * (len(spent) != 1)} that ended" if spent else ""]))
    return [f"speed       {told}"] if told else []


def _ledger(run: OfRun) -> Mapping[str, Any]:
    """The training data so far: from the newest checkpoint during training, since provenance.json is only written at
    the start and the end.
    """
    if run.state == "trained" or run.state == "stopped" or not run.checkpoints:
        return run.provenance.get("ledger") or {}
    from codellm_jax.runtime.checkpoints import newest_record

    try:
        return newest_record(str(run.path))[1].get("ledger") or {}
    except (OSError, ValueError):  # a checkpoint that is being written or removed
        return run.provenance.get("ledger") or {}


def ledger_lines(ledger: Mapping[str, Any]) -> list[str]:
    """The amount from each source, and the stages before."""
    if not ledger.get("rows"):
        return []
    total, branch = sum(ledger["rows"].values()), (ledger.get("branch") or {}).get("drawn", {})
    unit = "examples" if ledger["stage"] == "tuning" else "rows"
    lines = [f"{'source':<28} {unit:>9} {'tokens':>15} {'share':>8} {'epochs':>8}"]
    for source, rows in ledger["rows"].items():
        epoch, before = ledger.get("epoch_rows", {}).get(source), branch.get(source, (None, 0))[1]
        epochs = f"{(before + rows) / epoch:.2f}" if epoch else "-"
        lines.append(f"{source:<28} {rows:>9,} {ledger['tokens'].get(source, 0):>15,} "
                     f"{rows / total if total else 0.0:>8.4f} {epochs:>8}")
    for stage in stages_of(ledger)[:-1]:
        rows = sum(stage["rows"].values())
        code = f", {100 * rows_of_code(stage) / rows:.1f}% code" if rows else ""
        lines.append(f"before: {stage['stage']} in {stage.get('model_dir', 'an earlier run')}, "
                     f"{sum(stage['tokens'].values()):,} tokens{code}")
    return [*lines, ""]


def _kept(run: OfRun) -> list[str]:
    return [f"{title:<11} {', '.join(f'{step:,}' for step in steps)}" for title, steps in (
        ("checkpoints", run.checkpoints), ("exports", run.exports), ("damaged", run.damaged)) if steps]


def _next(run: OfRun, command: str) -> list[str]:
    """The next commands for a run."""
    place = shlex.quote(str(run.path))
    if run.state == "training":
        return [f"Watch:       {command} plot {place}"]
    if run.state in ("stopped", "not ended"):
        again = f"{command} train --gin_file={shlex.quote(str(run.path / 'config.gin'))}"
        return [f"Continue:    {again}" if (run.path / "config.gin").exists() else
                "Continue:    run the command that started it again"]
    if run.state == "to do":
        return []
    lines = []
    if not run.results:
        lines.append(f"Evaluate it: {command} eval --gin_file=gin/eval.gin --gin.CHECKPOINT_PATH={place}")
    else:
        lines.append(f"Compare:     {command} compare {place} OTHER_RUN")
    if (run.provenance.get("ledger") or {}).get("stage") == "pretraining":
        lines.append(f"Tune it:     {command} train --gin_file=gin/tune_mixed.gin "
                     f"--gin.INITIAL_CHECKPOINT_PATH={place}")
    return [*lines, f"Export it:   {command} export {place} --output=DIR"]


def runs_table(runs: Sequence[OfRun]) -> list[str]:
    """A line for each run."""
    width = max([len("run"), *(len(run.name) for run in runs)])
    lines = [f"{'run':<{width}}  {'state':<9} {'step':>17} {'training':>9} {'text':>9} {'code':>9} {'tokens/s':>10} "
             f"{'left':>8}  results"]
    for run in runs:
        step = f"{run.step:,}/{run.last_step:,}" if run.last_step else f"{run.step:,}"
        values = [run.last("train").get("loss"), *(run.last("eval").get(f"loss/{pool}") for pool in POOLS)]
        shown = " ".join(f"{'-' if value is None else format(value, '.4f'):>9}" for value in values)
        rate = run.tokens_per_second
        left = duration(run.seconds_left) if run.seconds_left and run.state == "training" else "-"
        lines.append(f"{run.name:<{width}}  {run.state:<9} {step:>17} {shown} {f'{rate:,.0f}' if rate else '-':>10} "
                     f"{left:>8}  {f'{len(run.results)} tasks' if run.results else '-'}")
    return lines


def study_page(study: OfStudy, runs: Sequence[OfRun], command: str = "t5x") -> str:
    """A study: its progress, the losses of its arms, active and failed runs, and the next commands."""
    place = shlex.quote(study.directory)
    open_or_failed = {name: of_run for name, of_run in study.runs.items() if of_run.state not in ("done", "to do")}
    lines = [study.summary, *study.others, "", *arms_table(study, {run.name: run for run in runs}), ""]
    width = max([len("run"), *map(len, open_or_failed)])
    for name, of_run in list(open_or_failed.items())[:SHOWN]:
        left = f", about {duration(of_run.left)} left" if of_run.left is not None and of_run.state not in ENDED else ""
        who = f" ({of_run.holder.worker})" if of_run.holder else ""
        lines.append(f"{name:<{width}}  {of_run.state}, step {of_run.step:,} of {of_run.steps:,}{left}{who}"
                     + f": {of_run.note}" * bool(of_run.note))
    if len(open_or_failed) > SHOWN:
        lines.append(f"and {len(open_or_failed) - SHOWN} more; all of them: {command} show {place}/runs")
    if open_or_failed:
        lines.append("")
    if any(of_run.state not in ENDED for of_run in study.runs.values()):
        lines.append("Continue:    the same `t5x study` command; it trains and evaluates the rest" if not
                     study.workers else "Help:        the same `t5x study` command with --worker, on any machine")
    if any(of_run.state == "failed" for of_run in study.runs.values()):
        lines.append("Fix:         once the cause is removed, the same `t5x study` command retries a failed run; its "
                     f"log is in {study.directory}/runs/RUN/train.log or eval.log")
    lines.append(f"Watch:       {command} report {place} --serve")
    report = epath.Path(study.directory).expanduser() / "report" / "report.html"
    lines.append(f"Report:      {report}" if report.exists() else f"Report:      {command} report {place}")
    return "\n".join(lines)


def arms_table(study: OfStudy, runs: Mapping[str, OfRun]) -> list[str]:
    """A line for each arm: how many of its seeds are done, and the mean of their last held-out losses."""
    arms = study.arms
    width = max([len("arm"), *map(len, arms)])
    stages = {arm: str(study.plan[names[0]].get("stage", "-")) for arm, names in arms.items()}
    stage_width = max([len("stage"), *map(len, stages.values())])
    lines = [f"{'arm':<{width}}  {'stage':<{stage_width}} {'done':>7} {'steps':>9} {'text':>9} {'code':>9}"]
    for arm, names in arms.items():
        done = [name for name in names if study.runs[name].state == "done"]
        of_arm = [runs[name].last("eval") for name in done if name in runs]
        shown = " ".join(f"{mean_of(line.get(f'loss/{pool}') for line in of_arm):>9}" for pool in POOLS)
        lines.append(f"{arm:<{width}}  {stages[arm]:<{stage_width}} {f'{len(done)}/{len(names)}':>7} "
                     f"{study.runs[names[0]].steps:>9,} {shown}")
    return lines


def mean_of(values: Iterable[float | None]) -> str:
    """The mean of the known values, or a dash."""
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.4f}" if known else "-"
