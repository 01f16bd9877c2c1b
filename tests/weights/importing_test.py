"""Folders of published models become runs: equal in numbers, whole or not there, and never whole in memory."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fake_hub import fake_hub
from published import BFLOAT16, golden, safetensors, with_header, write_model, write_tokenizer

from codellm_jax.cli import main
from codellm_jax.model.decoder import Decoder, DecoderConfig
from codellm_jax.runtime.checkpoints import newest_record, restore_parameters
from codellm_jax.runtime.partitioning import MeshShape, make_mesh
from codellm_jax.runtime.state import abstract_state
from codellm_jax.weights.importing import describe_source, import_run, open_source, parameters_on_mesh
from codellm_jax.weights.layouts import decoder_values, matched, published_tensors
from codellm_jax.weights.reading import open_tensors

ONE, MANY = MeshShape(data=1), MeshShape(data=2, fsdp=4)


def quiet(line: str) -> None:
    """Takes what an import tells."""


def abstract_of(config: DecoderConfig, shape: MeshShape) -> Any:
    mesh = make_mesh(shape, jax.devices()[: math.prod(shape.sizes(1 if shape is ONE else 8))])
    return abstract_state(Decoder(config), optax.identity(), mesh, shape).params


def logits_of(config: DecoderConfig, params: Any, tokens_BL: np.ndarray) -> np.ndarray:
    positions_BL = np.tile(np.arange(tokens_BL.shape[1], dtype=np.int32), (len(tokens_BL), 1))

    def run(params: Any) -> Any:
        hidden_BLD = Decoder(config).apply({"params": params}, tokens_BL, positions_BL, np.zeros_like(tokens_BL))
        return Decoder(config).apply({"params": params}, hidden_BLD, method="logits")

    return np.asarray(jax.jit(run)(params))


@pytest.mark.parametrize(("name", "shards"), [("gpt2", 1), ("gpt_neox", 2), ("qwen3", 3), ("olmo2", 1)])
def test_logits_of_an_imported_run_are_those_of_transformers(tmp_path: Path, name: str, shards: int) -> None:
    facts, tensors, tokens_BL, expected_BLV = golden(name)
    import_run(str(write_model(tmp_path / "model", facts, tensors, shards)), str(tmp_path / "run"), report=quiet)
    config = DecoderConfig(**decoder_values(facts))
    params, record = restore_parameters(str(tmp_path / "run"), abstract_of(config, ONE), report=quiet)
    assert record["step"] == 0
    np.testing.assert_allclose(logits_of(config, params, tokens_BL), expected_BLV, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder whose tensors are of bfloat16, norms of float32, and the run that is made of it by the command."""
    place = tmp_path_factory.mktemp("imported")
    facts, tensors, *_ = golden("llama_llama3")
    facts |= {"hidden_size": 24}
    config = DecoderConfig(**decoder_values(facts))
    generator = np.random.default_rng(0)
    tensors = {tensor.name: generator.standard_normal(tensor.shape).astype(np.float32 if "norm" in tensor.name else
                                                                          BFLOAT16)
               for tensor in published_tensors(facts, config)}
    write_model(place / "model", facts, tensors)
    assert main(["import", str(place / "model"), f"--output={place / 'run'}"]) == 0
    return place / "model", place / "run"


@pytest.mark.parametrize("shape", [ONE, MANY], ids=["one device", "eight devices"])
def test_a_run_and_its_source_give_the_same_parameters_on_any_mesh(imported: tuple[Path, Path], shape: Any) -> None:
    model, run = imported
    source = open_source(str(model))
    abstract = abstract_of(source.config, shape)
    saved, _ = restore_parameters(str(run), abstract, report=quiet)
    read = parameters_on_mesh(source, abstract)
    for wanted, one, other in zip(*(jax.tree.leaves(tree) for tree in (abstract, saved, read)), strict=True):
        assert one.dtype == other.dtype == jnp.float32 and one.sharding == other.sharding == wanted.sharding
        np.testing.assert_array_equal(one, other)
    numbers = source.tensors.read("model.layers.1.mlp.up_proj.weight").astype(np.float32)
    np.testing.assert_array_equal(saved["blocks"]["feedforward"]["up_kernel"][1], numbers.T)


