"""Models and tokenizers of strangers: each fault ends in one line, in bounded time and memory, and leaves nothing."""

import base64
import gzip
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published import golden, safetensors, with_header, write_model

from codellm_jax.cli import main
from codellm_jax.tokenizing import apart, foreign
from codellm_jax.weights.importing import import_run, open_source
from codellm_jax.weights.layouts import decoder_values
from codellm_jax.weights.mindspore import open_mindspore
from codellm_jax.weights.wire import MOST_FIELDS, layouts, stored_tensors

FACTS, TENSORS, *_ = golden("llama")
Refused = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", FACTS, TENSORS)


@pytest.fixture
def refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    """The line with which an import of the folder ends."""

    def importing(seconds: float = 20) -> str:
        began = time.monotonic()
        assert main(["import", str(tmp_path / "model"), f"--output={tmp_path / 'run'}"]) == 1
        assert time.monotonic() - began < seconds
        line = capfd.readouterr().err
        assert line.startswith("t5x import: error: ") and line.count("\n") == 1 and "--debug" not in line
        assert line[:-1].isprintable() and not any(path.name.startswith((".run", "run")) for path in tmp_path.iterdir())
        return line

    return importing


# ---- config.json -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [
    ("num_hidden_layers", 10**9), ("num_hidden_layers", 10**400), ("num_hidden_layers", True), ("hidden_size", 10**30),
    ("hidden_size", 20.0), ("vocab_size", 2**40), ("max_position_embeddings", 10**30), ("rms_norm_eps", 10**400),
    ("rms_norm_eps", 1e-300), ("rope_scaling", {"rope_theta": float("nan")}),
    ("rope_scaling", {"rope_theta": [1]}), ("model_type", "x" * 10**6),
    ("num_attention_heads", 3), ("rope_scaling", {"rope_type": "longrope", "factor": 2.0}),
    ("rope_scaling", {"rope_type": "yarn", "original_max_position_embeddings": 10**400}),
    ("rope_scaling", {"rope_type": "yarn", "factor": 10**400}), ("sliding_window", float("nan")),
    ("sliding_window", [4]), ("layer_types", "full_attention")])
def test_a_value_that_no_model_has(folder: Path, refused: Refused, name: str, value: Any) -> None:
    (folder / "config.json").write_text(json.dumps(FACTS | {name: value}))
    line = refused()
    assert str(folder) in line and "config.json" in line and len(line) < 1000


def test_the_windows_layers_are_a_number(folder: Path, refused: Refused) -> None:
    (folder / "config.json").write_text(json.dumps(
        FACTS | {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": "all"}))
    assert "max_window_layers = 'all': it must be a whole number" in refused()


@pytest.mark.parametrize(("content", "told"), [
    (b"", "no JSON"), (b"null", "holds no JSON object"), (b"[" * 100_000, "more than 100 levels"),
    (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "more than 100 levels"), (b'{"a": 1, "a": 2}', "'a' occurs twice"),
    (b'{"a": "\\ud800"}', "half a character"), ("{}".encode("utf-16-le"), "UTF-16 without a byte order mark"),
    (gzip.compress(b" " * (40 << 20)), "too large"), (b'{"\x1b[2J": 1, "\x1b[2J": 2}', "no JSON")])
def test_a_configuration_that_is_no_plain_json(folder: Path, refused: Refused, content: bytes, told: str) -> None:
    (folder / "config.json").write_bytes(content)
    assert f"{folder}/config.json" in (line := refused()) and told in line


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                                  "added_tokens.json"])
def test_a_file_of_a_gigabyte_is_not_read(folder: Path, refused: Refused, name: str) -> None:
    with (folder / name).open("wb") as file:
        file.write(b"{" + b" " * 10_000)
        file.truncate(1 << 30)
    assert f"{name} has 1,073,741,824 bytes" in refused()


def test_a_repeated_name_is_found_in_bounded_time(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{" + "".join(f'"{number}": 1, ' for number in range(200_000)) + '"7": 2}')
    began = time.monotonic()
    with pytest.raises(ValueError, match="'7' occurs twice"):
        foreign.json_object(str(tmp_path / "a.json"))
    assert time.monotonic() - began < 10


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "yarn", "silu", 10**400, 2**31, -1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["rope_type", "factor", "kind", "original_length"]), inner, max_size=3), max_leaves=6)
NAMES = [*FACTS, "rope_scaling", "rope_parameters", "sliding_window", "layer_types", "partial_rotary_factor",
         "quantization_config", "max_window_layers", "use_sliding_window", "attention_bias", "head_dim"]
