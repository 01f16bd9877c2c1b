"""Cards without their figure, which takes longer to draw than most preparations here; its tests request `draws`."""

import pytest

from codellm_jax.prepare import card


@pytest.fixture
def draws() -> None:
    """The card has its figure in this test."""


@pytest.fixture(autouse=True)
def picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "draws" not in request.fixturenames:
        monkeypatch.setattr(card, "_figures", lambda counts: [])