def test_what_a_run_knows_of_its_source(imported: tuple[Path, Path]) -> None:
    model, run = imported
    step, record = newest_record(str(run))
    ledger, settings = record["ledger"], record["settings"]
    sums = {name: {"bytes": (model / name).stat().st_size,
                   "sha256": hashlib.sha256((model / name).read_bytes()).hexdigest()}
            for name in ("config.json", "model.safetensors")}
    assert step == 0 and ledger["stage"] == "imported" and ledger["source"] == str(model)
    assert ledger["files"] == sums and ledger["revision"] is None and ledger["rows"] == {} == ledger["tokens"]
    assert ledger["dtype"] == "bfloat16" and len(ledger["other_dtypes"]) == 5  # two norms a layer, and the last
    assert set(ledger["other_dtypes"].values()) == {"float32"}
    assert settings["vocabulary.path"] == repr(str(run / "vocabulary")) and settings["vocabulary.size"] == "29"
    assert settings["mixture.lengths"] == "{'targets': 256}" and settings["model.head_size"] == "6"
    assert "'kind': 'llama3'" in settings["model.rotary_scaling"]
    assert (run / "vocabulary/tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["ledger"] == ledger and provenance["checkpoint"] == record["digest"] and provenance["finished"]
    told = describe_source(str(model))
    assert told["step"] == 0 and told["digest"] == describe_source(str(model))["digest"]
    assert {**told["ledger"], "files": None} == {**ledger, "files": None}
    assert {**told["settings"], "vocabulary.path": None} == {**settings, "vocabulary.path": None}


def test_a_name_on_a_hub_is_a_source(tmp_path: Path) -> None:
    """Of a repository that has PyTorch's file beside, which is not downloaded."""
    facts, tensors, *_ = golden("qwen2")
    model = write_model(tmp_path / "hub" / "org" / "small", facts, tensors, shards=2)
    (model / "pytorch_model.bin").write_bytes(b"0")
    with fake_hub(tmp_path / "hub") as hub:
        done = subprocess.run(
            [sys.executable, "-m", "codellm_jax.cli", "import", "hf://org/small", f"--output={tmp_path / 'run'}"],
            env=os.environ | hub.environment(tmp_path / "cache"), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not [path for _, path in hub.requests if path.endswith("pytorch_model.bin")]
        commit = hub.commit("org/small", "main")
    _, record = newest_record(str(tmp_path / "run"))
    assert record["ledger"]["source"] == "hf://org/small" and record["ledger"]["revision"] == commit
    assert len(record["ledger"]["files"]) == 3
    name = "model-00002-of-00002.safetensors"
    assert record["ledger"]["files"][name]["sha256"] == hashlib.sha256((model / name).read_bytes()).hexdigest()


def test_an_import_takes_no_place_that_is_taken(imported: tuple[Path, Path], capsys: Any) -> None:
    model, run = imported
    assert main(["import", str(model), f"--output={run}"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["import", str(run), f"--output={run.parent / 'other'}"]) == 1
    assert "is a run directory" in capsys.readouterr().err
    assert not (run.parent / "other").exists()


def of_llama() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    facts, tensors, *_ = golden("llama")
    return facts, tensors


def break_folder(folder: Path, how: str) -> None:
    """Makes a folder of three shards one of the kinds that are met."""
    index = folder / "model.safetensors.index.json"
    shards = sorted(folder.glob("*.safetensors"))
    second = shards[1].read_bytes()
    named = json.loads(index.read_text())
    length = 8 + int.from_bytes(second[:8], "little")
    header = json.loads(second[8:length])
    names = [name for name in header if name != "__metadata__"]

    def write_header(**changes: Any) -> None:
        header[names[0]] |= changes
        shards[1].write_bytes(with_header(json.dumps(header), second[length:]))

    if how == "truncated":
        shards[1].write_bytes(second[:-7])
    elif how == "header cut":
        shards[1].write_bytes(second[:100])
    elif how == "longer":
        shards[1].write_bytes(second + b"\0")
    elif how == "empty":
        shards[1].write_bytes(b"")
    elif how == "missing":
        shards[1].unlink()
    elif how == "pointer":
        shards[1].write_text("version https://git-lfs.example/spec/v1\noid sha256:0\nsize 3\n")
    elif how == "page":
        shards[1].write_text("<!DOCTYPE html><html><body>Not found</body></html>" * 9)
    elif how == "other dtype":
        write_header(dtype="F4")
    elif how == "other offsets":
        begin, end = header[names[0]]["data_offsets"]
        write_header(data_offsets=[begin + 2, end + 2])
    elif how == "huge shape":
        write_header(shape=[2**40, 2**40])
    elif how == "negative":
        write_header(data_offsets=[-2, 8])
    elif how == "no JSON":
        shards[1].write_bytes(with_header("{" + "[" * 5000, b""))
    elif how == "twice":
        shards[1].write_bytes(safetensors({names[0]: np.zeros(3, np.float32)} | dict(open_arrays(shards[0]))))
    elif how == "unnamed":
        del named["weight_map"][names[0]]
        index.write_text(json.dumps(named))
    elif how == "named":
        named["weight_map"]["model.more.weight"] = shards[1].name
        index.write_text(json.dumps(named))
    elif how == "outside":
        named["weight_map"][names[0]] = "../model.safetensors"
        index.write_text(json.dumps(named))
    elif how == "no index":
        index.unlink()
    elif how == "no configuration":
        (folder / "config.json").unlink()
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif how == "large tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
        (folder / "tokenizer.model").write_bytes(
            (Path(__file__).resolve().parents[2] / "codellm_jax/vocabularies/python_8k.model").read_bytes())
    else:
        raise AssertionError(how)


def open_arrays(file: Path) -> list[tuple[str, np.ndarray]]:
    """Tensors of a file, by another reading of the format than the library's own."""
    content = file.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:length])
    return [(name, np.frombuffer(content[length:][slice(*facts["data_offsets"])], np.float16).reshape(facts["shape"]))
            for name, facts in header.items() if name != "__metadata__"]


@pytest.mark.parametrize(("how", "told"), [
    ("truncated", "is incomplete"), ("header cut", "is incomplete"), ("longer", "is incomplete"),
    ("empty", "is not a safetensors file"), ("missing", "does not hold it"), ("pointer", "a Git LFS pointer"),
    ("page", "is not a safetensors file"), ("other dtype", "damaged header"), ("other offsets", "damaged header"),
    ("huge shape", "damaged header"), ("negative", "damaged header"), ("no JSON", "damaged header"),
    ("twice", "occurs in both"), ("unnamed", "which it does not name"), ("named", "which does not hold it"),
    ("outside", "not a file of its folder"), ("no index", "no model.safetensors.index.json"),
    ("no configuration", "holds no config.json"), ("no tokenizer", "--vocabulary"),
    ("large tokenizer", "the model's embedding has 29 rows, fewer"),
])
def test_what_is_broken_is_refused_in_a_line(tmp_path: Path, capsys: Any, how: str, told: str) -> None:
    folder = write_model(tmp_path / "model", *of_llama(), shards=3)
    break_folder(folder, how)
    assert main(["import", str(folder), f"--output={tmp_path / 'run'}"]) == 1
    line = capsys.readouterr().err
    assert told in line and line.count("\n") == 1 and str(tmp_path) in line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_numbers_that_are_none_are_refused(tmp_path: Path, capsys: Any) -> None:
    """After much is written, which is removed."""
    facts, tensors = of_llama()
    tensors["model.norm.weight"] = np.where(np.arange(20) == 3, np.nan, tensors["model.norm.weight"]).astype(np.float16)
    folder = write_model(tmp_path / "model", facts, tensors)
    assert main(["import", str(folder), f"--output={tmp_path / 'run'}"]) == 1
    assert "model.norm.weight holds numbers that are not finite, 1 of 20" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_head_that_is_stored_too_is_the_embedding(tmp_path: Path, capsys: Any, equal: bool) -> None:
    facts, tensors, *_ = golden("qwen3")
    head = tensors["model.embed_tokens.weight"] + np.float16(0 if equal else 1)
    folder = write_model(tmp_path / "model", facts, {"lm_head.weight": head} | tensors)
    assert main(["import", str(folder), f"--output={tmp_path / 'run'}"]) == (0 if equal else 1)
    assert equal or "differs from model.embed_tokens.weight" in capsys.readouterr().err
    assert (tmp_path / "run").exists() == equal


def test_another_tokenizer_is_taken_where_it_is_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", *of_llama(), tokenizer=False)
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "run").mkdir()  # an empty folder is no run
    import_run(str(folder), str(tmp_path / "run"), vocabulary=str(tmp_path / "tokenizer"), report=quiet)
    assert newest_record(str(tmp_path / "run"))[1]["settings"]["vocabulary.path"] == repr(
        str(tmp_path / "run" / "vocabulary"))
    assert (tmp_path / "run/vocabulary/tokenizer.json").exists()


