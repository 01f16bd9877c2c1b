"""Exports: what lies in the folder, bit by bit, and what is left of one that fails."""

import hashlib
import json
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import yaml
from safetensors import safe_open

from codellm_jax import cli
from codellm_jax.runtime.parts import saved_parameters
from codellm_jax.vocabulary import Vocabulary
from codellm_jax.weights import exporting
from codellm_jax.weights.exporting import export
from codellm_jax.weights.importing import import_run
from codellm_jax.weights.layouts import decoder_values, published_tensors
from codellm_jax.weights.writing import parse_size

ROOT = Path(__file__).resolve().parents[2]
FILES = {"README.md", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


def exported(run: Path, folder: Path, **options: Any) -> dict[str, np.ndarray]:
    """Exports a run; all tensors of the folder, read by the library safetensors."""
    export(str(run), str(folder), report=lambda line: None, **options)
    return tensors_of(folder)


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as opened:
            assert opened.metadata() == {"format": "pt"}
            found |= {name: opened.get_tensor(name) for name in opened.keys()}
    return found


def leaves_of(params: Any) -> dict[str, np.ndarray]:
    paths = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in paths}


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def test_every_number_comes_back_by_an_import(
    decoder: tuple[str, dict[str, Any]], save_run: Callable[..., Any], tmp_path: Path, vocabulary: Vocabulary
) -> None:
    family, values = decoder
    run, config, params = save_run(values)
    tensors = exported(run, tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "config.json").read_text())
    assert facts["model_type"] == family and facts["torch_dtype"] == "float32"
    read = decoder_values(facts)
    assert read["vocabulary_size"] == vocabulary.size > vocabulary.pieces
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        tensor.name: tensor.shape for tensor in published_tensors(facts, config)}
    imported = tmp_path / "imported"
    import_run(str(tmp_path / "out"), str(imported), report=lambda line: None)
    saved = next(saved_parameters(str(imported)))
    assert_same_bits({name: saved.read(name) for name in saved.shapes}, leaves_of(params))
    # And what is imported and exported again is what was imported.
    assert_same_bits(exported(imported, tmp_path / "again"), tensors)
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert decoder_values(again) == read and again["model_type"] == family


def test_dtypes_of_an_import_stay(save_run: Callable[..., Any], tmp_path: Path) -> None:
    """Most tensors in bfloat16 and the norms in float32, as some models are published."""
    from safetensors.numpy import save_file

    run, _, _ = save_run({"query_layer": False})
    published = {name: tensor if ".ln_" in name else tensor.astype(ml_dtypes.bfloat16)
                 for name, tensor in exported(run, tmp_path / "out").items()}
    save_file(published, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    import_run(str(tmp_path / "out"), str(tmp_path / "imported"), report=lambda line: None)
    assert_same_bits(exported(tmp_path / "imported", tmp_path / "again"), published)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    card = (tmp_path / "again" / "README.md").read_text()
    digest = hashlib.sha256((tmp_path / "out" / "model.safetensors").read_bytes()).hexdigest()
    assert "Exported by codellm_jax as it was imported." in card and "| source | out |" in card
    assert f"bytes, SHA-256 {digest} |" in card and str(tmp_path) not in card and "Arm of" not in card
    wide = exported(tmp_path / "imported", tmp_path / "wide", dtype="float32")
    assert {str(tensor.dtype) for tensor in wide.values()} == {"float32"}


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)])
def test_narrower_dtypes_are_rounded_to_nearest(
    dtype: str, kind: Any, save_run: Callable[..., Any], tmp_path: Path
) -> None:
    run, _, _ = save_run({})
    wide = exported(run, tmp_path / "wide")
    assert_same_bits(exported(run, tmp_path / "out", dtype=dtype),
                     {name: array.astype(kind) for name, array in wide.items()})


