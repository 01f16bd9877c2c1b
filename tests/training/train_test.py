"""The train step and the loop: meshes, microbatches, what a run leaves behind."""

import dataclasses
import functools
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import codellm_jax.training.train as train_module
import tasks
from codellm_jax.mixture.batches import global_batch
from codellm_jax.model import parts
from codellm_jax.model.decoder import Decoder, DecoderConfig, output_head
from codellm_jax.runtime import partitioning
from codellm_jax.runtime.checkpoints import Checkpoints, newest_record
from codellm_jax.runtime.compatibility import require_same_settings
from codellm_jax.runtime.optimization import adamw, decayed
from codellm_jax.runtime.partitioning import MeshShape, batch_sharding, make_mesh
from codellm_jax.runtime.progress import read_records
from codellm_jax.runtime.state import abstract_state, initial_state
from codellm_jax.training.plan import Training, describe, make_plan
from codellm_jax.training.train import summary, train, train_step

CONFIG = DecoderConfig(layers=3, hidden=32, heads=4, feedforward=64, vocabulary_size=8192, length=32)


def losses_on(shape: MeshShape, devices: int, training: Training, steps: int = 4, microbatches: int = 1,
              config: DecoderConfig = CONFIG) -> tuple[list[float], object]:
    """Losses of the first steps, and the parameters after them, on a mesh over the first `devices` devices."""
    mixture = make_plan(training).mixture
    mesh = make_mesh(shape, jax.devices()[:devices])
    model, optimizer = Decoder(config), adamw(optax.constant_schedule(1e-2))
    abstract = abstract_state(model, optimizer, mesh, shape)
    losses = []
    with jax.set_mesh(mesh), nn.logical_axis_rules(shape.all_rules()):
        state = initial_state(model, optimizer, abstract, seed=0)
        step_fn = jax.jit(functools.partial(
            train_step, model=model, optimizer=optimizer, sources=len(mixture.order.sources),
            microbatches=microbatches), donate_argnums=0)
        for step in range(steps):
            batch, _ = global_batch(step, training.batch_size, mixture.order, mixture.training,
                                    training.vocabulary.end_of_document_id, batch_sharding(mesh))
            state, metrics = step_fn(state, batch)
            losses.append(float(metrics.loss))
        return losses, jax.device_get(state.params)


@pytest.fixture(scope="module")
def single_device(make_training):
    return losses_on(MeshShape(), 1, make_training())


@pytest.mark.slow
@pytest.mark.parametrize("shape", [
    MeshShape(data=8), MeshShape(data=1, fsdp=8), MeshShape(data=2, model=4), MeshShape(data=2, fsdp=2, model=2),
    MeshShape(data=4, fsdp=2, slices=2)], ids=["data", "fsdp", "model", "mixed", "slices"])
def test_every_mesh_gives_the_single_device_losses(shape, single_device, make_training):
    losses, params = losses_on(shape, 8, make_training())
    np.testing.assert_allclose(losses, single_device[0], rtol=2e-5)
    for found, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(single_device[1]), strict=True):
        # AdamW turns gradients at rounding level into updates of up to the learning rate, so rare entries may differ.
        assert np.mean(np.abs(found - wanted) > 1e-3) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [True, False])
def test_the_layout_of_tpus_gives_the_same_bits(at_once, make_training, monkeypatch):
    """Output and down kernels by rows, and attention's gathered at once or each by itself, on eight devices."""
    shape, config, training = MeshShape(data=1, fsdp=8), dataclasses.replace(CONFIG, layers=2), make_training()
    expected, _ = losses_on(shape, 8, training, steps=3, config=config)
    gathered = []
    monkeypatch.setattr(partitioning, "is_laid_by_rows", lambda mesh: True)
    monkeypatch.setattr(parts, "_only_rows_are_split", lambda: True)
    monkeypatch.setattr(parts, "gathers_at_once", lambda rows: not gathered.append(rows) and at_once)
    found, _ = losses_on(shape, 8, training, steps=3, config=config)
    assert found == expected and set(gathered) == {32}  # rows of the four kernels


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_give_the_large_batch_update(microbatches, single_device, make_training):
    losses, _ = losses_on(MeshShape(), 1, make_training(), microbatches=microbatches)
    np.testing.assert_allclose(losses, single_device[0], rtol=2e-5)


@pytest.mark.slow
def test_microbatches_on_a_mesh(single_device, make_training):
    losses, _ = losses_on(MeshShape(data=4), 4, make_training(), microbatches=2)
    np.testing.assert_allclose(losses, single_device[0], rtol=2e-5)


