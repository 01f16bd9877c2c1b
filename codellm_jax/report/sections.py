"""The tables of a report: the paper's with our results, differences between arms, and conclusions. In per cent."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from codellm_jax.report.conclusions import LEVEL, RULES, judge
from codellm_jax.report.pages import Block, Heading, Items, Notice, Table, Text
from codellm_jax.report.paper import QUESTIONS, TABLE_3, TABLES, Column, PaperTable, Row, paper_interval
from codellm_jax.report.study import MIXES, PAPER_ARMS, Study
from codellm_jax.results.answers import METRICS, TESTS, Compared, Estimate
from codellm_jax.results.statistics import Interval, holm

Rows = list[Sequence[Any]]


class Section(NamedTuple):
    """Blocks of the page, and tables for further computation: (name, columns, rows), each a CSV file."""

    blocks: list[Block]
    tables: list[tuple[str, Sequence[str], Rows]]


PAPER_COLUMNS = ("row", "task", "metric", "column", "arm", "seeds", "n", "value", "low", "high", "chance", "majority",
                 "overlapping", "clean_n", "clean_value", "clean_low", "clean_high", "clean_chance", "clean_majority",
                 "paper_n", "paper_value", "paper_low", "paper_high")
SCORE_COLUMNS = ("arm", "task", "sample", "metric", "seeds", "n", "value", "low", "high", "chance", "majority",
                 "overlapping", "clean_n", "clean_value", "clean_low", "clean_high", "clean_chance", "clean_majority")
DIFFERENCE_COLUMNS = ("first", "second", "task", "metric", "first_seeds", "second_seeds", "n", "first_value",
                      "second_value", "difference", "low", "high", "test", "p", "p_holm", "detectable", "clean_n",
                      "clean_difference", "clean_low", "clean_high", "clean_p")


NOT_MEASURED = "not measured: ties"


def opening(study: Study) -> list[Block]:
    """The opening of the report: warnings first, then its contents."""
    blocks: list[Block] = []
    if warning := study.warning():
        blocks.append(Notice(f"{warning} " + (
            "The scores below only show that the software works." if study.tasks else
            "Losses are those of such models, and say nothing about others.")))
    counts = [f"{label} ({len(runs)} seed{'s' * (len(runs) > 1)})" for label, runs in study.arms.items()]
    named = any(label.partition("-")[0] in PAPER_ARMS for label in study.arms)
    names = (" N stands for natural language alone, C for data with code; the first letter is the pre-training, the "
             "second the tuning, and NL and CODE are pre-trained only.") * named
    blocks.append(Text(f"Arms: {', '.join(counts)}.{names} The table of mixes lists the stages of each."))
    matched = {"compute-matched": "compute-matched: all arms are trained on equally many tokens, and code takes the "
                                  "place of text",
               "data-matched": "data-matched: all arms see the same text, and code comes on top of it, so arms "
                               "with code are trained on more tokens"}
    blocks.append(Text(f"The comparison is {matched.get(study.comparison or '', study.comparison)}."
                       if study.comparison else "The study does not say whether arms are matched in compute or in "
                       "data: compare the tokens of each in the table of provenance."))
    if unfinished := [f"`{run.name}`" for run in study.runs if (run.provenance or {}).get("finished") is False]:
        blocks.append(Text(f"Not trained to the end, and excluded from effects and sweeps: {', '.join(unfinished)}."))
    if study.pending:
        blocks.append(Text(f"Planned and without results yet: {', '.join(f'`{name}`' for name in study.pending)}."))
    return blocks


def conclusions(study: Study) -> Section:
    """The paper's conclusions and their verdicts."""
    blocks: list[Block] = [Heading(2, "The paper's conclusions"), Text(
        "Verdicts follow the rules below, which were fixed before any data. In points of 100, with intervals of "
        f"{100 * LEVEL:g}%, which is 95% corrected for all contrasts; p tests a difference of 0, uncorrected and by "
        "Holm's method.")]
    table: Rows = []
    for conclusion, verdict, contrasts in judge(study):
        blocks += [Heading(3, f"{conclusion.number}. {conclusion.claim} {verdict.capitalize()}."), Table(
            "The differences behind this conclusion, with their verdicts.",
            ("Contrast", "Difference", "Interval", "p", "p, Holm", "Verdict", "Why", "Tasks"),
            [[one.planned.name, _signed(one.estimate), _bounds(one.interval, "+"), _p(one.p_value), _p(one.corrected),
              one.verdict, one.why, ", ".join(task for task, _ in one.planned.measures)] for one in contrasts],
            words=(5, 6, 7))]
        table += [[conclusion.number, conclusion.claim, verdict, one.planned.name,
                   " ".join(task for task, _ in one.planned.measures), _percent(one.estimate), *_percents(one.interval),
                   one.p_value, one.corrected, one.verdict, one.why] for one in contrasts]
    return Section([*blocks, Heading(3, "The rules"), Items(RULES)], [("conclusions", (
        "number", "claim", "verdict", "contrast", "tasks", "difference", "low", "high", "p", "p_holm",
        "contrast_verdict", "why"), table)])


