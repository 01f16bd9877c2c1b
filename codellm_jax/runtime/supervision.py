"""Watching processes: one for each process of a multi-process run, and one for a multi-process run on one machine.

When one process of a run is lost, JAX aborts the others within a minute from C++, with a page of stack trace. The
watching process then prints one line about what happened. Nothing here needs JAX.
"""

import ctypes
import glob
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import IO

from codellm_jax.runtime.terminal import ending_signals

GRACE_SECONDS = 5.0  # for the others to report, once one has failed
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


def has_others() -> bool:
    """Whether the environment suggests other processes of this run: TPUs, Slurm or Open MPI. A process restricted to
    its own chips (TPU_PROCESS_BOUNDS) is alone.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    on_tpu = (not platforms or "tpu" in platforms) and bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))
    started = max(int(os.environ.get(name, "1")) for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    on_tpu = on_tpu and os.environ.get("TPU_PROCESS_BOUNDS") != "1,1,1"
    return on_tpu or (started > 1 and ("SLURM_PROCID" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ))


def watched(command: str) -> int | None:
    """Continues in a forked child: returns None there, and its exit status here once it has ended. Call before threads
    start.

    SIGTERM and SIGHUP are forwarded; a terminal sends Ctrl-C to both. Neither process outlives the other.
    """
    child = os.fork()
    if not child:
        die_with_parent()
        return None
    before = {number: signal.signal(number, lambda number, _: os.kill(child, number) if number != signal.SIGINT
                                    else None) for number in ending_signals()}
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for number, handler in before.items():
        signal.signal(number, handler)
    if status < 0:
        why = ("as JAX does when another process of the run is lost, or was stopped for longer than "
               "--heartbeat_seconds") if status == -signal.SIGABRT else "from outside"
        print(f"t5x {command}: error: this process was ended by {signal.Signals(-status).name} ({why}). Start the same "
              "command again on all: it continues from the newest checkpoint.", file=sys.stderr, flush=True)
        return 1
    return status


def die_with_parent() -> None:
    """Makes the kernel kill this process by SIGKILL when its parent ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)


def without_others(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process that runs alone, although this one may be one of several Slurm tasks: those of a
    study are workers with separate runs.
    """
    return {name: value for name, value in environment.items()
            if name not in ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")}


def main(parent: str, *arguments: str) -> None:
    """Becomes `python -m ARGUMENTS`, which is killed when its parent, process PARENT, ends."""
    die_with_parent()
    if os.getppid() != int(parent):  # the parent ended before the binding
        sys.exit(1)
    os.execv(sys.executable, [sys.executable, "-m", *arguments])


def run_local_processes(arguments: Sequence[str], count: int) -> int:
    """Runs `t5x ARGUMENTS` in `count` local CPU processes; returns the exit status.

    The first one uses the terminal. When one fails, the others are killed, and a line says which failed and why.
    SIGTERM and SIGHUP are forwarded; a terminal sends Ctrl-C to all.

    Raises:
      ValueError: the count is below 2.
    """
    if count < 2:
        raise ValueError(f"--local_processes must be at least 2, found {count}.")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "codellm_jax.cli", *arguments, f"--coordinator_address=127.0.0.1:{port}",
               f"--process_count={count}"]
    logs: list[IO[bytes]] = [tempfile.TemporaryFile() for _ in range(1, count)]
    processes: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None and number != signal.SIGINT:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in ending_signals()}
    try:
        for index in range(count):
            log = None if index == 0 else logs[index - 1]
            processes.append(subprocess.Popen(
                [*command, f"--process_index={index}"], env={"JAX_PLATFORMS": "cpu"} | os.environ, stdout=log,
                stderr=log, stdin=subprocess.DEVNULL))
        return _wait(processes, logs, arguments[0])
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
        for log in logs:
            log.close()


def _wait(processes: Sequence[subprocess.Popen[bytes]], logs: Sequence[IO[bytes]], command: str) -> int:
    while not any(process.poll() for process in processes):
        if all(process.poll() == 0 for process in processes):
            return 0
        time.sleep(0.1)
    index, first = next((index, process) for index, process in enumerate(processes) if process.poll())
    end = time.monotonic() + GRACE_SECONDS
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        time.sleep(0.1)
    status = 1 if first.returncode < 0 else first.returncode
    said = {}
    for number, (process, log) in enumerate(zip(processes[1:], logs, strict=True), 1):
        if process.poll() is not None and process.returncode:
            log.seek(0)
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
            said[number] = lines[-1] if lines else f"status {process.returncode}"
            if process.returncode < 0:
                said[number] = (f"t5x {command}: error: ended by {signal.Signals(-process.returncode).name}. The same "
                                "command continues from the newest checkpoint.")
    # A process killed from outside is the cause, whichever failed first; process 0 has printed its own error.
    causes = [number for number, line in said.items() if "ended by" in line and signal.SIGABRT.name not in line]
    for number in causes[:1] or [number for number in said if number == index]:
        print(f"process {number} of {len(processes)}: {said[number]}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    main(*sys.argv[1:])
