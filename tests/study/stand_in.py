"""Stands in for `t5x train`, `t5x eval` and their survey, so that a study of ten runs takes seconds.

    python stand_in.py study FLAGS...    `t5x study` with the commands below
    python -m stand_in train FLAGS...    the lock, steps, a checkpoint at every fifth step, and their files
    python -m stand_in eval FLAGS...     evaluates nothing
    python -m stand_in report DIR        notes that it began, and takes REPORT_SECONDS

Every step and every refusal is a line of STUDY_DIR/log: run, step, process. A loss is a hash of all training of the run
and of the run from which it starts, so that it differs if a run is resumed wrongly, or trained from an unfinished one.
"""

import fcntl
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

SECONDS = float(os.environ.get("STEP_SECONDS", "0.02"))


def flag(name: str) -> str | None:
    found = [argument.partition("=")[2] for argument in sys.argv if argument.startswith(f"--gin.{name}=")]
    return found[-1] if found else None


def note(folder: Path, *words: object) -> None:
    descriptor = os.open(folder.parent.parent / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, (" ".join(map(str, (folder.name, *words, os.getpid()))) + "\n").encode())
    os.close(descriptor)


def train() -> None:
    folder, steps = Path(flag("MODEL_DIR") or ""), int(flag("TRAIN_STEPS") or 0)
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        note(folder, "locked")
        sys.exit(f"t5x train: error: Another process is training in {folder}")
    start = flag("INITIAL_CHECKPOINT_PATH")
    before = json.loads((Path(start) / "provenance.json").read_text()) if start else None
    if before and not before["finished"]:
        sys.exit("t5x train: error: what it starts from is not finished")
    if os.environ.get("FAIL") and os.environ["FAIL"] in folder.name:
        note(folder, "fails")
        sys.exit("t5x train: error: it was told to fail")
    kept = sorted((int(path.name), path.read_text()) for path in (folder / "checkpoints").iterdir())
    step, digest = kept[-1] if kept else (0, before["checkpoint"] if before else "new")
    lines = (folder / "metrics.jsonl").read_text().splitlines() if kept else []
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines[:step]))

    def save() -> None:
        building = folder / "building"
        building.write_text(digest)
        building.rename(folder / "checkpoints" / str(step))
        building.write_text(json.dumps({
            "asked": {}, "order": "same", "checkpoint": digest, "kept": {}, "finished": step == steps,
            "ledger": {"before": [{"digest": before["checkpoint"]}] if before else []},
            "sessions": [{"seconds": step * SECONDS}]}))
        building.rename(folder / "provenance.json")

    save()
    with (folder / "metrics.jsonl").open("a") as metrics:
        while step < steps and not stopped:
            time.sleep(SECONDS)
            step += 1
            digest = hashlib.sha256(f"{digest} {folder.name} {step}".encode()).hexdigest()
            note(folder, step)
            metrics.write(json.dumps({"step": step, "split": "train", "loss": int(digest[:8], 16)}) + "\n")
            metrics.flush()
            if step % 5 == 0 or step == steps or stopped:
                save()
    print(f"step {step}/{steps} of the stand-in", flush=True)


def report() -> None:
    (Path(sys.argv[2]) / "reporting").touch()
    time.sleep(float(os.environ.get("REPORT_SECONDS", "0")))


def worker() -> None:
    """Runs `t5x study` with the commands above."""
    from codellm_jax import cli
    from codellm_jax.runtime import commands
    from codellm_jax.study import devices, execute, planned

    bound = commands._bound_process
    commands._bound_process = lambda arguments, environment: bound(
        ["stand_in", *arguments[1:]] if arguments[0] == "codellm_jax.cli" else arguments, environment)
    planned.differences = lambda *_: []
    execute._survey = lambda processes, runs, options: {
        "runs": {one.run.name: {"flops": float(one.run.steps), "order": "same"} for one in runs}, "measured": {}}
    devices._devices = lambda: ("cpu", int(os.environ["DEVICES"]))
    sys.exit(cli.main(sys.argv[1:]))


if __name__ == "__main__":
    {"train": train, "study": worker, "eval": lambda: None, "report": report}[sys.argv[1]]()