OWN = {"model_type": "codellm", "layers": 2, "hidden": 8, "heads": 2, "feedforward": 8, "vocabulary_size": 9,
       "length": 8, "rotary_scaling": None, "rotary_theta": 1e4, "norm": "rms", "positions": "rotary", "head_size": 4,
       "tied_head": True, "dropout_rate": 0.0, "initializer_std": 0.02, "query_layer": False, "kv_heads": 1}


@settings(max_examples=100, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=1, max_size=3),
       own=st.dictionaries(st.sampled_from(list(OWN)[1:]), VALUES, min_size=1, max_size=3))
def test_any_values(changes: dict[str, Any], own: dict[str, Any]) -> None:
    for facts in (FACTS | changes, OWN | own):
        try:
            values = decoder_values(facts)
        except ValueError as error:
            assert "config.json" in str(error) and len(str(error)) < 1000
        else:
            for name, value in values.items():
                assert value is None or isinstance(value, (str, bool, dict)) or 0 <= value <= 1e18, (name, value)


def test_a_models_own_code_is_not_run(folder: Path, tmp_path: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for name in ("json.py", "jinja2.py", "tokenizers.py", "sitecustomize.py"):
        (folder / name).write_text((folder / "evil.py").read_text())
    (folder / "config.json").write_text(json.dumps(FACTS | {
        "auto_map": {"AutoModelForCausalLM": "evil.Evil"}, "trust_remote_code": True}))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "eos_token": "</s>", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "evil.Evil"}))
    before = Path.cwd()
    try:
        os.chdir(folder)
        open_source(".")
    finally:
        os.chdir(before)
    assert not (tmp_path / "ran").exists()


# ---- Tensors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [
    '{"a": {"dtype": "F32", "data_offsets": [0, 4], "shape": [' + ",".join(["9" * 4000] * 2000) + "]}}",
    '{"a": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 0]}}',
    '{"a": {"dtype": "F32", "data_offsets": [0, 4], "shape": [' + ",".join("1" * 100) + "]}}",
    '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": 1}', '{"a": Infinity}', '{"\\ud800": 1}',
    '{"a": ' + "[" * 5000, '{"a": 1e999}'])
def test_a_header_that_is_damaged(folder: Path, refused: Refused, header: str) -> None:
    (folder / "model.safetensors").write_bytes(with_header(header, bytes(4)))
    assert "model.safetensors has a damaged header" in (line := refused()) and len(line) < 1000


def test_a_header_of_100_megabytes_is_not_read(folder: Path, refused: Refused) -> None:
    with (folder / "model.safetensors").open("wb") as file:
        file.write((10**8).to_bytes(8, "little") + b'{"a": ')
        file.truncate(2 * 10**8)
    assert "has a header of 100,000,000 bytes" in refused()


def test_as_many_layers_as_tensors_are_not_listed(folder: Path, refused: Refused) -> None:
    """Each layer would be a dozen of tensors in memory."""
    (folder / "model.safetensors").write_bytes(safetensors({f"t{n}": np.zeros(1, np.bool_) for n in range(4000)}))
    (folder / "config.json").write_text(json.dumps(FACTS | {"num_hidden_layers": 4000}))
    assert "4000 layers, but there are 4000 tensors" in refused()


@pytest.mark.parametrize(("change", "told"), [
    ([], "holds no JSON object"), ({"weight_map": []}, "no weight_map"), ({"weight_map": {"a": 1}}, "no weight_map"),
    ({"weight_map": {"a": "/etc/passwd"}}, "not a file of its folder"), ({"weight_map": {"a": "\0"}}, "does not hold"),
    ({"weight_map": {"a\x1b[2J" * 10**5: "config.json"}}, "not a safetensors file")])
def test_an_index_that_is_none(tmp_path: Path, refused: Refused, change: Any, told: str) -> None:
    folder = write_model(tmp_path / "model", FACTS, TENSORS, shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps(change))
    assert told in refused()


def test_an_index_with_a_wrong_size_is_of_no_consequence(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", FACTS, TENSORS, shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    (folder / "model.safetensors.index.json").write_text(json.dumps(index | {"metadata": {"total_size": -1}}))
    assert len(open_source(str(folder)).published) == len(TENSORS)


def test_a_tensor_larger_than_the_memory(folder: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 1, "SC_PAGE_SIZE": 256}.__getitem__)
    assert "more than the memory of this machine" in refused()


def message(number: int, content: bytes) -> bytes:
    assert len(content) < 128
    return bytes([number << 3 | 2, len(content)]) + content


