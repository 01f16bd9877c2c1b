"""Where scores come from: losses and mixes of the runs, questions and how they were asked, contamination, provenance.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from codellm_jax.report import plots
from codellm_jax.report.pages import Block, Figure, Heading, Items, Table, Text
from codellm_jax.report.runs import Run, Stage
from codellm_jax.report.sections import Rows, Section
from codellm_jax.report.study import Study, pretraining_tokens
from codellm_jax.results.answers import METRICS, is_measured, metrics_of, ties_of

STAGES = {"pretraining": "pre-training", "tuning": "tuning"}
POOLS = ("text", "code")
IDS_SHOWN = 20
SHORT = 12  # characters of a hash
RESULT_COLUMNS = ("run", "task", "sample", "n", "ties", "measured", "data", "questions", "template", "few_shot",
                  "scoring", "samples", "sampling", "step", "checkpoint_digest", "config_hash", "training_config_hash",
                  "code_version", "code_commit", "code_dirty", "versions")
HASH = 40


def score_plots(study: Study) -> Section:
    """Scores by arm."""
    panels = []
    for task in study.tasks:
        for metric in study.metrics(task):
            found = [(label, study.estimate(label, task, metric)) for label in study.arms]
            points = [plots.Point(label, 100 * one.value, one.interval and plots.Interval(
                *(100 * bound for bound in one.interval))) for label, one in found if one]
            if points:
                panels.append(plots.Panel(_title(study, task, metric), points, *_levels(study, task)))
    blocks: list[Block] = [Heading(2, "Scores by arm")]
    if not panels:
        return Section([*blocks, Text("Nothing was measured: most questions of all tasks are ties.")], [])
    blocks += plots.scores(
        "scores", "Scores by arm, in per cent, with 95% intervals. The dotted line is chance, the other the score "
        "of always giving the commonest answer: a score whose interval reaches a line cannot be told from it.", panels)
    return Section(blocks, [])


def losses(study: Study) -> Section:
    """The held-out loss of every run, as curves and at the end."""
    blocks: list[Block] = [Heading(2, "Held-out loss")]
    numbers: list[Sequence[Any]] = []
    curves: dict[str, dict[str, list[plots.Curve]]] = {}
    for run in study.runs:
        counted = [(line["step"], line["tokens"]) for line in run.records if line["split"] == "train"
                   and line.get("tokens") is not None]
        steps, tokens = zip((0, 0), *counted, strict=True)
        held_out = [line for line in run.records if line["split"] == "eval" and line["step"] <= max(steps)]
        for pool in POOLS:
            lines = [line for line in held_out if line.get(f"loss/{pool}") is not None]
            at = np.interp([line["step"] for line in lines], steps, tokens).tolist()
            values = [line[f"loss/{pool}"] for line in lines]
            numbers += [(run.name, run.label, run.seed, run.stage, pool, line["step"], round(count), value)
                        for line, count, value in zip(lines, at, values, strict=True)]
            if lines:
                curves.setdefault(run.stage, {}).setdefault(pool, []).append(
                    plots.Curve(run.label, run.seed, at, values))
    for stage, panels in curves.items():
        blocks.append(plots.losses(
            f"loss_{stage}", f"Loss on held-out text and code in {STAGES[stage]}, in nats per token, against the "
            "tokens that the loss has counted: the mean over an arm's seeds, with each seed pale. Where a frame cuts "
            "curves off, the cut lies in the first tenth of training.", panels, list(study.arms)))
    rows = []
    for label, runs in study.arms.items():
        held_out, training = ([line for run in runs if (lines := [
            line for line in run.records if line["split"] == split])
            for line in lines[-1:]] for split in ("eval", "train"))
        cells = [*(_end(held_out, pool) for pool in POOLS),
                 _mean_and_spread([line["loss"] for line in training if line.get("loss") is not None])]
        if set(cells) != {"-"}:
            rows.append([label, STAGES[runs[0].stage], f"{len(runs)}", *cells])
    warned: dict[str, list[str]] = {}
    for run in study.runs:
        for note in (run.provenance or {}).get("notes", ()):
            warned.setdefault(note, []).append(f"`{run.name}`")
    notes = [Items([f"{', '.join(names)}: {note}" for note, names in warned.items()])] if warned else []
    if not rows:
        return Section([*blocks, Text("No run recorded a loss."), *notes], [])
    shown = [place for place in range(6) if any(row[place] != "-" for row in rows)]
    blocks.append(Table("The losses at the end of each arm's runs, in nats per token: the mean over seeds and, "
                        "with ±, the standard deviation between them. Perplexity is computed from the mean.",
                        [("Arm", "Stage", "Seeds", "Held-out text", "Held-out code", "Training")[n] for n in shown],
                        [[row[n] for n in shown] for row in rows], words=(1,)))
    columns = ("run", "arm", "seed", "stage", "pool", "step", "tokens", "loss")
    return Section([*blocks, *notes], [("losses", columns, numbers)])


def mixes(study: Study, figure: Figure | None) -> Section:
    """The stages of each arm, and the shares asked and realised."""
    blocks: list[Block] = [Heading(2, "Mix of text and code")]
    rows = [[label, runs[0].arm, "\n".join(map(_stage, runs[0].stages))]
            for label, runs in study.arms.items() if runs[0].stages]
    if rows:
        blocks.append(Table(
            "The stages of each arm, from the ledger of its first seed: the tokens that the loss counted "
            "and the share of code among rows (among examples in tuning). For a trunk, only the part before the branch "
            "counts.",
            ("Arm", "By its ledger", "Stages"), rows, words=(1, 2)))
    return Section([*blocks, figure or Text("No run recorded its mix.")], [])


def _stage(stage: Stage) -> str:
    return stage.name if stage.code is None else f"{stage.name}: {stage.tokens:,} tokens, {100 * stage.code:.1f}% code"


def contamination(study: Study) -> Section:
    """Which questions occur in training data."""
    blocks: list[Block] = [Heading(2, "Contamination")]
    if study.contamination is None:
        return Section([*blocks, Text("Contamination was not measured: there is no `contamination.json`. Whether "
                                      "questions occur in the training data is unknown.")], [])
    blocks.append(Text(f"A question overlaps with a training source where {study.contamination.n} of its words in a "
                       f"row (in Chinese {study.contamination.characters} characters), or all of a shorter part, "
                       "occur in the source. Every score is also given without these questions. Questions that "
                       "are too short, or whose words many questions share, are not tested."))
    rows, marked = [], []
    for task in study.tasks:
        result = study.result(task)
        found = study.contamination.of(result.result)
        if found is None:
            rows.append([task, f"{len(result.lines):,}", "not measured", "-", "-"])
            continue
        by_source = {source: ids for source, ids in study.overlaps(task).items() if ids}
        gone = study.overlapping(task)
        rows.append([task, f"{len(result.lines):,}", f"{len(gone):,}",
                     "-" if found.not_measurable is None else f"{found.not_measurable:,}",
                     ", ".join(f"{source} {len(ids):,}" for source, ids in by_source.items()) or "none"])
        if gone:
            shown = [id_ for id_ in result.ids if id_ in gone][:IDS_SHOWN]
            rest = len(gone) - len(shown)
            marked.append(f"{task}: {', '.join(f'`{id_}`' for id_ in shown)}"
                          + (f" and {rest:,} more, in `questions.csv`" if rest else ""))
    blocks.append(Table("How many questions of each task occur in training data, and in which sources.",
                        ("Task", "Questions", "Overlapping", "Not tested", "Of them in"), rows, words=(4,)))
    if marked:
        blocks += [Text("The questions that overlap:"), Items(marked)]
    return Section(blocks, [])


def asked(study: Study) -> Section:
    """The questions and how they were asked and scored. All runs agree in these, or no report is written."""
    rows, notes = [], []
    for task in study.tasks:
        result = study.result(task).result
        settings, skipped = result["settings"], sum(result.get("skipped", {}).values())
        how = settings.get("scoring") or f"written, {settings.get('samples')} answer(s), {_sampling(settings)}"
        template = settings.get("template")
        rows.append([task + " (sample)" * study.is_sample(task), f"{result['n']:,}", f"{skipped:,}",
                     f"`{str(settings.get('data', '-'))[:SHORT]}`", f"`{str(settings.get('questions', '-'))[:SHORT]}`",
                     template if isinstance(template, str) else json.dumps(template, ensure_ascii=False),
                     f"{settings.get('few_shot', '-')}", how, ", ".join(METRICS[name] for name in study.metrics(task))])
        asked_of = {run.name: run.results[task] for run in study.runs if task in run.results}
        for what, counts in (
            ("questions where several candidates tie; k tied candidates count 1 / k",
             {name: ties_of(one.lines) for name, one in asked_of.items()}),
            ("prompts too long for the model, which were cut",
             {name: one.result.get("prompts_cut") or 0 for name, one in asked_of.items()}),
            ("continuations too long for the model, which were cut",
             {name: one.result.get("continuations_cut") or 0 for name, one in asked_of.items()})):
            if any(counts.values()):
                told = f"{max(counts.values()):,} in each run" if len(set(counts.values())) == 1 else ", ".join(
                    f"{count:,} in `{name}`" for name, count in counts.items() if count)
                notes.append(f"{task}: {what}: {told}.")
        if tied := [f"`{name}`" for name, one in asked_of.items() if not one.measured]:
            notes.append(f"{task} is not measured for {', '.join(tied)}: most questions are ties.")
    blocks: list[Block] = [Heading(2, "What was asked"), Table(
        "The questions of each task and how they were asked, which is the same for all runs. Hashes are those of the "
        "files and of the scored texts.",
        ("Task", "n", "Skipped", "Data", "Questions", "Template", "Few-shot", "Scoring", "Metrics"), rows,
        words=(3, 4, 5, 7, 8))]
    return Section([*blocks, *([Items(notes)] if notes else [])], [])


def provenance(study: Study) -> Section:
    """The origin of every result."""
    rows: list[list[str]] = []
    numbers: Rows = []
    notes = list(_notes(study))
    for run in study.runs:
        known: Mapping[str, Any] = run.provenance or {}
        code = known.get("code") or {}
        version = " ".join(filter(None, [
            str(code.get("version") or ""), str(code.get("commit") or "")[:SHORT],
            "with uncommitted changes" if code.get("dirty") else ""])) or "unknown"
        digests = {str(result.result["checkpoint"].get("digest", "")) for result in run.results.values()}
        order = run.ledger.get("order_fingerprint") or known.get("order") or ""
        steps = sorted({result.result["checkpoint"]["step"] for result in run.results.values()})
        tokens = {source: count for source, count in run.ledger.get("tokens", {}).items() if count}
        config = str(known.get("config_hash") or "")
        rows.append([
            f"`{run.name}`", run.arm, "-" if run.seed is None else f"{run.seed}",
            ", ".join(f"{step:,}" for step in steps), "-" if run.parameters is None else f"{run.parameters:,}",
            ", ".join(f"{source} {count:,}" for source, count in tokens.items()) or "unknown",
            f"`{config[:SHORT]}`" if config else "unknown", version, f"`{order[:SHORT]}`" if order else "unknown",
            ", ".join(f"`{digest[:SHORT]}`" for digest in sorted(digests) if digest) or "unknown"])
        numbers.append([run.name, run.label, run.arm, run.seed, run.stage, run.parent, " ".join(map(str, steps)),
                        run.parameters, pretraining_tokens(run), json.dumps(run.ledger.get("tokens", {})),
                        json.dumps([stage._asdict() for stage in run.stages]), config,
                        code.get("version"), code.get("commit"), code.get("dirty"), order,
                        run.ledger.get("vocabulary_hash"), " ".join(sorted(digests)),
                        json.dumps(known.get("data") or {}), json.dumps(known.get("versions") or {})])
    data = sorted({f"{source}: `{str(value)[:HASH]}`" for run in study.runs
                   for source, value in ((run.provenance or {}).get("data") or {}).items()})
    data += sorted({f"{source} was prepared with the steps `{one['steps_sha256'][:HASH]}` of the inputs "
                    f"`{one['inputs_sha256'][:HASH]}`: {_inputs(one)}" for run in study.runs
                    for source, found in ((run.provenance or {}).get("prepared") or {}).items() for one in found})
    versions = sorted({", ".join(f"{name} {value}" for name, value in sorted(found.items())) for run in study.runs
                       if (found := (run.provenance or {}).get("versions"))})
    blocks: list[Block] = [Heading(2, "Provenance"), Table(
        "The origin of each run. Tokens are those that the loss counted in the run's own stage, from the ledger of its "
        "checkpoint; hashes identify the configuration, the order of the data and the checkpoint.",
        ("Run", "Arm", "Seed", "Step", "Parameters", "Tokens", "Configuration", "Code", "Order", "Checkpoint"), rows,
        words=(1, 5, 6, 7, 8, 9))]
    if data:
        blocks += [Text("Fingerprints of the data:"), Items(data)]
    blocks += [Text(f"Package versions: {'; or '.join(versions)}.")] if versions else []
    blocks.append(Text("The configuration, checkpoint, questions, code and package versions of each result are in "
                       "`results.csv`, those of each run in `provenance.csv`."))
    return Section([*blocks, *([Items(notes)] if notes else [])], [("provenance", (
        "run", "arm", "arm_by_ledger", "seed", "stage", "from", "step", "parameters", "pretraining_tokens", "tokens",
        "stages", "config_hash", "code_version", "code_commit", "code_dirty", "order", "vocabulary",
        "checkpoint_digest", "data", "versions"), numbers), ("results", RESULT_COLUMNS, [
            _of_result(run, task) for run in study.runs for task in run.results])])


def _inputs(prepared: Mapping[str, Any]) -> str:
    """The paths that a source was prepared from."""
    return "; ".join(f"{source} `{', '.join(paths)}`" for source, paths in prepared["inputs"].items())


def _of_result(run: Run, task: str) -> list[Any]:
    """A result as a row: its settings, checkpoint, configuration and code."""
    result = run.results[task].result
    settings, known = result["settings"], result.get("provenance") or {}
    code = known.get("code") or {}
    template = settings.get("template")
    lines = run.results[task].lines
    return [run.name, task, result["sample"], result["n"], ties_of(lines), is_measured(lines), settings.get("data"),
            settings.get("questions"), template if isinstance(template, str) else json.dumps(template),
            settings.get("few_shot"),
            settings.get("scoring"), settings.get("samples"), json.dumps(settings.get("sampling")),
            result["checkpoint"].get("step"), result["checkpoint"].get("digest"), known.get("config_hash"),
            known.get("training_config_hash"), code.get("version"), code.get("commit"), code.get("dirty"),
            json.dumps(known.get("versions") or {})]


def _notes(study: Study) -> Sequence[str]:
    """Facts about the runs that a reader needs and no table shows."""
    notes = []
    without = [run.name for run in study.runs if run.provenance is None]
    if without:
        notes.append("There is no provenance.json for " + ", ".join(f"`{name}`" for name in without)
                     + ": their configuration, code and package versions are unknown.")
    for run in study.runs:
        steps = {result.result["checkpoint"]["step"] for result in run.results.values()}
        if run.step is not None and steps != {run.step}:
            notes.append(f"`{run.name}` was evaluated after step {', '.join(map(str, sorted(steps)))}; its newest "
                         f"checkpoint is at step {run.step}.")
    unborne = [f"`{run.name}`" for run in study.runs for result in run.results.values()
               if "bleu" in result.result.get("scores", {}) and "bleu" not in metrics_of(result.lines)]
    if unborne:
        notes.append(f"The lines of {', '.join(unborne)} lack the counts that BLEU is computed from, so it is left "
                     "out: an earlier version wrote them; repeat the evaluation to add the counts.")
    for what in ("vocabulary", "length", "dtype"):
        values: dict[str, list[str]] = {}
        for run in study.runs:
            for result in run.results.values():
                values.setdefault(str(result.result["settings"].get(what))[:SHORT], []).append(run.name)
        if len(values) > 1:
            notes.append(f"Models differ in their {what}: " + "; ".join(
                f"{value} ({', '.join(dict.fromkeys(names))})" for value, names in values.items()) + ".")
    of_training = [run.provenance for run in study.runs]
    of_results = [result.result.get("provenance") for run in study.runs for result in run.results.values()]
    for what, known in (("trained", of_training), ("evaluated", of_results)):
        codes = [one.get("code") or {} for one in known if one]
        commits = sorted({str(code["commit"])[:SHORT] for code in codes if code.get("commit")})
        if len(commits) > 1:
            notes.append(f"Not all were {what} with the same version of the code: {', '.join(commits)}.")
        if any(code.get("dirty") for code in codes):
            notes.append(f"Some were {what} with uncommitted changes of the code.")
    for label, runs in study.arms.items():
        for task in study.tasks:
            asked = [run.name for run in runs if task in run.results]
            if asked and len(asked) < len(runs):
                notes.append(f"{task}: of {label} only {', '.join(f'`{name}`' for name in asked)} was asked.")
    return notes


def _title(study: Study, task: str, metric: str) -> str:
    name = task if metric == "accuracy" else f"{task}, {METRICS[metric]}"
    return f"{name}{' (sample)' * study.is_sample(task)}, n {len(study.result(task).lines):,}"


def _levels(study: Study, task: str) -> tuple[float | None, float | None]:
    levels = study.levels(task)
    return (100 * levels.chance, 100 * levels.majority) if levels else (None, None)


def _sampling(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in (settings.get("sampling") or {}).items())


def _end(lines: Sequence[Mapping[str, Any]], pool: str) -> str:
    """The held-out loss of a pool at the end of an arm's runs, its perplexity, and bits per byte where known."""
    losses, bits = ([line[f"{name}/{pool}"] for line in lines if line.get(f"{name}/{pool}") is not None]
                    for name in ("loss", "bits_per_byte"))
    if not losses:
        return "-"
    return f"{_mean_and_spread(losses)}\nperplexity {np.exp(np.mean(losses)):.4g}" + (
        f"\n{np.mean(bits):.4f} bits per byte" if len(bits) == len(losses) else "")


def _mean_and_spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{np.mean(values):.4f}" + (f"\n± {np.std(values, ddof=1):.4f}" if len(values) > 1 else "")
