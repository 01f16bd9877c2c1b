"""Runs untrusted Python programs against their tests, each in a kernel sandbox, and reports which passed.

The guarantees, by name; `guarantees()` returns which of them hold:

  network    The program has only its own empty network: nothing connects, not even to this host. The only sockets are
             stream pairs.
  reading    It sees Python's library, the system's libraries, three devices and an empty folder. No other file of
             the host is visible: no home, no checkpoints, no /proc.
  writing    It writes only to that folder, /tmp, which is memory of bounded size and ends with the program.
  signals    It sees and signals only its own processes, and all of these end with it, even detached ones.
  memory     Each of its processes has at most `memory_bytes`, shared memory counted in each that maps it, and /tmp
             holds at most `folder_bytes`. Other memory that outlives a mapping is refused (`calls`): System V's and
             POSIX's shared memory, queues and semaphores, memfd_create, larger pipes, record locks, watches, keys,
             io_uring, attributes of files. For each process the kernel also keeps page tables, at most 1.25 times its
             memory if that is single pages far apart, and buffers of 64 descriptors, at most 16 MiB. The judge has
             1 GiB. The total thus stays below `processes` x (2.25 x `memory_bytes` + 16 MiB) + `folder_bytes` +
             1 GiB, and without such tables below half of it.
  processes  Their number is limited, including threads.

Further: an empty environment, no inherited descriptors, no capabilities, no other program to start; limits on
processor time, wall-clock time and file sizes. Output is discarded, and input is empty. Python's hashes are seeded with
0, so that verdicts are reproducible.

A program cannot claim success. Each `assert` is split (`assertions`). The program's process computes the values of its
own calls on request, and returns them as plain data (`values`). The comparison runs in another process (`trial`), which
the program cannot see, signal or write to, and which reads the tests only when the program's process already runs in
separate memory. Thus neither the expected values nor the verdict are within the program's reach, whatever it does to
builtins, frames, exceptions, descriptors, its exit, or its objects' `__eq__`. Tests in HumanEval's form, a function
`check(candidate)`, run in that other process as a whole, which requests each call of `candidate` in the same way.

A verdict equals that of plain `exec` of program and tests, except for:
  - the program's own objects that claim to equal, or be less than, an expected value of another type; subclasses of
    plain types that do so are compared as those types;
  - object identity: `is` with a literal or a builtin function, a mutation of a value that is copied here;
  - tests that look up names as text: `eval`, `globals`; names assigned within an assert and used outside;
  - values of more than 8 MiB as JSON, and values of libraries beyond the standard one: NumPy is not available;
  - asserts within other statements, except in a `check`, which are not judged: a record with one is skipped;
  - an iterator from which more than 100 items are requested, which runs ahead by up to as many;
  - features that the sandbox withholds: input, files, sockets, other programs, record locks (SQLite on files needs
    them).

Not guaranteed:
  - A hole in the kernel is a hole in the sandbox.
  - A test that compares two values of the program, or one with a variable that a test has assigned, can be forged:
    such a variable lives in the program's process. Expected values belong in the assert.
  - A program may return a guess.
  - Memory is counted per process, since not every host provides control groups.
  - System calls are filtered on x86_64 and aarch64; elsewhere network and memory are not guaranteed.
  - Before Linux 5.14 `processes` also counts the user's processes outside; before 5.12 there is no separate file
    system.
"""

import contextlib
import dataclasses
import enum
import functools
import json
import os
import pathlib
import selectors
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence

import tqdm

from tasks.programs import assertions

_TASKS = pathlib.Path(__file__).resolve().parents[1]
_START = ("import sys, types; tasks = sys.modules['tasks'] = types.ModuleType('tasks'); "
          "tasks.__path__ = [sys.argv[1]]; "  # importing the package would import more than is needed
          "from tasks.programs import trial; trial.main()")
_GRACE_SECONDS = 15.0  # for the judge, beyond the program's own time; then this process kills it
_SECONDS_BETWEEN_LINES = 10.0


class SandboxError(OSError):
    """This host lacks a feature that confinement needs; one line names it."""


class Verdict(enum.StrEnum):
    PASSED = "passed"
    FAILED = "failed"  # an assert, or an exception
    TIMED_OUT = "timed out"
    OUT_OF_MEMORY = "out of memory"
    KILLED = "killed"
    OUTPUT_FLOOD = "output flood"
    CRASHED = "crashed"  # ended, or stopped answering, before its tests ended


