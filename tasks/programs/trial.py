"""The process that judges one untrusted program, and its child that runs the program.

`sandbox` starts `main` in a new interpreter, which creates three nested processes:

  supervisor   leaves the host's namespaces and waits; when it dies, the others die
  judge        init of a PID namespace; reads the tests only once the program's process exists, evaluates the
               asserts, keeps time, reports
  program      init of a nested PID namespace; holds the program's text, computes the values of expressions on request
"""

import builtins
import contextlib
import json
import os
import reprlib
import select
import signal
import sys
import time
import traceback
import types
from collections.abc import Sequence
from typing import Any, NoReturn

from tasks.programs import assertions, calls, confinement, values

_LONGEST_ANSWER = 8 << 20
_JUDGE_MEMORY = 1 << 30  # an answer of 8 MiB in JSON can be a large object
_DEEP = 5_000  # recursion limit for values, which nest deeper than function calls and take several calls per level
_OUT_OF_MEMORY = b'{"raised": "MemoryError", "text": ""}'
_OUT_OF_MEMORY_FRAME = len(_OUT_OF_MEMORY).to_bytes(4) + _OUT_OF_MEMORY


class Ended(Exception):
    """The verdict on a program that failed."""

    def __init__(self, verdict: str, detail: str, raised: tuple[str, str] = ("", "")) -> None:
        super().__init__(verdict, detail)
        self.verdict, self.detail = verdict, detail
        self.raised = raised  # the exception's name and text

    def as_builtin(self) -> Exception | None:
        """The exception that the program raised; None unless it is a builtin one."""
        name, text = self.raised
        kind = getattr(builtins, name, None)
        if not (isinstance(kind, type) and issubclass(kind, Exception)) or issubclass(kind, UnicodeError):
            return None
        return kind(text)


def main() -> None:
    """Judges the program described by the last argument and standard input; writes one line of JSON."""
    settings = json.loads(sys.argv[-1])
    try:
        _supervise(settings)
    except OSError as error:
        _report("crashed", f"the sandbox could not be set up: {error}", missing=str(error))


def _report(verdict: str, detail: str, missing: str | None = None, descriptor: int = 1) -> None:
    os.write(descriptor, json.dumps({"verdict": verdict, "detail": detail[:2000], "missing": missing}).encode())


def _supervise(settings: dict[str, Any]) -> None:
    confinement.die_with_parent()
    if os.getppid() != settings["harness"]:
        return  # the parent died before this took effect
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if memory runs out, this goes first
    null = os.open(os.devnull, os.O_RDWR)
    namespaces, missing, user = False, None, None
    try:
        confinement.new_namespaces()
        namespaces = True
        confinement.new_file_system(settings["folder"], settings["visible"], settings["folder_bytes"])
        if os.geteuid() == 0:  # a separate user: process limits do not apply to root, and count per user
            user = 1_000_000_000 + os.getpid()
    except OSError as error:
        if not settings["insist"]:
            raise
        missing = str(error)
        os.chdir(settings["folder"])
        os.mkdir(str(os.getpid()))
        os.chdir(str(os.getpid()))
    judge = os.fork()
    if judge == 0:
        try:
            _judge(settings, null, namespaces, user, missing)
        except BaseException as error:
            _report("crashed", f"the judge failed: {type(error).__name__}: {error}")
        finally:
            os._exit(0)
    os.waitpid(judge, 0)


def _judge(settings: dict[str, Any], null: int, namespaces: bool, user: int | None, missing: str | None) -> None:
    confinement.die_with_parent()
    if namespaces:
        confinement.new_process_ids()
    request_end, requests = os.pipe()
    replies, reply_end = os.pipe()
    program = os.fork()
    if program == 0:
        try:
            _become_program(settings, null, request_end, reply_end, user)
        finally:
            os._exit(1)
    for end in (request_end, reply_end):
        os.close(end)
    confinement.drop_privileges(user)
    sys.setrecursionlimit(_DEEP)
    confinement.limit(settings["cpu_seconds"] + 10, _JUDGE_MEMORY, 0, None)
    with open(0, "rb", closefd=False) as file:
        job = json.load(file)  # only now, so that the program's memory holds no copy of the tests
    verdicts = os.dup(1)
    for descriptor in (0, 1):  # tests may also read and print
        os.dup2(null, descriptor)
    verdict, detail = "passed", ""
    try:
        _go_through(job, _Conversation(settings, program, requests, replies))
    except Ended as ended:
        verdict, detail = ended.verdict, ended.detail
    except BaseException as error:
        verdict, detail = "crashed", f"the judge failed: {type(error).__name__}: {error}"
    _kill(program)
    _report(verdict, detail, missing, verdicts)


