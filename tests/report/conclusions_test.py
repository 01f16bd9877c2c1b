"""Planted effects are found, others are left open, and of what says nothing nothing is concluded."""

import importlib.util
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from scipy import stats
from statsmodels.stats.multitest import multipletests

from codellm_jax.report.conclusions import CONTRASTS, LEVEL, judge
from codellm_jax.report.write import read_study

_spec = importlib.util.spec_from_file_location("planted", Path(__file__).parent.parent / "planted.py")
assert _spec and _spec.loader
planted = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(planted)

REASONING = ("logic", "jecqa", "scienceqa", "ekar")
ALL_ARMS = ("NL", "CODE", "NN", "NC-decrease", "CC-uniform", "CC-increase", "CC-decrease")


def conclusions_of(folder: Path, skill, arms=ALL_ARMS, seeds: int = 4, spread: float = 0.02, n: int = 400, **options):
    tasks = [*REASONING, *(("c3", "ocnli", "cmnli", "cosqa", "mbpp") if arms == ALL_ARMS else ())]
    base = {("", task): 1.5 if task == "cosqa" else 0.3 for task in tasks}
    planted.write_study(folder, arms, seeds, dict.fromkeys(tasks, n), base | skill, spread, **options)
    return judge(read_study(epath.Path(folder)))


def answers(folder: Path, arm: str, task: str) -> np.ndarray:
    """[seeds, n] right or wrong, read anew."""
    runs = sorted((folder / "runs").glob(f"{arm}.seed*"))
    return np.array([[json.loads(line)["correct"] for line in (run / "results" / f"{task}.jsonl").read_text(
        ).splitlines()[1:]] for run in runs], float)


def test_planted_effects_are_found_and_null_ones_left_open(tmp_path):
    skill = {("CODE", task): 1.3 for task in REASONING} | {("CODE", task): 0.9 for task in ("c3", "ocnli", "cmnli")}
    skill |= {("CC-decrease", task): -1.5 for task in ("cosqa", "mbpp")}
    judged = conclusions_of(tmp_path, skill)
    verdicts = [(verdict, [one.verdict for one in contrasts]) for _, verdict, contrasts in judged]
    assert verdicts == [("supported", ["supported", "supported"]), ("open", ["open"]),
                        ("contradicted", ["contradicted", "contradicted"])]
    assert judged[1][2][0].why == "the interval holds 0"
    # The first contrast again, by hand: the mean over tasks, questions that differ, seeds that are shared.
    first = judged[0][2][0]
    arms = [[answers(tmp_path, arm, task) for task in REASONING] for arm in ("CODE", "NL")]
    parts = [(sum(np.mean([task.mean(1) for task in arm], axis=0).var(ddof=1) for arm in arms) / 4, 6)]
    parts += [((one.mean(0) - other.mean(0)).var(ddof=1) / 400 / 16, 399) for one, other in zip(*arms, strict=True)]
    difference = np.mean(arms[0]) - np.mean(arms[1])
    half = math.sqrt(sum(part * stats.t.ppf(1 - 0.05 / CONTRASTS / 2, freedom) ** 2 for part, freedom in parts))
    assert LEVEL == 0.99 and first.estimate == pytest.approx(difference)
    assert first.interval == pytest.approx((difference - half, difference + half))
    p_values = [one.p_value for _, _, contrasts in judged for one in contrasts]
    assert [one.corrected for _, _, contrasts in judged for one in contrasts] == pytest.approx(
        multipletests(p_values, method="holm")[1].tolist())


@pytest.mark.parametrize("options, why", [
    ({"seeds": 1}, "a single seed of CODE and of NL"), ({"sample": True}, "sample items"),
    ({"arrays": planted.TINY}, "the models are tiny"), ({"tokens": 10_000_000}, "pre-trained on little"),
    ({"base": -2.5}, "neither arm is above"), ({"n": 400, "drop": "ekar"}, "not evaluated on ekar"),
    ({"without": True}, "is unknown, as there is no checkpoint")])
def test_never_supported_where_nothing_can_be_said(tmp_path, options, why):
    """The same planted effect, but from a single seed, on samples, of tiny models, at chance, with a task missing."""
    base = options.pop("base", None)
    drop, without = options.pop("drop", None), options.pop("without", False)
    skill = {(arm, task): (base if base is not None else 0.3) + (1.0 if base is None else 0.4) * (arm == "CODE")
             for arm in ("NL", "CODE") for task in REASONING}
    conclusions_of(tmp_path, skill, arms=("NL", "CODE"), **options)
    if drop:
        for path in tmp_path.glob(f"runs/*/results/{drop}.json*"):
            path.unlink()
    if without:
        for path in tmp_path.glob("runs/*/checkpoints"):
            shutil.rmtree(path)
            path.with_name("provenance.json").unlink()
    judged = judge(read_study(epath.Path(tmp_path), say=lambda line: None))
    contrast = judged[0][2][0]
    assert contrast.verdict == "open" and why in contrast.why
    assert judged[0][1] != "supported"
    if not drop:
        assert contrast.interval.low > 0  # it would have been
