"""A study: every arm under every seed, trained, evaluated, and told how far it is.

    t5x study --gin_file=gin/study.gin

Each run is trained and evaluated by the very commands that --print_commands prints, each in a process of its own: a
crash, a kill for want of memory, or a wrong setting of one arm leaves the others as they are, devices are free again
between runs, and a run made by hand or on another machine is a run of the study. What that costs is a start each, some
seconds. All that is known of a study lies in its directory; so the same command goes on after any interruption.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from codellm_jax.configuration import Configuration, build
from codellm_jax.runtime.commands import Commands, Pace
from codellm_jax.runtime.progress import duration
from codellm_jax.study.arms import Study, select
from codellm_jax.study.page import losses, page
from codellm_jax.study.planned import (
    Planned,
    Standing,
    evaluation_seconds,
    move_aside,
    plan_as_json,
    planned_runs,
    standing,
    write_plan,
)
from codellm_jax.study.printed import shell_commands


class Options(NamedTuple):
    """The flags of `t5x study`."""

    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    search_paths: tuple[str, ...] = ()
    redo: bool = False
    dry_run: bool = False
    print_commands: bool = False
    command: str = "t5x study"  # the same again, without --redo, --dry_run and --print_commands


def study(configuration: Configuration, options: Options, report: Callable[[str], None] = print) -> int:
    """Plans, and trains and evaluates what is not done yet; returns the exit status.

    Raises:
      ValueError, FileNotFoundError: in one line, before anything is begun: for a plan that is none, or runs that are
        there under another configuration.
    """
    _require_of_study(configuration)
    asked: Study = build(configuration, "study")
    planned, told = planned_runs(asked, configuration, options.search_paths)
    names = {run.name for run in select([one.run for one in planned], options.arms, options.seeds)}
    chosen = [one for one in planned if one.run.name in names]
    for line in told:
        report(line)
    if options.print_commands:
        report(shell_commands(chosen, asked, options.search_paths, options.command))
        return 0
    with Commands(report) as processes:
        surveyed = _survey(processes, chosen if options.dry_run else planned, options)
        if processes.stopped:
            return tell_stopped(processes.stopped, report)
        facts = surveyed["runs"]
        for warning in dict.fromkeys(line for fact in facts.values() for line in fact.get("warnings", ())):
            report(f"WARNING: {warning}")
        stand = stand_of(planned, facts)
        if options.dry_run:
            report(page(asked, chosen, facts, stand, surveyed["measured"]))
            return 0
        _put_aside_or_refuse(planned, asked, stand, options, report)
        write_plan(asked.directory, plan_as_json(asked, configuration, options.search_paths, planned))
        sound = [one for one in planned if "error" not in facts[one.run.name]]
        if any(one.tasks and not stand[one.run.name].evaluated for one in sound):
            _contamination(processes, sound, asked, options)
        failures = _run_all(chosen, facts, processes, options, report)
        if processes.stopped:
            return tell_stopped(processes.stopped, report)
        unreported = _report(processes, chosen, asked)
    for line in [*failures, *unreported]:
        print(f"t5x study: error: {line}", file=sys.stderr)
    evaluated = any(one.tasks for one in chosen)
    if not evaluated:
        report(losses(chosen))
    report(f"{len(chosen) - len(failures)} of {len(chosen)} runs are done: {asked.directory}" if failures else
           f"All {len(chosen)} runs are trained{' and evaluated' * evaluated}: {asked.directory}")
    return 1 if failures or unreported else 0


def _require_of_study(configuration: Configuration) -> None:
    """Raises ValueError where gin files plan no study."""
    if "study.directory" not in configuration.effective:
        raise ValueError("the gin files plan no study: give one such as gin/study.gin.")


def stand_of(planned: Sequence[Planned], facts: Mapping[str, Any]) -> dict[str, Standing]:
    """How far each run has come, by name."""
    found: dict[str, Standing] = {}
    for one in planned:  # parents come first
        found[one.run.name] = standing(one, facts.get(one.run.name, {}), found.get(one.run.parent or ""))
    return found


def _put_aside_or_refuse(
    planned: Sequence[Planned], asked: Study, stand: Mapping[str, Standing], options: Options,
    report: Callable[[str], None],
) -> None:
    """Runs that were trained or evaluated under another configuration are told; nothing of them is ever overwritten."""
    changed = [one for one in planned if stand[one.run.name].changed or stand[one.run.name].results_changed]
    for one in changed:
        of_run = stand[one.run.name]
        report(f"{one.run.name} was {'trained' if of_run.changed else 'evaluated'} under another configuration: "
               + "; ".join([*of_run.changed, *of_run.results_changed][:6]))
    if changed and not options.redo:
        raise ValueError(f"{len(changed)} run(s) in {asked.directory} are of another configuration (above). Set it "
                         "back; or use another STUDY_DIR; or give --redo, which makes them again and moves what is "
                         f"there to {asked.directory.rstrip('/')}/replaced.")
    again: list[Planned] = []
    for one in planned:
        # What was trained from a run that is made again is of another one too.
        if stand[one.run.name].changed or one.run.parent in [other.run.name for other in again]:
            again.append(one)
        elif stand[one.run.name].results_changed:
            report(f"{one.run.name} is evaluated again; its results are in {move_aside(one, asked.directory, True)}")
    for one in reversed(again):  # so that a kill in between leaves none that stands on nothing
        if epath.Path(one.folder).expanduser().exists():
            report(f"{one.run.name} is made again; what was there is in {move_aside(one, asked.directory, False)}")


def tell_stopped(number: int, report: Callable[[str], None]) -> int:
    """Says that the study was interrupted by a signal; returns the exit status."""
    report("Interrupted; the same command goes on from here.")
    return 128 + number


def _survey(processes: Commands, planned: Sequence[Planned], options: Options) -> dict[str, Any]:
    """What `survey.survey` tells of these runs; anything where it is stopped by a signal."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        _ask(processes, {"runs": [one.request() for one in planned], "search_paths": options.search_paths,
                         "measure": options.dry_run}, str(answer))
        return {} if processes.stopped else json.loads(answer.read_text())


