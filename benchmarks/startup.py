"""Seconds from the command to the end of the first step, with cached rows.

    python -m benchmarks.startup

The default run of gin/mixed_pretrain.gin, including its evaluation before the first step:

  cold   nothing compiled before
  warm   with the previous run's programs in JAX's compilation cache
  help   `t5x train --help`, complete
  slip   a misspelt setting, until its one-line error

    python -m benchmarks.startup --branch --size=125m

A run of that size that continues from its checkpoint of step 2, warm, to the end of step 3:

  resume   by the same command
  branch   in a run that branches from it, with another share of code
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = [sys.executable, "-m", "codellm_jax.cli"]
TRAIN = [*COMMAND, "train", "--gin_file=gin/mixed_pretrain.gin"]


def seconds_to_step(command: list[str], model_dir: str, step: int, compiled: str) -> float:
    """Seconds from the start of a command to its record of a step; then kills it."""
    records = Path(model_dir) / "metrics.jsonl"
    began = time.perf_counter()
    process = subprocess.Popen([*command, f"--gin.MODEL_DIR={model_dir}", "--gin.LOG_PERIOD=1"],
                               env=os.environ | {"JAX_COMPILATION_CACHE_DIR": compiled}, stdout=subprocess.DEVNULL)
    try:
        while not (records.exists() and f'"step": {step}, "split": "train"' in records.read_text()):
            if process.poll() is not None:
                sys.exit(f"The run ended before its step {step}; its error is above.")
            time.sleep(0.02)
        return time.perf_counter() - began
    finally:
        process.kill()
        process.wait()


def seconds_to_first_step(cache: str, compiled: str) -> float:
    with tempfile.TemporaryDirectory() as model_dir:
        return seconds_to_step([*TRAIN, f"--gin.CACHE_DIR={cache}"], model_dir, 1, compiled)


def resume_and_branch(size: str, cache: str, rounds: int) -> dict[str, list[float]]:
    command = [*TRAIN, f"--gin_file=gin/models/{size}.gin", f"--gin.CACHE_DIR={cache}", "--gin.TRAIN_STEPS=4",
               "--gin.WARMUP_STEPS=1", "--gin.BATCH_SIZE=1", "--gin.CHECKPOINT_PERIOD=4", "--gin.KEEP_STEPS=[2]",
               "--gin.EVAL_PERIOD=4", "--gin.train.eval_rows=8"]
    figures: dict[str, list[float]] = {"resume": [], "branch": []}
    with tempfile.TemporaryDirectory() as folder:
        trunk, resumed, branch = (f"{folder}/{name}" for name in ("trunk", "resumed", "branch"))
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled"}
        subprocess.run([*command, f"--gin.MODEL_DIR={trunk}"], check=True, env=environment, stdout=subprocess.DEVNULL)
        shutil.rmtree(f"{trunk}/checkpoints/4")
        Path(f"{trunk}/metrics.jsonl").unlink()
        for number in range(rounds + 1):
            shutil.copytree(trunk, resumed)
            taken = {"resume": seconds_to_step(command, resumed, 3, f"{folder}/compiled"),
                     "branch": seconds_to_step([*command, "--gin.CODE_RATE=0.5", f"--gin.BRANCH_FROM={trunk}@2"],
                                               branch, 3, f"{folder}/compiled")}
            for name, seconds in taken.items() if number else ():  # the first round reads files that are not cached
                figures[name].append(seconds)
            shutil.rmtree(resumed)
            shutil.rmtree(branch)
    return figures


def seconds_of(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--branch", action="store_true", help="compare a branch with a resume instead")
    parser.add_argument("--size", default="tiny", help="for --branch, a file of gin/models (default: tiny)")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        subprocess.run([*TRAIN, f"--gin.CACHE_DIR={cache}", "--dry_run"], check=True, stdout=subprocess.DEVNULL)
        figures: dict[str, list[float]] = {"cold": [], "warm": [], "help": [], "slip": []}
        if flags.branch:
            figures = resume_and_branch(flags.size, cache, flags.rounds)
        for _ in range(0 if flags.branch else flags.rounds):
            with tempfile.TemporaryDirectory() as compiled:
                figures["cold"].append(seconds_to_first_step(cache, compiled))
                figures["warm"].append(seconds_to_first_step(cache, compiled))
            figures["help"].append(seconds_of([*COMMAND, "train", "--help"]))
            figures["slip"].append(seconds_of([*TRAIN, "--gin.CODERATE=1"]))
    for name, seconds in figures.items():
        print(f"{name:<8}{statistics.median(seconds):>7.2f} s   {min(seconds):.2f}-{max(seconds):.2f}")


if __name__ == "__main__":
    main()
