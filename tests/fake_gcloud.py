"""A fake gcloud that records its commands, and simulates a queued resource and its workers.

$FAKE holds: `plays` (JSON: for each creation the successive states that describe returns), `state`, `label`, `commands`
(JSON lines of all arguments), `breaks` (JSON: [words of an ssh command, exit status] that fail once, in order),
`refusals` (JSON: verb -> stderr), and a home for each worker, `NODE.NUMBER`, in which ssh commands really run, with
stand-ins for python3, git and t5x on PATH.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

FAKE = Path(os.environ["FAKE"])
ACTIVE = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]


def read(name, default):
    path = FAKE / name
    return json.loads(path.read_text()) if path.exists() else default


def write(name, value):
    (FAKE / f".{name}").write_text(json.dumps(value))
    (FAKE / f".{name}").rename(FAKE / name)


def fail(text, status=1):
    print(text, file=sys.stderr)
    sys.exit(status)


def ends_workers():
    for home in FAKE.glob("*.[0-9]"):
        pid = home / "t5x" / "pid"
        if pid.exists():
            subprocess.run(["kill", "-KILL", "--", f"-{pid.read_text().strip()}"], stderr=subprocess.DEVNULL)
        shutil.rmtree(home)


def main():
    arguments = sys.argv[1:]
    with open(FAKE / "commands", "a") as log:
        log.write(json.dumps(arguments) + "\n")
    verb = arguments[3]
    refusals = read("refusals", {})
    if verb in refusals:
        fail(refusals[verb])
    state = read("state", "")
    if verb == "create":
        plays = read("plays", [])
        write("state", (plays.pop(0) if plays else ACTIVE))
        write("plays", plays)
        write("label", next(word for word in arguments if word.startswith("--labels=")).rpartition("=")[2])
    elif verb == "describe":
        if not state:
            fail("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource was not found")
        if len(state) > 1:
            write("state", state[1:])
        name, _, reason = state[0].partition(": ")
        print(json.dumps({"name": f"projects/p/locations/z/queuedResources/{arguments[4]}", "state": {
            "state": name, **({"failedData": {"error": {"code": 8, "message": reason}}} if reason else {})},
            "tpu": {"nodeSpec": [{"node": {"labels": {"t5x-job": read("label", "")}}}]}}))
    elif verb == "delete":
        ends_workers()
        write("state", [])
    elif verb == "ssh":
        ssh(arguments, state)


def ssh(arguments, state):
    flags = dict(word.split("=", 1) for word in arguments if word.startswith("--") and "=" in word)
    script = flags["--command"]
    if state != ["ACTIVE"]:
        fail("ERROR: (gcloud.compute.tpus.tpu-vm.ssh) TPU is in state PREEMPTED")
    breaks = read("breaks", [])
    if breaks and breaks[0][0] in script:
        write("breaks", breaks[1:])
        fail(f"##### Command execution on worker 1 failed with exit status {breaks[0][1]}. Continuing.", breaks[0][1])
    failed = 0
    for worker in range(2) if flags["--worker"] == "all" else [int(flags["--worker"])]:
        home = FAKE / f"{arguments[4]}.{worker}"
        home.mkdir(exist_ok=True)
        done = subprocess.run(
            ["bash", "-c", f"hostname() {{ echo {home.name}; }}; {script}"], cwd=home, stdin=subprocess.DEVNULL,
            env=os.environ | {"HOME": str(home), "PATH": f"{FAKE / 'worker_bin'}:{os.environ['PATH']}",
                              "WORKER": str(worker)})
        failed = failed or done.returncode
    sys.exit(failed)


if __name__ == "__main__":
    main()