def test_losses_of_sources_are_those_of_an_independent_count(make_training):
    training = make_training()
    plan = make_plan(training)
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    batch, draw = global_batch(0, training.batch_size, plan.mixture.order, plan.mixture.training,
                               training.vocabulary.end_of_document_id, batch_sharding(mesh))
    model, optimizer = Decoder(CONFIG), adamw(optax.constant_schedule(1e-3))
    state = initial_state(model, optimizer, abstract_state(model, optimizer, mesh, MeshShape()), seed=0)
    params = state.params
    hidden = jax.jit(model.apply)({"params": params}, batch.inputs, batch.positions, batch.segment_ids)
    logits = np.asarray(hidden @ output_head(params).T, np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses_BL = -np.take_along_axis(log_probabilities, np.asarray(batch.targets)[..., None], -1)[..., 0]
    _, metrics = jax.jit(functools.partial(
        train_step, model=model, optimizer=optimizer, sources=len(plan.mixture.order.sources)))(state, batch)
    np.testing.assert_allclose(float(metrics.loss), losses_BL.mean(), rtol=1e-5)
    for source in range(len(plan.mixture.order.sources)):
        here = draw.source == source
        np.testing.assert_allclose(float(metrics.source_losses[source]), losses_BL[here].sum(), rtol=1e-5)
        assert float(metrics.source_tokens[source]) == here.sum() * training.mixture.length


def test_weight_decay_leaves_out_biases_and_scales(make_training):
    model, optimizer = Decoder(CONFIG), adamw(optax.constant_schedule(1e-3))
    mesh = make_mesh(MeshShape(), jax.devices()[:1])
    mask = decayed(abstract_state(model, optimizer, mesh, MeshShape()).params)
    named = {jax.tree_util.keystr(path): keep for path, keep in jax.tree_util.tree_leaves_with_path(mask)}
    assert {name for name, keep in named.items() if not keep} == {
        name for name in named if "bias" in name or "scale" in name}
    assert any("norm" in name for name, keep in named.items() if not keep)
    assert all(keep for name, keep in named.items() if "kernel" in name or "embedding" in name)


def test_a_run_leaves_what_the_contract_says(make_training):
    training = make_training()
    run = train(training, settings=lambda: ("SEED = 0\n", {"SEED": "0"}))
    model_dir = Path(training.model_dir)
    lines = read_records(str(model_dir))
    trained = [line for line in lines if line["split"] == "train"]
    evaluated = [line for line in lines if line["split"] == "eval"]
    assert [line["step"] for line in trained] == list(range(1, 13))
    assert [line["step"] for line in evaluated] == [0, 6, 12]
    for line in trained:
        assert {"loss", "tokens", "tokens_per_second", "learning_rate", "grad_norm", "data_wait_fraction"} <= set(line)
        assert line["token_fraction/text"] + line["token_fraction/code"] == pytest.approx(1)
        weighted = sum(line[f"loss/{pool}"] * line[f"token_fraction/{pool}"] for pool in ("text", "code")
                       if f"loss/{pool}" in line)
        assert weighted == pytest.approx(line["loss"], rel=1e-5)
    assert trained[-1]["tokens"] == 12 * training.batch_size * training.mixture.length
    assert trained[-1]["loss"] < trained[0]["loss"]
    assert (model_dir / "config.gin").read_text() == "SEED = 0\n"
    assert sorted(path.name for path in (model_dir / "checkpoints").iterdir()) == ["12", "8"]
    assert list((model_dir / "tensorboard").iterdir())
    notes = json.loads((model_dir / "provenance.json").read_text())["notes"]
    assert [note.split(" (")[0] for note in notes] == ["text: held-out documents: 4", "code: held-out documents: 4"]
    assert all(f"WARNING: {note}" in describe(training, run.plan).splitlines() for note in notes)
    text = summary(run)
    for words in ("held-out loss", "text, bits per byte", "text.tiny", "code.tiny", "share asked"):
        assert words in text


@pytest.mark.parametrize("stage", ["pretraining", "tuning"])
def test_bits_per_byte_are_of_the_text_that_is_held_out(make_training, stage):
    """Nats of all counted tokens over the bytes of their text; a row may end within a character."""
    training = make_training(stage=stage, train_steps=1, eval_period=1)
    plan, pieces = train(training).plan, training.vocabulary.bytes_of_ids()
    evaluated = [line for line in read_records(training.model_dir) if line["split"] == "eval"]
    assert [line["step"] for line in evaluated] == [0, 1]
    for source, rows in zip(plan.mixture.order.sources, plan.mixture.validation, strict=True):
        assert rows is not None
        tokens = size = 0
        for row in rows.read(np.arange(min(training.eval_rows, rows.count))).tolist():
            counted = row[1:] if stage == "pretraining" else row[max(1, row[-2]): row[-1]]
            tokens, size = tokens + len(counted), size + len(b"".join(pieces[token] for token in counted))
        assert 0 < size
        for line in evaluated:
            expected = line[f"loss/{source.name}"] * tokens / np.log(2) / size
            assert line[f"bits_per_byte/{source.name}"] == pytest.approx(expected)
            assert line[f"bits_per_byte/{source.pool}"] == pytest.approx(expected)  # each pool has one source


@pytest.mark.slow
def test_realised_shares_are_those_asked_for(make_training):
    for rate in (0.0, 0.1, 1 / 3, 0.9, 1.0):
        training = make_training(code_rate=rate, train_steps=5, eval_period=5, checkpoint_period=5)
        run = train(training)
        rows = 5 * training.batch_size
        code = sum(count for name, count in run.ledger.rows.items() if name.startswith("code."))
        assert abs(code - rate * rows) <= 0.5
        fractions = [line["token_fraction/code"] for line in read_records(training.model_dir)
                     if line["split"] == "train"]
        assert sum(fractions) * training.batch_size == pytest.approx(code)


def test_max_epochs_stops_the_run_before_a_source_repeats(make_training):
    training = make_training(max_epochs=1, code_rate=0.9, train_steps=200, eval_period=200, checkpoint_period=200)
    plan = make_plan(training)
    assert plan.last_step < 200 and "MAX_EPOCHS = 1 ends the run at step" in describe(training, plan)
    run = train(training)
    for source in plan.mixture.order.sources:
        assert run.ledger.rows[source.name] <= source.rows
    assert run.step == plan.last_step


def test_a_stop_during_an_evaluation_saves(make_training, monkeypatch):
    training = make_training(eval_period=3, checkpoint_period=100)
    real = train_module.evaluate

    def stop_at_the_second(run, *rest):
        real(run, *rest)
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train_module, "evaluate", stop_at_the_second)
    run = train(training)
    assert run.step == 3
    assert [path.name for path in (Path(training.model_dir) / "checkpoints").iterdir()] == ["3"]
    monkeypatch.undo()
    assert train(training).step == 12