def test_fields_and_devices_without_end(tmp_path: Path) -> None:
    """A search over the ranks of 2**80 devices, and a message of empty fields."""
    file = tmp_path / "strategy.ckpt"
    devices = b"\x08\x80\x80\x40" * 4  # 2**20 each
    file.write_bytes(message(3, message(1, b"a") + message(2, message(1, devices) + message(2, b"\x08\x03"))))
    with pytest.raises(ValueError, match="is damaged: a device matrix"):
        layouts(str(file))
    empty = message(1, b"") * (MOST_FIELDS + 1)
    file.write_bytes(b"\x1a" + bytes([len(empty) & 127 | 128, len(empty) >> 7]) + empty)
    with pytest.raises(ValueError, match=f"has more than {MOST_FIELDS} values"):
        layouts(str(file))
    file.write_bytes(b"\x0a\x00")
    with pytest.raises(ValueError, match="without its tag"):
        stored_tensors(str(file))


@pytest.mark.parametrize("shape", ["(-2, -12)", "(" * 90, "(2, 12), **{}", "(2**70, 0)"])
def test_an_array_without_a_size(tmp_path: Path, shape: str) -> None:
    described = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(118).encode()
    (tmp_path / "a_word_embedding.npy").write_bytes(
        b"\x93NUMPY\x01\0" + len(described).to_bytes(2, "little") + described + bytes(96))
    (tmp_path / "a.ckpt").write_bytes(message(1, message(1, b"a") + message(2, message(2, b"Float32") + message(
        3, bytes(4)))))
    with pytest.raises(ValueError, match=r"a_word_embedding.npy (is not a NumPy array|does not hold a row-major)"):
        open_mindspore(str(tmp_path))


# ---- What is no file of the folder -------------------------------------------------------------

SPECIAL: dict[str, Callable[[Path], Any]] = {
    "pipe": os.mkfifo, "folder": Path.mkdir, "endless": lambda file: file.symlink_to("/dev/zero"),
    "outside": lambda file: file.symlink_to("../secret.json"), "absolute": lambda file: file.symlink_to("/etc/passwd"),
    "itself": lambda file: file.symlink_to(file.name)}


@pytest.mark.parametrize("how", SPECIAL)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja",
                                  "added_tokens.json", "generation_config.json", "rank_0.ckpt"])
def test_special_files(folder: Path, refused: Refused, name: str, how: str) -> None:
    (folder.parent / "secret.json").write_text("{}")
    if name == "rank_0.ckpt":
        (folder / "model.safetensors").unlink()
    (folder / name).unlink(missing_ok=True)
    SPECIAL[how](folder / name)
    line = refused()
    assert name in line or (how, name) == ("itself", "rank_0.ckpt") and "config.json" not in line


def test_links_within_the_folder_and_a_hubs_cache_are_followed(tmp_path: Path) -> None:
    place = tmp_path / "models--a--b" / "snapshots" / "0123"
    folder = write_model(place, FACTS, TENSORS)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(tmp_path / "models--a--b" / "blobs" / str(number))
        file.symlink_to(f"../../blobs/{number}")
    (folder / "config.json").rename(folder / "other.json")
    (folder / "config.json").symlink_to("other.json")
    (tmp_path / "link").symlink_to(folder)
    import_run(str(tmp_path / "link"), str(tmp_path / "run"), report=lambda line: None)
    assert (tmp_path / "run" / "vocabulary" / "tokenizer.json").is_file()
    assert not (tmp_path / "run" / "vocabulary" / "tokenizer.json").is_symlink()


# ---- Tokenizers --------------------------------------------------------------------------------


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


TOKEN = {"id": 1, "content": "</s>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
TEMPLATE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "</s>", "type_id": 0}}], "pair": [],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [10**6], "tokens": ["</s>"]}}}


@pytest.mark.parametrize(("changes", "told"), [
    ({"pre_tokenizer": split("(a+)+$")}, "its library fails on it|takes more than"),
    ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "chunk size must be non-zero"),
    ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(bytes([255] * 4)).decode()}},
     "is not a tokenizer"),
    ({"normalizer": {"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 10**6}}, "too much memory"),
    ({"added_tokens": [TOKEN | {"content": ["a"]}]}, "'added_tokens' are not a list"),
    ({"added_tokens": [3]}, "'added_tokens' are not a list"), ({"post_processor": TEMPLATE}, "begins texts with"),
    ({"model": {"type": "BPE", "vocab": {"a": 0, "</s>": 2**32 - 1}, "merges": []}}, "has the id 4,294,967,295"),
    ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "a"]]}}, "is not a tokenizer.json"),
    ({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, "is not a tokenizer.json"),
    ({"model": {"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]]}}, "is not a tokenizer.json"),
    ({"normalizer": {"type": "Sequence", "normalizers": 3}}, "is not a tokenizer.json"), ({"model": []}, "no 'model'")])
def test_tokenizers(folder: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, changes: Any, told: str) -> None:
    monkeypatch.setattr(apart, "LOADING", (5.0, 1 << 30))
    whole = json.loads((folder / "tokenizer.json").read_text()) | changes
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    assert re.search(told, line := refused(90)) and f"{folder}/tokenizer.json" in line