def test_a_tokenizer_that_names_no_end_has_that_of_the_model(tmp_path: Path) -> None:
    """A SentencePiece file without one, as PanGu's is."""
    from sentencepiece import sentencepiece_model_pb2

    facts, tensors = of_llama()
    folder = write_model(tmp_path / "model", facts | {"eos_token_id": 9, "pad_token_id": 6}, tensors, tokenizer=False)
    model = sentencepiece_model_pb2.ModelProto()
    for number, piece in enumerate(["<unk>", *"▁etaoinshrdlu"]):
        model.pieces.add(piece=piece, score=-number, type=2 if number == 0 else 1)
    model.trainer_spec.eos_id = model.trainer_spec.pad_id = model.trainer_spec.bos_id = -1
    (tmp_path / "other.model").write_bytes(model.SerializeToString())
    source = open_source(str(folder), vocabulary=str(tmp_path / "other.model"))
    assert (source.vocabulary.end_of_document_id, source.vocabulary.pad_id, source.vocabulary.size) == (9, 6, 29)
    assert describe_source(source)["settings"]["vocabulary.end_of_document_id"] == "9"


def test_files_of_pytorch_need_it(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "model", *of_llama())
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["import", str(folder), f"--output={tmp_path / 'run'}"]) == 1
    assert "needs PyTorch, which is not installed" in capsys.readouterr().err
    assert main(["import", str(folder), f"--output={tmp_path / 'run'}", "--check"]) == 1
    assert "--check compares with transformers" in capsys.readouterr().err


