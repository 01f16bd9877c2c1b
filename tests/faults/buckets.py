"""Kinds of faults for commands whose OUT is in gs://, on a service that fails; see `served`.

Their results are compared with those without a fault on disk.
"""

import atexit
import functools
import random
import time
from pathlib import Path

from tests.faults.kinds import Outcome, files_below, hostile, judged, junk
from tests.faults.served import Fails, Failure, Served, any_failure
from tests.faults.world import World, copied, kill, steps_of

SMALL = (".json", ".jsonl", ".gin", ".lease", ".txt", "metadata", "_METADATA", "manifest.ocdbt", "_CHECKPOINT_METADATA")
AWAY = (3, 10, 30, 80)  # seconds; a lease is lost after 60


@functools.cache
def served_for(world: World) -> Served:
    """The bucket of a world."""
    world.served = Served(world.folder, world.environment)
    atexit.register(world.served.close)
    return world.served


@functools.cache
def whole_there(world: World, name: str) -> float:
    """The seconds that a command takes in the bucket without faults. Raises RuntimeError if it fails there, or has
    other results than on disk.
    """
    out, began = served_for(world).root / "whole" / name, time.monotonic()
    ended = world.run(name, out)
    if ended.status != 0:
        raise RuntimeError(f"{name} fails in gs:// without any fault: {ended.output[-2000:]}")
    seconds = time.monotonic() - began
    command = world.commands[name]
    if command.signature(out) != command.signature(world.whole(name)):
        raise RuntimeError(f"{name} has other results in gs:// than on disk.")
    return seconds


def there(world: World, out: Path) -> Path:
    """The folder in the bucket for the folder OUT of a trial."""
    return served_for(world).root / out.parent.name / out.name


def any_command(dice: random.Random) -> str:
    return dice.choice(["train", "train", "cache_there"])


def at_a_rate(dice: random.Random, rate: float, begin: float = 0.0, seconds: float = float("inf")) -> Fails:
    """Any failures, of this part of the requests, for a time that begins in `begin` seconds."""
    first = time.monotonic() + begin

    def fails() -> Failure | None:
        during = first <= time.monotonic() < first + seconds
        return any_failure(dice) if during and dice.random() < rate else None

    return fails


def unreliable_bucket(world: World, out: Path, dice: random.Random) -> Outcome:
    """The service fails in some requests throughout, or in most of them for a while."""
    name, served = any_command(dice), served_for(world)
    long = whole_there(world, name)
    if dice.random() < 0.5:
        served.fails = at_a_rate(dice, dice.choice([0.01, 0.03, 0.06]))
    else:
        served.fails = at_a_rate(dice, 0.8, dice.random() * long, dice.uniform(1, 8))
    served.asked = served.failed = 0
    try:
        ended = world.run(name, there(world, out))
    finally:
        served.fails = lambda: None
    if ended.status != 0:
        return Outcome(name, "WRONG", f"retries do not survive it: {ended.fault() or ended.line[:300]}")
    outcome = judged(world, name, there(world, out), [ended], may_refuse=False)
    return outcome._replace(told=f"{served.failed} of {served.asked} requests failed. {outcome.told}")


def bucket_away(world: World, out: Path, dice: random.Random) -> Outcome:
    """The service fails in everything for a while, which retries may not survive."""
    name, served = any_command(dice), served_for(world)
    long = whole_there(world, name)
    failure = dice.choice([Failure(503), Failure("closed"), Failure(429), Failure(503, done=True)])
    seconds = dice.choice(AWAY)
    process = world.start(name, there(world, out))
    try:
        time.sleep(dice.random() * long)
        served.fails = lambda: failure
        end = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        served.fails = lambda: None
    first = world.ended(process)
    outcome = judged(world, name, there(world, out), [first], may_refuse=False)
    told = outcome.told if outcome.what == "WRONG" else first.line[:160] if first.status else "it went on"
    return outcome._replace(told=f"away for {seconds} s: {told}")


def killed_on_bucket(world: World, out: Path, dice: random.Random) -> Outcome:
    """SIGKILL at any moment, once or twice."""
    name = any_command(dice)
    long = whole_there(world, name)
    for _ in range(dice.randint(1, 2)):
        process = world.start(name, there(world, out))
        time.sleep(dice.random() * long)
        kill(process)
    return judged(world, name, there(world, out), [], may_refuse=False)


@functools.cache
def half_there(world: World) -> Path:
    """OUT of a run in the bucket that was killed after its second checkpoint."""
    out = served_for(world).root / "half" / "train"
    process = world.start("train", out)
    try:
        while process.poll() is None and len(steps_of(out)) < 3:
            time.sleep(0.02)
    finally:
        kill(process)
    return out


def damaged_object(world: World, out: Path, dice: random.Random) -> Outcome:
    """An object of a killed run is damaged or removed before the run resumes."""
    served, target = served_for(world), there(world, out)
    world.whole("train")
    copied(half_there(world), target)
    files = files_below(target)
    if dice.random() < 0.5:  # most objects hold data, so others are drawn separately
        files = [path for path in files if path.suffix in SMALL or path.name in SMALL]
    one = dice.choice(files)
    content = one.read_bytes()
    how = dice.choice(["removed", "junk", "hostile"])
    if how == "removed":
        one.unlink()
    else:
        served.write(one, (junk if how == "junk" else hostile)(dice, content))
    outcome = judged(world, "train", target, [], records=one.name != "metrics.jsonl")
    return outcome._replace(told=f"{one.relative_to(target)} {how}: {outcome.told}")
