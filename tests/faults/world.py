"""The commands into which faults are injected: small ones of each kind, with their results without faults.

Each command writes to one folder, OUT. `signature` reads the results there that must be the same bit for bit however
often the command was killed: losses and arrays, but not times.
"""

import dataclasses
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from tests.faults.served import Served
    from tests.forked import Started

Process: TypeAlias = "subprocess.Popen[str] | Started"
ROOT = Path(__file__).resolve().parents[2]
CLOCK = {"tokens_per_second", "data_wait_fraction", "model_flops_utilization"}
STEPS, PERIOD = 24, 5
PATIENCE = 240.0  # least seconds after which a command counts as hanging; or SLOWER times the longest without faults
SLOWER = 20
INTERRUPTED = {128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)}  # exit statuses
LONGEST = 1800.0  # seconds that a command may take without faults
SIZE = ["--gin.model.layers=1", "--gin.model.hidden=32", "--gin.model.heads=2", "--gin.model.feedforward=64"]
ARMS = {"NL": {"CODE_RATE": 0.0}, "CODE": {"CODE_RATE": 0.4}}
PERIODS = [f"--gin.TRAIN_STEPS={STEPS}", f"--gin.CHECKPOINT_PERIOD={PERIOD}", "--gin.EVAL_PERIOD=12",
           "--gin.LOG_PERIOD=1", "--gin.WARMUP_STEPS=2", "--gin.train.eval_rows=4", "--gin.BATCH_SIZE=4"]


@dataclasses.dataclass(frozen=True)
class Ended:
    """The end of a command."""

    status: int | None  # None if it hung, and was killed
    output: str

    @property
    def line(self) -> str:
        """The last line of its output."""
        return (self.output.strip().splitlines() or [""])[-1]

    def fault(self) -> str:
        """Why this end is wrong after any fault; empty if it is not."""
        if self.status is None:
            return f"hangs: {self.line[:300]}"
        if "Traceback (most recent call last)" in self.output:
            trace = self.output.partition("Traceback (most recent call last)")[2].splitlines()[1:]
            return f"a traceback: {next((line for line in trace if not line.startswith(' ')), self.line)[:300]}"
        refused = "t5x " in self.line and "error: " in self.line
        if self.status > 0 and not refused and self.status not in INTERRUPTED:
            return f"ends with {self.status} without a word: {self.line[:300]}"
        if refused and "(--debug shows where)" in self.line:
            return f"an error that was not expected: {self.line[:300]}"
        return ""


@dataclasses.dataclass(frozen=True)
class Command:
    """A kind of command; `arguments` and `signature` are given OUT."""

    name: str
    arguments: Callable[[Path], list[str]]
    signature: Callable[[Path], Any]
    trains: bool = False
    apart: bool = False  # whether only its own kinds of faults draw it, as one that starts other commands
    refuses_again: str = ""  # words with which it refuses to run again once done; the results are still compared


