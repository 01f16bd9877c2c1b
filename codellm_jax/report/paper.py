"""The results of the study's paper (Ma et al., ICLR 2024, arXiv 2309.16298), typed from its tables, in per cent.

The paper gives no intervals. The intervals here are Wilson's, from its accuracy and the number of questions. The paper
states that number for CosQA and MBPP; it is inferred for Logic, JEC-QA and E-KAR from the granularity of their
accuracies (each is k / n; one E-KAR figure, 27.20, is not), and for C3, OCNLI and ScienceQA it is the size of the data
that fits (3172, which is no official count). For CMNLI and DuReader it is unknown, and BLEU and F1 are not shares of
questions: these have no interval.
"""

from collections.abc import Mapping
from typing import NamedTuple

from codellm_jax.results.statistics import Interval, wilson_interval

QUESTIONS: Mapping[str, int] = {
    "logic": 22, "jecqa": 1000, "scienceqa": 3172, "scienceqa_cot": 3172, "ekar": 335, "ekar_cot": 335, "cosqa": 604,
    "mbpp": 427, "c3": 1825, "ocnli": 2950}


class Row(NamedTuple):
    """A row of a table: its measure, and its figure in each column."""

    name: str
    task: str
    metric: str  # "accuracy", "bleu", "exact_match" or "f1"
    figures: tuple[float, ...]
    arm: str | None = None  # where rows are arms


class Column(NamedTuple):
    """A column: its heading, the arm of the study, and the mix of its tuning where the table distinguishes mixes."""

    name: str
    arm: str | None  # None where rows are arms
    mix: str | None = None
    suffix: str = ""  # of the row's task in this column
    of_ours: bool = True  # False: a model size whose arm has another column, which shows our figures


class PaperTable(NamedTuple):
    number: int
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


def _rows(*rows: tuple[str, str, tuple[float, ...]]) -> tuple[Row, ...]:
    return tuple(Row(name, task, "bleu" if task == "mbpp" else "accuracy", figures) for name, task, figures in rows)


TABLE_2 = PaperTable(2, "after pre-training", (
    Column("NL (2.6B)", "NL"), Column("NL (13B)", "NL", of_ours=False), Column("CODE (2.6B)", "CODE")), _rows(
        ("Logic", "logic", (36.36, 45.45, 40.90)),
        ("JEC-QA", "jecqa", (27.00, 27.00, 28.70)),
        ("ScienceQA", "scienceqa", (45.93, 45.18, 46.06)),
        ("E-KAR", "ekar", (32.24, 35.52, 36.12)),
        ("CosQA", "cosqa", (47.01, 46.85, 50.50)),
        ("MBPP (BLEU)", "mbpp", (0.52, 1.34, 5.06))))

TABLE_3 = PaperTable(3, "after instruction tuning", (
    Column("NN (2.6B)", "NN"), Column("NC (2.6B)", "NC"), Column("NN (13B)", "NN", of_ours=False),
    Column("NC (13B)", "NC", of_ours=False), Column("CC (2.6B)", "CC")), _rows(
        ("Logic", "logic", (36.36, 40.90, 40.90, 40.90, 40.90)),
        ("JEC-QA", "jecqa", (25.20, 26.10, 24.50, 26.40, 27.10)),
        ("ScienceQA", "scienceqa", (44.45, 43.44, 42.94, 43.41, 41.90)),
        ("E-KAR", "ekar", (30.45, 28.66, 26.27, 27.46, 27.20)),
        ("CosQA", "cosqa", (45.20, 48.18, 47.52, 51.99, 52.48)),
        ("MBPP (BLEU)", "mbpp", (0.00, 5.61, 0.00, 1.88, 24.88))))

TABLE_4 = PaperTable(4, "chain of thought, given as part of the input", (
    Column("without", None), Column("with", None, suffix="_cot")), (
        Row("NL (2.6B), ScienceQA", "scienceqa", "accuracy", (45.93, 68.76), "NL"),
        Row("CODE (2.6B), ScienceQA", "scienceqa", "accuracy", (46.06, 70.30), "CODE"),
        Row("NL (2.6B), E-KAR", "ekar", "accuracy", (32.24, 69.55), "NL"),
        Row("CODE (2.6B), E-KAR", "ekar", "accuracy", (36.12, 72.84), "CODE")))

TABLE_6 = PaperTable(6, "mixing text and code while tuning", (
    Column("uniform", "CC", "uniform"), Column("increase", "CC", "increase"), Column("decrease", "CC", "decrease")),
    _rows(
        ("Logic", "logic", (31.82, 36.36, 40.90)),
        ("JEC-QA", "jecqa", (27.30, 26.70, 27.10)),
        ("ScienceQA", "scienceqa", (43.76, 43.19, 41.90)),
        ("E-KAR", "ekar", (28.66, 28.36, 27.20)),
        ("CosQA", "cosqa", (51.65, 50.66, 52.48)),
        ("MBPP (BLEU)", "mbpp", (23.68, 23.42, 24.88))))


def _others(*figures: tuple[float, float]) -> tuple[Row, ...]:
    rows = (("C3", "c3", "accuracy"), ("OCNLI", "ocnli", "accuracy"), ("CMNLI", "cmnli", "accuracy"),
            ("DuReader EM", "dureader", "exact_match"), ("DuReader F1", "dureader", "f1"))
    return tuple(Row(*row, pair) for row, pair in zip(rows, figures, strict=True))


TABLE_7 = PaperTable(7, "the other tasks after pre-training", (
    Column("without code", "NL"), Column("with code", "CODE")), _others(
        (54.14, 54.30), (41.69, 40.50), (45.07, 43.49), (0.42, 0.14), (15.29, 8.73)))
TABLE_8 = PaperTable(8, "the other tasks after tuning", (
    Column("without code", "NN"), Column("with code", "NC")), _others(
        (55.07, 54.47), (40.78, 41.19), (44.82, 45.49), (12.07, 8.05), (34.85, 25.05)))

TABLES = (TABLE_2, TABLE_3, TABLE_4, TABLE_6, TABLE_7, TABLE_8)


def paper_interval(task: str, metric: str, figure: float) -> Interval | None:
    """The 95% interval, in per cent, of a figure of the paper; None where it is not an accuracy or n is unknown.

    The number of right answers is the whole number nearest to figure * n.
    """
    if metric != "accuracy" or task not in QUESTIONS:
        return None
    n = QUESTIONS[task]
    low, high = wilson_interval(round(figure * n / 100), n)
    return Interval(100 * low, 100 * high)
