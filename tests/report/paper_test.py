"""The paper's figures: each accuracy is k / n of the n beside it, and intervals are those of statsmodels."""

import pytest
from statsmodels.stats.proportion import proportion_confint

from codellm_jax.report.paper import QUESTIONS, TABLE_3, TABLE_6, TABLES, paper_interval

FIGURES = [(table.number, row, figure) for table in TABLES for row in table.rows for figure in row.figures]


def test_every_table_is_whole():
    assert [table.number for table in TABLES] == [2, 3, 4, 6, 7, 8]
    assert len(FIGURES) == 6 * 3 + 6 * 5 + 4 * 2 + 6 * 3 + 5 * 2 * 2
    assert all(len(row.figures) == len(table.columns) for table in TABLES for row in table.rows)


@pytest.mark.parametrize("task", ["logic", "jecqa", "scienceqa", "ekar", "cosqa", "c3", "ocnli"])
def test_accuracies_are_shares_of_their_n(task):
    """To the paper's two decimals, cut or rounded; but for E-KAR's 27.20, which no k / 335 is."""
    n = QUESTIONS[task]
    odd = {figure for _, row, figure in FIGURES if row.task.removesuffix("_cot") == task and abs(
        100 * round(figure * n / 100) / n - figure) > 0.0101}
    assert odd == ({27.2} if task == "ekar" else set())


def test_the_column_of_one_table_is_a_column_of_the_other():
    """The paper's CC of Table 3 is the one tuned on less and less code, of Table 6."""
    assert [row.figures[4] for row in TABLE_3.rows] == [row.figures[2] for row in TABLE_6.rows]


def test_intervals_are_wilsons_of_the_papers_n():
    for _, row, figure in FIGURES:
        found = paper_interval(row.task, row.metric, figure)
        if row.metric != "accuracy" or row.task == "cmnli":
            assert found is None
            continue
        n = QUESTIONS[row.task]
        low, high = proportion_confint(round(figure / 100 * n), n, method="wilson")
        assert found == pytest.approx((100 * low, 100 * high))
        assert found.low < figure < found.high
    assert paper_interval("logic", "accuracy", 36.36) == pytest.approx((19.7, 57.0), abs=0.1)  # 8 of 22
