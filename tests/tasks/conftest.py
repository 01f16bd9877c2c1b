"""Fixtures of several files of tests."""

import json
import pathlib
from collections.abc import Callable

import pytest


@pytest.fixture
def write(tmp_path: pathlib.Path) -> Callable[..., str]:
    """Writes records as a JSON list, or text or bytes unchanged, to a file in a folder; returns its path."""

    def write(name: str, content: object) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


@pytest.fixture
def tree_sitter() -> None:
    """Skips a test where a grammar that it needs is not installed."""
    for package in ("tree_sitter", *(f"tree_sitter_{name}" for name in ("javascript", "java", "c", "go"))):
        pytest.importorskip(package)
