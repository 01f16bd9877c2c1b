"""A job on Cloud TPU: requests a queued resource, installs the package at a commit on every worker, starts the command
there, prints worker 0's log, and deletes the resource at the end, however it ends.

A worker contains in ~/t5x: `source` (the checkout), `venv`, `installed` (the commit, once everything is installed),
`log`, `lock` (held while the command runs), `pid`, and `status` (the command's exit status). The command does not
depend on an ssh connection, so a dropped connection does no harm, and this process may be killed: the same command line
finds the resource by its name and continues to print the log.

A preempted resource is deleted and requested again, and the same command continues from its newest checkpoint.
"""

import codecs
import contextlib
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from codellm_jax.pods.job import Job

POLL_SECONDS = 10.0
LOG_BYTES = 1 << 20  # of the log, read at once
PYTHON = "3.11"  # TPU VMs have an older version; uv installs its own
INSTALL_TRIES = 3
RESTARTS = 5  # in place, of a command that ended abnormally while the resource remained
LOOKS_AFTER_A_FAILURE = 6  # polls: a preemption ends the command some seconds before the resource reports it
DELETE_TRIES = 30  # a resource refuses deletion during a change of state
TERMINATED = "143"  # the exit status after SIGTERM

WAITING = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "SUSPENDING", "DELETING")
GONE = ("SUSPENDED", "FAILED")  # its TPUs are deleted; only an entry of the queue is left

# The state of the command: running, its exit status, or lost if the machine failed during it. The lock is checked
# first: once it is free, a missing status will never appear.
_STATE = "if flock --nonblock lock true; then cat status 2>/dev/null || echo lost; else echo running; fi"


def create(job: Job) -> list[str]:
    """The gcloud command that requests the TPUs."""
    nodes = [f"--node-id={job.name}"] if job.accelerator.slices == 1 else [
        f"--node-count={job.accelerator.slices}", f"--node-prefix={job.name}"]
    return [*_queued_resource(job, "create"), *nodes, f"--accelerator-type={job.accelerator.type}",
            f"--runtime-version={job.accelerator.runtime_version}", f"--labels=t5x-job={job.identity}",
            *(["--spot"] if job.spot else [])]


def describe(job: Job) -> list[str]:
    """The gcloud command that prints the state of the resource, as JSON."""
    return [*_queued_resource(job, "describe"), "--format=json"]


def delete(job: Job) -> list[str]:
    """The gcloud command that deletes the TPUs; --force also deletes its nodes."""
    return [*_queued_resource(job, "delete"), "--force"]


def _queued_resource(job: Job, verb: str) -> list[str]:
    return ["gcloud", "compute", "tpus", "queued-resources", verb, job.name, *_where(job)]


def _where(job: Job) -> list[str]:
    return [f"--zone={job.zone}", *([f"--project={job.project}"] if job.project else []), "--quiet"]


def nodes(job: Job) -> list[str]:
    """The names of the TPU VMs: the resource's own name, or one for each slice."""
    if job.accelerator.slices == 1:
        return [job.name]
    return [f"{job.name}-{number}" for number in range(job.accelerator.slices)]


def ssh(job: Job, node: str, worker: str, script: str) -> list[str]:
    """The gcloud command that runs a shell script on one or all workers of a node.

    Without the time-outs, ssh would wait many minutes for a machine that no longer exists.
    """
    return ["gcloud", "compute", "tpus", "tpu-vm", "ssh", node, *_where(job), f"--worker={worker}",
            "--ssh-flag=-oConnectTimeout=20", "--ssh-flag=-oServerAliveInterval=20", f"--command={script}"]


def install_script(job: Job) -> str:
    """Installs the commit in a virtual environment with its own Python; does nothing if it is installed."""
    commit, url = job.source.commit, shlex.quote(job.source.url)
    return (f'set -e; cd; if [ "$(cat t5x/installed 2>/dev/null)" != {commit} ]; then rm -rf t5x; mkdir t5x; '
            "PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --user --quiet --upgrade uv; "
            f"GIT_TERMINAL_PROMPT=0 git clone --quiet {url} t5x/source; "
            f"git -C t5x/source checkout --quiet --detach {commit}; "
            f"python3 -m uv venv --quiet --python {PYTHON} t5x/venv; "
            "python3 -m uv pip install --quiet --python t5x/venv/bin/python './t5x/source[tpu]'; "
            f"t5x/venv/bin/t5x --help >/dev/null; echo {commit} >t5x/installed; fi")