def test_a_non_finite_loss_names_the_last_good_checkpoint(make_training):
    training = make_training(learning_rate=lambda step: 1e20 * (step >= 5))
    with pytest.raises(FloatingPointError, match=r"at step \d+\. The last good checkpoint is step 4 in"):
        train(training)
    checkpoints = Path(training.model_dir) / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["4"]


def test_a_checkpoint_whose_parameters_give_the_loss_is_set_aside(make_training, capsys):
    """Its own step had a finite loss, which is that of the parameters before."""
    training = make_training(learning_rate=lambda step: 1e20 * (step >= 5), checkpoint_period=3, eval_period=100)
    with pytest.raises(FloatingPointError, match=r"at step 7\. The last good checkpoint is step 3 in"):
        train(training)
    model_dir = Path(training.model_dir)
    assert [path.name for path in (model_dir / "checkpoints").iterdir()] == ["3"]
    assert [path.name for path in (model_dir / "damaged_checkpoints").iterdir()] == ["6"]
    assert "the checkpoint of step 6" in capsys.readouterr().out


@pytest.mark.slow
def test_what_no_later_step_proves_is_proven_at_its_save(make_training):
    last_is_infinite = optax.scale_by_schedule(lambda count: jnp.where(count >= 11, jnp.inf, 1.0))
    training = make_training(eval_period=100, optimizer=lambda schedule: optax.chain(adamw(schedule), last_is_infinite))
    with pytest.raises(FloatingPointError, match=r"at step 12\. The last good checkpoint is step 8 in"):
        train(training)


@pytest.mark.slow
def test_records_without_a_checkpoint_are_set_aside(make_training, capsys):
    training = make_training(train_steps=4)
    train(training)
    model_dir = Path(training.model_dir)
    before = {name: (model_dir / name).read_bytes() for name in ("metrics.jsonl", "provenance.json")}
    losses = [line["loss"] for line in read_records(str(model_dir))]
    shutil.rmtree(model_dir / "checkpoints")
    train(training)
    assert "records of 4 steps and no checkpoint to go on from" in capsys.readouterr().out
    assert {name: (model_dir / "set_aside" / "1" / name).read_bytes() for name in before} == before
    assert [line["loss"] for line in read_records(str(model_dir))] == losses


def removed(model_dir: Path) -> None:
    shutil.rmtree(model_dir)


def moved(model_dir: Path) -> None:
    model_dir.rename(model_dir.with_name("moved"))


def replaced(model_dir: Path) -> None:
    shutil.rmtree(model_dir)
    (model_dir / "checkpoints").mkdir(parents=True)
    (model_dir / ".lock").touch()


