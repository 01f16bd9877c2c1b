"""A study: trains and evaluates every arm with every seed, and reports the progress.

    t5x study --gin_file=gin/study.gin

Each run is trained and evaluated by the commands that --print_commands prints, each in its own process. A crash, an
out-of-memory kill or a wrong setting of one arm therefore leaves the other arms untouched, devices are free between
runs, and a run made by hand or on another machine counts as a run of the study. The cost is a start of some seconds per
command. The state of a study lies entirely in its directory: the same command continues after any interruption, and any
number of processes can share the study, as `worker` and `leases` describe.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from codellm_jax.configuration import Configuration, build
from codellm_jax.runtime.commands import Commands
from codellm_jax.runtime.leases import LEASE_SECONDS, RECORD, Leases, State
from codellm_jax.study.arms import Study, select
from codellm_jax.study.devices import run_side_by_side
from codellm_jax.study.page import losses, page
from codellm_jax.study.planned import (
    Planned,
    Standing,
    move_aside,
    plan_as_json,
    planned_runs,
    standing,
    write_plan,
)
from codellm_jax.study.printed import printed
from codellm_jax.study.worker import Worker


class Options(NamedTuple):
    """The flags of `t5x study`."""

    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    search_paths: tuple[str, ...] = ()
    redo: bool = False
    dry_run: bool = False
    print_commands: str = ""  # "shell", "slurm" or "kubernetes"
    worker: bool = False
    devices_per_run: int | None = None
    lease_seconds: float = LEASE_SECONDS
    command: tuple[str, ...] = ("study",)  # arguments of t5x that select the same runs of the same study


def study(configuration: Configuration, options: Options, report: Callable[[str], None] = print) -> int:
    """Plans the study, trains and evaluates what is not done yet, and returns the exit status.

    Raises:
      ValueError, OSError: with a one-line message, before anything starts: for an invalid plan, existing runs with
        another configuration, or a directory that is not writable.
    """
    asked = study_of(configuration)
    planned, told = planned_runs(asked, configuration, options.search_paths)
    names = {run.name for run in select([one.run for one in planned], options.arms, options.seeds)}
    chosen = [one for one in planned if one.run.name in names]
    for line in told:
        report(line)
    if options.print_commands:
        report(printed(options.print_commands, chosen, asked, options.search_paths, options.command,
                       options.devices_per_run))
        return 0
    if not options.lease_seconds > 0:
        raise ValueError(f"--lease_seconds must be positive, found {options.lease_seconds:g}.")
    if options.devices_per_run is not None and not options.dry_run:
        return _side_by_side(asked, options, report)
    with Commands(report) as processes:
        surveyed = _survey(processes, chosen if options.dry_run else planned, options)
        if processes.stopped:
            return tell_stopped(processes.stopped, report)
        facts = surveyed["runs"]
        for warning in dict.fromkeys(line for fact in facts.values() for line in fact.get("warnings", ())):
            report(f"WARNING: {warning}")
        if options.dry_run:
            report(page(asked, chosen, facts, stand_of(planned, facts), surveyed["measured"]))
            return 0
        leases = Leases(State(asked.directory), options.lease_seconds)
        stand = _begin(asked, configuration, planned, facts, leases, processes, options)
        if processes.stopped:
            return tell_stopped(processes.stopped, report)
        sound = [one for one in planned if "error" not in facts[one.run.name]]
        if any(one.tasks and not stand[one.run.name].evaluated for one in sound):
            _contamination(processes, sound, asked, options, leases)
        worker = Worker(chosen, facts, stand, leases, processes, options.search_paths)
        worker.work()
        if processes.stopped:
            return tell_stopped(processes.stopped, report)
        failures = list(worker.failures.values())
        if any(one.tasks for one in sound) and not _contamination_file(asked).exists():
            _contamination(processes, sound, asked, options, leases)  # the first searching process was killed
        unreported = _report(processes, chosen, asked, leases)
        if unreported and processes.stopped:
            return tell_stopped(processes.stopped, report)
    evaluated = any(one.tasks for one in chosen)
    if not evaluated:
        report(losses(chosen))
    report(f"{len(chosen) - len(failures)} of {len(chosen)} runs are done: {asked.directory}" if failures else
           f"All {len(chosen)} runs are trained{' and evaluated' * evaluated}: {asked.directory}")
    for line in [*failures, *unreported]:
        print(f"t5x study: error: {line}", file=sys.stderr)
    return 1 if failures or unreported else 0


def study_of(configuration: Configuration) -> Study:
    """The study in these gin files. Raises ValueError if they describe none."""
    if "study.directory" not in configuration.effective:
        raise ValueError("the gin files describe no study: add one such as gin/study.gin.")
    return build(configuration, "study")


def stand_of(planned: Sequence[Planned], facts: Mapping[str, Any]) -> dict[str, Standing]:
    """The progress of each run, by name."""
    found: dict[str, Standing] = {}
    for one in planned:  # parents come first
        found[one.run.name] = standing(one, facts.get(one.run.name, {}), found.get(one.run.parent or ""))
    return found


def _side_by_side(asked: Study, options: Options, report: Callable[[str], None]) -> int:
    """Starts workers on this machine, each with its own devices; returns the exit status."""
    assert options.devices_per_run is not None
    if not options.worker:
        forget_failures(State(asked.directory))
    flags = ["--worker", f"--lease_seconds={options.lease_seconds:g}", *["--redo"] * options.redo]
    return run_side_by_side([*options.command, *flags], options.devices_per_run, report)


def _begin(
    asked: Study, configuration: Configuration, planned: Sequence[Planned], facts: Mapping[str, Any], leases: Leases,
    processes: Commands, options: Options,
) -> dict[str, Standing]:
    """Writes the plan and moves aside or refuses runs of another plan, under a lock between workers; returns the
    progress of each run.
    """
    state, told = leases.state, False
    while not processes.stopped:
        with leases.held("plan", processes.kill) as lease:
            if lease is None:
                if not told:
                    processes.report("Waiting for another worker, which writes the plan")
                told = True
                processes.wait(min(1.0, leases.poll_seconds))
                continue
            stand = stand_of(planned, facts)
            if _put_aside_or_refuse(planned, asked, stand, leases, processes, options):
                stand = stand_of(planned, facts)
            write_plan(asked.directory, plan_as_json(asked, configuration, options.search_paths, planned))
            state.write("plan", {name: {key: fact[key] for key in ("flops", "error") if key in fact}
                                 for name, fact in facts.items()}, RECORD)
            if not options.worker:
                forget_failures(state)
            return stand
    return {}


def forget_failures(state: State) -> None:
    """Resets failed runs so that they are tried again."""
    records = state.read_all([name for name in state.names(RECORD) if name != "plan"], RECORD)
    for name, (record, generation) in records.items():
        if record and record.get("state") == "failed":
            state.write(name, None, RECORD, generation)


def _put_aside_or_refuse(
    planned: Sequence[Planned], asked: Study, stand: Mapping[str, Standing], leases: Leases, processes: Commands,
    options: Options,
) -> bool:
    """Reports runs that were trained or evaluated with another configuration, and moves them aside or raises
    ValueError; their files are never overwritten.

    Returns:
      Whether anything was moved aside.
    """
    report = processes.report
    changed = [one for one in planned if stand[one.run.name].changed or stand[one.run.name].results_changed]
    for one in changed:
        of_run = stand[one.run.name]
        report(f"{one.run.name} was {'trained' if of_run.changed else 'evaluated'} under another configuration: "
               + "; ".join([*of_run.changed, *of_run.results_changed][:6]))
    if changed and not options.redo:
        raise ValueError(f"{len(changed)} run(s) in {asked.directory} have another configuration (above). Restore "
                         "it; or use another STUDY_DIR; or give --redo, which runs them again and moves their old "
                         f"files to {asked.directory.rstrip('/')}/replaced.")
    again: list[str] = []
    for one in planned:
        # A run trained from a run that is run again is stale too.
        if stand[one.run.name].changed or one.run.parent in again:
            again.append(one.run.name)
    aside = [one for one in reversed(planned)  # so that a kill in between leaves no run without its parent
             if (one.run.name in again and epath.Path(one.folder).expanduser().exists())
             or (one.run.name not in again and stand[one.run.name].results_changed)]
    for one in aside:
        with leases.held(one.run.name, processes.kill) as lease:
            if lease is None:
                raise ValueError(f"{one.run.name} must be run again, but another worker is running it: stop that "
                                 "worker first.")
            results_alone = one.run.name not in again
            place = move_aside(one, asked.directory, results_alone)
            leases.state.write(one.run.name, None, RECORD)
        report(f"{one.run.name} is evaluated again; its results are in {place}" if results_alone else
               f"{one.run.name} is run again; its old files are in {place}")
    return bool(aside)


def tell_stopped(number: int, report: Callable[[str], None]) -> int:
    """Reports that a signal interrupted the study; returns the exit status."""
    report("Interrupted; the same command continues from here.")
    return 128 + number


def _survey(processes: Commands, planned: Sequence[Planned], options: Options) -> dict[str, Any]:
    """The answer of `survey.survey` for these runs; arbitrary if a signal stops it."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        _ask(processes, {"runs": [one.request() for one in planned], "search_paths": options.search_paths,
                         "measure": options.dry_run}, str(answer))
        return {} if processes.stopped else json.loads(answer.read_text())


