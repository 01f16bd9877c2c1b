"""Cards without their picture, which takes longer to draw than most preparations here; tests of it ask for `draws`."""

import pytest

from codellm_jax.prepare import card


@pytest.fixture
def draws() -> None:
    """The card has its picture in this test."""


@pytest.fixture(autouse=True)
def picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "draws" not in request.fixturenames:
        monkeypatch.setattr(card, "_figures", lambda counts: [])