def paper_tables(study: Study) -> Section:
    """The paper's tables in the paper's layout."""
    blocks: list[Block] = [Heading(2, "The paper's tables"), Text(
        "In per cent, with 95% intervals. A cell shows our score above the paper's, with the interval that "
        "follows from the paper's n, since the paper gives none; where a figure is not an accuracy, or its n is "
        "unknown, there is no interval. Chance is a random choice, majority is always giving the commonest right "
        "answer.")]
    tables: list[tuple[str, Sequence[str], Rows]] = []
    for table in TABLES:
        made, rows = _paper_table(study, table)
        if all(row[5] is None for row in rows):
            continue  # it has no score of ours
        blocks += [Heading(3, f"Table {table.number}: {table.title}"), made]
        tables.append((f"table_{table.number}", PAPER_COLUMNS, rows))
    return Section(blocks, tables)


class _Cell(NamedTuple):
    """The label of our arm, None without one; its task; the paper's figure, None without one."""

    label: str | None
    task: str
    figure: float | None


def _paper_table(study: Study, table: PaperTable) -> tuple[Table, Rows]:
    columns = list(table.columns)
    if table is TABLE_3 and study.find("CN"):
        columns.append(Column("CN, not in the paper", "CN"))
    rows: list[list[str]] = []
    numbers: Rows = []
    for paper_row in table.rows:
        metrics = [paper_row]
        if paper_row.metric == "bleu" and paper_row.task in study.tasks and "pass@1" in study.metrics(paper_row.task):
            metrics.append(paper_row._replace(name="MBPP (pass@1)", metric="pass@1", figures=()))
        for row in metrics:
            cells = [_Cell(study.find(row.arm or column.arm or "", column.mix) if column.of_ours else None,
                           row.task + column.suffix, figure)
                     for column, figure in itertools.zip_longest(columns, row.figures)]
            overlap = any(cell.task in study.tasks and study.overlapping(cell.task) for cell in cells)
            rows += [_row_of_paper(study, row, cells, clean) for clean in ((False, True) if overlap else (False,))]
            numbers += [_numbers_of_paper(study, row, column.name, cell)
                        for column, cell in zip(columns, cells, strict=True) if cell.label or cell.figure is not None]
    labels = [study.find(column.arm, column.mix) if column.arm and column.of_ours else None for column in columns]
    names = [column.name + (f"\nours: {label}\n{_seeds(study, label)}" if label else
                            "\nours: none" * bool(column.of_ours and column.arm))
             for column, label in zip(columns, labels, strict=True)]
    return Table(f"Table {table.number} of the paper, {table.title}: our score above the paper's.",
                 ("Task", "n", "Chance", "Majority", *names), rows), numbers


def _row_of_paper(study: Study, row: Row, cells: Sequence[_Cell], clean: bool) -> list[str]:
    """A row; n, chance and majority are those of its first cell with our score, and n is repeated where another's
    differs.
    """
    texts: list[str] = []
    n, levels, sample = None, None, False
    for label, task, figure in cells:
        found = study.estimate(label, task, row.metric, clean) if label and task in study.tasks else None
        if found and n is None:
            n, levels, sample = found.n, study.levels(task, clean), study.is_sample(task)
        text = _score(found) + (f", n {found.n:,}" if found and found.n != n else "")
        if label and task in study.tasks and study.unmeasured(label, task):
            text = NOT_MEASURED
        if figure is not None and not clean:
            text += f"\npaper {figure:.2f}{_interval_of_paper(row, figure)}"
        texts.append(text)
    paper_n = f"\npaper {QUESTIONS[row.task]:,}" if row.task in QUESTIONS and row.figures and not clean else ""
    name = row.name + "\nsample questions" * sample
    if row.arm and (label := cells[0].label):
        name += f"\nours: {label}, {_seeds(study, label)}"
    if clean:
        gone = sorted({len(study.overlapping(cell.task)) for cell in cells if cell.task in study.tasks})
        name = f"… without {' or '.join(map(str, gone))} overlapping"
    return [name, f"{'-' if n is None else f'{n:,}'}{paper_n}", *_levels(levels), *texts]


