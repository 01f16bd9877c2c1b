"""Work on what strangers made, in a process of its own with bounded memory and processor time.

The libraries that read tokenizers and render chat templates are not made for hostile input: a template may loop or
double a text for ever, and a broken file may crash a library. No `except` catches that. The process ends with its
parent; each request is a line of JSON and, if the line says so, bytes behind it, and each answer a line of JSON.

  render(template, ...)    the text that a chat template makes; a process is kept for it
  try_tokenizer(...)       loads a tokenizer and encodes a few texts, once, before it is loaded here
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

# Seconds of the processor and bytes of memory for a rendering, which takes a millisecond, and for a tokenizer.
RENDERING = 10.0, 1 << 30
LOADING = 60.0, 4 << 30
WAITING = 20  # times the seconds of the processor: the most of the clock, on a busy machine
ROOT = Path(__file__).resolve().parents[2]
LETTERS = "".join(chr(code) for first, last in ((32, 127), (0xA1, 0x250), (0x370, 0x590), (0x3041, 0x3100),
                                                (0x4E00, 0x4E80), (0x1F600, 0x1F640)) for code in range(first, last))
# A long run with another end is where a regular expression tries every way of parting a text.
TEXTS = ("x  x", LETTERS, "def f(x):\n\treturn  x + 1\r\n",
         *(one * 4000 + "!\0" for one in ("a", "x", " ", "1", "\n", "ab", "a ")),
         "\0\x7f\u2028\u200d\ufeff\ufffd e\u0301")


class Ended(ValueError):
    """The process ended before its answer; the message says why, such as "takes more than 10 seconds"."""


class _Process:
    """A process that answers one request after another."""

    def __init__(self, seconds: float, memory: int) -> None:
        self._seconds = seconds
        # Not the working directory, which may be the folder of a stranger.
        paths = [str(ROOT), *(path for path in sys.path if path)]
        code = (f"import sys; sys.path[:] = {paths!r}; from codellm_jax.tokenizing import apart; "
                f"apart.answer({seconds!r}, {memory!r})")
        self._process = subprocess.Popen([sys.executable, "-P", "-c", code], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def ask(self, request: Mapping[str, Any], content: bytes = b"") -> dict[str, Any]:
        """The answer to a request; raises Ended."""
        to, answers = self._process.stdin, self._process.stdout
        assert to is not None and answers is not None
        line = b""
        with contextlib.suppress(BrokenPipeError):
            to.write(json.dumps({**request, "bytes": len(content)}).encode() + b"\n" + content)
            to.flush()
            line = answers.readline()
        if line.endswith(b"\n"):
            found: dict[str, Any] = json.loads(line)
            return found
        status = self._process.wait()
        if status in (-signal.SIGPROF, -signal.SIGALRM):
            raise Ended(f"takes more than {self._seconds:g} seconds")
        raise Ended("needs too much memory, or crashes a library" + (
            f" ({signal.Signals(-status).name})" if status < 0 else ""))

    def close(self) -> None:
        self._process.kill()
        with contextlib.suppress(BrokenPipeError), self._process:  # closes its pipes and waits
            pass


_renderer: _Process | None = None
_lock = threading.Lock()


def _forget() -> None:
    """In a forked process, which needs its own."""
    global _renderer, _lock
    _renderer, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)


def render(template: str, messages: Sequence[Mapping[str, str]], variables: Mapping[str, str],
           add_generation_prompt: bool) -> dict[str, str]:
    """The answer of `templates.render`; raises Ended if it takes too long or too much memory."""
    global _renderer
    with _lock:
        if _renderer is None:
            _renderer = _Process(*RENDERING)
        try:
            return _renderer.ask({"template": template, "messages": list(map(dict, messages)),
                                  "variables": dict(variables), "add_generation_prompt": add_generation_prompt})
        except BaseException:  # whatever comes next is no answer to the next request
            _renderer.close()
            _renderer = None
            raise


def try_tokenizer(content: bytes, file: str) -> None:
    """Raises ValueError, in one line, if a tokenizer's library fails on its content in a way that cannot be caught."""
    process = _Process(*LOADING)
    try:
        answer = process.ask({"file": file}, content)
    except Ended as error:
        raise ValueError(f"{file} is not a tokenizer that can be used: loading it {error}.") from None
    finally:
        process.close()
    if why := answer.get("failed"):
        raise ValueError(f"{file} is not a tokenizer that can be used: {why}.")


# ---- In the process ----------------------------------------------------------------------------


def answer(seconds: float, memory: int) -> NoReturn:
    """Answers the requests on stdin until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory, resource.getrlimit(resource.RLIMIT_AS)[1]))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries print
    for line in iter(sys.stdin.buffer.readline, b""):
        request = json.loads(line)
        content = sys.stdin.buffer.read(request.pop("bytes"))
        signal.setitimer(signal.ITIMER_PROF, seconds)  # whose signals end the process, also within a library
        signal.setitimer(signal.ITIMER_REAL, WAITING * seconds)
        try:
            made = _loaded(content, **request) if content else _rendered(**request)
        except MemoryError:
            os._exit(1)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(json.dumps(made).encode() + b"\n")
        answers.flush()
    os._exit(0)


def _rendered(**request: Any) -> dict[str, str]:
    from codellm_jax.tokenizing.templates import render as rendered

    return rendered(**request)


def _loaded(content: bytes, file: str) -> dict[str, str]:
    from codellm_jax.tokenizing.backend import read_backend

    try:
        backend = read_backend(content, file)
    except MemoryError:
        raise
    except BaseException as error:  # a library may raise any
        # What is refused as a ValueError, the caller refuses itself; but a panic of the library would print a trace.
        told = isinstance(error, ValueError) and isinstance(error.__context__, Exception | None)
        return {} if told else _failed(error)
    try:
        ids = [token for text in backend.encode(TEXTS) for token in text]
        backend.encode(TEXTS[:2], behind=True)
        backend.decode(ids)
        backend.bytes_of_ids()
    except MemoryError:
        raise
    except BaseException as error:
        return _failed(error)
    return {"failed": "it gives ids beyond its own"} if any(token >= backend.pieces for token in ids) else {}


def _failed(error: BaseException) -> dict[str, str]:
    return {"failed": f"its library fails on it: {' '.join(str(error).split())[:200] or type(error).__name__}"}