def test_files_of_pytorch_are_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    facts, tensors = of_llama()
    folder = write_model(tmp_path / "model", facts, {})
    (folder / "model.safetensors").unlink()
    made = {name: torch.from_numpy(array.copy()).to(torch.bfloat16) for name, array in tensors.items()}
    places = {}
    for number, names in enumerate((list(made)[::2], list(made)[1::2]), start=1):
        torch.save({name: made[name] for name in names}, folder / f"pytorch_model-{number:05}-of-00002.bin")
        places |= dict.fromkeys(names, f"pytorch_model-{number:05}-of-00002.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    found = open_tensors(str(folder))
    for name, value in made.items():
        np.testing.assert_array_equal(found.read(name).astype(np.float32), value.float().numpy())
        np.testing.assert_array_equal(found.read(name, slice(1, 3)).astype(np.float32), value[1:3].float().numpy())
    import_run(str(folder), str(tmp_path / "run"), report=quiet)
    torch.save({"model": made, "when": Path("/")}, folder / places[names[0]])
    with pytest.raises(ValueError, match="as weights alone"):
        open_tensors(str(folder))


def test_safetensors_are_read_as_their_library_does(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy")
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.asarray(3.0),
              "none": np.zeros((0, 2)), "mask": np.array([True, False]), "half": np.ones((3, 1, 2), np.float16)}
    library.save_file(arrays, tmp_path / "model.safetensors")
    found = open_tensors(str(tmp_path))
    for name, array in arrays.items():
        np.testing.assert_array_equal(found.read(name), array)
        assert found.dtypes[name] == array.dtype.name and found.shapes[name] == array.shape
    np.testing.assert_array_equal(found.read("half", slice(1, None)), arrays["half"][1:])


@pytest.mark.parametrize("name", ["gpt_neox", "qwen2"])
def test_check_compares_with_transformers(tmp_path: Path, capsys: Any, name: str) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    facts, tensors, *_ = golden(name)
    folder = write_model(tmp_path / "model", facts, tensors)
    assert main(["import", str(folder), f"--output={tmp_path / 'run'}", "--check"]) == 0
    assert "Largest difference between these logits" in capsys.readouterr().out
    # The same run, and a model that is another.
    from codellm_jax.weights.checking import largest_difference

    (folder / "model.safetensors").write_bytes(safetensors(
        {key: -array if "mlp" in key else array for key, array in tensors.items()}))
    assert largest_difference(open_source(str(folder)), str(tmp_path / "run"), report=quiet) > 1e-3


def write_random(folder: Path, layers: int, hidden: int) -> int:
    """A Llama of random bfloat16 with a tokenizer; returns the bytes of its largest tensor."""
    facts = of_llama()[0] | {
        "num_hidden_layers": layers, "hidden_size": hidden, "head_dim": 64, "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64, "intermediate_size": 4 * hidden}
    shapes = {tensor.name: tensor.shape for tensor in published_tensors(facts, DecoderConfig(**decoder_values(facts)))}
    write_model(folder, facts, {})
    header, at = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at := at + 2 * math.prod(shape)]}
    generator = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(with_header(json.dumps(header), b""))
        for shape in shapes.values():
            file.write(generator.standard_normal(shape, np.float32).astype(BFLOAT16).tobytes())
    return 2 * max(math.prod(shape) for shape in shapes.values())