@dataclasses.dataclass(frozen=True)
class Program:
    """An untrusted program and its tests.

    Attributes:
      source: its text, run as a module whose `__name__` is "program".
      tests: Python statements for `assertions.steps`, run after the program in this order.
      defined: builtin names that in tests refer to the program's own objects, such as a function called `sum`.
      entry_point: if given, tests are for `assertions.check_steps`: a function `check`, to which the program's function
        of this name is passed.
    """

    source: str
    tests: tuple[str, ...]
    defined: Collection[str] = ()
    entry_point: str = ""

    def steps(self) -> list[assertions.Step]:
        """The judge's steps. Raises `assertions.Unjudged`, a ValueError, if the tests cannot be judged."""
        return assertions.check_steps(self.tests, self.entry_point) if self.entry_point else assertions.steps(
            self.tests, self.defined)


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of a program. Times are in seconds; processor time and memory are counted per process."""

    cpu_seconds: int = 10
    wall_seconds: float = 20.0
    memory_bytes: int = 512 << 20
    file_bytes: int = 16 << 20
    folder_bytes: int = 64 << 20
    processes: int = 8

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(f"Limits: {field.name} must be positive, not {getattr(self, field.name)}")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a program; `detail` is one line, empty if it passed, and `seconds` the wall-clock time.

    `detail` may quote the program: control characters are replaced, but the rest is untrusted.
    """

    verdict: Verdict
    detail: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.verdict is Verdict.PASSED


def run_programs(programs: Sequence[Program], *, workers: int | None = None, limits: Limits | None = None,
                 insist: bool = False, progress: str | None = None) -> list[Outcome]:
    """Runs programs, several at a time, and returns their outcomes in the order given.

    An interrupt (or any exception here) kills running programs before it propagates.

    Args:
      programs: the programs.
      workers: number at a time; by default the number of processors.
      limits: the limits of each program.
      insist: runs them even if guarantees are missing; without a PID namespace a program can end this process,
        thereby forge its verdict, and leave processes behind.
      progress: the label of progress on the terminal; None shows none.

    Raises:
      SandboxError: guarantees are missing, and `insist` is False.
      ValueError: tests that cannot be judged, or `workers` below 1.
    """
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    jobs = [json.dumps({"source": program.source, "steps": program.steps()}).encode() for program in programs]
    if jobs and not insist:
        require_guarantees()
    return [outcome for outcome, _ in _run(jobs, workers, limits or Limits(), insist, progress)]


def require_guarantees() -> None:
    """Raises SandboxError, with one line on what is missing, if this host lacks any of `guarantees()`."""
    holds, missing = _probe()
    if not all(holds.values()):
        raise SandboxError(f"untrusted programs are not run on this host, which lacks the guarantees "
                           f"{', '.join(name for name in holds if not holds[name])} ({missing}); "
                           "see tasks/programs/sandbox.py")


def guarantees() -> dict[str, bool]:
    """The guarantees that hold on this host, found once per process by running programs that try to break them."""
    return dict(_probe()[0])


_PROBES = {
    "network": """
import socket
def holds():
    for connect in (lambda: socket.create_connection(("127.0.0.1", {port}), 2), lambda: socket.socket(40)):  # AF_VSOCK
        try: connect().close()
        except OSError: continue
        return False
    return True
""",
    "reading": """
def holds():
    try: open({file!r}).close()
    except OSError: return True
""",
    "writing": """
import os
def holds():
    open("inside", "w").write("x")
    for folder in ({folder!r}, {home!r}, "/var/tmp", "/dev/shm", os.path.dirname(os.__file__)):
        path = folder + "/codellm-probe-%d" % {pid}
        try: open(path, "w").close()
        except OSError: continue
        os.remove(path)
        return False
    return True
""",
    "signals": """
import os
def holds():
    try: os.kill({pid}, 0)
    except ProcessLookupError: return os.getppid() == 0
    except OSError: pass
""",
    "memory": """
import ctypes, fcntl, os
def holds():
    try: bytearray({memory})
    except MemoryError: pass
    else: return False
    try: fcntl.fcntl(os.pipe()[0], 1031, 1 << 20)  # F_SETPIPE_SZ
    except OSError: pass
    else: return False
    libc = ctypes.CDLL(None)
    return libc.memfd_create(b"", 0) == libc.shmget(0, 4096, 0o1600) == libc.semget(0, 1, 0o1600) == -1
""",
    "processes": """
import os, time
def holds():
    for number in range({processes}):
        try:
            if os.fork() == 0:
                time.sleep(60)
                os._exit(0)
        except OSError: return True
""",
}


@functools.cache
def _probe() -> tuple[dict[str, bool], str]:
    """Guarantees, and the kernel's error if it refused one, else the outcomes of the programs that tested them."""
    limits = Limits(cpu_seconds=5, wall_seconds=10)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="codellm-probe-"))
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        file = pathlib.Path(folder, "file")
        file.touch()
        facts = {"port": server.getsockname()[1], "file": str(file), "folder": folder, "pid": os.getpid(),
                 "home": os.path.expanduser("~"), "memory": limits.memory_bytes, "processes": limits.processes + 1}
        jobs = [json.dumps({"source": source.format(**facts), "steps": assertions.steps(["assert holds()"])}).encode()
                for source in _PROBES.values()]
        results = _run(jobs, 2, limits, insist=True, progress=None)
    holds = {name: outcome.passed for name, (outcome, _) in zip(_PROBES, results, strict=True)}
    said = [missing or outcome.detail for outcome, missing in results if missing or outcome.verdict is Verdict.CRASHED]
    return holds, next(iter(said), "a limit does not hold")


