"""Runs that branch from a step of another: all of it goes on, bit for bit, and kills on either side change nothing."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from codellm_jax import cli
from codellm_jax.mixture.schedules import constant
from codellm_jax.runtime.checkpoints import newest_record, record_of, restore_state
from codellm_jax.runtime.progress import read_records
from codellm_jax.training.plan import describe, make_plan
from codellm_jax.training.train import held_out, train

STEPS = 12


def losses(run: str, after: int = 0) -> dict[int, tuple[float, float]]:
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in read_records(run)
            if line["split"] == "train" and line["step"] > after}


@pytest.fixture(scope="module")
def trunk(make_training):
    """A run whose mix and learning rate change all the time; steps 3 and 5 are kept beside the newest."""
    training = make_training(train_steps=STEPS, keep_steps=[3, 0.4], mix_phases=["5:5 to 7:3", "3:7"], code_rate=None,
                             checkpoint_period=100)
    train(training)
    return training


def branch_of(trunk, tmp_path, step: int, **changes):
    return dataclasses.replace(trunk, branch_from=f"{trunk.model_dir}@{step}", model_dir=str(tmp_path / "branch"),
                               keep_steps=(), **changes)


def test_steps_are_kept(trunk):
    kept = {path.name for path in (Path(trunk.model_dir) / "checkpoints").iterdir()}
    assert kept == {"3", "5", str(STEPS)}


def test_a_branch_under_the_trunks_own_settings_is_the_trunk(trunk, tmp_path):
    branch = branch_of(trunk, tmp_path, 5, checkpoint_period=4)
    run = train(branch)
    assert losses(branch.model_dir) == losses(trunk.model_dir, after=5)
    ends = [newest_record(training.model_dir)[1] for training in (trunk, branch)]
    assert ends[0]["checksums"] == ends[1]["checksums"] and run.step == STEPS
    assert ends[0]["place"] == ends[1]["place"]
    ledger = ends[1]["ledger"]
    assert ledger["branch"]["step"] == 5 and ledger["before"][-1]["step"] == 5
    assert ledger["before"][-1]["digest"] == record_of(trunk.model_dir, 5)["digest"]
    for name, count in ends[0]["ledger"]["rows"].items():
        assert count == ledger["rows"][name] + ledger["before"][-1]["rows"][name]


def test_a_branch_takes_over_the_held_out_losses_of_its_first_step(trunk, tmp_path, monkeypatch):
    """Those that it would compute; and it computes them where other rows are asked for."""

    def first_of(name: str, **changes) -> tuple[list[int], dict]:
        branch = dataclasses.replace(branch_of(trunk, tmp_path, 5, train_steps=6, **changes),
                                     model_dir=str(tmp_path / name))
        computed = []
        monkeypatch.setattr("codellm_jax.training.train.held_out",
                            lambda run, eval_fn: computed.append(run.step) or held_out(run, eval_fn))
        train(branch)
        line = next(line for line in read_records(branch.model_dir) if line["split"] == "eval")
        return computed, {name: value for name, value in line.items() if name != "time"}

    [trunks] = [line for line in read_records(trunk.model_dir) if (line["step"], line["split"]) == (5, "eval")]
    computed, taken = first_of("taken")
    assert computed == [6] and taken == {name: value for name, value in trunks.items() if name != "time"}
    computed, other = first_of("other", eval_rows=trunk.eval_rows - 1)
    assert computed == [5, 6] and other["tokens"] < taken["tokens"]
    without = record_of(trunk.model_dir, 5) | {"held_out": None}  # as a version that did not keep them saved it
    monkeypatch.setattr("codellm_jax.training.begin.restore_state",
                        lambda *arguments: (restore_state(*arguments)[0], without))
    assert first_of("again") == ([5, 6], taken)


def test_a_killed_branch_goes_on_without_its_trunk(trunk, tmp_path):
    copy = dataclasses.replace(trunk, model_dir=str(tmp_path / "trunk"))
    shutil.copytree(trunk.model_dir, copy.model_dir)
    branch = branch_of(copy, tmp_path, 3, checkpoint_period=2, keep_last=20)
    train(branch)
    whole = losses(branch.model_dir)
    for step in (8, 10, 12):  # as a kill after step 7 leaves it
        shutil.rmtree(Path(branch.model_dir) / "checkpoints" / str(step))
    shutil.rmtree(copy.model_dir)
    train(branch)
    assert losses(branch.model_dir) == whole


def test_a_branch_of_a_branch_with_another_mix_and_batch(trunk, tmp_path):
    """An independent count: of every source the rows of all three come one after the other."""
    changed = dataclasses.replace(trunk.mixture, mix_phases=None, code_rate=0.75)
    first = branch_of(trunk, tmp_path, 5, mixture=changed, train_steps=9)
    train(first)
    second = branch_of(first, tmp_path / "second", 9, batch_size=16, train_steps=14)
    train(second)
    plans = [make_plan(training) for training in (trunk, first, second)]
    seen: dict[str, list[tuple[int, int]]] = {}
    for plan, begin, end in zip(plans, (0, 5 * 8, 9 * 16), (5 * 8, 9 * 8, 14 * 16), strict=True):
        draw = plan.mixture.order.draw(np.arange(begin, end))
        for source, epoch, row in zip(*(part.tolist() for part in draw), strict=True):
            seen.setdefault(plan.mixture.order.sources[source].name, []).append((epoch, row))
    sizes = {source.name: source.rows for source in plans[0].mixture.order.sources}
    for name, drawn in seen.items():
        for start in range(0, len(drawn), sizes[name]):
            epoch = drawn[start : start + sizes[name]]
            assert len({row for _, row in epoch}) == len(epoch) and {e for e, _ in epoch} == {start // sizes[name]}
    ledger = newest_record(second.model_dir)[1]["ledger"]
    assert [saved["step"] for saved in ledger["before"]] == [5, 9]
    assert sum(ledger["rows"].values()) == 5 * 16 and abs(ledger["rows"]["code.tiny"] - 60) <= 1
    assert [line["step"] for line in read_records(second.model_dir) if line["split"] == "train"] == list(range(10, 15))


def test_the_learning_rate_goes_on_or_that_is_said(trunk, tmp_path):
    branch = branch_of(trunk, tmp_path, 5)
    assert "The learning rate continues the trunk's last" in describe(branch, make_plan(branch))
    jumping = dataclasses.replace(branch, learning_rate=lambda step: 1e-5)
    printed = describe(jumping, make_plan(jumping))
    assert "WARNING: the learning rate does not continue the trunk's last" in printed
    assert "7 steps of" in printed and f"starts from  {trunk.model_dir}@5" in printed


@pytest.mark.parametrize(("changes", "message"), [
    ({"seed": 7}, "SEED is 7, but that of"),
    ({"branch_from": "nowhere"}, "must be RUN@STEP, such as runs/trunk@6000, found 'nowhere'"),
    ({"branch_from": "nowhere@3"}, "There is no directory"),
    ({"train_steps": 5, "learning_rate": lambda step: 1e-3}, "begins after step 5, and TRAIN_STEPS = 5"),
    ({"initial_checkpoint_path": "x"}, "BRANCH_FROM and INITIAL_CHECKPOINT_PATH are both set"),
])
def test_what_does_not_fit_is_refused_in_a_line(trunk, tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        train(branch_of(trunk, tmp_path, 5, **changes) if "branch_from" not in changes else
              dataclasses.replace(trunk, model_dir=str(tmp_path), keep_steps=(), **changes))
    assert "\n" not in str(raised.value)


def test_a_step_that_is_not_kept_lists_those_that_are(trunk, tmp_path):
    with pytest.raises(FileNotFoundError, match="No checkpoint of step 4 .* there are those of steps 3, 5, 12"):
        train(branch_of(trunk, tmp_path, 4))


@pytest.mark.parametrize("bad", [[0], [13], [1.5], [True]])
def test_steps_to_keep_that_are_none(make_training, bad):
    with pytest.raises(ValueError, match="KEEP_STEPS must list steps from 1 to TRAIN_STEPS = 12"):
        make_training(keep_steps=bad)


@pytest.mark.slow
def test_on_the_command_line(tiny_flags, tmp_path, capsys):
    """Sizes, vocabulary and length come from the trunk; the branch warms up again."""
    arguments = ["train", *tiny_flags, "--gin.TRAIN_STEPS=8", "--gin.LOG_PERIOD=1", "--gin.CODE_RATE=0.5"]
    assert cli.main([*arguments, f"--gin.MODEL_DIR={tmp_path / 'trunk'}", "--gin.KEEP_STEPS=[0.5]"]) == 0
    again = [*arguments, f"--gin.MODEL_DIR={tmp_path / 'branch'}", f"--gin.BRANCH_FROM={tmp_path / 'trunk'}@4"]
    assert cli.main(again) == 0, capsys.readouterr().err
    assert losses(str(tmp_path / "branch")) == losses(str(tmp_path / "trunk"), after=4)
    capsys.readouterr()
    warm = [argument for argument in again if "MODEL_DIR" not in argument]
    assert cli.main([*warm, f"--gin.MODEL_DIR={tmp_path / 'warm'}", "--gin.warmup_cosine.begin_step=%BRANCH_STEP",
                     "--dry_run"]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "BRANCH_STEP = 4" in printed and "does not continue the trunk's last" in printed
    provenance = json.loads((tmp_path / "branch" / "provenance.json").read_text())
    assert provenance["ledger"]["branch"]["step"] == 4


@pytest.mark.slow
def test_packed_examples_branch_too(make_training, tmp_path):
    trunk = make_training(stage="tuning", train_steps=8, keep_steps=[3], checkpoint_period=100)
    train(trunk)
    branch = branch_of(trunk, tmp_path, 3)
    train(branch)
    assert losses(branch.model_dir) == losses(trunk.model_dir, after=3)


@pytest.mark.slow
def test_another_mesh_draws_the_same(trunk, tmp_path):
    from codellm_jax.runtime.partitioning import MeshShape

    if jax.device_count() < 2:
        pytest.skip("one device")
    branch = branch_of(trunk, tmp_path, 5, mesh=MeshShape(data=2, fsdp=2, model=2))
    train(branch)
    wanted = losses(trunk.model_dir, after=5)
    for step, (loss, _) in losses(branch.model_dir).items():
        assert loss == pytest.approx(wanted[step][0], rel=1e-5)


def test_constant_shares_are_what_they_were():
    """A plain order's quota is untouched by what branches add."""
    assert constant(0.25).after(0, 0).quota(np.arange(9)).tolist() == constant(0.25).quota(np.arange(9)).tolist()
