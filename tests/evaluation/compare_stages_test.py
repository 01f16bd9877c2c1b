"""Which stages two runs differ in, told from their ledgers."""

import json

import pytest

from codellm_jax.evaluation.compare import stages

TEXT, CODE = {"text.a": 80, "code.b": 0}, {"text.a": 56, "code.b": 24}
ASKED = {"text.q": 20, "code.q": 12}


def stage(kind: str, rows: dict, model_dir: str = "", step: int = 0) -> dict:
    return {"stage": kind, "rows": rows, "tokens": {name: 10 * count for name, count in rows.items()},
            "epoch_rows": {name: 100 for name in rows}, "model_dir": model_dir, "step": step}


def half(rows: dict) -> dict:
    return {name: count // 2 for name, count in rows.items()}


@pytest.fixture
def told(tmp_path):
    def of(*lines: list[dict]) -> str:
        for name, line in zip("ab", lines, strict=True):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "provenance.json").write_text(json.dumps({"ledger": line[-1] | {"before": line[:-1]}}))
        return stages(str(tmp_path / "a"), str(tmp_path / "b"))

    return of


def test_the_stages_of_both_are_told(told):
    lines = told([stage("pretraining", TEXT, "nl", 10), stage("tuning", ASKED)], [stage("imported", {}, "hf")])
    assert lines.splitlines()[:2] == ["A: pretraining, 800 tokens, 0.0% code; tuning, 320 tokens, 37.5% code",
                                      "B: imported, training data unknown"]


@pytest.mark.parametrize(("first", "second", "differing"), [
    # The same, and one stage alone.
    ([stage("pretraining", TEXT)], [stage("pretraining", TEXT)], 0),
    ([stage("pretraining", TEXT)], [stage("pretraining", CODE)], 1),
    ([stage("pretraining", TEXT, "nl"), stage("tuning", ASKED)],
     [stage("pretraining", CODE, "code"), stage("tuning", ASKED)], 1),
    ([stage("pretraining", TEXT, "nl"), stage("tuning", ASKED)],
     [stage("pretraining", TEXT, "nl"), stage("tuning", {"text.q": 32, "code.q": 0})], 1),
    ([stage("pretraining", TEXT, "nl")], [stage("pretraining", TEXT, "nl"), stage("tuning", ASKED)], 1),
    # Two seeds of one arm draw a row more or less.
    ([stage("pretraining", CODE, "s0"), stage("tuning", ASKED)],
     [stage("pretraining", {"text.a": 57, "code.b": 23}, "s1"), stage("tuning", ASKED)], 0),
    # NN and CC.
    ([stage("pretraining", TEXT, "nl"), stage("tuning", {"text.q": 32, "code.q": 0})],
     [stage("pretraining", CODE, "code"), stage("tuning", ASKED)], 2),
    # A branch half-way against the end of its trunk differs in the second half alone.
    ([stage("pretraining", TEXT, "nl", 10), stage("tuning", ASKED)],
     [stage("pretraining", half(TEXT), "nl", 5), stage("pretraining", half(CODE)), stage("tuning", ASKED)], 1),
    # Branches at one step that differ in their mix, and in how they are tuned besides.
    ([stage("pretraining", half(TEXT), "nl", 5), stage("pretraining", half(TEXT))],
     [stage("pretraining", half(TEXT), "nl", 5), stage("pretraining", half(CODE))], 1),
    ([stage("pretraining", half(TEXT), "nl", 5), stage("pretraining", half(TEXT), "m"), stage("tuning", ASKED)],
     [stage("pretraining", half(TEXT), "nl", 5), stage("pretraining", half(CODE), "n"), stage("tuning", TEXT)], 2),
    # Two published models, and one.
    ([stage("imported", {}, "hf://A/A"), stage("tuning", ASKED)],
     [stage("imported", {}, "hf://B/B"), stage("tuning", ASKED)], 1),
    ([stage("imported", {}, "hf://A/A"), stage("tuning", ASKED)],
     [stage("imported", {}, "hf://A/A"), stage("tuning", TEXT)], 1),
    # Another corpus of the same name.
    ([stage("pretraining", TEXT)], [stage("pretraining", TEXT) | {"epoch_rows": {"text.a": 70, "code.b": 100}}], 1),
])
def test_in_how_many_stages_two_runs_differ(told, first, second, differing):
    for pair in ((first, second), (second, first)):
        lines = told(*pair).splitlines()
        assert (len(lines) == 3) == (differing > 1), lines
        assert differing < 2 or f"on different data in {differing} stages" in lines[2]


def test_nothing_is_told_where_nothing_tells(tmp_path):
    assert stages(str(tmp_path / "a"), str(tmp_path / "b")) == ""


def test_a_run_against_what_branched_from_it(tmp_path):
    """The first is the trunk itself, whose own directory the other's ledger names."""
    trunk, branch = tmp_path / "trunk", tmp_path / "branch"
    for folder, line in ((trunk, [stage("pretraining", TEXT)]), (branch, [
            stage("pretraining", half(TEXT), str(trunk)), stage("pretraining", half(CODE))])):
        folder.mkdir()
        (folder / "provenance.json").write_text(json.dumps({"ledger": line[-1] | {"before": line[:-1]}}))
    assert len(stages(str(trunk), str(branch)).splitlines()) == 2