def _interval_of_paper(row: Row, figure: float) -> str:
    found = paper_interval(row.task, row.metric, figure)
    return f" [{found.low:.1f}, {found.high:.1f}]" if found else ""


def _numbers_of_paper(study: Study, row: Row, column: str, cell: _Cell) -> list[Any]:
    ours = _numbers(study, cell.label, cell.task, row.metric) if cell.label else [None] * 13
    interval = None if cell.figure is None else paper_interval(cell.task, row.metric, cell.figure)
    return [row.name, cell.task, row.metric, column, cell.label, *ours,
            QUESTIONS.get(cell.task) if cell.figure is not None else None, cell.figure, *(interval or (None, None))]


def _numbers(study: Study, label: str, task: str, metric: str) -> list[Any]:
    """Seeds, n, value, bounds, chance, majority; the number overlapping; the same without them, except the seeds."""
    if task not in study.tasks:
        return [None] * 13
    both: list[Any] = []
    for clean in (False, True):
        found = study.estimate(label, task, metric, clean)
        levels = study.levels(task, clean)
        if not clean:
            both.append(found and found.seeds)
        both += [found and found.n, _percent(found.value) if found else None, *_percents(found and found.interval),
                 *((_percent(levels.chance), _percent(levels.majority)) if levels and found else (None, None))]
        if not clean:
            both.append(len(study.overlapping(task)) if study.measured(task) else None)
    return both


def scores(study: Study) -> Section:
    """All scores of all arms."""
    rows: list[list[str]] = []
    numbers: Rows = []
    for label in study.arms:
        for task in study.tasks:
            for metric in study.metrics(task):
                found = study.estimate(label, task, metric)
                if study.unmeasured(label, task):
                    rows.append([label, task + " (sample)" * study.is_sample(task), METRICS[metric], "-", "-",
                                 NOT_MEASURED, *_levels(study.levels(task)), "-"])
                if not found:
                    continue
                numbers.append([label, task, study.is_sample(task), metric, *_numbers(study, label, task, metric)])
                overlapping = study.overlapping(task)
                clean = study.estimate(label, task, metric, clean=True) if overlapping else None
                rows.append([label, task + " (sample)" * study.is_sample(task), METRICS[metric], f"{found.seeds}",
                             f"{found.n:,}", _score(found), *_levels(study.levels(task)),
                             f"{_score(clean)}, n {clean.n:,}" if clean else "-" if overlapping else "the same"
                             if study.measured(task) else "not measured"])
    return Section([Heading(2, "All scores"), Table(
        "Every score in per cent, with its 95% interval: Wilson's for one seed's accuracy, a bootstrap over questions "
        "for other scores; for several seeds the mean, with an interval over seeds and questions.",
        ("Arm", "Task", "Metric", "Seeds", "n", "Score", "Chance", "Majority", "Without overlapping questions"), rows,
        words=(1, 2))], [("scores", SCORE_COLUMNS, numbers)])


def pairs(study: Study) -> list[tuple[str, str]]:
    """The arms to compare, as labels (first, second): the study's questions, and every other arm against the first of
    its stage.
    """
    planned: list[tuple[tuple[str, str | None], tuple[str, str | None]]] = [
        (("CODE", None), ("NL", None)), (("NC", None), ("NN", None)), (("CC", None), ("CN", None)),
        (("CN", None), ("NN", None)), (("CC", None), ("NC", None))]
    planned += [((arm, first), (arm, second)) for arm in ("CC", "NC")
                for first, second in ((MIXES[0], MIXES[1]), (MIXES[0], MIXES[2]), (MIXES[2], MIXES[1]))]
    found = [(study.find(*first), study.find(*second)) for first, second in planned]
    pairs = [(first, second) for first, second in found if first and second and first != second]
    compared = {label for pair in pairs for label in pair}
    firsts: dict[str, str] = {}
    for label, runs in study.arms.items():
        baseline = firsts.setdefault(runs[0].stage, label)
        if label not in compared and label != baseline:
            pairs.append((label, baseline))
    return list(dict.fromkeys(pairs))