def _ask(processes: Commands, request: Mapping[str, Any], answer: str) -> None:
    """Runs `survey.main`; raises ValueError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "request.json"
        file.write_text(json.dumps(request))
        ended = processes.run(["codellm_jax.study.survey", str(file), answer])
        if ended.status and not processes.stopped:
            raise ValueError(f"the plan could not be made, for its process {ended.how}")


def _report(processes: Commands, chosen: Sequence[Planned], asked: Study) -> list[str]:
    """STUDY_DIR/report, of what there is; a line where that failed."""
    if not any(one.tasks and standing(one, {}, None).evaluated for one in chosen):
        return []  # each of the failures that are told says why, or no benchmark is asked
    ended = processes.run(["codellm_jax.cli", "report", asked.directory])
    return [f"report {ended.how}"] if ended.status else []


def _contamination(processes: Commands, planned: Sequence[Planned], asked: Study, options: Options) -> None:
    """STUDY_DIR/contamination.json, of everything the runs train on; where it is there already nothing is searched."""
    evaluation = planned[0].evaluation
    settings = {macro: evaluation.resolved(name) for macro, name in (
        ("TASKS", "evaluation.tasks"), ("DATA_DIR", "benchmarks.data_dir"))}
    _ask(processes, {"runs": [one.request() for one in planned], "search_paths": options.search_paths,
                     "asked": [pair for pair in settings.items() if pair[1] is not None]},
         f"{asked.directory.rstrip('/')}/contamination.json")


def _run_all(
    chosen: Sequence[Planned], facts: Mapping[str, Any], processes: Commands, options: Options,
    report: Callable[[str], None],
) -> list[str]:
    """Trains and evaluates what is not done; returns a line for each run that failed or was skipped."""
    failures: dict[str, str] = {}
    stand, pace = stand_of(chosen, facts), Pace()
    for one in chosen:
        if stand[one.run.name].trained and stand[one.run.name].seconds and "flops" in facts[one.run.name]:
            pace.trained(facts[one.run.name]["flops"], stand[one.run.name].seconds)
        if stand[one.run.name].evaluated and (seconds := evaluation_seconds(one)):
            pace.evaluated(seconds)

    def left() -> str:
        to_come = [(later.run.name, stand[later.run.name]) for later in chosen if later.run.name not in failures]
        seconds = pace.left([facts[name].get("flops", 0.0) for name, of_run in to_come if not of_run.trained],
                            sum(not of_run.evaluated for _, of_run in to_come))
        return "" if seconds is None else f" | about {duration(seconds)} left for the study"

    for number, one in enumerate(chosen, 1):
        if processes.stopped:
            break
        name, heading = one.run.name, f"[{number}/{len(chosen)}] {one.run.name}"
        if one.run.parent in failures:
            failures[name] = f"{name} is skipped, for it starts from {one.run.parent}."
        elif "error" in facts[name]:
            failures[name] = f"{name}: {facts[name]['error']}"
        elif standing(one, {}, None).evaluated:
            report(f"{heading}: done before")
        else:
            why = _make(one, heading, facts[name]["flops"], processes, options, pace, left, report)
            if why:
                failures[name] = f"{name}: {why}"
        stand[name] = standing(one, {}, None)
        if name in failures:
            report(f"{heading}: {failures[name]}")
    return list(failures.values())


def _make(
    one: Planned, heading: str, flops: float, processes: Commands, options: Options, pace: Pace,
    left: Callable[[], str], report: Callable[[str], None],
) -> str | None:
    """Trains and evaluates a run, as far as that is not done; returns why it failed, or None."""
    told = []
    for verb, done, command in (("train", "trained", one.train_command(options.search_paths)),
                                ("eval", "evaluated", one.eval_command(options.search_paths))):
        if getattr(standing(one, {}, None), done):
            continue
        report(f"{heading}: {verb}{left()}")
        began = time.monotonic()
        ended = processes.run(["codellm_jax.cli", *command], f"{heading} {verb}", f"{one.folder}/{verb}.log", left)
        if processes.stopped:
            return None
        if ended.status or not getattr(standing(one, {}, None), done):
            return f"{verb} {ended.how}"
        seconds = time.monotonic() - began
        told.append(f"{verb} {duration(seconds)}")
        if verb == "train":
            pace.trained(flops, seconds)
        else:
            pace.evaluated(seconds)
    report(f"{heading}: done, {', '.join(told)}")
    return None
