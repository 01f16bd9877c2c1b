"""When metrics are read, what stops the run, and what is recorded, worked out by hand."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest

from codellm_jax.mixture.order import Order, Source
from codellm_jax.mixture.schedules import constant
from codellm_jax.runtime import meter as meter_module
from codellm_jax.runtime.meter import Meter, Metrics, loss_by_source, sum_by_source
from codellm_jax.runtime.progress import Records, StatusLine, read_records

ORDER = Order(0, constant(0.25), (
    Source("text.a", 50, Fraction(1)), Source("code.b", 50), Source("text.c", 50, Fraction(1))))


class Lazy:
    """An array that tells when it is looked at."""

    def __init__(self, value: float, looked_at: list) -> None:
        self.value, self.looked_at = value, looked_at

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        self.looked_at.append(self.value)
        return np.asarray(self.value, np.float32)


def metrics(loss=2.0, grad_norm=1.0, losses=(8.0, 12.0, 4.0), tokens=(4.0, 3.0, 1.0)) -> Metrics:
    return Metrics(loss, np.float32(grad_norm), np.array(losses, np.float32), np.array(tokens, np.float32))


def meter_of(model_dir, first: int = 0, last: int = 100, log_period: int = 10, rate: float = 0.5,
             stage: str = "pretraining", interval=None) -> Meter:
    records = Records(str(model_dir), first, active=True)
    return Meter(ORDER, 8, stage, first, last, log_period, lambda step: rate * step,
                 lambda tokens_per_second: (tokens_per_second / 1e6, tokens_per_second / 2e6),
                 records, StatusLine(first, last, active=True), interval)


def add(meter: Meter, step: int, values: Metrics) -> None:
    """A step on 8 full rows of 16 tokens."""
    meter.add(step, values, 8 * 16, step * 8 * 16)


def test_metrics_are_read_one_step_late(tmp_path):
    looked_at: list = []
    meter = meter_of(tmp_path)
    for step in range(1, 10):
        add(meter, step, metrics(loss=Lazy(step, looked_at)))
        assert looked_at == list(range(1, step))
    add(meter, 10, metrics(loss=Lazy(10, looked_at)))  # recorded, so settled at once
    assert looked_at == list(range(1, 11))
    add(meter, 11, metrics(loss=Lazy(11, looked_at)))
    meter.settle()
    meter.settle()
    assert looked_at == list(range(1, 12))


@pytest.mark.parametrize("bad", [{"loss": math.nan}, {"loss": math.inf}, {"grad_norm": math.nan},
                                 {"grad_norm": -math.inf}])
def test_what_is_not_finite_stops_the_run(tmp_path, bad):
    meter = meter_of(tmp_path)
    add(meter, 1, metrics())
    add(meter, 2, metrics(**{name: np.float32(value) for name, value in bad.items()}))
    with pytest.raises(FloatingPointError, match=r"^The loss became .* at step 2\.$") as raised:
        add(meter, 3, metrics())
    assert "\n" not in str(raised.value)


def test_what_is_not_finite_stops_the_run_before_a_checkpoint(tmp_path):
    meter = meter_of(tmp_path)
    add(meter, 3, metrics(loss=np.float32(math.nan)))
    with pytest.raises(FloatingPointError, match="at step 3"):
        meter.settle()  # what the loop calls before it saves
    meter = meter_of(tmp_path)
    with pytest.raises(FloatingPointError, match="at step 10"):
        add(meter, 10, metrics(loss=np.float32(math.nan)))


def test_a_record_by_hand(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(meter_module.time, "monotonic", lambda: now[0])
    meter = meter_of(tmp_path, first=8)
    meter.restart()

    def batches():
        while True:
            now[0] += 0.25  # waited for
            yield "batch"

    source = batches()
    for step in (9, 10):
        assert meter.next_batch(source) == "batch"
        now[0] += 0.75
        add(meter, step, metrics())
    line, = read_records(str(tmp_path))
    assert line.pop("model_flops_utilization") == pytest.approx(128e-6)
    assert line.pop("model_flops_utilization_causal") == pytest.approx(64e-6)
    line = {name: value for name, value in line.items() if not name.startswith("last_step/")}
    assert line == pytest.approx({
        "step": 10, "split": "train", "loss": 2.0, "tokens": 10 * 8 * 16, "tokens_per_second": 2 * 8 * 16 / 2.0,
        "learning_rate": 4.5, "grad_norm": 1.0, "data_wait_fraction": 0.25,
        # text.a 8 / 4, text.c 4 / 1, text 12 / 5, code 12 / 3
        "loss/text": 2.4, "loss/code": 4.0, "loss/text.a": 2.0, "loss/text.c": 4.0, "loss/code.b": 4.0,
        "token_fraction/text": 0.625, "token_fraction/code": 0.375, "token_fraction/text.a": 0.5,
        "token_fraction/text.c": 0.125, "token_fraction/code.b": 0.375})


def test_a_record_is_of_all_steps_since_the_one_before(tmp_path):
    """Losses by tokens, shares by what was drawn; the last step's own stand beside."""
    meter = meter_of(tmp_path, log_period=2, stage="tuning")
    add(meter, 1, metrics(grad_norm=3.0, losses=(8.0, 0.0, 4.0), tokens=(4.0, 0.0, 1.0)))
    add(meter, 2, metrics(loss=np.float32(7.5), losses=(4.0, 11.0, 0.0), tokens=(1.0, 1.0, 0.0)))
    add(meter, 3, metrics(losses=(9.0, 0.0, 0.0), tokens=(3.0, 0.0, 0.0)))
    meter.settle()
    line, = read_records(str(tmp_path))
    assert line["loss"] == (2.0 * 5 + 7.5 * 2) / 7 and line["grad_norm"] == 2.0 and line["token_fraction/code"] == 1 / 7
    assert line["loss/text"] == 16 / 6 and line["loss/code"] == 11.0 and line["loss/text.a"] == 12 / 5
    last = {name.removeprefix("last_step/"): value for name, value in line.items() if name.startswith("last_step/")}
    assert last["loss"] == 7.5 and last["grad_norm"] == 1.0 and last["loss/text"] == 4.0
    assert last["token_fraction/code"] == 0.5 and last["loss/code"] == 11.0 and "loss/text.c" not in last
    # Of 16 examples four are code, of the last 8 two.
    assert line["example_fraction/code"] == last["example_fraction/code"] == 0.25
    assert meter.interval == {"steps": 1, "loss": 6.0, "grad_norm": 1.0, "source_losses": [9.0, 0.0, 0.0],
                              "source_tokens": [3.0, 0.0, 0.0]}


