"""Upstream T5X's trainer on a run: the same numbers, whoever takes the steps, and whoever goes on."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from codellm_jax import cli
from codellm_jax.training.train import OWN, train
from codellm_jax.upstream.runners import INSTALL, runner

# What depends on the clock.
TIMES = ("tokens_per_second", "data_wait_fraction", "model_flops_utilization", "model_flops_utilization_causal")
NEEDS_T5X = f"upstream T5X is not installed: {INSTALL}"


@pytest.fixture
def upstream() -> Any:
    pytest.importorskip("t5x", reason=NEEDS_T5X)
    return runner("t5x")


def records(model_dir: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (Path(model_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def test_without_t5x_a_line_says_how_to_install_it(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for name in [name for name in sys.modules if name.startswith("t5x.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "t5x", None)
    assert cli.main(["train", "--gin_file=gin/mixed_pretrain.gin", "--runner=t5x"]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "--no-deps" in told and "fiddle cached_property chex grain" in told


def test_this_package_s_own_runner_needs_nothing():
    assert runner("own") is OWN


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretraining", "tuning"])
@pytest.mark.parametrize(("options", "steps"), [
    ({}, 20), ({"data": 2}, 4), ({"fsdp": 2, "model": 2}, 4)], ids=["one device", "two devices", "fsdp x model"])
def test_the_same_losses_bit_by_bit(
        stage: str, options: dict[str, int], steps: int, upstream: Any, make_training: Callable[..., Any]):
    import jax

    from codellm_jax.runtime.partitioning import MeshShape

    mesh = MeshShape(**{"data": 1} | options)
    sizes = {"train_steps": steps, "stage": stage, "eval_period": 10, "checkpoint_period": 10, "batch_size": 8}
    jax_devices = jax.devices
    count = mesh.data * mesh.fsdp * mesh.model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *arguments: jax_devices(*arguments)[:count])
        own, theirs = (make_training(**sizes, mesh=mesh) for _ in range(2))
        train(own)
        train(theirs, runner=upstream)
    assert records(own.model_dir) == records(theirs.model_dir)


@pytest.mark.slow
def test_two_microbatches_have_the_loss_of_the_batch(upstream: Any, make_training: Callable[..., Any]):
    from codellm_jax.runtime.partitioning import MeshShape

    sizes = {"train_steps": 4, "stage": "tuning", "microbatches": 2, "batch_size": 16, "mesh": MeshShape(data=8)}
    own, theirs = (make_training(**sizes) for _ in range(2))
    train(own)
    train(theirs, runner=upstream)
    for one, other in zip(records(own.model_dir), records(theirs.model_dir), strict=True):
        assert one.pop("split") == other.pop("split")
        assert other == pytest.approx(one, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [("own", "t5x"), ("t5x", "own"), ("t5x", "t5x")])
def test_either_goes_on_with_what_one_of_them_left(
        first: str, second: str, upstream: Any, make_training: Callable[..., Any]):
    whole, parts = (make_training(train_steps=8, checkpoint_period=4, eval_period=4) for _ in range(2))
    train(whole)
    before, after = (runner(name) for name in (first, second))
    train(parts, runner=before)
    shutil.rmtree(Path(parts.model_dir) / "checkpoints" / "8")
    (Path(parts.model_dir) / "provenance.json").unlink()
    train(parts, runner=after)
    assert records(whole.model_dir) == records(parts.model_dir)
    sessions = json.loads((Path(parts.model_dir) / "provenance.json").read_text())["sessions"]
    assert [(session["from_step"], session["runner"]) for session in sessions] == [(4, after.name)]


@pytest.mark.slow
def test_a_run_of_t5x_s_trainer_is_evaluated_and_tuned_like_any(
        upstream: Any, tiny_flags: list[str], tiny_tuning_flags: list[str], tmp_path: Path,
        capsys: pytest.CaptureFixture[str]):
    scores = {}
    for name in ("own", "t5x"):
        run, tuned = f"{tmp_path}/{name}", f"{tmp_path}/{name}_tuned"
        trained = ["train", f"--runner={name}", "--gin.TRAIN_STEPS=3"]
        assert cli.main([*trained, *tiny_flags, f"--gin.MODEL_DIR={run}"]) == 0
        assert cli.main([*trained, "--gin_file=gin/tune_mixed.gin", *tiny_tuning_flags,
                         f"--gin.INITIAL_CHECKPOINT_PATH={run}", f"--gin.MODEL_DIR={tuned}"]) == 0
        assert cli.main(["eval", "--gin_file=gin/eval.gin", "--gin.TASKS=['logic', 'ekar']",
                         f"--gin.CHECKPOINT_PATH={tuned}"]) == 0
        # The first line of each file names the run.
        scores[name] = [path.read_text().splitlines()[1:] for path in sorted(Path(tuned, "results").glob("*.jsonl"))]
    assert scores["own"] == scores["t5x"] and all(scores["own"]) and len(scores["own"]) == 2
    capsys.readouterr()
    assert cli.main(["compare", f"{tmp_path}/own_tuned", f"{tmp_path}/t5x_tuned"]) == 0
    assert "logic" in capsys.readouterr().out
