"""A campaign of faults: kills, signals, damage, full disks, clock changes, files that disappear.

    python -m tests.faults --minutes=5 --seed=1
    python -m tests.faults --seed=1 --only=17             repeats its seventeenth trial
    python -m tests.faults --minutes=5 --kinds=damaged    only some kinds
    python -m tests.faults --minutes=60 --kinds=damaged_study,killed_study    kinds for studies, which take longer
    python -m tests.faults --minutes=60 --kinds=unreliable_bucket,bucket_away,killed_on_bucket,damaged_object

The kinds of the last line are for runs in gs://, on a service that fails in some requests, is away, or has lost an
object. They take longer, too. After each fault the same command resumes, and its results are compared, bit for bit,
with those without a fault. Prints a table of kinds and outcomes. Status 1: some outcome was wrong.
"""

import argparse
import collections
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.drawn import KINDS, WHERE_ASKED, kind_of
from tests.faults.kinds import Outcome
from tests.faults.world import World


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="no trial begins after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one trial")
    parser.add_argument("--kinds", help=f"with commas between: {', '.join(KINDS)}; by default all but those of studies "
                                        "and of buckets")
    parser.add_argument("--keep", action="store_true", help="leave the folders of trials that went wrong")
    flags = parser.parse_args()
    kinds = set(flags.kinds.split(",")) if flags.kinds else set(KINDS) - WHERE_ASKED
    if unknown := kinds - set(KINDS):
        parser.error(f"there is no kind {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    folder, began = Path(tempfile.mkdtemp(prefix="faults.")), time.monotonic()
    world = World(folder / "world")
    outcomes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    wrong: list[str] = []
    number = flags.only or 1
    while number == flags.only or flags.only is None and time.monotonic() - began < 60 * flags.minutes:
        name, dice = kind_of(flags.seed, number)
        if name in kinds or flags.only:
            out, started = folder / "trials" / str(number) / "out", time.monotonic()
            outcome: Outcome = KINDS[name][0](world, out, dice)
            print(f"{number:>4} {name:<18} {outcome.command:<8} {outcome.what:<10} {time.monotonic() - started:>5.0f} s"
                  f"  {outcome.told}", flush=True)
            outcomes[name][outcome.what] += 1
            if outcome.what == "WRONG":
                wrong.append(f"python -m tests.faults --seed={flags.seed} --only={number}   # {name}: {outcome.told}")
            if outcome.what != "WRONG" or not flags.keep:
                shutil.rmtree(out.parent, ignore_errors=True)
        number += 1
    print(f"\n{'fault':<18} {'trials':>6} {'identical':>9} {'refused':>7} {'WRONG':>5}")
    for name, counted in outcomes.items():
        print(f"{name:<18} {counted.total():>6}", *(
            f"{counted[what]:>{width}}" for what, width in (("identical", 9), ("refused", 7), ("WRONG", 5))))
    print(*wrong, sep="\n")
    if not (wrong and flags.keep):
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
