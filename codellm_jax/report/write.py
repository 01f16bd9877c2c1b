"""The report of a study: answers to its questions first, then all details, from the files of its runs.

    t5x report studies/first

DIR holds study.json and runs/NAME, or is any folder of run directories; runs without results appear with their losses.
All files are written to DIR/report at the end:

  report.html       one self-contained page
  report.md         the same as Markdown, with its plots beside it
  *.csv             every table with all digits, and a line for each question
  tables.tex        every table of the page in LaTeX
  *.png, *.svg, *.pdf   the plots

All scores are computed from the lines of the questions.
"""

import ast
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from codellm_jax.mixture.ledger import arm, rows_of_code, stages_of
from codellm_jax.mixture.schedules import Schedule, constant, phases
from codellm_jax.report import (
    asked,
    background,
    effects_page,
    latex,
    law_files,
    plots,
    sections,
    signal_page,
    sweep_page,
)
from codellm_jax.report.conclusions import has_papers_arms, judge
from codellm_jax.report.pages import Figure, Text, comma_separated, markdown, page
from codellm_jax.report.runs import (
    Run,
    Stage,
    name_and_seed,
    of_an_arm,
    read_contamination,
    read_json,
    read_results,
    require_same_arm,
    require_same_measurement,
    require_same_sources,
    resolve,
)
from codellm_jax.report.study import Study
from codellm_jax.results.files import Damaged, files_of, read_provenance, require_plain_runs, write_whole
from codellm_jax.runtime.checkpoints import newest_record
from codellm_jax.runtime.progress import StatusLine, read_records

Told = Callable[[str], None]
# Files that `t5x laws` writes to the same folder.
OF_LAWS = ("laws.svg", "laws.png", "laws.pdf", "ratios.csv", "metrics.csv", "predictions.csv")


def report(directory: str, say: Told = print) -> str:
    """Writes DIR/report and returns a summary as lines of text.

    Raises:
      FileNotFoundError: the directory does not exist, or no run in it has results or losses.
      ValueError: with a one-line message; results that must not stand in one table, or invalid files.
    """
    folder = epath.Path(directory).expanduser()
    study = read_study(folder, say)
    require_same_arm(study.runs)
    require_same_sources(study.runs)
    require_same_measurement(run.results for run in study.runs)
    results = sum(len(run.results) for run in study.runs)
    say(f"{len(study.runs)} runs of {len(study.arms)} arms, {results} results.")
    compared = asked.groups(study)
    effects, words = effects_page.effects(compared)
    swept, of_sweeps = sweep_page.sweeps(compared)
    parts: dict[str, Callable[[Study], sections.Section]] = {
        "effects of stages": lambda study: effects, "sweeps": lambda study: swept,
        "held-out loss": background.losses}
    if of_sweeps:
        parts["laws"] = lambda study: sections.Section(law_files.section(str(folder)), [])
    parts["signal over noise"] = lambda study: signal_page.signals(compared)
    if study.tasks:
        parts |= {"plots of scores": background.score_plots, "differences between arms": sections.differences,
                  "all scores": sections.scores}
    papers = has_papers_arms(study)
    if papers:
        parts |= {"conclusions": sections.conclusions, "the paper's tables": sections.paper_tables}
    parts["mix of text and code"] = lambda study: background.mixes(study, mix_figure(study))
    if study.tasks:
        parts |= {"contamination": background.contamination, "what was asked": background.asked}
    parts["provenance"] = background.provenance
    status, made = StatusLine(0, len(parts), active=True, unit="section"), []
    for number, (name, make) in enumerate(parts.items()):
        status.show(number, name)
        made.append(make(study))
    status.close()
    blocks = [*sections.opening(study), *(block for section in made for block in section.blocks), Text(
        "The folder of this page also holds its figures as SVG, PDF and PNG, its tables in LaTeX (`tables.tex`) and, "
        "with all digits, as CSV.")]
    title = f"Report of {study.name}"
    tables = [table for section in made for table in section.tables]
    if study.tasks:
        tables.append(sections.questions(study))
    files: dict[str, str | bytes] = {f"{name}.csv": comma_separated(columns, rows) for name, columns, rows in tables}
    for block in blocks:
        if isinstance(block, Figure):
            files |= block.files
    files |= {"report.md": markdown(title, blocks), "report.html": page(title, blocks),
              "tables.tex": latex.tables(title, blocks)}
    write(folder / "report", files)
    return "\n".join([
        *filter(None, [study.warning()]),
        *words, *of_sweeps,
        *(f"{conclusion.number}. {conclusion.claim} {verdict.upper()}"
          for conclusion, verdict, _ in (judge(study) if papers else ())),
        f"The report: {folder / 'report' / 'report.html'}"])


