"""Runs commands in separate processes, forked from one that has imported the libraries, since importing takes longer
than most commands.

`Forked(environment).run(["-m", "codellm_jax.cli", "train", ...])` or `run(["-c", PROGRAM, ...])` is like
`subprocess.run([sys.executable, ...])` in that environment, with stdout and stderr together, and `start` is like
`subprocess.Popen` in its own process group. Commands share only the effects of imports.
"""

import atexit
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

# The imports of most commands. None of them starts JAX's devices or reads files.
IMPORTED = ("codellm_jax.cli", "codellm_jax.training.train", "codellm_jax.evaluation.evaluate",
            "codellm_jax.report.write", "codellm_jax.weights.exporting", "tensorflow", "seqio", "tasks.pretraining",
            "tasks.evaluation", "tensorboardX")


class Forked:
    """A context manager; the process from which commands are forked ends with it."""

    def __init__(self, environment: Mapping[str, str], timeout: float = 400.0) -> None:
        self._timeout = timeout
        self._folder = tempfile.TemporaryDirectory(prefix="forked.")  # for outputs of started commands
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=self._timeout)
        self._folder.cleanup()

    def run(self, command: Sequence[str]) -> tuple[int, str]:
        """Runs a command; returns its status (the negative number of a signal) and all its output."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with tempfile.NamedTemporaryFile("r", errors="replace") as output:
            self._process.stdin.write(json.dumps([list(command), output.name, self._timeout]) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            assert answer, "the process that commands are forked from has ended"
            return json.loads(answer), output.read()

    def start(self, command: Sequence[str]) -> "Started":
        """Starts a command, in its own process group."""
        assert self._process.stdin is not None and self._process.stdout is not None
        folder = Path(tempfile.mkdtemp(dir=self._folder.name))
        self._process.stdin.write(json.dumps([list(command), str(folder / "output"), None]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the process that commands are forked from has ended"
        return Started(json.loads(answer), folder)


class Started:
    """A started command, with the methods of `subprocess.Popen` that the campaign of faults needs."""

    def __init__(self, pid: int, folder: Path) -> None:
        self.pid, self._folder = pid, folder
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and (file := self._folder / "output.status").exists():
            self.returncode = int(file.read_text())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = float("inf") if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a forked command", timeout or 0)
            time.sleep(0.02)
        return status

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Waits for its end; returns all its output."""
        self.wait(timeout)
        return (self._folder / "output").read_text(errors="replace"), None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _serve() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        command, output, timeout = json.loads(line)
        if timeout is None:
            print(_started(command, output), flush=True)
            continue
        child = os.fork()
        if child == 0:
            _be(command, output)
        alarm = threading.Timer(timeout, os.kill, (child, signal.SIGKILL))
        alarm.start()
        _, status = os.waitpid(child, 0)
        alarm.cancel()
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


def _started(command: Sequence[str], output: str) -> int:
    """Starts a command; returns its process number. Its parent is another process, which writes its status to a file
    once it has ended.
    """
    reading, writing = os.pipe()
    if between := os.fork():
        os.close(writing)
        with open(reading) as pipe:
            found = int(pipe.read())
        os.waitpid(between, 0)
        return found
    os.setsid()
    if os.fork():
        os._exit(0)  # so that nobody has to wait for the process that waits
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.setpgid(0, 0)
        _be(command, output)
    try:
        os.setpgid(child, child)
    except OSError:
        pass  # the command did it, or has ended
    os.write(writing, str(child).encode())
    os.close(writing)
    _, status = os.waitpid(child, 0)
    part = Path(f"{output}.part")
    part.write_text(str(os.waitstatus_to_exitcode(status)))
    part.rename(f"{output}.status")
    os._exit(0)


def _be(command: Sequence[str], output: str) -> None:
    """Runs a command in this process, then ends the process."""
    kind, what, *arguments = command
    with Path(output).open("wb") as file, Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [kind, *arguments]
    status = 0
    try:
        if kind == "-m":
            status = importlib.import_module(what).main(arguments)
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        status = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve()
