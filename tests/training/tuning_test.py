"""The second stage: arms and where they start from, shares of examples, packing, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from codellm_jax import cli
from codellm_jax.runtime.progress import read_records
from codellm_jax.training.plan import describe, make_plan
from codellm_jax.training.train import batch_of_step, train

DECREASE = ["5:5", "6:4", "7:3", "7:3"]
INCREASE = DECREASE[::-1]


@pytest.fixture
def tune(pretrained, tiny_tuning_flags, tmp_path, capsys):
    """Runs an arm from one of the pre-trained runs; returns status, stdout and stderr."""

    def run(arm: str, start: str, *more: str, model_dir: Path | None = None) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.main([
            "train", f"--gin_file=gin/tune_{arm}.gin", f"--gin.INITIAL_CHECKPOINT_PATH={pretrained / start}",
            f"--gin.MODEL_DIR={model_dir or tmp_path / 'run'}", *tiny_tuning_flags, "--gin.TRAIN_STEPS=8", *more])
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize("start, arm, name", [
    ("NL", "text", "NN"), ("NL", "decrease", "NC"), ("CODE", "text", "CN"), ("CODE", "mixed", "CC"),
    ("CODE", "increase", "CC")])
def test_every_arm_by_one_flag(tune, tmp_path, start, arm, name):
    status, printed, errors = tune(arm, start)
    assert status == 0, errors
    assert f"arm of the study: {name}" in printed and "3 layers of 32" in printed
    assert "Parameters from step 4 of" in printed
    lines = read_records(str(tmp_path / "run"))
    shares = {"text": [0] * 8, "mixed": [0.375] * 8, "decrease": [.5] * 2 + [.4] * 2 + [.3] * 4,
              "increase": [.3] * 4 + [.4] * 2 + [.5] * 2}[arm]
    logged, before = [line for line in lines if line["split"] == "train"], 0
    for line in logged:
        step = line["step"]
        # Within one example, of a batch of ten and of all batches since the record before.
        assert abs(line["last_step/example_fraction/code"] - shares[step - 1]) <= 1 / 10
        steps = step - before
        assert abs(line["example_fraction/code"] - sum(shares[before:step]) / steps) <= 1 / (10 * steps)
        before = step
    assert before == 8


@pytest.mark.parametrize("phases", [DECREASE, INCREASE, ["5:3"], {0: "7:3", 0.5: "7:3 to 0:1"},
                                    {0: "1:1", 3: "9:1 to 1:9 cosine"}])
@pytest.mark.parametrize("packing", [True, False])
def test_each_batch_has_the_examples_its_phase_asks_for(make_training, phases, packing):
    """Counted from the arrays themselves, by the source of each document."""
    training = make_training(stage="tuning", mix_phases=phases, code_rate=None, train_steps=20, batch_size=16,
                             packing=packing)
    plan = make_plan(training)
    total = 0
    for step in range(20):
        batch, _ = batch_of_step(training, plan, step)
        documents = [(source, segment) for sources, segments in zip(
            np.asarray(batch.sources), np.asarray(batch.segment_ids), strict=True)
            for source, segment in dict.fromkeys(zip(sources.tolist(), segments.tolist(), strict=True)) if segment]
        assert len(documents) == 16
        code = sum(plan.mixture.order.sources[source].pool == "code" for source, _ in documents)
        total += code
        asked = plan.mixture.order.schedule.asked
        assert abs(code - float(asked((step + 1) * 16) - asked(step * 16))) <= 1
        assert abs(total - float(asked((step + 1) * 16))) <= 0.5


@pytest.mark.slow
def test_packed_and_unpacked_runs_have_the_same_losses(make_training):
    runs = {packing: train(make_training(stage="tuning", packing=packing, batch_size=32)) for packing in (True, False)}
    assert runs[True].plan.rows < runs[False].plan.rows == 32
    lines = [read_records(run.training.model_dir) for run in runs.values()]
    for packed, alone in zip(*lines, strict=True):
        assert packed["step"] == alone["step"] and packed["tokens"] == alone["tokens"]
        assert packed["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    assert runs[True].ledger == runs[False].ledger


def test_the_ledger_counts_targets(make_training):
    """Against the records themselves, tokenized here."""
    training = make_training(stage="tuning", train_steps=6, batch_size=16)
    run = train(training)
    order = run.plan.mixture.order
    draw = order.draw(np.arange(96))
    counted = dict.fromkeys(run.ledger.rows, 0)
    for index, rows in enumerate(run.plan.mixture.training):
        for row in draw.row[draw.source == index]:
            *tokens, prompt, size = rows.read(np.array([row]))[0].tolist()
            counted[rows.name] += size - prompt
    assert run.ledger.tokens == counted
    assert sum(run.ledger.rows.values()) == 96
    trained = [line for line in read_records(training.model_dir) if line["split"] == "train"]
    assert trained[-1]["tokens"] == sum(counted.values())


def test_inputs_and_targets_are_the_records(make_training, tiny_instructions):
    training = make_training(stage="tuning", code_rate=0.5, batch_size=8)
    plan = make_plan(training)
    records = {json.dumps(record) for spec in tiny_instructions.values()
               for record in json.loads(Path(spec["instructions"]).read_text())}
    decode, end = training.vocabulary.decode, training.vocabulary.end_of_document_id
    whole = 0
    for rows in plan.mixture.training:
        for *tokens, prompt, size in rows.read(np.arange(rows.count)).tolist():
            if tokens[size - 1] != end:
                continue  # cut
            whole += 1
            record = {"input": decode(tokens[:prompt]), "target": decode(tokens[prompt : size - 1])}
            assert json.dumps(record) in records
            assert end not in tokens[: size - 1]
    assert whole > 30


def test_what_is_cut_and_left_out_is_told(make_training, tmp_path):
    records = ([{"input": "a b", "target": "c d"}] * 3 + [{"input": "a b", "target": "word " * 50}] * 2
               + [{"input": "word " * 50, "target": "c"}] * 4 + [{"input": "a b", "target": ""}])
    (tmp_path / "mine.json").write_text(json.dumps([r | {"n": n} for n, r in enumerate(records)]))
    import tasks

    definitions = tasks.Definitions(corpora={"text.mine": {"instructions": str(tmp_path / "mine.json"), "holdout": 0}})
    training = make_training(stage="tuning", name="text.mine", definitions=definitions, code_rate=0.0)
    printed = describe(training, make_plan(training))
    assert "text.mine: 2 of 9 examples are cut to 33 tokens; 4 are left out" in printed
    assert ("text.mine, read for train: 9 records are instructions, skipped: 1 empty (first: "
            f"{tmp_path}/mine.json, record 10).") in printed
    assert describe(training, make_plan(training)) == printed  # from the cache too


def test_sizes_are_taken_from_the_run_and_a_mismatch_is_refused(tune, pretrained):
    def refused(*more: str, start: str = "CODE") -> str:
        status, _, errors = tune("text", start, *more)
        lines = errors.strip().splitlines()
        assert status == 1 and len(lines) == 1, errors
        return lines[0]

    assert "was trained with model.layers = 3, here it is 32" in refused(
        "--gin_file=gin/models/2_6b.gin", "--gin.TASK_FEATURE_LENGTHS={'targets': 32}", "--gin.BATCH_SIZE=16")
    assert "was trained with model.activation = 'fast_gelu', here it is 'gelu'" in refused(
        "--gin.model.activation=gelu")
    assert "rows of 32 tokens, here they have 48: set TASK_FEATURE_LENGTHS to as many or fewer" in refused(
        "--gin.TASK_FEATURE_LENGTHS={'targets': 48}")
    assert "name the MODEL_DIR of a run that saved one" in refused(start="nowhere")
    assert cli.main(["train", "--gin_file=gin/tune_text.gin"]) == 1


def test_another_vocabulary_is_refused(tune, tmp_path):
    from codellm_jax.vocabulary import train_vocabulary

    train_vocabulary(["some words of another vocabulary"] * 300, 400, str(tmp_path / "other.model"))
    status, _, errors = tune("text", "NL", f"--gin.VOCABULARY={tmp_path / 'other.model'}")
    assert status == 1 and "was trained with another vocabulary" in errors


def test_a_run_directory_of_the_wrong_stage_is_refused(tune, pretrained, tiny_flags, capsys, tmp_path):
    status, _, errors = tune("text", "NL", model_dir=pretrained / "CODE")
    assert status == 1 and "holds a run of the stage pretraining, but this one is of the stage tuning" in errors
    assert tune("text", "NL")[0] == 0
    assert cli.main(["train", *tiny_flags, f"--gin.MODEL_DIR={tmp_path / 'run'}", "--gin.TRAIN_STEPS=8"]) == 1
    assert "holds a run of the stage tuning, but this one is of the stage pretraining" in capsys.readouterr().err


def test_another_start_in_the_same_directory_is_refused(tune, pretrained, tmp_path):
    assert tune("text", "NL")[0] == 0
    status, _, errors = tune("text", "CODE")
    assert status == 1 and f"started from {pretrained / 'NL'}, not from {pretrained / 'CODE'}" in errors
    status, printed, _ = tune("text", "NL")
    assert status == 0 and "8 of 8 steps are done" in printed


def test_documents_are_refused(tune, tiny_corpora):
    status, _, errors = tune("text", "NL", f"--gin.CORPORA={tiny_corpora}", "--gin.MIXTURE_OR_TASK_NAME=text.tiny")
    assert status == 1 and "text.tiny is a task of documents, without inputs to answer" in errors


def test_a_run_goes_on_when_the_one_it_started_from_is_gone(tiny_tuning_flags, pretrained, tmp_path, capsys):
    shutil.copytree(pretrained / "CODE", tmp_path / "start")
    flags = ["train", "--gin_file=gin/tune_decrease.gin", f"--gin.INITIAL_CHECKPOINT_PATH={tmp_path / 'start'}",
             f"--gin.MODEL_DIR={tmp_path / 'run'}", *tiny_tuning_flags, "--gin.TRAIN_STEPS=4"]
    assert cli.main(flags) == 0
    shutil.rmtree(tmp_path / "start")
    capsys.readouterr()
    assert cli.main(flags) == 0
    assert "4 of 4 steps are done" in capsys.readouterr().out


def test_max_epochs_ends_tuning_before_an_example_comes_again(make_training):
    training = make_training(stage="tuning", max_epochs=1, code_rate=0.75, train_steps=100, batch_size=16)
    plan = make_plan(training)
    assert 0 < plan.last_step < 100 and "MAX_EPOCHS = 1 ends the run at step" in describe(training, plan)
    draw = plan.mixture.order.draw(np.arange(plan.last_step * 16))
    assert draw.epoch.max() == 0
    assert plan.mixture.order.draw(np.arange((plan.last_step + 1) * 16)).epoch.max() == 1