def _visible() -> list[str]:
    """The files of the host that a program sees: Python's library, and the libraries of its compiled modules."""
    # The base Python's, not a virtual environment's, which may be in the folder that an empty one replaces.
    of_base = {"platbase": sys.base_exec_prefix}
    wanted = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache",
              f"{sys.base_prefix}/lib", sysconfig.get_path("stdlib"),
              sysconfig.get_path("platstdlib", vars=of_base)]
    return [path for path in dict.fromkeys(wanted)
            if not any(path.startswith(f"{other}/") for other in wanted)]


@dataclasses.dataclass
class _Running:
    index: int
    process: subprocess.Popen[bytes]
    started: float
    answer: bytes = b""


def _run(jobs: Sequence[bytes], workers: int, limits: Limits, insist: bool,
         progress: str | None) -> list[tuple[Outcome, str | None]]:
    """Outcomes, each with the kernel's error messages (only if `insist`)."""
    results: dict[int, tuple[Outcome, str | None]] = {}
    waiting = iter(enumerate(jobs))
    running: list[_Running] = []
    with (tempfile.TemporaryDirectory(prefix="codellm-sandbox-", ignore_cleanup_errors=True) as folder,
          selectors.DefaultSelector() as selector, _shown(progress, results, len(jobs)) as show):
        settings = dataclasses.asdict(limits) | {"folder": folder, "visible": _visible(), "insist": insist,
                                                 "harness": os.getpid()}
        try:
            while len(results) < len(jobs):
                while len(running) < workers and (job := next(waiting, None)) is not None:
                    running.append(_Running(job[0], _start(job[1], settings), time.monotonic()))
                    selector.register(_pipe(running[-1]), selectors.EVENT_READ, running[-1])
                for key, _ in selector.select(1.0):
                    data = os.read(key.fd, 1 << 16)
                    key.data.answer += data
                    if not data:
                        selector.unregister(key.fd)
                        running.remove(key.data)
                        results[key.data.index] = _result(key.data)
                for one in running:
                    if time.monotonic() - one.started > limits.wall_seconds + _GRACE_SECONDS:
                        one.process.kill()  # its pipe closes, which is detected above
                show()
        finally:
            for one in running:
                one.process.kill()
            for one in running:
                while os.read(_pipe(one), 1 << 16):  # until its children are gone, too
                    pass
                one.process.wait()
                os.close(_pipe(one))
    return [results[index] for index in range(len(jobs))]


def _pipe(one: _Running) -> int:
    assert one.process.stdout is not None
    return one.process.stdout.fileno()


def _start(job: bytes, settings: dict[str, object]) -> subprocess.Popen[bytes]:
    with tempfile.TemporaryFile() as file:  # rather than a pipe, which would need a writer
        file.write(job)
        file.seek(0)
        return subprocess.Popen(
            [sys.executable, "-sSP", "-X", "utf8", "-c", _START, str(_TASKS), json.dumps(settings)],
            stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0, start_new_session=True, cwd="/",
            env={"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"})


def _result(one: _Running) -> tuple[Outcome, str | None]:
    status = one.process.wait()
    assert one.process.stdout is not None
    one.process.stdout.close()
    seconds = time.monotonic() - one.started
    try:
        answer = json.loads(one.answer)
        detail = "".join(letter if letter.isprintable() else " " for letter in answer["detail"])
        return Outcome(Verdict(answer["verdict"]), detail, seconds), answer["missing"]
    except ValueError:  # only the judge writes there, when it ends
        if status >= 0:
            what = "its judge was killed" if status == 0 else f"the sandbox itself ended with exit status {status}"
            return Outcome(Verdict.CRASHED, what, seconds), None
        return Outcome(Verdict.TIMED_OUT, f"its judge did not finish after {seconds:.0f} s", seconds), None


class _Show:
    """A progress bar on a terminal, elsewhere a plain line every ten seconds and one at the end."""

    def __init__(self, label: str | None, results: dict[int, tuple[Outcome, str | None]], total: int) -> None:
        self._label, self._results, self._total = label, results, total
        self._bar = None
        self._shown, self._next_line = 0, time.monotonic() + _SECONDS_BETWEEN_LINES
        if label is not None and sys.stderr.isatty():
            self._bar = tqdm.tqdm(total=total, desc=label, dynamic_ncols=True, unit="program")

    def __call__(self) -> None:
        done = len(self._results)
        if self._label is None or done == self._shown:
            return
        passed = sum(outcome.passed for outcome, _ in self._results.values())
        if self._bar is not None:
            self._bar.set_postfix_str(f"{passed} passed", refresh=False)
            self._bar.update(done - self._shown)
        elif done == self._total or time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
            print(f"{self._label}: {done} of {self._total} programs run, {passed} passed", file=sys.stderr, flush=True)
        self._shown = done

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


@contextlib.contextmanager
def _shown(label: str | None, results: dict[int, tuple[Outcome, str | None]], total: int) -> Iterator[_Show]:
    with contextlib.closing(_Show(label, results, total)) as show:
        yield show