def start_script(job: Job) -> str:
    """Ends the rest of an earlier start, then starts the command in a new session.

    The script takes the lock and passes it on open, so it is held from before this script ends until after `status` is
    written. A terminated command is not done, although t5x then saves and exits with 0: TERM results in 143.
    """
    runner = (f"trap terminated=1 TERM; ulimit -n hard; cd {shlex.quote(f'source/{job.source.folder}')}; "
              f'PYTHONUNBUFFERED=1 "$HOME"/t5x/venv/bin/t5x {shlex.join(job.command)}; status=$?; cd "$HOME"/t5x; '
              f'[ -z "$terminated" ] || status={TERMINATED}; echo $status >status.new; mv status.new status')
    return ("set -e; cd ~/t5x; exec 9>lock; if ! flock --nonblock 9; then kill -TERM -- -$(cat pid) || true; "
            "flock --timeout 60 9 || { kill -KILL -- -$(cat pid) || true; flock --timeout 10 9; }; fi; rm -f status; "
            f"setsid nohup bash -c {shlex.quote(runner)} </dev/null >>log 2>&1 & echo $! >~/t5x/pid")


def poll_script(job: Job, offset: int) -> str:
    """Prints a line with the command's state, then the log from a byte offset on.

    gcloud itself retries a dropped connection, so output of the first try may precede the line.
    """
    return (f"cd ~/t5x 2>/dev/null || exit 0; state=$({_STATE}); echo; echo {job.identity} $state; "
            f"tail --bytes=+{offset + 1} log 2>/dev/null | head --bytes={LOG_BYTES}")


def finish_script(job: Job) -> str:
    """Prints a line with the worker's name and its command's state, and the end of its log if it failed."""
    return (f"cd ~/t5x; flock --timeout 60 lock true || true; state=$({_STATE}); echo; "
            f"echo {job.identity} $(hostname) $state; "
            '[ "$state" = 0 ] || tail --lines=20 log | sed "s/^/$(hostname): /"')


def commands(job: Job) -> str:
    """All commands of a job, in order, as one would type them."""
    every = [shlex.join(ssh(job, node, "all", script))
             for script in (install_script(job), start_script(job)) for node in nodes(job)]
    count = len(nodes(job))
    parts = [
        ("ask for the TPUs", [shlex.join(create(job))]),
        ("until it is ACTIVE", [shlex.join(describe(job))]),
        ("install on every worker", every[:count]),
        ("start on every worker", every[count:]),
        ("print the log of worker 0, until it ends", [shlex.join(ssh(job, nodes(job)[0], "0", poll_script(job, 0)))]),
        ("show how every worker ended", [shlex.join(ssh(job, node, "all", finish_script(job))) for node in nodes(job)]),
        ("delete the TPUs; after a preemption, start again at the top", [shlex.join(delete(job))])]
    return "\n\n".join("\n".join([f"# {title}", *lines]) for title, lines in parts)


def launch(job: Job, keep: bool = False, poll_seconds: float = POLL_SECONDS) -> int:
    """Runs a job to its end; returns the exit status of its command.

    Args:
      job: what to run and where.
      keep: leaves the resource running at the end; otherwise it is deleted, also after a failure or Ctrl-C.
      poll_seconds: between two polls of the resource and the log.

    Raises:
      FileNotFoundError: gcloud is not on PATH.
      ValueError: the resource's name is taken by something else.
      OSError: gcloud refused, or the package could not be installed; the message is one line.
      KeyboardInterrupt: on SIGINT or SIGTERM, after the resource is deleted.
    """
    if shutil.which("gcloud") is None:
        raise FileNotFoundError("gcloud is not on PATH: install the Google Cloud CLI, or look at --print_only.")
    launched = _Launched(job, poll_seconds)
    with _interruptible():
        try:
            return launched.run()
        finally:
            if launched.ours and keep:
                _say(f"{job.name} is kept and continues to cost money; to delete it: {shlex.join(delete(job))}")
            elif launched.ours:
                launched.delete()