def test_killed_on_the_way_there_is_no_run_and_the_same_command_makes_it(tmp_path: Path) -> None:
    write_random(tmp_path / "model", layers=6, hidden=512)
    command = [sys.executable, "-m", "codellm_jax.cli", "import", str(tmp_path / "model"),
               f"--output={tmp_path / 'run'}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        until = time.monotonic() + 120
        while not list(tmp_path.glob(".run.*/content/checkpoints/0/state/d/*")) and time.monotonic() < until:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.005)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "run").exists() and list(tmp_path.glob(".run.*"))
    with pytest.raises(FileNotFoundError):
        newest_record(str(tmp_path / "run"))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]
    assert newest_record(str(tmp_path / "run"))[0] == 0


@pytest.mark.slow
def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    """640 MB of bfloat16, which would be 1.3 GB of float32."""
    largest = write_random(tmp_path / "model", layers=26, hidden=1024)
    script = ("import sys; from codellm_jax import cli; status = cli.main(sys.argv[1:]); "
              "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))); sys.exit(status)")
    done = subprocess.run([sys.executable, "-c", script, "import", str(tmp_path / "model"),
                           f"--output={tmp_path / 'run'}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak = 1024 * int(done.stdout.split("VmHWM:")[1].split()[0])
    assert peak < 3 * largest + 2**30
    assert peak < (tmp_path / "model" / "model.safetensors").stat().st_size + 2**29  # less than the file, with JAX


def test_a_source_that_is_not_what_its_configuration_says(tmp_path: Path, capsys: Any) -> None:
    """A Qwen2 that calls itself a Llama."""
    facts, tensors, *_ = golden("qwen2")
    folder = write_model(tmp_path / "model", facts | {"model_type": "llama"}, tensors)
    assert main(["import", str(folder), f"--output={tmp_path / 'run'}"]) == 1
    line = capsys.readouterr().err
    assert "self_attn.q_proj.bias [24]" in line and "left over" in line and str(folder) in line
    assert len(matched(facts, DecoderConfig(**decoder_values(facts)),
                       {name: array.shape for name, array in tensors.items()})) == len(tensors)