def write(folder: epath.Path, files: Mapping[str, str | bytes]) -> None:
    """Writes files, each atomically, and removes tables and plots of an earlier report."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if isinstance(content, str):
            write_whole(folder / name, content)
        else:
            (folder / name).write_bytes(content)
    for path in files_of(folder, ".csv", ".png", ".svg", ".pdf"):
        if path.name not in (*files, *OF_LAWS):
            path.unlink()


def read_study(folder: epath.Path, say: Told = print) -> Study:
    """A study's directory, or any folder of run directories, in the form that a report needs.

    Raises:
      FileNotFoundError: the directory does not exist, or no run in it has results or losses.
      ValueError: a file is invalid.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no directory {folder}: name that of a study, or one that holds run "
                                "directories.")
    plan = read_json(folder / "study.json")
    if plan is None:
        below = folder / "runs" if (folder / "runs").is_dir() else folder
        entries = [{"run": path.name} for path in sorted(below.iterdir())
                   if (path / "results").is_dir() or (path / "metrics.jsonl").exists()]
    else:
        below = folder / "runs"
        listed = plan.get("runs") if isinstance(plan, dict) else None
        if not listed or not isinstance(listed, list) or not all(
                isinstance(entry, dict) and entry.get("run") for entry in listed):
            raise ValueError(f"{folder / 'study.json'} lists no runs: create it again with t5x study.")
        entries = listed
        require_plain_runs(folder / "study.json", entries)
    runs, pending = [], []
    names = {entry["run"]: entry["stage"] for entry in entries if entry.get("stage")}
    for entry in entries:
        run = read_run(below / entry["run"], entry, names, say)
        if run.results or run.records:
            runs.append(run)
        else:
            pending.append(run.name)
    if not runs:
        raise FileNotFoundError(f"No run in {below} has results or losses: train some, or name another folder.")
    if plan is None:
        runs = list(_labelled(runs))
    return Study(folder.name, runs, pending, (plan or {}).get("comparison"), read_contamination(folder))


def read_run(path: epath.Path, entry: Mapping[str, Any], names: Mapping[str, str], say: Told) -> Run:
    """Reads a run directory. `entry` is its entry in study.json, of which only the name is required; `names` maps the
    stages of the runs to the study's names for them.
    """
    results = read_results(path, path.name)
    record: Mapping[str, Any] = {}
    step, records, provenance = None, read_records(str(path)), None
    try:
        provenance = read_provenance(path)
    except Damaged as error:
        say(f"WARNING: {error}")
    if results or records:
        try:
            step, record = newest_record(str(path))
        except (FileNotFoundError, ValueError) as error:
            if results or not (provenance or {}).get("ledger"):
                say(f"WARNING: {path.name}: {error}")
    settings = resolve(record.get("settings", {}))
    ledger = record.get("ledger") or (provenance or {}).get("ledger") or {}
    label, seed = name_and_seed(path.name)
    told = [result.result["checkpoint"].get("arm") for result in results.values()]
    letters = arm(ledger) if ledger else str((told or [entry.get("arm")])[0])
    stage = ledger.get("stage") or entry.get("kind") or entry.get("stage") or (
        "pretraining" if letters.endswith(("NL", "CODE")) else "tuning")
    for known in (entry.get("seed"), seed, _number(settings.get("train.seed")), (provenance or {}).get("seed")):
        if known is not None:
            seed = int(known)
            break
    if entry.get("arm") and label == path.name:  # a study whose run names do not contain the arm
        label = str(entry["arm"])
    return Run(path.name, label, letters, _mix(stage, letters, entry.get("mix"), settings), seed, stage,
               entry.get("from") or _parent(ledger), settings, ledger,
               _parameters(record) or (provenance or {}).get("parameters"), step, results, provenance,
               records, list(_stages(ledger, path.name, names)))


def _stages(ledger: Mapping[str, Any], own: str, names: Mapping[str, str]) -> Iterator[Stage]:
    for stage in stages_of(ledger) if ledger else ():
        run, rows = own if stage is ledger else epath.Path(stage.get("model_dir", "")).name, sum(stage["rows"].values())
        yield Stage(names.get(run, stage["stage"]), run, sum(stage["tokens"].values()),
                    rows_of_code(stage) / rows if rows else None)