def test_what_float16_cannot_hold_is_refused(
    save_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _, _ = save_run({})
    arrays = exporting._arrays
    monkeypatch.setattr(exporting, "_arrays", lambda *given: (1e6 * array for array in arrays(*given)))
    with pytest.raises(ValueError, match="transformer.wte.weight has numbers beyond the range of float16"):
        export(str(run), str(tmp_path / "out"), dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_shards_are_no_larger_than_asked_and_hold_all(save_run: Callable[..., Any], tmp_path: Path) -> None:
    run, _, _ = save_run({"layers": 6})
    whole = exported(run, tmp_path / "whole")
    assert {path.name for path in (tmp_path / "whole").iterdir()} == FILES | {
        "model.safetensors", "modeling_codellm.py"}
    sharded = exported(run, tmp_path / "sharded", max_shard_size="16KB")
    assert_same_bits(sharded, whole)
    files = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in whole.values())
    for file in files:
        with safe_open(file, "np") as opened:
            names = list(opened.keys())
        assert names and all(index["weight_map"][name] == file.name for name in names)
        assert file.stat().st_size <= 16_000 or len(names) == 1
    assert index["weight_map"].keys() == whole.keys() and len(files) > 4


@pytest.mark.parametrize(("text", "size"), [
    ("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("1kb", 1000), ("1.5GiB", 3 * 2**29), ("7000", 7000)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_a_model_card(save_run: Callable[..., Any], tmp_path: Path, vocabulary: Vocabulary) -> None:
    tuned = {"stage": "tuning", "rows": {"text.x|y": 3, "code.z": 1}, "tokens": {"text.x|y": 12, "code.z": 5},
             "epoch_rows": {"text.x|y": 2, "code.z": 4}, "before": [{
                 "stage": "pretraining", "rows": {"text.a": 30}, "tokens": {"text.a": 960}, "length": 32,
                 "phases": [{"start": 0, "rows": {"text.a": 30}}], "model_dir": "/home/me/secret/first", "step": 15,
                 "digest": "d" * 64}]}
    run, config, _ = save_run({}, ledger=tuned)
    code = {"version": "0.1.0", "commit": "c" * 40, "dirty": True}
    (run / "provenance.json").write_text(json.dumps({"code": code}))
    export(str(run), str(tmp_path / "out"), report=lambda line: None)
    _, head, card = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head) == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": [
        "codellm_jax", "codellm", "custom_code", "pretraining", "tuning"]}
    digest = next(saved_parameters(str(run))).record["digest"]
    for line in (
            "### 1. pretraining, 15 steps, rows of 32 tokens", "| text.a | 30 | 960 | not known | 1.0000 |",
            "### 2. tuning, 3 steps, rows of 32 tokens", "| text.x\\|y | 3 | 12 | 1.50 | 0.7500 |",
            "| code.z | 1 | 5 | 0.25 | 0.2500 |", "| seed | 7 |", f"| checkpoint | step 3, digest {digest} |",
            f"| checkpoint of stage 1 | first, step 15, digest {'d' * 64} |", "LEARNING_RATE = 0.5",
            f"| codellm_jax | version 0.1.0, commit {'c' * 40}, with uncommitted changes |"):
        assert line in card.splitlines(), line
    assert "trust_remote_code=True" in card and "/home" not in card
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": vocabulary.end_of_document_id, "pad_token_id": vocabulary.pad_id}


def damage(run: Path, step: int) -> None:
    """Changes bytes in the middle of the largest file of a checkpoint."""
    file = max((path for path in (run / "checkpoints" / str(step) / "state").rglob("*") if path.is_file()),
               key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    for place in range(len(content) // 2, len(content) // 2 + 64):
        content[place] ^= 0xFF
    file.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over(save_run: Callable[..., Any], tmp_path: Path) -> None:
    run, _, _ = save_run({}, steps=(1, 2))
    expected = exported(Path(f"{run}@1"), tmp_path / "first")
    damage(run, 2)
    said: list[str] = []
    export(str(run), str(tmp_path / "out"), report=said.append)
    assert len(said) == 2 and "step 2" in said[0] and "is damaged" in said[0] and said[1].startswith("Step 1 of")
    assert_same_bits(tensors_of(tmp_path / "out"), expected)
    with pytest.raises(ValueError, match="The checkpoint of step 2 in .* is damaged: restore"):
        export(f"{run}@2", str(tmp_path / "other"), report=said.append)
    damage(run, 1)
    with pytest.raises(ValueError, match="All checkpoints in .* are damaged"):
        export(str(run), str(tmp_path / "other"), report=said.append)
    assert not (tmp_path / "other").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(("arguments", "message"), [
    (["{run}@7", "--output={out}"], "No checkpoint of step 7 in .*; there are those of steps 1, 3"),
    (["{run}@last", "--output={out}"], "must end in a step number"),
    (["{run}nowhere", "--output={out}"], "There is no directory"),
    (["{run}", "--output={out}", "--dtype=bf16"], "--dtype must be one of float32, bfloat16, float16, found 'bf16'"),
    (["{run}", "--output={out}", "--max_shard_size=5XB"], "--max_shard_size must be a size such as 5GB"),
    (["{run}", "--output={out}", "--max_shard_size=0GB"], "--max_shard_size must be a size such as 5GB"),
    (["{run}", "--output={run}"], "holds checkpoints: name a new folder"),
    (["{run}", "--output={run}/file"], "is a file: name a new folder"),
    (["{run}", "--output={out}", "--vocabulary=gone.model"], "gone.model.* If it was moved, name it with --vocabulary"),
    (["{run}", "--output={run}/file/out"], "failed: "),
])
def test_mistakes_are_one_line(
    arguments: list[str], message: str, save_run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _, _ = save_run({}, steps=(1, 3))
    file = run / "file"
    if any("/file" in argument for argument in arguments):
        file.write_text("")
    assert cli.main(["export", *(text.format(run=run, out=tmp_path / "out") for text in arguments)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error), error
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_an_empty_folder_is_taken_and_a_full_one_left(save_run: Callable[..., Any], tmp_path: Path) -> None:
    run, _, _ = save_run({})
    (tmp_path / "out").mkdir()
    tensors = exported(run, tmp_path / "out")
    with pytest.raises(FileExistsError, match="holds README.md and more"):
        export(str(run), str(tmp_path / "out"))
    assert_same_bits(tensors_of(tmp_path / "out"), tensors)


@pytest.fixture
def no_room() -> Iterator[None]:
    """As on a full disk: no file can grow beyond 256 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_nothing(
    save_run: Callable[..., Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run, _, _ = save_run({})
    request.getfixturevalue("no_room")
    with pytest.raises(OSError, match="Writing .*out failed: .*Nothing of it remains") as raised:
        export(str(run), str(tmp_path / "out"))
    assert "\n" not in str(raised.value) and [path.name for path in tmp_path.iterdir()] == ["run"]


# The command, killed in the midst of so many tensors' writing.
KILLED = """
import os, signal, sys
from codellm_jax import cli
from codellm_jax.weights import exporting
arrays, left = exporting._arrays, int(sys.argv[1])
def some(tensors, read):
    global left
    for array in arrays(tensors, read):
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        yield array
exporting._arrays = some
cli.main(sys.argv[2:])
"""


def run_until_killed(tensors: int, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tensors), *arguments], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_one_that_is_killed_passes_for_nothing(save_run: Callable[..., Any], tmp_path: Path) -> None:
    run, _, _ = save_run({})
    run_until_killed(20, "export", str(run), f"--output={tmp_path / 'out'}")
    left = list(tmp_path.glob(".out.*"))
    assert not (tmp_path / "out").exists() and left and list(left[0].rglob("*.safetensors"))
    exported(run, tmp_path / "out")
    assert not list(tmp_path.glob(".*"))


def losses_of(run: Path) -> list[Any]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line.get("gradient_norm")) for line in lines]


@pytest.mark.slow
def test_a_run_exports_while_it_trains(tiny_flags: list[str], tmp_path: Path) -> None:
    """From parameters sharded over a mesh; what it exports is what its checkpoints hold, and it trains as without."""
    for name, more in (("plain", []), ("run", ["--gin.EXPORT_PERIOD=4"])):
        assert cli.main(["train", *tiny_flags, f"--gin.MODEL_DIR={tmp_path / name}", "--gin.TRAIN_STEPS=6",
                         "--gin.CHECKPOINT_PERIOD=2", "--gin.LOG_PERIOD=1", "--gin.mesh.fsdp=2", "--gin.mesh.model=2",
                         "--gin.BATCH_SIZE=4", *more]) == 0
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "plain")
    folder = tmp_path / "run" / "exports"
    assert sorted(path.name for path in folder.iterdir()) == ["4", "6"]
    for step in (4, 6):
        export(f"{tmp_path / 'run'}@{step}", str(tmp_path / str(step)), report=lambda line: None)
        for file in (tmp_path / str(step)).iterdir():
            if file.name != "README.md":  # which names the checkpoint
                assert (folder / str(step) / file.name).read_bytes() == file.read_bytes(), file
    card = (folder / "4" / "README.md").read_text()
    assert "| checkpoint | step 4, written while training |" in card and re.search(r"\| text.tiny \| \d+ \|", card)


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_exports_goes_on(tiny_flags: list[str], tmp_path: Path) -> None:
    flags = ["train", *tiny_flags, f"--gin.MODEL_DIR={tmp_path / 'run'}", "--gin.TRAIN_STEPS=6", "--gin.BATCH_SIZE=8",
             "--gin.CHECKPOINT_PERIOD=2"]
    run_until_killed(70, *flags, "--gin.EXPORT_PERIOD=2")  # each has 54
    folder = tmp_path / "run" / "exports"
    assert [path.name for path in folder.iterdir() if path.name[0] != "."] == ["2"] and list(folder.glob(".4.*"))
    first = tensors_of(folder / "2")
    assert cli.main([*flags, "--gin.EXPORT_PERIOD=4"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["2", "4", "6"]
    assert_same_bits(tensors_of(folder / "2"), first)
    for step in (4, 6):
        expected = exported(Path(f"{tmp_path / 'run'}@{step}"), tmp_path / str(step))
        assert_same_bits(tensors_of(folder / str(step)), expected)


@pytest.mark.slow
def test_an_export_that_fails_does_not_end_the_run(
    tiny_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("codellm_jax.training.train.set_earlier_aside", lambda *_: None)  # the file would be moved
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "exports").write_text("a file where a folder should be")
    assert cli.main(["train", *tiny_flags, f"--gin.MODEL_DIR={tmp_path / 'run'}", "--gin.TRAIN_STEPS=4",
                     "--gin.EXPORT_PERIOD=4", "--gin.BATCH_SIZE=8"]) == 0
    assert "WARNING: the export after step 4 failed: Writing" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoints" / "4").is_dir()


@pytest.mark.slow
def test_memory_is_that_of_a_tensor(save_run: Callable[..., Any], tmp_path: Path) -> None:
    """Of 24 layers of 6 MB each only a few are held at a time."""
    run, _, _ = save_run({"layers": 24, "hidden": 256, "feedforward": 4096, "query_layer": False})
    script = """
import sys
from codellm_jax.weights.exporting import export
from codellm_jax.runtime import parts
from tests.peak import peak_bytes
export(sys.argv[1], sys.argv[2] + "0", report=lambda line: None)  # of a small model: all imports, all programs
before = peak_bytes()
export(sys.argv[3], sys.argv[2], report=lambda line: None)
print(peak_bytes() - before)
"""
    small, _, _ = save_run({}, name="small")
    done = subprocess.run([sys.executable, "-c", script, str(small), str(tmp_path / "out"), str(run)],
                          capture_output=True, text=True, check=True, cwd=ROOT)
    size = sum(array.nbytes for array in tensors_of(tmp_path / "out").values())
    largest = max(array.nbytes for array in tensors_of(tmp_path / "out").values())
    assert size > 15 * largest > 100e6
    assert int(done.stdout) < 5 * largest
