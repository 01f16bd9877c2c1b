"""Checkpoints of upstream T5X as runs and back: the same arrays, by the names that T5X has for them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from codellm_jax import cli
from codellm_jax.runtime import parts
from codellm_jax.runtime.checkpoints import checksums, record_of
from codellm_jax.runtime.state import TrainState
from codellm_jax.upstream.adopt import settings_of
from codellm_jax.upstream.trees import copy_state, give_state

HERE = Path(__file__).parent
# As T5X writes it where a file of gin/t5x/ was used, in parts.
CONFIG = """
from __gin__ import dynamic_registration
import __main__ as train_script
from codellm_jax.mixture import mixture
from codellm_jax.model import decoder
from codellm_jax.training import plan
import tasks
from t5x import utils

# Macros:
# ==============================================================================
BATCH_SIZE = 8
CACHE_DIR = {cache!r}
CODE_RATE = {rate}
CORPORA = \\
    {corpora!r}
LEARNING_RATE = 0.001
MODEL_DIR = '/elsewhere'
RANDOM_SEED = {seed}
SOURCES = {sources!r}
STAGE = {stage!r}
TASK_FEATURE_LENGTHS = {lengths!r}
TRAIN_STEPS = 4
WARMUP_STEPS = 2
INITIAL_CHECKPOINT_PATH = '/gone/checkpoint_4'

