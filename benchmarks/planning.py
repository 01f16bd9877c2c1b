"""The seconds to plan a study of many arms: its runs, and the plan of each.

    python -m benchmarks.planning --arms=500

A trunk, arms of several shares of code, branches of the trunk and tuned runs, in the shipped study at the tiny size:

  arms    from gin files and flags to the commands of all runs
  survey  the plan of each run, with cached rows: its order, model, tokens and FLOPs; no step is measured

Each in wall-clock time and, for a machine with other work, in processor time.
"""

import argparse
import sys
import time

from codellm_jax.configuration import build, read_configuration
from codellm_jax.study.planned import planned_runs
from codellm_jax.study.survey import survey


def arms(count: int) -> dict[str, dict[str, object]]:
    """About `count` arms, the same number of each kind."""
    shares = [(number + 1) / count for number in range(count // 4)]
    return {"TEXT": {"CODE_RATE": 0.0}, "SHARE": {"sweep": {"CODE_RATE": shares}},
            "MID": {"from": "TEXT", "stage": "midtraining", "sweep": {"at": [0.25, 0.5], "CODE_RATE": shares}},
            "TUNED": {"from": "SHARE", "CODE_RATE": 0.3}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", type=int, default=500, help="how many (default: 500)")
    flags = parser.parse_args()
    settings = [("ARMS", str(arms(flags.arms))), ("SEEDS", "[0]")]
    began = _now()
    configuration = read_configuration(["gin/study.gin"], settings)
    planned, _ = planned_runs(build(configuration, "study"), configuration, [])
    planning = _since(began)
    requests = [one.request() for one in planned]
    survey(requests, [], measure=False)  # caches missing rows
    began = _now()
    found = survey(requests, [], measure=False, report=lambda line: None)["runs"]
    if errors := [fact["error"] for fact in found.values() if "error" in fact]:
        sys.exit(errors[0])
    print(f"{len(planned)} runs: arms {planning}, survey {_since(began)}")


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(began: tuple[float, float]) -> str:
    passed, used = (now - then for now, then in zip(_now(), began, strict=True))
    return f"{passed:.1f} s ({used:.1f} s of the processor)"


if __name__ == "__main__":
    main()
