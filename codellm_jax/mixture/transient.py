"""Errors of remote storage that pass: what they are, and asking again.

Libraries ask again by themselves where the service is busy, does not answer or breaks off (408, 429, 5xx, timeouts),
with growing pauses: TensorStore 32 times (`gcs_request_retries`), Google's client for two minutes (`DEFAULT_RETRY`),
TensorFlow's file system, by which records and other small files go, ten times (`RetryConfig`). What passes them, such
as credentials that are being renewed, is asked for again here.
"""

import time
from collections.abc import Callable
from typing import TypeVar

SECONDS_BETWEEN_TRIES = (1, 4, 16)
# Errors of TensorFlow's, Google's and Python's clients of remote storage.
OF_STORAGE = frozenset((
    "UnavailableError", "DeadlineExceededError", "ResourceExhaustedError", "AbortedError", "PermissionDeniedError",
    "ServerError", "TooManyRequests", "RetryError", "ConnectionError", "TimeoutError", "PermissionError",
    "TransportError", "UnauthenticatedError"))
Found = TypeVar("Found")


def is_transient(error: Exception) -> bool:
    """Whether storage could not be read just now, which says nothing of what lies there."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & OF_STORAGE) or any(word in str(error) for word in (
        "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAUTHENTICATED", "CANCELLED"))


def asked_again(ask: Callable[[], Found]) -> Found:
    """What `ask` gives, asked again after a while where it fails with an error that passes. Raises its last error."""
    for seconds in SECONDS_BETWEEN_TRIES:
        try:
            return ask()
        except Exception as error:
            if not is_transient(error):
                raise
        time.sleep(seconds)
    return ask()
