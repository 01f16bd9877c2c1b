"""The process that sends the files of a run to one tracker.

    python -m codellm_jax.tracking.follow RUN wandb

It reads until its standard input ends, which happens when the run ends for any reason, then sends the rest.
RUN/trackers records what was sent, so each record is sent once, over any number of sessions. If it fails, it prints the
reason to its standard output, in one line.
"""

import ast
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from codellm_jax.results.files import files_of, write_whole
from codellm_jax.runtime.progress import read_records
from codellm_jax.runtime.terminal import one_line
from codellm_jax.tracking.backends import OPEN, Tracked, Tracker
from codellm_jax.tracking.trackers import END_SECONDS, FOLDER

PERIOD, REMOTE_PERIOD = 2.0, 30.0  # seconds between two reads of a run on a disk, and in a bucket
REST = 20.0  # and at least this many times the duration of a read, to leave the processor to the run
FILES = ("config.gin", "provenance.json")


class Follower:
    """The record of what was sent of a run to one tracker; sends the rest."""

    def __init__(self, directory: str, name: str) -> None:
        self.folder = epath.Path(directory).expanduser()
        self._state = self.folder / FOLDER / f"{name}.json"
        self._sent: dict[str, Any] = {"id": None, "steps": {}, "files": {}} | _json(self._state)
        self._seen: tuple[float, int] | None = None  # modification time and size of metrics.jsonl
        self._is_study = (self.folder / "study.json").exists()
        (self.folder / FOLDER).mkdir(parents=True, exist_ok=True)
        local = "://" not in directory
        study = self.folder.parent.parent if self.folder.parent.name == "runs" else None
        self._tracker: Tracker = OPEN[name](Tracked(
            f"report of {self.folder.name}" if self._is_study else self.folder.name,
            self.folder.name if self._is_study else study.name if study and (study / "study.json").exists() else None,
            self._sent["id"], str(self.folder / FOLDER) if local else None, str(self.folder), self._configuration()))
        self._sent["id"] = self._tracker.id
        self._keep()

    def _configuration(self) -> dict[str, Any]:
        """The settings in force, with macros resolved, and the facts about the run."""
        provenance = _json(self.folder / "provenance.json")
        asked = {name: str(value) for name, value in provenance.get("asked", {}).items()}
        resolved = {name: asked.get(value[1:], value) if value.startswith("%") else value
                    for name, value in asked.items() if "." in name}
        return {name: _value(text) for name, text in resolved.items()} | {
            name: provenance[name] for name in ("arm", "seed", "parameters", "flops_per_token", "config_hash", "order",
                                                "vocabulary") if provenance.get(name) is not None}

    def records(self) -> None:
        """Sends new lines of metrics.jsonl; each step of a split once, even if it is written again."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return
        stat = path.stat()
        seen = (float(stat.mtime), int(stat.length))
        if seen == self._seen:
            return
        self._seen, any_sent = seen, False
        for line in read_records(str(self.folder)):
            step, split = line["step"], str(line["split"])
            if isinstance(step, int) and step > self._sent["steps"].get(split, -1):
                values = {f"{split}/{name}": float(value) for name, value in line.items()
                          if isinstance(value, int | float) and name != "step"}
                self._tracker.record(step, values)
                self._sent["steps"][split], any_sent = step, True
        if any_sent:
            self._keep()

    def rest(self) -> None:
        """Sends everything besides records: ledger, scores, files; for a study, its report."""
        provenance, finished = _json(self.folder / "provenance.json"), True
        if not self._is_study:
            finished = bool(provenance.get("finished"))
            if values := _ledger(provenance.get("ledger") or {}) | _scores(self.folder):
                self._tracker.summary(values, int(provenance.get("step") or 0))
            names = [self.folder / name for name in FILES] + files_of(self.folder / "results", ".json")
        else:
            report = self.folder / "report"
            names = [path for path in report.iterdir() if path.is_file()] if report.is_dir() else []
        with tempfile.TemporaryDirectory() as copies:
            for path in names:
                kind = "" if path.parent == self.folder else path.parent.name
                if path.exists() and (changed := _changed(path)) != self._sent["files"].get(f"{kind}/{path.name}"):
                    copy = Path(copies) / kind / path.name  # trackers need local files
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    copy.write_bytes(path.read_bytes())
                    self._tracker.file(copy, kind)
                    self._sent["files"][f"{kind}/{path.name}"] = changed
            self._tracker.close(finished)  # while the copies exist
        self._keep()

    def _keep(self) -> None:
        write_whole(self._state, json.dumps(self._sent, indent=1) + "\n")


def _changed(path: epath.Path) -> list[float]:
    stat = path.stat()
    return [float(stat.mtime), int(stat.length)]


def _json(path: epath.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes()) if path.exists() else {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _value(text: str) -> Any:
    """A setting as a number, text or truth value if it is one; else as gin writes it."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, int | float | str | bool) else text


def _ledger(ledger: Mapping[str, Any]) -> dict[str, float]:
    rows, tokens = ledger.get("rows") or {}, ledger.get("tokens") or {}
    total = sum(rows.values())
    shares = {f"ledger/share/{source}": count / total for source, count in rows.items()} if total else {}
    return {f"ledger/rows/{source}": float(count) for source, count in rows.items()} | {
        f"ledger/tokens/{source}": float(count) for source, count in tokens.items()} | shares


def _scores(folder: epath.Path) -> dict[str, float]:
    found = {}
    for path in files_of(folder / "results", ".json"):
        result = _json(path)
        if isinstance(result.get("value"), int | float) and result.get("measured", True):
            found[f"score/{path.stem}"] = float(result["value"])
            for name, bound in zip(("low", "high"), result.get("interval") or (), strict=False):
                found[f"score_{name}/{path.stem}"] = float(bound)
    return found


def main(directory: str, name: str) -> int:
    """Follows a run until standard input ends; returns the exit status."""
    os.nice(10)
    ended = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.buffer.read()
        ended.set()
        signal.alarm(int(5 * END_SECONDS))  # ends this process if the tracker hangs and nobody else can

    with os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace") as told:
        _to_log(directory, name)
        threading.Thread(target=wait_for_end, daemon=True).start()
        try:
            follower, took = Follower(directory, name), 0.0
            while True:
                last = ended.wait(max(REMOTE_PERIOD if "://" in directory else PERIOD, REST * took))
                began = time.monotonic()
                follower.records()
                took = time.monotonic() - began
                if last:
                    break
            follower.rest()
        except Exception as error:  # any exception of a tracker's library; reported to the run, which continues
            print(one_line(error).removesuffix(" (--debug shows where)"), file=told, flush=True)
            return 1
    return 0


def _to_log(directory: str, name: str) -> None:
    """Redirects the output of libraries to RUN/trackers/NAME.log."""
    path = os.devnull
    if "://" not in directory:
        folder = Path(directory).expanduser() / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        path = str(folder / f"{name}.log")
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)


if __name__ == "__main__":
    status = main(*sys.argv[1:3])
    sys.stdout.flush()
    os._exit(status)  # does not wait for threads of a hanging tracker
