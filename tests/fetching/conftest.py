"""Fixtures of a fake publisher on loopback, and one of all official files."""

import os
from collections.abc import Iterator

import pytest
from fake_publisher import Publisher, fake_publisher, official_publisher

from codellm_jax.fetching import download


@pytest.fixture
def publisher(monkeypatch: pytest.MonkeyPatch) -> Iterator[Publisher]:
    """A publisher without files, and a client with short timeouts."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(download, "TIMEOUT", 1.0)
    monkeypatch.setattr(download, "FIRST_WAIT", 0.01)
    with fake_publisher({}) as found:
        yield found


@pytest.fixture
def published() -> Iterator[Publisher]:
    with official_publisher() as found:
        yield found