def _ask(processes: Commands, request: Mapping[str, Any], answer: str) -> None:
    """Runs `survey.main`; raises ValueError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "request.json"
        file.write_text(json.dumps(request))
        ended = processes.run(["codellm_jax.study.survey", str(file), answer])
        if ended.status and not processes.stopped:
            raise ValueError(f"the plan could not be made, because its process {ended.how}")


def _report(processes: Commands, chosen: Sequence[Planned], asked: Study, leases: Leases) -> list[str]:
    """Writes STUDY_DIR/report from the runs so far; returns a line if that failed."""
    if not any(standing(one, {}, None).evaluated for one in chosen):  # without benchmarks: trained
        return []  # each reported failure says why
    with leases.held("report", processes.kill) as lease:
        if lease is None:
            processes.report("Another worker is writing the report.")
            return []
        ended = processes.run(["codellm_jax.cli", "report", asked.directory])
        return [f"report {ended.how}"] if ended.status else []


def _contamination_file(asked: Study) -> epath.Path:
    return epath.Path(asked.directory).expanduser() / "contamination.json"


def _contamination(
    processes: Commands, planned: Sequence[Planned], asked: Study, options: Options, leases: Leases
) -> None:
    """Writes STUDY_DIR/contamination.json, which covers the training data of all runs; skips the search if the file
    exists or another worker is searching.
    """
    evaluation = planned[0].evaluation
    settings = {macro: evaluation.resolved(name) for macro, name in (
        ("TASKS", "evaluation.tasks"), ("DATA_DIR", "benchmarks.data_dir"), ("BENCHMARKS", "benchmarks.specs"))}
    with leases.held("contamination", processes.kill) as lease:
        if lease is not None:
            _ask(processes, {"runs": [one.request() for one in planned], "search_paths": options.search_paths,
                             "asked": [pair for pair in settings.items() if pair[1] is not None]},
                 str(_contamination_file(asked)))