def differences(study: Study) -> Section:
    """Every pair of arms on every task, corrected together."""
    found: list[tuple[str, str, str, str, Compared]] = []
    for first, second in pairs(study):
        for task in study.tasks:
            for metric in study.metrics(task):
                one = study.compared(first, second, task, metric)
                if one:
                    found.append((first, second, task, metric, one))
    corrected = holm([one.p_value for *_, one in found]) if found else []
    blocks: list[Block] = [Heading(2, "Differences between arms")]
    if not found:
        return Section([*blocks, Text("No two arms were evaluated on the same task.")],
                       [("differences", DIFFERENCE_COLUMNS, [])])
    blocks.append(Text("In points of 100, over the same questions, with 95% intervals; Holm's p is "
                       f"corrected for all {len(found)} differences here. Detectable is the smallest true difference "
                       "that is found with a probability of 80%."))
    blocks.append(Items([f"{name}: {TESTS[name]}." for name in dict.fromkeys(one.test for *_, one in found)]))
    rows: dict[tuple[str, str], list[list[str]]] = {}
    numbers: Rows = []
    for (first, second, task, metric, one), p_holm in zip(found, corrected, strict=True):
        ours, theirs = (study.estimate(label, task, metric) for label in (first, second))
        assert ours and theirs
        clean = study.compared(first, second, task, metric, clean=True) if study.overlapping(task) else None
        left = ours.n - len(study.overlapping(task))
        rows.setdefault((first, second), []).append([
            task + " (sample)" * study.is_sample(task), METRICS[metric], f"{ours.n:,}", f"{100 * ours.value:.2f}",
            f"{100 * theirs.value:.2f}", _signed(one.difference), _bounds(one.interval, "+"), one.test, _p(one.p_value),
            _p(p_holm), _points(one.detectable),
            f"{_signed(clean.difference)} {_bounds(clean.interval, '+')}, n {left:,}" if clean else "-"])
        numbers.append([first, second, task, metric, ours.seeds, theirs.seeds, ours.n, _percent(ours.value),
                        _percent(theirs.value), _percent(one.difference), *_percents(one.interval), one.test,
                        one.p_value, p_holm, _percent(one.detectable), *(
                            [left, _percent(clean.difference), *_percents(clean.interval), clean.p_value] if clean
                            else [None] * 5)])
    for (first, second), of_pair in rows.items():
        blocks += [Heading(3, f"{first} - {second}"), Table(
            f"The score of {first} ({_seeds(study, first)}) minus that of {second} ({_seeds(study, second)}), in "
            "points of 100.",
            ("Task", "Metric", "n", first, second, "Difference", "95% interval", "Test", "p", "p, Holm", "Detectable",
             "Without overlapping"), of_pair, words=(1, 7))]
    return Section(blocks, [("differences", DIFFERENCE_COLUMNS, numbers)])


def questions(study: Study) -> tuple[str, Sequence[str], Rows]:
    """A row for each question and metric: its contribution to each run's score, and the sources that contain it."""
    rows: Rows = []
    for task in study.tasks:
        asked = [(run, run.results[task]) for run in study.runs if task in run.results]
        overlaps = study.overlaps(task)
        for number, id_ in enumerate(asked[0][1].ids):
            sources = " ".join(source for source, ids in overlaps.items() if id_ in ids)
            for metric in study.metrics(task):
                name = {"accuracy": "correct", "bleu": "bleu_counts"}.get(metric, metric)
                rows.extend([task, id_, metric, run.name, _plain(result.lines[number].get(name)), sources]
                            for run, result in asked)
    return "questions", ("task", "id", "metric", "run", "value", "overlapping_sources"), rows


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, bool) else " ".join(map(str, value)) if isinstance(value, list) else value


def _seeds(study: Study, label: str) -> str:
    seeds = [run.seed for run in study.arms[label]]
    known = ", ".join("unknown" if seed is None else str(seed) for seed in seeds)
    return f"seed{'s' * (len(seeds) > 1)} {known}" if len(seeds) < 6 else f"{len(seeds)} seeds"


def _score(found: Estimate | None) -> str:
    return f"{100 * found.value:.2f} {_bounds(found.interval)}".rstrip(" -") if found else "-"


def _levels(levels: Any) -> list[str]:
    return [f"{100 * levels.chance:.1f}", f"{100 * levels.majority:.1f}"] if levels else ["-", "-"]


def _bounds(interval: Interval | None, sign: str = "") -> str:
    return "-" if interval is None else f"[{100 * interval.low:{sign}.1f}, {100 * interval.high:{sign}.1f}]"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.2f}"


def _points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _p(value: float | None) -> str:
    return "-" if value is None else "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _percents(interval: Interval | None) -> tuple[float | None, float | None]:
    return (None, None) if interval is None else (100 * interval.low, 100 * interval.high)
