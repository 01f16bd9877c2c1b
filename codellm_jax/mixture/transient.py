"""Detects transient errors of remote storage, and retries.

Libraries themselves retry with growing pauses when the service is busy, does not answer or breaks off (408, 429, 5xx,
timeouts): TensorStore 32 times (`gcs_request_retries`), Google's client for two minutes (`DEFAULT_RETRY`), TensorFlow's
file system, used for records and other small files, ten times (`RetryConfig`). Errors that get past them, such as
credentials being renewed, are retried here.
"""

import time
from collections.abc import Callable
from typing import TypeVar

SECONDS_BETWEEN_TRIES = (1, 4, 16)
# Class names of errors raised by the storage clients of TensorFlow, Google and Python.
OF_STORAGE = frozenset((
    "UnavailableError", "DeadlineExceededError", "ResourceExhaustedError", "AbortedError", "PermissionDeniedError",
    "ServerError", "TooManyRequests", "RetryError", "ConnectionError", "TimeoutError", "PermissionError",
    "TransportError", "UnauthenticatedError"))
Found = TypeVar("Found")


def is_transient(error: Exception) -> bool:
    """Whether an error is temporary, so that it says nothing about the stored data."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & OF_STORAGE) or any(word in str(error) for word in (
        "UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAUTHENTICATED", "CANCELLED",
        "Could not resolve host"))  # the last is a failed precondition to TensorFlow, which does not retry it


def is_of_storage(error: Exception) -> bool:
    """Whether an error is temporary and of a storage client, rather than of JAX, which uses some of the same words."""
    return is_transient(error) and type(error).__module__.partition(".")[0] in ("tensorflow", "google")


def asked_again(ask: Callable[[], Found]) -> Found:
    """The result of `ask`, retried with pauses after transient errors. Raises the last error."""
    for seconds in SECONDS_BETWEEN_TRIES:
        try:
            return ask()
        except Exception as error:
            if not is_transient(error):
                raise
        time.sleep(seconds)
    return ask()