def _kill(program: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(program, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(program, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(program, 0)


def _go_through(job: dict[str, Any], conversation: "_Conversation") -> None:
    """Runs the program and every step of its tests; returns if all pass."""
    conversation.ask({"run": job["source"]})
    names: dict[str, Any] = {}
    for kind, source, *rest in job["steps"]:
        if kind in ("import", "run"):
            conversation.ask({"run": source})
        try:
            if kind == "import":
                exec(source, names)
            elif kind == "check":
                _check(source, rest[0], conversation)
            elif kind == "judge":
                _judge_assert(source, rest[0], rest[1], names, conversation)
        except Ended:
            raise
        except MemoryError:
            raise Ended("out of memory", f"while judging {source}") from None
        except Exception as error:  # such as a TypeError of an operator between the result and the expected value
            raise Ended("failed", f"{type(error).__name__}: {error} (in {source})") from None


def _judge_assert(source: str, condition: str, parts: list[str], names: dict[str, Any],
                  conversation: "_Conversation") -> None:
    got: list[Any] = []

    def ask(index: int, *arguments: Any) -> Any:
        got.append(conversation.value({"call": parts[index]}, arguments))
        return got[-1]

    names[assertions.ASK] = ask
    if not eval(condition, names):
        raise Ended("failed", f"AssertionError: {source} (got {reprlib.repr(got[-1]) if got else 'nothing'})")


def _check(source: str, entry_point: str, conversation: "_Conversation") -> None:
    """Runs `check` of a module with a proxy of the program's function; returns if it passes."""
    ended: list[Ended] = []  # kept, since a test that catches all exceptions would hide it

    def candidate(*arguments: Any, **named: Any) -> Any:
        try:
            return conversation.value(
                {"call": f"lambda arguments, named: {entry_point}(*arguments, **named)"}, (arguments, named))
        except Ended as error:
            if raised := error.as_builtin():
                raise raised from None
            ended.append(error)
            raise

    names: dict[str, Any] = {"__name__": "tests"}
    exec(compile(source, "tests", "exec", dont_inherit=True), names)
    names[entry_point] = candidate  # some tests call it by its own name
    try:
        names["check"](candidate)
    except (Ended, MemoryError):
        raise
    except Exception as error:
        lines = [frame.lineno or 1 for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "tests"]
        where = source.split("\n")[lines[-1] - 1].strip()
        what = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise (ended[0] if ended else Ended("failed", f"{what} (in {where})")) from None
    if ended:
        raise ended[0]


class _Conversation:
    """Sends requests to the program's process and waits, within limits, for its answers."""

    def __init__(self, settings: dict[str, Any], program: int, requests: int, replies: int) -> None:
        self._settings, self._program = settings, program
        self._requests, self._replies = requests, replies
        self._deadline = time.monotonic() + settings["wall_seconds"]
        self._received = b""
        self._poll = select.poll()
        self._poll.register(replies, select.POLLIN)
        self._known = values.Known(self._use)

    def value(self, request: dict[str, Any], arguments: Sequence[Any]) -> Any:
        """The result of a request with these values.

        Raises:
          Ended: see `ask`.
        """
        encoded = [values.encode(value, self._known.number) for value in arguments]
        return values.decode(self.ask({**request, "values": encoded})["value"], self._known.named)

    def _use(self, how: str, number: int, *arguments: Any) -> Any:
        """Makes a request for a `Foreign`; raises the object's exception here if it is a builtin one."""
        try:
            return self.value({"use": how, "object": number}, arguments)
        except Ended as ended:
            if raised := ended.as_builtin():
                raise raised from None
            raise

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer of the program's process.

        Raises:
          Ended: it raises, ends, or violates a limit or the form of answers.
        """
        with contextlib.suppress(BrokenPipeError):  # the reason is reported when its answers end
            _send(self._requests, request)
        try:
            answer = json.loads(self._frame())
            if not isinstance(answer, dict) or not {"raised", "value"} & answer.keys():
                raise ValueError(answer)
            if "raised" not in answer:
                return answer
            name, text = str(answer["raised"]), str(answer["text"])
        except (ValueError, KeyError, RecursionError):
            raise Ended("crashed", "answered in an unknown form") from None
        detail = f"{name}: {text}".removesuffix(": ")
        if name == "MemoryError":
            raise Ended("out of memory", detail)
        raise Ended("failed", detail, (name, text))

    def _frame(self) -> bytes:
        size = None
        while True:
            if size is None and len(self._received) >= 4:
                size = 4 + int.from_bytes(self._received[:4])
                if size > _LONGEST_ANSWER:
                    raise Ended("output flood", f"a value longer than {_LONGEST_ANSWER:,} bytes")
            if size is not None and len(self._received) >= size:
                frame, self._received = self._received[4:size], self._received[size:]
                return frame
            remaining = self._deadline - time.monotonic()
            if remaining <= 0:
                raise Ended("timed out", f"{self._settings['wall_seconds']} s have passed")
            if self._poll.poll(remaining * 1000 + 1):
                data = os.read(self._replies, 1 << 16)
                if not data:
                    self._closed()
                self._received += data

    def _closed(self) -> NoReturn:
        for _ in range(200):
            pid, status, used = os.wait4(self._program, os.WNOHANG)
            if pid:
                break
            time.sleep(0.002)
        else:
            raise Ended("crashed", "closed the descriptor that it answers through")
        if not os.WIFSIGNALED(status):
            raise Ended("crashed", f"ended with exit status {os.waitstatus_to_exitcode(status)} before its tests did")
        number = os.WTERMSIG(status)
        if number in (signal.SIGKILL, signal.SIGXCPU) and (
                used.ru_utime + used.ru_stime > self._settings["cpu_seconds"] - 0.5):
            raise Ended("timed out", f"{self._settings['cpu_seconds']} s of processor time are used up")
        raise Ended("killed" if number == signal.SIGKILL else "crashed", f"ended by signal {number}")


def _send(descriptor: int, message: dict[str, Any]) -> None:
    data = json.dumps(message).encode()
    view = memoryview(len(data).to_bytes(4) + data)
    while view:
        view = view[os.write(descriptor, view):]


def _become_program(settings: dict[str, Any], null: int, requests: int, replies: int, user: int | None) -> NoReturn:
    """Turns this process into the program's; from here on nothing in it is trusted, and its answers are only values."""
    os.setsid()
    for descriptor in range(3):  # its input is empty, and its output is discarded
        os.dup2(null, descriptor)
    for descriptor in range(3, 64):
        if descriptor not in (requests, replies):
            with contextlib.suppress(OSError):
                os.close(descriptor)
    confinement.drop_privileges(user)
    confinement.limit(settings["cpu_seconds"], settings["memory_bytes"], settings["file_bytes"], settings["processes"])
    try:
        calls.allow_listed()
    except OSError:
        if not settings["insist"]:
            raise
    os.environ.clear()
    sys.argv[:] = sys.orig_argv[:] = ["program"]
    for name in [name for name in sys.modules if name.split(".")[0] == "tasks"]:
        del sys.modules[name]
    module = sys.modules["program"] = types.ModuleType("program")
    names = module.__dict__
    kept = values.Kept()
    depth = sys.getrecursionlimit()
    frame: types.FrameType | None = sys._getframe()
    while frame := frame and frame.f_back:  # frames above the program do not count towards its limit
        depth += 1
    while True:
        sys.setrecursionlimit(_DEEP)
        request = json.loads(_read(requests, int.from_bytes(_read(requests, 4))))
        try:
            arguments = [values.decode(value, kept.named) for value in request.get("values", ())]
            sys.setrecursionlimit(depth)
            if "run" in request:
                exec(compile(request["run"], "program", "exec", dont_inherit=True, optimize=0), names)
                value = None
            elif "use" in request:
                value = kept.use(request["use"], request["object"], *arguments)
            else:
                value = eval(request["call"], names)(*arguments)
            depth = sys.getrecursionlimit()
            sys.setrecursionlimit(_DEEP)
            _send(replies, {"value": values.encode(value, kept.number)})
        except MemoryError:
            os.write(replies, _OUT_OF_MEMORY_FRAME)
        except BaseException as error:
            _send(replies, {"raised": type(error).__name__, "text": str(error)[:1000]})


def _read(descriptor: int, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = os.read(descriptor, count - len(data))
        if not part:
            os._exit(0)
        data += part
    return data