def test_a_resume_between_two_records_records_the_same(tmp_path):
    steps = [metrics(losses=(0.1 * step, 0.7, 0.3), tokens=(4.0, 3.0, step)) for step in range(1, 6)]
    for name in ("whole", "before", "after"):
        (tmp_path / name).mkdir()
    whole = meter_of(tmp_path / "whole", log_period=5)
    before = meter_of(tmp_path / "before", log_period=5)
    for number, values in enumerate(steps, 1):
        add(whole, number, values)
        if number <= 3:
            add(before, number, values)
    before.settle()
    saved = json.loads(json.dumps(before.interval))
    after = meter_of(tmp_path / "after", first=3, log_period=5, interval=saved)
    for number in (4, 5):
        add(after, number, steps[number - 1])
    [expected], [found] = (read_records(str(tmp_path / name)) for name in ("whole", "after"))
    timed = {"tokens_per_second", "data_wait_fraction", "model_flops_utilization", "model_flops_utilization_causal"}
    assert {name: value for name, value in found.items() if name not in timed} == {
        name: value for name, value in expected.items() if name not in timed}


def test_tuning_records_shares_of_examples_and_counts_its_own_tokens(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(meter_module.time, "monotonic", lambda: now[0])
    meter = meter_of(tmp_path, log_period=2, stage="tuning")
    for step, positions, tokens in ((1, 50, 20), (2, 70, 45)):
        now[0] += 3.0
        meter.add(step, metrics(), positions, tokens)
    line, = read_records(str(tmp_path))
    assert line["tokens"] == 45 and line["tokens_per_second"] == pytest.approx(120 / 6)
    # Of 8 examples in the second step two are code, and three of each of text's sources.
    assert {name: value for name, value in line.items() if name.startswith("example_fraction")} == {
        "example_fraction/text": 0.75, "example_fraction/code": 0.25, "example_fraction/text.a": 0.375,
        "example_fraction/text.c": 0.375, "example_fraction/code.b": 0.25}


def test_a_restart_leaves_evaluation_out_of_the_rate(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(meter_module.time, "monotonic", lambda: now[0])
    meter = meter_of(tmp_path, log_period=2)
    for step in (1, 2, 3, 4):
        now[0] += 1.0
        add(meter, step, metrics())
        if step == 2:
            now[0] += 500.0  # an evaluation
            meter.restart()
    assert [line["tokens_per_second"] for line in read_records(str(tmp_path))] == pytest.approx([128.0, 128.0])


def test_the_last_step_is_recorded(tmp_path):
    meter = meter_of(tmp_path, last=7, log_period=5)
    for step in range(1, 8):
        add(meter, step, metrics())
    meter.settle()
    assert [line["step"] for line in read_records(str(tmp_path))] == [5, 7]


def test_the_status_line_tells_shares_and_time_left(tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(meter_module.time, "monotonic", lambda: now[0])
    meter = meter_of(tmp_path, log_period=5)
    for step in range(1, 6):
        now[0] += 2.0
        add(meter, step, metrics())
    # 5 of 100 steps in 10 s; 10 of 40 rows are code.
    assert capsys.readouterr().out == (
        "step 5/100 loss 2.0000 (text 2.400, code 4.000) | code 0.250 of 0.250 | 64 tokens/s | MFU 0.0% | 3:10 left\n")


def test_sources_without_tokens_have_no_loss():
    names = ["text.a", "code.b", "text.c"]
    losses, tokens = np.array([6.0, 0.0, 0.0]), np.array([4.0, 0.0, 0.0])
    assert loss_by_source(losses, tokens, names) == {"loss/text": 1.5, "loss/text.a": 1.5}
    assert sum_by_source(tokens, names) == {"text": 4.0, "code": 0.0, "text.a": 4.0, "code.b": 0.0, "text.c": 0.0}


def test_means_of_pools_weigh_by_tokens():
    found = loss_by_source(np.array([30.0, 5.0]), np.array([10.0, 1.0]), ["code.a", "code.b"])
    assert found == pytest.approx({"loss/code": 35 / 11, "loss/code.a": 3.0, "loss/code.b": 5.0})