class World:
    """A folder with corpora, a cache, and the results of each command without faults."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.served: Served | None = None  # a bucket, once a kind of fault needs one
        (folder / "data").mkdir(parents=True)
        corpora = write_corpora(folder / "data")
        self.environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
            "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2",
            "XLA_FLAGS": "--xla_llvm_disable_expensive_passes=true",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        mixed = ["--gin_file=gin/mixed_pretrain.gin", f"--gin.CORPORA={corpora}", *SIZE, *PERIODS,
                 "--gin.MIXTURE_OR_TASK_NAME=['text.a', 'code.b']", "--gin.TASK_FEATURE_LENGTHS={'targets': 32}"]
        cached = f"--gin.CACHE_DIR={folder / 'cache'}"

        def caching(out: Path) -> list[str]:
            return ["train", *mixed, f"--gin.CACHE_DIR={out / 'cache'}", f"--gin.MODEL_DIR={out / 'run'}",
                    "--gin.TRAIN_STEPS=3"]

        asked = write_instructions(folder / "data")
        run = functools.partial(self.whole, "train")
        self.commands = {command.name: command for command in (
            Command("train", lambda out: ["train", *mixed, cached, f"--gin.MODEL_DIR={out}"], of_run, True),
            Command("cache", caching, of_rows),
            # In gs:// names of rows' folders are random, and those of killed commands stay.
            Command("cache_there", caching, lambda out: of_run(out / "run"), apart=True),
            Command("tune", lambda out: [
                "train", "--gin_file=gin/tune_mixed.gin", f"--gin.CORPORA={asked}", cached, *PERIODS,
                "--gin.MIXTURE_OR_TASK_NAME=['text.asked', 'code.asked']", f"--gin.MODEL_DIR={out}",
                f"--gin.INITIAL_CHECKPOINT_PATH={run()}"], of_run, True),
            Command("branch", lambda out: [
                "train", *mixed, cached, f"--gin.MODEL_DIR={out}", f"--gin.TRAIN_STEPS={2 * STEPS}",
                f"--gin.BRANCH_FROM={run()}@{STEPS - STEPS % PERIOD}", "--gin.CODE_RATE=0.1"], of_run, True),
            Command("eval", lambda out: [
                "eval", "--gin_file=gin/eval.gin", f"--gin.CHECKPOINT_PATH={run()}", "--gin.TASKS=['logic']",
                f"--gin.evaluate.results_dir={out}"], of_results),
            Command("export", lambda out: ["export", str(run()), f"--output={out / 'model'}"], of_files,
                    refuses_again="name a new folder"),
            Command("study", lambda out: [
                "study", "--gin_file=gin/study.gin", "--gin.PRETRAINING_FILES=['gin/pretrain.gin']",
                *(flag.replace("--gin.", "--gin.pretraining/", 1) for flag in [*mixed, cached]
                  if flag.startswith("--gin.")), "--gin.pretraining/TRAIN_STEPS=6", f"--gin.STUDY_DIR={out}",
                "--gin.SEEDS=[0]", f"--gin.ARMS={ARMS}", "--gin.evaluation/TASKS=['logic']"], of_study, apart=True),
            Command("import", lambda out: ["import", str(self.whole("export") / "model"), f"--output={out / 'run'}"],
                    lambda out: of_run(out / "run"), refuses_again="exists already"),
        )}

    @functools.cache  # noqa: B019
    def whole(self, name: str) -> Path:
        """OUT of a command without faults."""
        out = self.folder / "whole" / name
        began = time.monotonic()
        ended = waited_for(self.start(name, out), LONGEST)
        if ended.status != 0:
            raise RuntimeError(f"{name} fails without any fault: {ended.output[-2000:]}")
        self.seconds[name] = time.monotonic() - began
        return out

    @functools.cached_property
    def seconds(self) -> dict[str, float]:
        """The time that each command takes without faults."""
        return {}

    @functools.cache  # noqa: B019
    def half(self, name: str) -> Path:
        """OUT of a run killed after its second checkpoint."""
        self.whole(name)
        out = self.folder / "half" / name
        process = self.start(name, out)
        try:
            while process.poll() is None and len(steps_of(out)) < 2:
                time.sleep(0.02)
        finally:
            kill(process)
        return out

    def start(self, name: str, out: Path, more: Sequence[str] = (), wrapper: Sequence[str] = (), program: str = "",
              **options: Any) -> Process:
        """Starts a command in its own process group; `program` is Python code that runs before it. One whose OUT is in
        the served bucket starts without these options.
        """
        if self.served is not None and out.is_relative_to(self.served.root):
            return self.served.start(["-m", "codellm_jax.cli", *self.commands[name].arguments(out)])
        code = f"{program}\nimport sys\nfrom codellm_jax import cli\nsys.exit(cli.main(sys.argv[1:]))"
        out.parent.mkdir(parents=True, exist_ok=True)
        return subprocess.Popen(
            [*wrapper, sys.executable, "-c", code, *self.commands[name].arguments(out), *more],
            **{"env": self.environment, "cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT,
               "stdin": subprocess.DEVNULL, "text": True, "errors": "replace", "process_group": 0} | options)

    def run(self, name: str, out: Path, **options: Any) -> Ended:
        """Runs a command to its end."""
        return self.ended(self.start(name, out, **options))

    def ended(self, process: Process) -> Ended:
        """Waits for a command; kills it if it hangs."""
        return waited_for(process, self.patience)

    @property
    def patience(self) -> float:
        """Seconds after which a command counts as hanging, at the speed of this computer."""
        return max(PATIENCE, SLOWER * max(self.seconds.values(), default=0.0))


def waited_for(process: Process, patience: float) -> Ended:
    """Waits for a command; kills it if it takes too long."""
    try:
        output, _ = process.communicate(timeout=patience)
        return Ended(process.returncode, output or "")
    except subprocess.TimeoutExpired:
        kill(process)
        return Ended(None, process.communicate()[0] or "")


def kill(process: Process) -> None:
    """Kills a command and all processes of its group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def steps_of(run: Path) -> list[int]:
    """The steps of a run's complete checkpoints."""
    folder = run / "checkpoints"
    names = [path.name for path in (folder.iterdir() if folder.exists() else ())]
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def of_run(out: Path) -> Any:
    """The records, and the newest checkpoint's step, checksums of arrays, and ledger of rows and tokens."""
    lines = (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []
    records = [{name: value for name, value in json.loads(line).items() if name not in CLOCK} for line in lines]
    newest = steps_of(out)[-1]
    saved = json.loads((out / "checkpoints" / str(newest) / "record" / "metadata").read_text())
    return records, newest, saved["checksums"], saved["ledger"]["rows"], saved["ledger"]["tokens"]


def of_rows(out: Path) -> Any:
    """The files of cached rows, and the run trained on them."""
    files = [path for path in sorted((out / "cache" / "rows").glob("*/*/*/**/*"))
             if path.is_file() and ".set_aside." not in str(path) and not path.parent.parent.name.startswith(".")]
    digests = {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return digests, of_run(out / "run")


def of_results(out: Path) -> Any:
    """The lines of questions and the value of each task."""
    return {path.name: ([json.loads(line) for line in path.read_text().splitlines()[1:]],
                        json.loads(path.with_suffix(".json").read_text())["value"])
            for path in sorted(out.glob("*.jsonl"))}


def of_study(out: Path) -> Any:
    """Each arm's run and evaluation results, the plan, and the losses in the report."""
    runs = [out / "runs" / f"{arm}.seed0" for arm in ARMS]
    plan = (out / "study.json").read_text().replace(str(out), "STUDY_DIR")
    return ([(of_run(run), of_results(run / "results")) for run in runs], json.loads(plan),
            (out / "report" / "losses.csv").read_text())


def of_files(out: Path) -> Any:
    """The hash of each file except README.md, which names the folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted((out / "model").iterdir()) if path.name != "README.md"}


WORDS = "a row of tokens is read by its number and never lost while one model learns from text and code".split()


def write_corpora(folder: Path) -> dict[str, Any]:
    """Writes two corpora of JSON lines; returns their CORPORA."""
    dice = random.Random(0)
    for name, make in (("a", lambda: " ".join(dice.choices(WORDS, k=60)) + "."),
                       ("b", lambda: f"def f{dice.randrange(99)}(x):\n" + "    x = x * 3\n" * dice.randrange(1, 30))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": make()}) + "\n" for _ in range(120)))
    return {"text.a": {"json_lines": str(folder / "a.jsonl"), "holdout": 0.2},
            "code.b": {"json_lines": str(folder / "b.jsonl"), "holdout": 0.2}}


def write_instructions(folder: Path) -> dict[str, Any]:
    """Writes two files of instructions; returns their CORPORA."""
    dice = random.Random(1)
    for name in ("text.asked", "code.asked"):
        (folder / f"{name}.json").write_text(json.dumps([
            {"input": " ".join(dice.choices(WORDS, k=4)), "target": " ".join(dice.choices(WORDS, k=5))}
            for _ in range(80)]))
    return {name: {"instructions": str(folder / f"{name}.json"), "holdout": 0.2} for name in (
        "text.asked", "code.asked")}


def copied(source: Path, target: Path) -> Path:
    """Copies a folder, including links as links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, target, symlinks=True)
    return target
