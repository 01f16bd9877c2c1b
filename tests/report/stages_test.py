"""The stages of a run as a report names and shows them."""

from types import SimpleNamespace

from codellm_jax.report.background import mixes
from codellm_jax.report.runs import Stage
from codellm_jax.report.write import _stages


def stage(kind: str, text: int, code: int, model_dir: str | None = None) -> dict:
    rows = {"text.a": text, "code.b": code}
    ledger = {"stage": kind, "rows": rows, "tokens": {name: 8 * count for name, count in rows.items()}}
    return ledger | ({"model_dir": model_dir} if model_dir else {})


LEDGER = stage("tuning", 5, 3) | {"before": [
    stage("pretraining", 10, 0, "/a/runs/TEXT.seed0"), stage("pretraining", 6, 2, "/a/runs/MID.seed0")]}
NAMES = {"TEXT.seed0": "pretraining", "MID.seed0": "midtraining", "TUNED.seed0": "alignment"}


def test_stages_have_the_names_of_the_study_and_else_their_kinds():
    assert list(_stages(LEDGER, "TUNED.seed0", NAMES)) == [
        Stage("pretraining", "TEXT.seed0", 80, 0.0), Stage("midtraining", "MID.seed0", 64, 0.25),
        Stage("alignment", "TUNED.seed0", 64, 0.375)]
    assert [one.name for one in _stages(LEDGER, "TUNED.seed0", {})] == ["pretraining", "pretraining", "tuning"]
    imported = {"stage": "imported", "rows": {}, "tokens": {}}
    assert list(_stages(stage("tuning", 1, 1) | {"before": [imported]}, "QC.seed0", {})) == [
        Stage("imported", "", 0, None), Stage("tuning", "QC.seed0", 16, 0.5)]
    assert list(_stages({}, "TUNED.seed0", NAMES)) == []


def test_the_table_of_stages():
    run = SimpleNamespace(arm="NCC", stages=list(_stages(LEDGER, "TUNED.seed0", NAMES)))
    section = mixes(SimpleNamespace(arms={"TUNED": [run], "GONE": [SimpleNamespace(arm="NL", stages=[])]}), None)
    [table] = [block for block in section.blocks if hasattr(block, "rows")]
    assert table.rows == [["TUNED", "NCC", "pretraining: 80 tokens, 0.0% code\nmidtraining: 64 tokens, 25.0% code\n"
                           "alignment: 64 tokens, 37.5% code"]]
