"""The plan of a study as a page: the tree of its arms, what each takes in all its stages, and which may be compared."""

import re
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from codellm_jax.mixture.order import Order, Source
from codellm_jax.mixture.schedules import constant
from codellm_jax.model.config import DecoderConfig
from codellm_jax.model.decoder import flops_per_token
from codellm_jax.study.arms import Asked, Study, expand, plan_runs
from codellm_jax.study.page import comparable, page
from codellm_jax.study.survey import line_of

CONFIG = DecoderConfig(layers=2, hidden=8, heads=2, feedforward=16, vocabulary_size=32, length=16)
SOURCES = (Source("text.a", 11, Fraction(1), "x"), Source("code.b", 5, Fraction(1), "y"))
BATCH, LENGTH = 4, 16


def run_of(rate: float, last: int, trunk: SimpleNamespace | None = None, at: int = 0, stage: str = "pretraining"):
    """What `line_of` reads of a run's training and plan."""
    order = Order(0, constant(rate), SOURCES, trunk.order.branch_at(at * BATCH) if trunk else None)
    plan = SimpleNamespace(
        mixture=SimpleNamespace(order=order, stage=stage), model=SimpleNamespace(config=CONFIG), rows=BATCH,
        first_step=at, last_step=last)
    return SimpleNamespace(
        training=SimpleNamespace(batch_size=BATCH, mixture=SimpleNamespace(length=LENGTH)), plan=plan, order=order)


def test_a_line_counts_a_trunk_up_to_its_branch_once():
    """Against the rows themselves, drawn one by one."""
    trunk, expected = run_of(0.25, 40), {"text.a": 0, "code.b": 0}
    branch = run_of(0.6, 50, trunk, at=30)
    tuned = run_of(0.5, 6, stage="tuning")
    before = line_of(trunk.training, trunk.plan, None, 30)
    line = line_of(branch.training, branch.plan, before)
    for order, positions in ((trunk.order, np.arange(120)), (branch.order, np.arange(120, 200))):
        for source in order.draw(positions).source:
            expected[SOURCES[source].name] += 1
    assert line.tokens == 50 * BATCH * LENGTH
    assert line.flops == pytest.approx(flops_per_token(CONFIG, causal=False) * line.tokens)
    assert line.text_tokens == expected["text.a"] * LENGTH and line.text_examples == 0
    assert {name: count for name, _, count in line.epochs} == pytest.approx(
        {"text.a": expected["text.a"] / 11, "code.b": expected["code.b"] / 5})
    # The order says the same of the rows that the branch took over.
    assert (branch.order.drawn_before + branch.order.counts(200)).tolist() == list(expected.values())
    after = line_of(tuned.training, tuned.plan, line)
    assert after.text_tokens == line.text_tokens and after.text_examples == 12 and after.tokens == 56 * BATCH * LENGTH


def fact(flops: float, text: float, examples: int = 0, steps: int = 10) -> dict:
    return {"flops": 10.0 * steps, "steps": steps, "batch_size": 4, "length": 16,
            "line": {"flops": flops, "text_tokens": text, "text_examples": examples}}


def test_arms_are_comparable_to_a_step():
    """A step is 10 FLOPs, and 64 tokens or 4 examples of text."""
    lines = comparable({
        "NL": fact(100, 640), "CODE": fact(110, 320), "LONG": fact(111, 704), "NN": fact(200, 640, 20),
        "NC": fact(200, 640, 15), "CN": fact(205, 320, 24), "ALONE": fact(400, 2000)})
    assert lines == [
        "equal compute  100 FLOPs: NL, CODE", "               200 FLOPs: NN, NC, CN",
        "               like no other: LONG, ALONE", "equal text     640 tokens: NL, LONG",
        "               like no other: CODE, NN, NC, CN, ALONE"]


def test_hundreds_of_arms_of_a_group_are_not_all_listed():
    [line, text] = comparable({f"A{number}": fact(100, 640) for number in range(500)})
    assert line.endswith("A10, A11 and 488 more") and len(line) < 120 and text.endswith("and 488 more")


def page_of(arms: dict, seeds: list[int], states: dict[str, str] | None = None) -> list[str]:
    study = Study("d", arms, ["p.gin"], ["t.gin"], ["e.gin"], seeds=seeds, stages={"midtraining": ["p.gin"]})
    expanded, _ = expand(study)
    runs = plan_runs(study, expanded, {arm.name: Asked(100, 4, 0.5, None) for arm in expanded})
    planned = [SimpleNamespace(run=run, tasks=["logic"], folder="/none") for run in runs]
    facts = {run.name: {
        "steps": 100, "rows": 4, "tokens": 6400, "flops": 1e6, "batch_size": 4, "length": 16, "program": "p",
        "epochs": [("text.a", "x", 0.5)], "line": {
            "tokens": 6400, "flops": 1e6, "text_tokens": 3200, "text_examples": 0,
            "epochs": [("text.a", "x", 0.5 if run.parent is None else 1.25), ("code.b", "y", 0.25),
                       ("code.c", "z", 0.0)]}} for run in runs}
    stand = {run.name: SimpleNamespace(
        trained=False, evaluated=False, state=(states or {}).get(run.name, "to do")) for run in runs}
    return page(study, planned, facts, stand, {}).splitlines()


def test_the_tree_of_arms():
    lines = page_of({
        "TRUNK": {}, "OTHER": {"CODE_RATE": 0.1},
        "MID": {"from": "TRUNK", "stage": "midtraining", "sweep": {"at": [0.1, 0.5]}}, "TUNED": {"from": "MID"},
        "LAST": {"from": "hf://ORG/NAME"}}, [3, 4], {"OTHER.seed3": "done"})
    tree = lines[1:lines.index("")]
    assert [re.match(r" *[\w.-]+", line)[0] for line in tree] == [
        "TRUNK", "  MID-0.1", "    TUNED-0.1", "  MID-0.5", "    TUNED-0.5", "OTHER", "LAST"]
    assert [re.split(" +", line.strip())[1:3] for line in tree] == [
        ["pretraining", "-"], ["midtraining", "TRUNK@10"], ["tuning", "MID-0.1"], ["midtraining", "TRUNK@50"],
        ["tuning", "MID-0.5"], ["pretraining", "-"], ["tuning", "hf://ORG/NAME"]]
    assert tree[0].endswith("6,400  1.00e+06  text.a 0.50, code.b 0.25")
    assert tree[1].endswith("text.a 1.25 (0.50 here), code.b 0.25")
    assert "1 done, 1 to do" in tree[5] and " to do " in tree[0]
    assert "not counted    the earlier training data of hf://ORG/NAME" in lines
    assert any(line.endswith("each arm under the seeds 3, 4") for line in lines)
    assert "14 runs: 89,600 tokens" in "\n".join(lines)
