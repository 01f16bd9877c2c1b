"""Runs that start from published weights: directly, or from an import of them; in a study, too."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from published import POSITIONS, write_llama

from codellm_jax import cli
from codellm_jax.runtime.checkpoints import newest_record
from codellm_jax.runtime.progress import read_records
from codellm_jax.weights import start


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("published") / "llama")


@pytest.fixture(scope="module")
def imported(published: Path) -> Path:
    run = published.parent / "imported"
    assert cli.main(["import", str(published), f"--output={run}"]) == 0
    return run


@pytest.fixture(scope="module")
def own_data(tiny_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of small corpora, whose rows are cached anew, for the vocabulary is the model's."""
    kept = ("--gin.CORPORA", "--gin.MIXTURE", "--gin.WARMUP", "--gin.train.eval_rows")
    return [*(flag for flag in tiny_flags if flag.startswith(kept)),
            f"--gin.CACHE_DIR={tmp_path_factory.mktemp('rows')}", "--gin.TASK_FEATURE_LENGTHS={'targets': 32}"]


def continued(source: Path, run: Path, own_data: list[str], *more: str) -> list[float]:
    """Losses of six steps of continued pre-training."""
    arguments = ["train", "--gin_file=gin/continue_pretrain.gin", *own_data, f"--gin.INITIAL_CHECKPOINT_PATH={source}",
                 f"--gin.MODEL_DIR={run}", "--gin.TRAIN_STEPS=6", "--gin.LOG_PERIOD=1", "--gin.EVAL_PERIOD=6", *more]
    assert cli.main(arguments) == 0
    return [line["loss"] for line in read_records(str(run))]


@pytest.mark.slow
def test_a_folder_and_its_import_start_alike(published, imported, own_data, tmp_path):
    losses = continued(published, tmp_path / "direct", own_data)
    assert losses == continued(imported, tmp_path / "imported", own_data)
    assert losses[-1] < losses[0]
    for name, source in (("direct", published), ("imported", imported)):
        ledger = newest_record(str(tmp_path / name))[1]["ledger"]
        assert ledger["stage"] == "pretraining" and ledger["length"] == 32
        [before] = ledger["before"]
        assert before["stage"] == "imported" and before["model_dir"] == str(source)
        provenance = json.loads((tmp_path / name / "provenance.json").read_text())
        assert provenance["arm"] == "imported-CODE"


def test_a_run_goes_on_when_what_it_started_from_is_gone(published, own_data, tmp_path):
    source = shutil.copytree(published, tmp_path / "source")
    whole = continued(published, tmp_path / "whole", own_data)
    continued(source, tmp_path / "run", own_data, "--gin.CHECKPOINT_PERIOD=3", "--gin.train.keep_last=9")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    (source / "model.safetensors").unlink()
    (source / "config.json").unlink()
    assert continued(source, tmp_path / "run", own_data, f"--gin.VOCABULARY={published}")[-4:] == whole[-4:]


def test_an_import_is_evaluated_tuned_and_written_with(imported, published, tiny_tuning_flags, tmp_path, capsys):
    evaluation = ["eval", "--gin_file=gin/eval.gin", "--gin.TASKS=['logic']", "--gin.QUESTIONS=4"]
    scores = []
    for number, source in enumerate((imported, published)):
        assert cli.main([*evaluation, f"--gin.CHECKPOINT_PATH={source}",
                         f"--gin.evaluate.results_dir={tmp_path / str(number)}"]) == 0, capsys.readouterr().err
        lines = (tmp_path / str(number) / "logic_sample.jsonl").read_text().splitlines()
        scores.append([json.loads(line) for line in lines[1:]])
    assert scores[0] == scores[1]
    tuning = [flag for flag in tiny_tuning_flags if not flag.startswith("--gin.CACHE_DIR")]
    assert cli.main(["train", "--gin_file=gin/tune_mixed.gin", *tuning, f"--gin.CACHE_DIR={tmp_path / 'rows'}",
                     f"--gin.INITIAL_CHECKPOINT_PATH={imported}", f"--gin.MODEL_DIR={tmp_path / 'tuned'}",
                     "--gin.TRAIN_STEPS=3"]) == 0, capsys.readouterr().err
    ledger = newest_record(str(tmp_path / "tuned"))[1]["ledger"]
    assert ledger["length"] == POSITIONS and [stage["stage"] for stage in ledger["before"]] == ["imported"]
    assert "arm of the study: imported-C" in capsys.readouterr().out


