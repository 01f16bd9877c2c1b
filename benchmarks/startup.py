"""Seconds from the command to the end of the first step, rows being cached.

    python -m benchmarks.startup

The default run of gin/mixed_pretrain.gin, its evaluation before the first step included:

  cold   nothing compiled before
  warm   the programs of the run before are found in JAX's compilation cache
  help   `t5x train --help`, all of it
  slip   a misspelt setting, to its one line
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = [sys.executable, "-m", "codellm_jax.cli"]
TRAIN = [*COMMAND, "train", "--gin_file=gin/mixed_pretrain.gin"]


def seconds_to_first_step(cache: str, compiled: str) -> float:
    with tempfile.TemporaryDirectory() as model_dir:
        records = Path(model_dir) / "metrics.jsonl"
        began = time.perf_counter()
        process = subprocess.Popen(
            [*TRAIN, f"--gin.CACHE_DIR={cache}", f"--gin.MODEL_DIR={model_dir}", "--gin.LOG_PERIOD=1"],
            env=os.environ | {"JAX_COMPILATION_CACHE_DIR": compiled}, stdout=subprocess.DEVNULL)
        try:
            while not (records.exists() and '"split": "train"' in records.read_text()):
                if process.poll() is not None:
                    sys.exit("The run ended before its first step; its error is above.")
                time.sleep(0.02)
            return time.perf_counter() - began
        finally:
            process.kill()
            process.wait()


def seconds_of(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        subprocess.run([*TRAIN, f"--gin.CACHE_DIR={cache}", "--dry_run"], check=True, stdout=subprocess.DEVNULL)
        figures: dict[str, list[float]] = {"cold": [], "warm": [], "help": [], "slip": []}
        for _ in range(flags.rounds):
            with tempfile.TemporaryDirectory() as compiled:
                figures["cold"].append(seconds_to_first_step(cache, compiled))
                figures["warm"].append(seconds_to_first_step(cache, compiled))
            figures["help"].append(seconds_of([*COMMAND, "train", "--help"]))
            figures["slip"].append(seconds_of([*TRAIN, "--gin.CODERATE=1"]))
    for name, seconds in figures.items():
        print(f"{name:<6}{statistics.median(seconds):>7.2f} s   {min(seconds):.2f}-{max(seconds):.2f}")


if __name__ == "__main__":
    main()