# Parameters for utils.DatasetConfig:
train/utils.DatasetConfig.batch_size = %BATCH_SIZE
train/utils.DatasetConfig.mixture_or_task_name = @rows.ordered_rows()
utils.RestoreCheckpointConfig.path = []
vocabulary.load_vocabulary.path = 'python_8k'
tasks.Definitions.corpora = %CORPORA
tasks.Definitions.modules = ['tasks.pretraining']
mixture.Mixture.cache_dir = %CACHE_DIR
mixture.Mixture.code_rate = %CODE_RATE
mixture.Mixture.definitions = @tasks.Definitions()
mixture.Mixture.lengths = %TASK_FEATURE_LENGTHS
mixture.Mixture.name = %SOURCES
mixture.Mixture.stage = %STAGE
decoder.DecoderConfig.activation = 'fast_gelu'
decoder.DecoderConfig.feedforward = 64
decoder.DecoderConfig.heads = 2
decoder.DecoderConfig.hidden = 32
decoder.DecoderConfig.layers = 3
optimization.warmup_cosine.peak = %LEARNING_RATE
optimization.warmup_cosine.warmup_steps = %WARMUP_STEPS
plan.Training.batch_size = %BATCH_SIZE
plan.Training.learning_rate = @optimization.warmup_cosine()
plan.Training.model = @decoder.DecoderConfig
plan.Training.model_dir = %MODEL_DIR
plan.Training.optimizer = {optimizer}
plan.Training.seed = %RANDOM_SEED
plan.Training.train_steps = %TRAIN_STEPS
"""


def read_on_host(path: Path) -> Any:
    """A tree of arrays that Orbax wrote, in memory, whatever devices it was saved from."""
    handler = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    tree = handler.metadata(path).item_metadata.tree
    return handler.restore(path, ocp.args.PyTreeRestore(
        restore_args=jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), tree)))


def config(**values: Any) -> str:
    return CONFIG.format(**{"cache": "c", "rate": 0.5, "corpora": {}, "seed": 0, "sources": "python_text_code",
                            "lengths": {"targets": 256}, "optimizer": "@optimization.adamw",
                            "stage": "pretraining"} | values)


@pytest.fixture
def theirs(pretrained: Path, tmp_path: Path, tiny_corpora: dict[str, Any], tiny_cache: str) -> Path:
    """A model directory of T5X with the state that a run of this package has after four steps."""
    state = read_on_host(pretrained / "CODE" / "checkpoints" / "4" / "state")

    def as_state_dict(tree: Any) -> Any:
        if isinstance(tree, list):
            found = {str(number): as_state_dict(part) for number, part in enumerate(tree)}
        elif isinstance(tree, dict):
            found = {name: as_state_dict(part) for name, part in tree.items()}
        else:
            return tree
        return {name: part for name, part in found.items() if part is not None and not (
            isinstance(part, dict) and not part)}

    tree = {"target": state["params"],
            "state": {"step": state["step"], "param_states": as_state_dict(state["opt_state"])}}
    folder = tmp_path / "t5x"
    ocp.PyTreeCheckpointer().save(folder / "checkpoint_4" / "state", tree)
    (folder / "checkpoint_10.orbax-checkpoint-tmp-3").mkdir()
    (folder / "config.gin").write_text(config(
        cache=tiny_cache, corpora=tiny_corpora, sources=list(tiny_corpora), lengths={"targets": 32}))
    return folder


def test_settings_are_those_of_the_stage_and_what_differs(tmp_path: Path):
    (tmp_path / "config.gin").write_text(config(seed=3, optimizer="@optax.adafactor"))
    base, found = settings_of(epath.Path(tmp_path))
    assert base == "gin/pretrain.gin"
    assert dict(found) == {
        "CACHE_DIR": "'c'", "CODE_RATE": "0.5", "SEED": "3", "TRAIN_STEPS": "4", "WARMUP_STEPS": "2",
        "mixture.stage": "'pretraining'", "model.activation": "'fast_gelu'", "model.feedforward": "64",
        "model.heads": "2", "model.hidden": "32", "model.layers": "3", "train.optimizer": "@optax.adafactor"}


def test_settings_of_tuning_stand_on_what_it_takes_over(tmp_path: Path):
    (tmp_path / "config.gin").write_text(config(stage="tuning", sources="python_instructions"))
    base, found = settings_of(epath.Path(tmp_path))
    assert base == "gin/tune.gin"
    assert {"VOCABULARY": "'python_8k'", "TASK_FEATURE_LENGTHS": "{'targets': 256}", "BATCH_SIZE": "8"}.items() <= dict(
        found).items()
    assert not {"mixture.stage", "MIXTURE_OR_TASK_NAME", "INITIAL_CHECKPOINT_PATH", "MODEL_DIR"} & dict(found).keys()


def test_an_adopted_run_is_the_run_itself(theirs: Path, pretrained: Path, tmp_path: Path,
                                          capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "run"
    assert cli.main(["adopt", str(theirs), f"--output={run}"]) == 0
    assert "step 4 of 4" in capsys.readouterr().out
    own, adopted = record_of(str(pretrained / "CODE"), 4), record_of(str(run), 4)
    for fact in ("checksums", "ledger", "place"):
        assert adopted[fact] == own[fact]
    differing = {name for name in own["settings"] if own["settings"][name] != adopted["settings"].get(name)}
    assert differing <= {"MODEL_DIR", "train.eval_rows"}
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["finished"] and provenance["arm"] == "CODE" and provenance["step"] == 4
    assert [session["runner"] for session in provenance["sessions"]] == ["t5x"]
    # And there again.
    assert cli.main(["adopt", str(run), f"--output={tmp_path / 'back'}", "--to=t5x"]) == 0
    before, after = (read_on_host(folder / "checkpoint_4" / "state")
                     for folder in (theirs, tmp_path / "back"))
    assert jax.tree.structure(before) == jax.tree.structure(after)
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.slow
def test_an_adopted_run_goes_on_as_one_that_was_never_given_away(tiny_flags: list[str], tmp_path: Path):
    flags = [*tiny_flags, "--gin.TRAIN_STEPS=8", "--gin.CHECKPOINT_PERIOD=4"]
    whole, theirs, adopted = (str(tmp_path / name) for name in ("whole", "t5x", "adopted"))
    assert cli.main(["train", *flags, f"--gin.MODEL_DIR={whole}"]) == 0
    assert cli.main(["adopt", f"{whole}@4", f"--output={theirs}", "--to=t5x"]) == 0
    assert cli.main(["adopt", theirs, f"--output={adopted}", *flags]) == 0
    assert cli.main(["train", *flags, f"--gin.MODEL_DIR={adopted}"]) == 0
    assert (tmp_path / "adopted" / "checkpoints" / "4").is_dir()
    for fact in ("checksums", "ledger", "place"):
        assert record_of(adopted, 8)[fact] == record_of(whole, 8)[fact]


@pytest.mark.parametrize(("arguments", "said"), [
    (["{t5x}", "--output={t5x}"], "exists already"),
    (["{nothing}", "--output={new}"], "No checkpoint_STEP/state"),
    (["{run}", "--output={new}"], "is a run of this package already"),
    (["{t5x}", "--output={new}", "--gin.model.layers=5"], "another model or optimizer"),
    (["{t5x}", "--output={new}", "--gin.TRAIN_STEPS=3"], "--gin.TRAIN_STEPS=4"),
    (["{run}@3", "--output={new}", "--to=t5x"], "No checkpoint of step 3"),
    (["{t5x}", "--output={new}", "--to=t5x"], "is upstream T5X's"),
], ids=["output", "no checkpoint", "own run", "other model", "fewer steps", "no step", "to what it is"])
def test_mistakes_are_one_line(arguments: list[str], said: str, theirs: Path, pretrained: Path, tmp_path: Path,
                               capsys: pytest.CaptureFixture[str]):
    (tmp_path / "nothing").mkdir()
    names = {"t5x": theirs, "run": pretrained / "CODE", "new": tmp_path / "new", "nothing": tmp_path / "nothing"}
    assert cli.main(["adopt", *(argument.format(**names) for argument in arguments)]) == 1
    told = capsys.readouterr().err
    assert told.startswith("t5x adopt: error: ") and said in told and told.count("\n") == 1


def test_a_damaged_tree_or_another_config_is_told(theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    whole = (theirs / "config.gin").read_text()
    (theirs / "config.gin").write_text("BATCH_SIZE = 8\n")
    assert cli.main(["adopt", str(theirs), f"--output={tmp_path / 'new'}"]) == 1
    assert "was not made from a file in gin/t5x/" in capsys.readouterr().err
    shutil.copytree(theirs / "checkpoint_4", theirs / "checkpoint_6")
    for file in (theirs / "checkpoint_6" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    (theirs / "config.gin").write_text(config(stage="tuning"))
    assert cli.main(["adopt", str(theirs), f"--output={tmp_path / 'new'}"]) == 1
    assert "was tuned: give --gin.INITIAL_CHECKPOINT_PATH=RUN" in capsys.readouterr().err
    (theirs / "config.gin").write_text(whole)
    assert cli.main(["adopt", str(theirs), f"--output={tmp_path / 'new'}"]) == 1
    told = capsys.readouterr().err
    assert "checkpoint_6" in told and told.count("\n") == 1


def state_of(rows: int, columns: int, layers: int, arrays: int) -> TrainState:
    """A state with arrays of layers, of rows, and of neither."""
    made = [np.random.default_rng(number).integers(0, 2**32, (layers, rows, columns), np.uint32).view(np.float32)
            for number in range(arrays)]
    params = {"blocks": {f"kernel_{number}": array for number, array in enumerate(made)},
              "embedding": np.arange(rows * columns, dtype=np.float32).reshape(rows, columns),
              "scale": np.arange(rows, dtype=np.float32)}
    step = np.array(7, np.int32)
    return TrainState(step, params, ({"count": step}, None), np.arange(2, dtype=np.uint32))


def as_t5x_has_it(state: TrainState) -> dict[str, Any]:
    return {"target": state.params, "state": {"step": state.step, "param_states": {"0": state.opt_state[0]}}}


@pytest.mark.parametrize(("stored", "in_one"), [(24, True), (70, True), (10**6, True), (10**6, False)],
                         ids=["a row", "some rows", "all", "a folder each"])
def test_arrays_of_many_chunks_are_copied_whole(
        stored: int, in_one: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parts, "CHUNK", 32)
    state = state_of(rows=5, columns=3, layers=4, arrays=1)
    tree, theirs = as_t5x_has_it(state), epath.Path(tmp_path / "checkpoint_7")
    ocp.PyTreeCheckpointer(use_ocdbt=in_one).save(
        theirs / "state", tree, save_args=jax.tree.map(lambda leaf: ocp.SaveArgs(chunk_byte_size=stored), tree))
    ours = epath.Path(tmp_path / "run" / "checkpoints" / "7")
    found = copy_state(theirs, 7, state, state.rng, ours)
    assert found == checksums(state)
    restored = ocp.StandardCheckpointer().restore(ours / "state", state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    give_state(str(tmp_path / "run"), 7, {"checksums": found}, epath.Path(tmp_path / "back"))
    jax.tree.map(np.testing.assert_array_equal, read_on_host(tmp_path / "back" / "checkpoint_7" / "state"), tree)


@pytest.mark.slow
def test_memory_is_that_of_an_array(tmp_path: Path):
    """Of 12 arrays of 32 MiB, each stored as one, a few are held at a time, with what waits to be written.

    The allocator returns at once what is freed, so that its own reserves, which grow with the load, are not measured.
    """
    arrays, (layers, rows, columns) = 12, (8, 1024, 1024)
    size = 4 * layers * rows * columns
    for name, state in (("small", state_of(4, 4, 2, 1)), ("large", state_of(rows, columns, layers, arrays))):
        ocp.PyTreeCheckpointer().save(tmp_path / name / "state", as_t5x_has_it(state))
    script = """
import sys
import jax, numpy as np
from etils import epath
from adopt_test import state_of
from codellm_jax.upstream.trees import copy_state
from tests.peak import peak_bytes
folder = epath.Path(sys.argv[1])
def peak(name, rows, columns, layers, arrays):  # shapes of a small state: `state_of` makes its arrays
    shapes = {(2, 4, 4): (layers, rows, columns), (4, 4): (rows, columns), (4,): (rows,)}
    abstract = jax.tree.map(lambda array: jax.ShapeDtypeStruct(shapes.get(array.shape, array.shape), array.dtype),
                            state_of(4, 4, 2, arrays))
    copy_state(folder / name, 7, abstract, np.arange(2, dtype=np.uint32), folder / ("run_" + name) / "7")
    return peak_bytes()
sizes = [int(size) for size in sys.argv[2:]]
print(-peak("small", 4, 4, 2, 1) + peak("large", *sizes))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path, *map(str, (rows, columns, layers, arrays))], text=True,
        capture_output=True, check=True, env=os.environ | {
            "PYTHONPATH": os.pathsep.join([*sys.path, str(HERE)]), "MALLOC_MMAP_THRESHOLD_": str(2**20)})
    assert int(done.stdout) < 3 * size + 2**27
