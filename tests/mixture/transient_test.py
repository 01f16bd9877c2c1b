"""Errors of remote storage that pass, and asking again."""

import pytest

from codellm_jax.mixture import transient
from codellm_jax.mixture.transient import asked_again, is_transient


class UnavailableError(Exception):
    """As TensorFlow names it."""


@pytest.mark.parametrize("error, passes", [
    (ConnectionResetError("reset"), True), (TimeoutError(), True), (UnavailableError(), True),
    (ValueError("DEADLINE_EXCEEDED: no answer"), True), (RuntimeError("UNAUTHENTICATED: the token has expired"), True),
    (RuntimeError("libcurl code 6, error details: Could not resolve host: www.googleapis.com"), True),
    (ValueError("DATA_LOSS: a checksum differs"), False), (FileNotFoundError("gs://bucket/x"), False)], ids=repr)
def test_which_errors_pass(error: Exception, passes: bool) -> None:
    assert is_transient(error) == passes


def test_what_passes_is_asked_for_again_with_growing_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses, errors = list[float](), [ConnectionError("busy"), UnavailableError(), TimeoutError()]
    monkeypatch.setattr(transient.time, "sleep", pauses.append)

    def ask() -> str:
        if errors:
            raise errors.pop()
        return "found"

    assert asked_again(ask) == "found" and pauses == sorted(pauses) and len(pauses) == 3
    errors.extend(ConnectionError(f"busy {number}") for number in range(4))
    with pytest.raises(ConnectionError, match="busy 0"):
        asked_again(ask)
    errors.extend([ValueError("broken"), ValueError("broken")])
    with pytest.raises(ValueError, match="broken"):
        asked_again(ask)
    assert len(errors) == 1 and len(pauses) == 6