def test_results_of_a_folder_lie_beside_runs(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert start.results_folder(str(published)) == "runs/llama/results"
    assert start.results_folder("hf://ORG/NAME@v1") == "runs/ORG--NAME@v1/results"
    assert start.results_folder("runs/mine") == "runs/mine/results"


def test_rows_of_long_models_are_short_in_training(published, tmp_path, monkeypatch):
    source = shutil.copytree(published, tmp_path / "long")
    facts = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": 40_960}
    (source / "config.json").write_text(json.dumps(facts))
    assert start.newest_settings(str(source), training=True)[1]["mixture.lengths"] == "{'targets': 2048}"
    assert start.newest_settings(str(source))[1]["mixture.lengths"] == "{'targets': 40960}"


def test_shorter_rows_take_the_first_positions(pretrained):
    import optax

    from codellm_jax.model.decoder import Decoder, DecoderConfig
    from codellm_jax.runtime.partitioning import MeshShape, make_mesh
    from codellm_jax.runtime.state import abstract_state

    shape = MeshShape(data=-1)
    tables = {}
    for length in (32, 16):
        config = DecoderConfig(layers=3, hidden=32, heads=2, feedforward=64, vocabulary_size=8192, length=length)
        abstract = abstract_state(Decoder(config), optax.identity(), make_mesh(shape), shape).params
        params, record = start.restore_parameters(str(pretrained / "CODE"), abstract, report=lambda line: None)
        assert record["ledger"]["length"] == 32
        tables[length] = {name: np.asarray(params[name]) for name in start.POSITION_TABLES}
        assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, abstract)
    for name, table in tables[32].items():
        np.testing.assert_array_equal(tables[16][name], table[:16])


@pytest.mark.slow
def test_a_study_starts_from_published_weights(published, imported, own_data, tiny_tuning_flags, tmp_path, capsys):
    arms = {"MORE": {"from": str(imported), "stage": "pretraining", "sweep": {"CODE_RATE": [0.0, 0.5]}},
            "MC": {"from": "MORE", "CODE_RATE": 0.5}, "QN": {"from": str(published), "CODE_RATE": 0.0}}
    of_stages = [flag.replace("--gin.", f"--gin.{stage}/", 1) for stage, flags in (
        ("pretraining", own_data), ("tuning", tiny_tuning_flags)) for flag in flags
        if not flag.startswith(("--gin.CACHE_DIR", "--gin.WARMUP"))]
    short = [f"--gin.{stage}/{name}={value}" for stage in ("pretraining", "tuning") for name, value in (
        ("TRAIN_STEPS", 2), ("WARMUP_STEPS", 1), ("EVAL_PERIOD", 2))]
    arguments = ["study", "--gin_file=gin/study.gin", f"--gin.STUDY_DIR={tmp_path / 'study'}", f"--gin.ARMS={arms}",
                 "--gin.SEEDS=[0]", "--gin.PRETRAINING_FILES=['gin/continue_pretrain.gin']",
                 "--gin.evaluation/TASKS=[]", f"--gin.CACHE_DIR={tmp_path / 'rows'}", *of_stages, *short]
    assert cli.main([*arguments, "--dry_run"]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert ["MORE-0.5", "pretraining", str(imported)] in [words[:3] for words in lines]
    assert ["MC-0.5", "tuning", "MORE-0.5"] in [words[:3] for words in lines]
    assert cli.main(arguments) == 0, capsys.readouterr().err
    runs = tmp_path / "study" / "runs"
    arms_of_runs = {run: json.loads((runs / f"{run}.seed0" / "provenance.json").read_text())["arm"]
                    for run in ("MORE-0.0", "MORE-0.5", "MC-0.0", "MC-0.5", "QN")}
    assert arms_of_runs == {"MORE-0.0": "imported-NL", "MORE-0.5": "imported-CODE", "MC-0.0": "imported-NC",
                            "MC-0.5": "imported-CC", "QN": "imported-N"}


@pytest.mark.parametrize(("name", "told"), [
    ("nowhere", "name the MODEL_DIR of a run that saved one"), ("hf://nobody", "is not a name on the hub"),
])
def test_what_is_not_there_is_named(name, told, own_data, tmp_path, capsys):
    path = name if "://" in name else str(tmp_path / name)
    assert cli.main(["train", "--gin_file=gin/continue_pretrain.gin", *own_data, f"--gin.MODEL_DIR={tmp_path / 'run'}",
                     f"--gin.INITIAL_CHECKPOINT_PATH={path}"]) == 1
    error = capsys.readouterr().err
    assert told in error and len(error.strip().splitlines()) == 1, error
