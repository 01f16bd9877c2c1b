"""Safetensors files of random bytes, and good ones with some bytes changed: refused in a line, or read."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codellm_jax.weights.reading import open_tensors

NUMBERS = np.arange(24, dtype=np.float32)


def file_of(header: bytes, content: bytes = NUMBERS.tobytes()) -> bytes:
    return len(header).to_bytes(8, "little") + header + content


GOOD = file_of(json.dumps({"__metadata__": {"format": "pt"}, "a": {
    "dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}, "b": {
        "dtype": "BF16", "shape": [24], "data_offsets": [48, 96]}}).encode())


def require_refused_or_read(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    tracemalloc.start()
    try:
        tensors = open_tensors(str(folder))
        for name, shape in tensors.shapes.items():
            assert tensors.read(name).shape == tuple(shape)
    except (ValueError, OSError) as error:
        assert "model.safetensors" in str(error) and "\n" not in str(error) and len(str(error)) < 600
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 << 20


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.binary(max_size=200), at=st.floats(0, 1), cut=st.booleans())
def test_random_bytes(tmp_path: Path, junk: bytes, at: float, cut: bool):
    """Junk by itself, as a header, in the place of some bytes of a good file, and at the place where it ends."""
    begin = int(at * len(GOOD))
    for content in (junk, file_of(junk), GOOD[:begin] + junk[:4] + (b"" if cut else GOOD[begin + len(junk[:4]):])):
        require_refused_or_read(tmp_path, content)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["F32", "BF16"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=8)
NUMBER = st.integers(-2, 100) | st.sampled_from([2**31, 2**63, 2**64, 10**30]) | VALUES
TENSOR = st.fixed_dictionaries({
    "dtype": st.sampled_from(["F32", "BF16", "I8", "F8_E4M3"]) | VALUES, "shape": st.lists(NUMBER, max_size=4) | VALUES,
    "data_offsets": st.lists(NUMBER, min_size=2, max_size=2) | VALUES})


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=VALUES | st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), VALUES | TENSOR, max_size=3))
def test_random_headers(tmp_path: Path, header: Any):
    require_refused_or_read(tmp_path, file_of(json.dumps(header).encode()))


def test_names_that_break_a_line_are_refused(tmp_path: Path):
    for name in ("\n", "a\u2028b", "a" * 300):
        header = json.dumps({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode()
        require_refused_or_read(tmp_path, file_of(header))
        with pytest.raises(ValueError, match="has a damaged header: a tensor is named"):
            open_tensors(str(tmp_path))