def _labelled(runs: list[Run]) -> Iterator[Run]:
    """Runs of a folder without study.json: runs that differ only in their seeds form one arm, named by the ledger if
    only one such group has that name, else by its first run.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        same = "" if run.label != run.name else json.dumps(of_an_arm(run.settings), sort_keys=True)
        groups.setdefault((run.arm if same else run.label, same), []).append(run)
    for (name, same), of_group in groups.items():
        seeds = [run.seed for run in of_group]
        alone = sum(other == name for other, _ in groups) == 1
        for run in of_group:
            one_of_several = len(set(seeds)) == len(seeds) and None not in seeds or len(of_group) == 1
            label = (name if alone or not same else of_group[0].name) if one_of_several else run.name
            yield dataclasses.replace(run, label=label)


def _mix(stage: str, letters: str, told: Any, settings: Mapping[str, str]) -> str | None:
    """The name of a mix: the study's, or "uniform" for a constant one; else derived from the settings."""
    if stage != "tuning" or not letters.endswith("C"):
        return None
    if told:
        return "uniform" if told == "constant" else str(told)
    schedule = schedule_of(settings)
    if schedule is None:
        return None
    first, last = schedule.shares[0], schedule.ends[-1]
    if len(set(schedule.shares)) == 1 and first == last:
        return "uniform"
    return "decrease" if first > last else "increase" if first < last else "changing"


def schedule_of(settings: Mapping[str, str]) -> Schedule | None:
    """The share of code that a run's settings ask for; None where they do not say."""
    try:
        rate, mix = (ast.literal_eval(settings[f"mixture.{name}"]) for name in ("code_rate", "mix_phases"))
        batch_size, steps = (int(settings[f"train.{name}"]) for name in ("batch_size", "train_steps"))
        return constant(rate) if mix is None else phases(mix, steps * batch_size, batch_size)
    except (KeyError, ValueError, SyntaxError, TypeError):
        return None


def mix_figure(study: Study) -> Figure | None:
    """The share of code asked and realised for the first seed of each arm that recorded it."""
    found = [shares for runs in study.arms.values() if (shares := _shares(runs[0]))]
    if not found:
        return None
    return plots.shares("mix", "The share of code over training, of the first seed of each arm: of tokens in "
                        "pre-training, of examples in tuning. Dots are single steps, which hold whole rows or "
                        "examples; the bars show everything drawn in a phase.", found)


def _shares(run: Run) -> plots.Shares | None:
    schedule = schedule_of(run.settings)
    unit = "example" if run.stage == "tuning" else "token"
    recorded = [(line["step"], line[f"{unit}_fraction/code"]) for line in run.records
                if line["split"] == "train" and line.get(f"{unit}_fraction/code") is not None]
    if schedule is None or not recorded or not run.ledger:
        return None
    batch_size = int(run.settings["train.batch_size"])
    last = run.step or recorded[-1][0]
    starts = [phase["start"] / batch_size for phase in run.ledger["phases"]]
    realised = []
    for first, end, phase in zip(starts, [*starts[1:], math.inf], run.ledger["phases"], strict=True):
        if total := sum(phase["rows"].values()):
            code = sum(rows for name, rows in phase["rows"].items() if name.startswith("code."))
            realised.append((first, min(end, last), code / total))
    steps = sorted({0.0, float(last), *(last * k / 64 for k in range(65)),
                    *(at for start in starts if 0 < start <= last for at in (start - 1e-6, start))})
    asked = [float(schedule.share_at(int(step * batch_size))) for step in steps]
    return plots.Shares(run.label, f"{unit}s", (steps, asked), ([step for step, _ in recorded],
                                                           [share for _, share in recorded]), realised)


def _parent(ledger: Mapping[str, Any]) -> str | None:
    """The name of the run that this one started from."""
    before = ledger.get("before") or [{}]
    return epath.Path(before[-1]["model_dir"]).name if "model_dir" in before[-1] else None


def _parameters(record: Mapping[str, Any]) -> int | None:
    arrays = [shape for name, (shape, *_) in record.get("checksums", {}).items() if name.startswith("params/")]
    return sum(math.prod(shape) for shape in arrays) if arrays else None


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None