@pytest.mark.slow
@pytest.mark.parametrize("gone", [removed, moved, replaced])
def test_a_directory_that_goes_away_ends_the_run(make_training, tmp_path, monkeypatch, gone):
    training = make_training(model_dir=str(tmp_path / "run"))
    monkeypatch.setattr(train_module, "stops", lambda stop, step, period: step == 5 and gone(tmp_path / "run"))
    with pytest.raises(OSError, match=r"^MODEL_DIR .*/run was moved, removed or replaced during training: ") as raised:
        train(training)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_a_file_of_records_that_goes_away_is_written_again(make_training, tmp_path, monkeypatch, capsys):
    whole, training = make_training(), make_training(model_dir=str(tmp_path / "run"))
    train(whole)
    monkeypatch.setattr(train_module, "stops", lambda stop, step, period: step == 5 and (
        tmp_path / "run" / "metrics.jsonl").unlink())
    train(training)
    assert "metrics.jsonl was removed or replaced; it is written again" in capsys.readouterr().out
    found, wanted = ([(line["step"], line["split"], line["loss"]) for line in read_records(model_dir)]
                     for model_dir in (training.model_dir, whole.model_dir))
    assert found == wanted


@pytest.mark.slow
def test_checkpoints_that_go_away_are_saved_again(make_training, tmp_path, monkeypatch, capsys):
    training = make_training(model_dir=str(tmp_path / "run"))
    checkpoints, gone, wait = tmp_path / "run" / "checkpoints", [], Checkpoints.wait

    def remove_after_the_last(self: Checkpoints) -> None:
        wait(self)
        if not gone and (checkpoints / "12").exists():
            gone.append(shutil.rmtree(checkpoints))

    monkeypatch.setattr(Checkpoints, "wait", remove_after_the_last)
    train(training)
    assert "the checkpoint of step 12 was removed; it is saved again" in capsys.readouterr().out
    assert [path.name for path in checkpoints.iterdir()] == ["12"] and gone
    assert newest_record(training.model_dir)[0] == 12


def test_warm_start_takes_parameters_alone(make_training, tmp_path):
    first = train(make_training(model_dir=str(tmp_path / "first")))
    second = make_training(model_dir=str(tmp_path / "second"), initial_checkpoint_path=str(tmp_path / "first"))
    train(second)
    ended = [line for line in read_records(str(tmp_path / "first")) if line["split"] == "eval"][-1]
    began = [line for line in read_records(str(tmp_path / "second")) if line["split"] == "eval"][0]
    assert began["step"] == 0 and began["loss"] == ended["loss"]
    assert first.step == 12
    with pytest.raises(FileNotFoundError, match="There is no directory .*nothing"):
        train(make_training(model_dir=str(tmp_path / "third"), initial_checkpoint_path=str(tmp_path / "nothing")))


def test_a_run_directory_of_another_configuration_is_refused(make_training):
    training = make_training(train_steps=4, eval_period=4)
    train(training, settings=lambda: ("", {"CODE_RATE": "0.5", "EVAL_PERIOD": "4"}))
    with pytest.raises(ValueError, match=r"another configuration: CODE_RATE was 0.5, is 0.6"):
        train(training, settings=lambda: ("", {"CODE_RATE": "0.6", "EVAL_PERIOD": "9"}))
    require_same_settings({"EVAL_PERIOD": "4"}, {"EVAL_PERIOD": "5"}, "run")


def test_a_ledger_of_other_data_is_refused(make_training, tmp_path):
    """The same names and settings over other documents, as after an edit of a corpus."""
    def training(words: str):
        (tmp_path / "mine.jsonl").write_text((json.dumps({"text": words}) + "\n") * 40)
        corpora = {"text.mine": {"json_lines": str(tmp_path / "mine.jsonl"), "holdout": 0}}
        return make_training(name=["text.mine"], definitions=tasks.Definitions(corpora=corpora), code_rate=0.0,
                             train_steps=4, cache_dir=str(tmp_path / "cache"), model_dir=str(tmp_path / "run"))

    train(training("a row of tokens is read by its number and never lost"))
    with pytest.raises(ValueError, match="trained on other data"):
        train(training("a row of tokens was read by its number and never found"))


def test_dropout_differs_by_step_and_repeats_by_seed(make_training):
    config = DecoderConfig(layers=2, hidden=32, heads=4, feedforward=64, vocabulary_size=8192, length=32,
                           dropout_rate=0.5)
    once, _ = losses_on(MeshShape(), 1, make_training(), steps=2, config=config)
    again, _ = losses_on(MeshShape(), 1, make_training(), steps=2, config=config)
    assert once == again