class _Launched:
    """A job in progress. `ours` is true once this job has, or may have, created the resource."""

    def __init__(self, job: Job, poll_seconds: float) -> None:
        self.job, self.ours = job, False
        self._poll_seconds = poll_seconds
        self._offset, self._restarts, self._told = 0, 0, ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def run(self) -> int:
        """Returns the exit status of the command, across preemptions."""
        state, reason = self._state(patient=False)
        was_active = False
        while True:
            if state is None:
                self._create()
            elif state in GONE:
                if state == "FAILED" and not was_active:
                    raise OSError(f"{self.job.name} failed before it had a TPU: {reason or 'no reason is given'}.")
                self.tell(f"{self.job.name} is {state}: it is deleted and requested again.")
                self.delete()
            elif state == "ACTIVE":
                was_active = True
                status = self._work()
                if status is not None:
                    return status
            else:
                self.tell(f"{self.job.name} is {state}.")
                self._wait()
            state, reason = self._state()

    def _create(self) -> None:
        self.tell(f"Asking for {self.job.accelerator.name} in {self.job.zone} as {self.job.name}.")
        self._offset, self.ours = 0, True  # set before the request is sent: it may arrive even if interrupted
        done = _gcloud(create(self.job))
        if done.returncode:
            raise OSError(f"gcloud refused to create {self.job.name}: {_last_line(done.stderr)}")

    def delete(self) -> None:
        """Deletes the resource in any state, and waits until it is deleted. Ctrl-C does not stop this."""
        self.tell(f"Deleting {self.job.name}.")
        before = [(number, signal.signal(number, signal.SIG_IGN)) for number in (
            signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        try:
            for _ in range(DELETE_TRIES):
                done = _gcloud(delete(self.job), start_new_session=True)
                if not done.returncode or _is_not_found(done.stderr):
                    return
                self._wait()
            raise OSError(f"{self.job.name} is NOT deleted and continues to cost money: {_last_line(done.stderr)} Run "
                          f"this command yourself: {shlex.join(delete(self.job))}")
        finally:
            for number, handler in before:
                signal.signal(number, handler)

    def _work(self) -> int | None:
        """From an active resource to the command's exit status; None if the resource must be checked again."""
        state = self._poll()
        if state is None:  # it may be running: do not start it a second time
            self._again("Worker 0 cannot be reached")
            return None
        if state != "running":
            if not self._on_every_worker("Installing the package", install_script, INSTALL_TRIES):
                return None
            if not self._on_every_worker("Starting the command", start_script, INSTALL_TRIES):
                return None
            self.tell(f"The command is running; its log on worker 0 of {nodes(self.job)[0]} is ~/t5x/log.")
            state = "running"
        while state in ("running", None):
            self._wait()
            if self._state()[0] != "ACTIVE":
                return None
            state = self._poll()
        if state == "lost":
            self._again("The machine went down under the command")
            return None
        return self._finish()

    def _poll(self) -> str | None:
        """Prints new output of worker 0's log; returns the command's state, None if the worker could not be reached."""
        while True:
            done = _gcloud(ssh(self.job, nodes(self.job)[0], "0", poll_script(self.job, self._offset)))
            _, line, rest = done.stdout.rpartition(f"\n{self.job.identity} ".encode())
            if done.returncode:
                self.tell(f"Worker 0 cannot be reached and is tried again: {_last_line(done.stderr)}")
                return None
            if not line:
                return "lost"  # nothing is installed there yet
            state, _, log = rest.partition(b"\n")
            sys.stdout.write(self._decoder.decode(log))
            sys.stdout.flush()
            self._offset += len(log)
            if len(log) < LOG_BYTES:
                return state.decode()

    def _finish(self) -> int | None:
        """The exit status from the results of all workers, or None after a preemption."""
        found = [_gcloud(ssh(self.job, node, "all", finish_script(self.job))) for node in nodes(self.job)]
        lines = [line for done in found for line in done.stdout.decode(errors="replace").splitlines()]
        states = dict(line.split()[1:3] for line in lines if line.startswith(f"{self.job.identity} "))
        reached = bool(states) and not any(done.returncode for done in found)
        if reached and set(states.values()) == {"0"}:
            return 0
        for _ in range(LOOKS_AFTER_A_FAILURE):
            if self._state()[0] != "ACTIVE":
                return None
            self._wait()
        if not reached or {TERMINATED, "lost"} & set(states.values()):
            self._again("Something ended the command on a worker")
            return None
        print("\n".join(line for line in lines if line and not line.startswith(self.job.identity)), file=sys.stderr)
        failed = {worker: state for worker, state in states.items() if state != "0"}
        worker, state = min(failed.items(), key=lambda item: not item[1].isdigit())
        _say(f"{len(failed)} of {len(states)} workers failed; {worker}: " + (
            "it still ran a minute after worker 0 ended" if state == "running" else f"exit status {state}") + ".")
        return int(state) if state.isdigit() else 1

    def _again(self, reason: str) -> None:
        self._restarts += 1
        if self._restarts > RESTARTS:
            raise OSError(f"{reason}, {self._restarts} times while {self.job.name} stayed ACTIVE.")
        self.tell(f"{reason}: attempt {self._restarts} of {RESTARTS} to continue.")
        self._wait()

    def _on_every_worker(self, title: str, script: Callable[[Job], str], tries: int) -> bool:
        """Runs a script on all workers of all slices concurrently; returns False if the resource no longer exists."""
        for attempt in range(tries):
            self.tell(f"{title} on every worker" + (f", try {attempt + 1}." if attempt else "."))
            running = [subprocess.Popen(ssh(self.job, node, "all", script(self.job)), stdin=subprocess.DEVNULL)
                       for node in nodes(self.job)]
            try:
                if not any([process.wait() for process in running]):
                    return True
            finally:
                for process in running:
                    process.terminate()  # those left by an interruption
            if self._state()[0] != "ACTIVE":
                return False
            self._wait()
        raise OSError(f"{title} failed on a worker {tries} times; its output is above.")

    def _state(self, patient: bool = True) -> tuple[str | None, str]:
        """The resource's state, None if it does not exist, and the reason of a failure.

        A temporary network outage must not end a job of days: a `patient` query is repeated until it succeeds.

        Raises:
          OSError: gcloud fails, and the query is not patient.
          ValueError: a resource of this name belongs to another job.
        """
        while True:
            done = _gcloud(describe(self.job))
            if done.returncode == 0:
                return self._read(json.loads(done.stdout))
            if _is_not_found(done.stderr):
                return None, ""
            if not patient:
                raise OSError(f"gcloud cannot query {self.job.name}: {_last_line(done.stderr)}")
            self.tell(f"The state of {self.job.name} cannot be read; trying again: {_last_line(done.stderr)}")
            self._wait()

    def _read(self, resource: dict[str, Any]) -> tuple[str, str]:
        labels = [spec.get("node", {}).get("labels", {}) for spec in resource.get("tpu", {}).get("nodeSpec", [])]
        if not self.ours and {"t5x-job": self.job.identity} not in labels:
            raise ValueError(f"{self.job.zone} has a queued resource {self.job.name} that another command or commit "
                             "created: delete it, or give this job another --name.")
        self.ours = True
        state = resource.get("state", {})
        return state.get("state", "CREATING"), state.get("failedData", {}).get("error", {}).get("message", "")

    def _wait(self) -> None:
        time.sleep(self._poll_seconds)

    def tell(self, text: str) -> None:
        """Prints a line to stderr, unless it repeats the last one."""
        if text != self._told:
            _say(text)
        self._told = text


def _say(text: str) -> None:
    print(f"t5x launch {time.strftime('%H:%M:%S')}: {text}", file=sys.stderr, flush=True)


def _gcloud(command: Sequence[str], start_new_session: bool = False) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, start_new_session=start_new_session)


def _is_not_found(stderr: bytes) -> bool:
    return b"NOT_FOUND" in stderr


def _last_line(stderr: bytes) -> str:
    return (stderr.decode(errors="replace").strip().splitlines() or ["it gave no reason."])[-1].strip()


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Converts SIGINT, SIGTERM and SIGHUP to KeyboardInterrupt, so that no billed resource is left behind."""
    def interrupt(number: int, _: Any) -> None:
        raise KeyboardInterrupt

    before = [(number, signal.signal(number, interrupt)) for number in (
        signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN]  # set by nohup
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
