"""Kinds of faults. Each is a function of a world, an output folder OUT and dice, which runs a command, injects the
fault, resumes the command to its end as a user would, and returns an `Outcome`.
"""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

from tests.faults.world import ARMS, Ended, World, copied, kill, steps_of

TRIES = 3  # to resume a command


class Outcome(NamedTuple):
    """The outcome of a fault."""

    command: str
    what: str  # "identical", "refused", or "WRONG"
    told: str


def judged(
    world: World, name: str, out: Path, before: list[Ended], may_refuse: bool = True, records: bool = True
) -> Outcome:
    """Runs a command until it is done, and compares its results with those without a fault; `records` is False if the
    fault changed the records themselves, which are then not compared.
    """
    seen = list(before)
    for _ in range(TRIES):
        seen.append(world.run(name, out))
        if seen[-1].status == 0 or seen[-1].fault():
            break
    for one in seen:
        if wrong := one.fault():
            return Outcome(name, "WRONG", wrong)
    command = world.commands[name]
    if seen[-1].status != 0 and not (command.refuses_again and command.refuses_again in seen[-1].line):
        return Outcome(name, "refused" if may_refuse else "WRONG", seen[-1].line[:300])
    try:
        found, wanted = command.signature(out), command.signature(world.whole(name))
    except (OSError, ValueError, KeyError, IndexError) as error:
        return Outcome(name, "WRONG", f"done, and what it left cannot be read: {type(error).__name__}: {error}"[:300])
    if not records:
        found, wanted = found[1:], wanted[1:]
    if found != wanted:
        return Outcome(name, "WRONG", "done, and other than without the fault")
    told = [line for one in seen for line in one.output.splitlines() if line.startswith("WARNING: ")
            and "too few to measure" not in line]
    return Outcome(name, "identical", told[-1][:160] if told else "")


def any_command(world: World, dice: random.Random) -> str:
    """A random command, most often training."""
    return dice.choice(["train", "train", "train", *(
        name for name, command in world.commands.items() if not command.apart)])


def run_of(world: World, dice: random.Random) -> str:
    return dice.choice([name for name, command in world.commands.items() if command.trains])


def after_a_while(world: World, name: str, dice: random.Random) -> None:
    world.whole(name)
    time.sleep(dice.random() * world.seconds[name])


def killed(world: World, out: Path, dice: random.Random) -> Outcome:
    """SIGKILL at any moment, once or twice."""
    name = any_command(world, dice)
    for _ in range(dice.randint(1, 2)):
        world.whole(name)
        process = world.start(name, out)
        after_a_while(world, name, dice)
        kill(process)
    return judged(world, name, out, [], may_refuse=False)


def killed_at_a_save(world: World, out: Path, dice: random.Random) -> Outcome:
    """SIGKILL soon after the folder of a save appears."""
    name = run_of(world, dice)
    world.whole(name)
    process, folder = world.start(name, out), out / "checkpoints"
    wanted = dice.randint(1, 3)
    seen: set[str] = set()
    end = time.monotonic() + world.patience
    while process.poll() is None and len(seen) < wanted and time.monotonic() < end:
        seen |= {path.name for path in folder.iterdir() if "tmp" in path.name} if folder.exists() else set()
    time.sleep(dice.random() * 0.05)
    kill(process)
    return judged(world, name, out, [], may_refuse=False)


def signalled(world: World, out: Path, dice: random.Random) -> Outcome:
    """SIGTERM, SIGHUP, or SIGINT once or twice in a row, at any moment."""
    name = any_command(world, dice)
    numbers = dice.choice([[signal.SIGTERM], [signal.SIGHUP], [signal.SIGINT], [signal.SIGINT] * 2,
                           [signal.SIGTERM, signal.SIGINT]])
    process = world.start(name, out)
    after_a_while(world, name, dice)
    for number in numbers:
        if process.poll() is None:
            process.send_signal(number)
            time.sleep(dice.choice([0, 0.01, 0.3]))
    return judged(world, name, out, [world.ended(process)], may_refuse=False)


def stopped(world: World, out: Path, dice: random.Random) -> Outcome:
    """SIGSTOP and, some seconds later, SIGCONT."""
    name = any_command(world, dice)
    process = world.start(name, out)
    after_a_while(world, name, dice)
    if process.poll() is None:
        process.send_signal(signal.SIGSTOP)
        time.sleep(dice.choice([0.5, 3]))
        process.send_signal(signal.SIGCONT)
    return judged(world, name, out, [world.ended(process)], may_refuse=False)


CLOCK = """
import time
real, calls = time.time, 0
def changed():
    global calls
    calls += 1
    return real() + ({shift} if calls > {calls} else 0)
time.time = changed
"""


def clock(world: World, out: Path, dice: random.Random) -> Outcome:
    """The wall clock is set back or forward during the run."""
    name = any_command(world, dice)
    shift = dice.choice([-1, 1]) * dice.choice([3600, 86_400 * 366, 2e9])
    program = CLOCK.format(shift=shift, calls=dice.choice([0, 100, 1000, 3000]))
    return judged(world, name, out, [world.run(name, out, program=program)], may_refuse=False)


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def removed_meanwhile(world: World, out: Path, dice: random.Random) -> Outcome:
    """A file or a folder of a run is removed or moved away while it trains."""
    name = run_of(world, dice)
    world.whole(name)
    process = world.start(name, out)
    try:
        end = time.monotonic() + world.patience
        while process.poll() is None and len(steps_of(out)) < dice.randint(0, 1) and time.monotonic() < end:
            time.sleep(0.02)
        while process.poll() is None and not (out / "metrics.jsonl").exists() and time.monotonic() < end:
            time.sleep(0.02)
        there = [path for path in (out, out / "metrics.jsonl", out / "checkpoints", out / ".lock", out / "tensorboard",
                                   out / "provenance.json") if path.exists()]
        if process.poll() is None and there:
            target = dice.choice(there)
            if dice.random() < 0.5:
                target.rename(target.with_name(f"{target.name}.moved"))
            elif target.is_dir():
                shutil.rmtree(target, ignore_errors=True)
            else:
                target.unlink()
    finally:
        first = world.ended(process)
    if first.status == 0 and not (out / "metrics.jsonl").exists():
        return Outcome(name, "WRONG", "it says that it is done, and its records are gone")
    return judged(world, name, out, [first])


def junk(dice: random.Random, content: bytes) -> bytes:
    """Junk to replace a file's content."""
    at = dice.randrange(max(1, len(content)))
    return dice.choice([
        lambda: b"", lambda: content[:at], lambda: bytes(len(content)), lambda: content[at:],
        lambda: content[:at] + bytes([content[at] ^ 1 << dice.randrange(8)]) + content[at + 1:] if content else b"x",
        lambda: dice.randbytes(len(content) or 9), lambda: b"null", lambda: b"[]", lambda: b"{}", lambda: b"[" * 99_999,
        lambda: content + content])()


VALUES = (None, "many", -1, 10**30, 1e308, [], {}, True, "../../../etc/passwd", "%MODEL_DIR", "@os.system()",
          "\n\x1b[2J")


def hostile(dice: random.Random, content: bytes) -> bytes:
    """JSON, or JSON lines, with one value replaced or left out; junk for other content."""
    lines = content.split(b"\n")
    place = dice.randrange(len(lines))
    try:
        whole = json.loads(content)
        place = -1
    except ValueError:
        try:
            whole = json.loads(lines[place])
        except ValueError:
            return junk(dice, content)
    at, path = whole, []
    while isinstance(at, (dict, list)) and at:
        key = dice.choice(list(at)) if isinstance(at, dict) else dice.randrange(len(at))
        path.append((at, key))
        at = at[key]
        if dice.random() < 0.3:
            break
    if path:
        holder, key = path[-1]
        if dice.random() < 0.3:
            del holder[key]
        else:
            holder[key] = dice.choice(VALUES)
    changed = json.dumps(whole).encode()
    return changed if place < 0 else b"\n".join([*lines[:place], changed, *lines[place + 1:]])


def damaged(world: World, out: Path, dice: random.Random) -> Outcome:
    """One or more files of a killed run are damaged before it resumes."""
    name = run_of(world, dice)
    copied(world.half(name), out)
    files = files_below(out)
    some = dice.sample(files, min(len(files), dice.choice([1, 1, 1, 3])))
    if dice.random() < 0.5:  # most files hold data, so others are drawn separately
        some = [dice.choice([path for path in files if path.suffix in (".json", ".jsonl", ".gin") or path.name in (
            "metadata", "_METADATA", "manifest.ocdbt", "_CHECKPOINT_METADATA")])]
    for path in some:
        content = path.read_bytes()
        path.write_bytes(hostile(dice, content) if dice.random() < 0.5 else junk(dice, content))
    return judged(world, name, out, [], records="metrics.jsonl" not in {path.name for path in some})


def rearranged(world: World, out: Path, dice: random.Random) -> Outcome:
    """Checkpoints of a killed run are copied, renamed, swapped, removed or mixed with each other."""
    name = run_of(world, dice)
    copied(world.half(name), out)
    folder, steps = out / "checkpoints", steps_of(out)
    first, last = folder / str(steps[0]), folder / str(steps[-1])

    def swap(one: Path, other: Path) -> None:
        one.rename(folder / "between")
        other.rename(one)
        (folder / "between").rename(other)

    dice.choice([
        lambda: shutil.copytree(last, folder / str(steps[-1] + dice.choice([1, 2, 14, 1000]))),
        lambda: last.rename(folder / str(steps[-1] + 3)), lambda: swap(first, last),
        lambda: shutil.rmtree(folder), lambda: shutil.rmtree(last), lambda: swap(first / "state", last / "state"),
        lambda: swap(first / "record", last / "record"), lambda: (folder / "99").mkdir(),
        lambda: (folder / "notes.txt").write_text("mine"), lambda: (folder / "²").mkdir()])()
    return judged(world, name, out, [])


def damaged_study(world: World, out: Path, dice: random.Random) -> Outcome:
    """A file of a finished study is damaged or removed before the same study runs again."""
    copied(world.whole("study"), out)
    # A study neither rewrites a run's records nor rereads its checkpoints; other kinds damage these.
    one = dice.choice([path for path in files_below(out) if path.name != "metrics.jsonl"
                       and "checkpoints" not in path.parts])
    content = one.read_bytes()
    dice.choice([one.unlink, lambda: one.write_bytes(junk(dice, content)),
                 lambda: one.write_bytes(hostile(dice, content))])()
    return judged(world, "study", out, [])


def killed_study(world: World, out: Path, dice: random.Random) -> Outcome:
    """SIGKILL or SIGTERM while a study makes the missing parts of one of its arms."""
    copied(world.whole("study"), out)
    run = out / "runs" / f"{dice.choice(list(ARMS))}.seed0"
    shutil.rmtree(dice.choice([run, run, run / "results"]))
    (out / "state" / f"{run.name}.json").unlink()
    for path in dice.sample([out / "report", out / "contamination.json"], dice.randint(0, 2)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    process = world.start("study", out)
    time.sleep(dice.random() * world.seconds["study"] / 2)
    number = dice.choice([signal.SIGKILL, signal.SIGTERM])
    if process.poll() is None:
        process.send_signal(number)
    return judged(world, "study", out, [world.ended(process)], may_refuse=False)


def damaged_rows(world: World, out: Path, dice: random.Random) -> Outcome:
    """A file of the cache is damaged, removed, or swapped with another, before a run begins."""
    copied(world.whole("cache"), out)
    shutil.rmtree(out / "run")
    files = [path for path in files_below(out / "cache") if "rows" in path.parts]
    one, other = dice.sample(files, 2)
    content = one.read_bytes()
    dice.choice([
        one.unlink, lambda: one.write_bytes(junk(dice, content)), lambda: one.write_bytes(hostile(dice, content)),
        lambda: (one.write_bytes(other.read_bytes()), other.write_bytes(content)),
        lambda: shutil.rmtree(one.parent)])()
    # Simulates a large cache, which is not verified as a whole when it is opened.
    large = "from codellm_jax.mixture import checked\nchecked.BYTES_READ_WHOLE = 0"
    first = [world.run("cache", out, program=large)] if dice.random() < 0.5 else []
    if first and first[0].status and "damaged" in first[0].line:
        shutil.rmtree(out / "cache")  # as its message advises
    return judged(world, "cache", out, first)


LIMITS = """
import resource
resource.setrlimit(resource.{name}, ({value}, {value}))
"""


def limited(world: World, out: Path, dice: random.Random) -> Outcome:
    """The size of files, or the number of open files, is limited."""
    name = any_command(world, dice)
    limit, value = dice.choice([("RLIMIT_FSIZE", 2 ** dice.randint(8, 21)), ("RLIMIT_NOFILE", 2 ** dice.randint(5, 8))])
    program = "import signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)" + LIMITS.format(name=limit, value=value)
    return judged(world, name, out, [world.run(name, out, program=program)], may_refuse=False)


def can_mount() -> bool:
    """Whether a separate disk can be mounted here."""
    return shutil.which("unshare") is not None and subprocess.run(
        ["unshare", "-rm", "true"], capture_output=True).returncode == 0


def full_disk(world: World, out: Path, dice: random.Random) -> Outcome:
    """OUT is on a disk that becomes full; then there is more space."""
    name = run_of(world, dice)
    world.whole(name)
    size, kept = dice.choice([200, 500, 1000, 2000, 4000, 8000]), out.with_name("kept")
    out.mkdir(parents=True)
    script = (f"mount -t tmpfs -o size={size}k none {out} && mkdir -p {kept} && \"$@\"; status=$?; "
              f"cp -r {out}/. {kept}; exit $status")
    first = world.run(name, out, wrapper=["unshare", "-rm", "bash", "-c", script, "bash"])
    out.rmdir()
    kept.rename(out)
    if first.status and "No space" not in first.line:
        return Outcome(name, "WRONG", f"a full disk is not named: {first.line[:300]}")
    return judged(world, name, out, [first], may_refuse=False)


def second_beside(world: World, out: Path, dice: random.Random) -> Outcome:
    """The same command runs a second time beside the first."""
    name = any_command(world, dice)
    processes = [world.start(name, out)]
    time.sleep(dice.random() * 5)
    processes.append(world.start(name, out))
    return judged(world, name, out, [world.ended(process) for process in processes], may_refuse=False)


def nobody_reads(world: World, out: Path, dice: random.Random) -> Outcome:
    """The reader of a command's output goes away."""
    name = any_command(world, dice)
    world.whole(name)
    process = world.start(name, out)
    assert process.stdout is not None
    for _ in itertools.islice(process.stdout, dice.randint(0, 3)):
        pass
    process.stdout.close()
    try:
        process.wait(world.patience)
    except subprocess.TimeoutExpired:
        kill(process)
        return Outcome(name, "WRONG", "hangs")
    return judged(world, name, out, [], may_refuse=False)


def peer_killed(world: World, out: Path, dice: random.Random) -> Outcome:
    """One of two processes of a run is killed; a single process resumes the run."""
    world.whole("train")
    process = world.start("train", out, more=["--local_processes=2"])
    end = time.monotonic() + world.patience
    while process.poll() is None and len(steps_of(out)) < 1 and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(dice.random() * 0.5)
    found = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if is_peer(path, out)]
    if process.poll() is None and found:
        try:
            os.kill(dice.choice(found), signal.SIGKILL)
        except ProcessLookupError:
            pass
    first = world.ended(process)
    for one in [first, second := world.run("train", out)]:
        if wrong := one.fault():
            return Outcome("train", "WRONG", wrong)
    # Sums over two processes equal those of one only up to rounding.
    return Outcome("train", "identical" if second.status == 0 and steps_of(out) == steps_of(world.whole("train"))
                   else "WRONG", first.line[:160])


def is_peer(cmdline: Path, out: Path) -> bool:
    try:
        text = cmdline.read_bytes()
    except OSError:
        return False
    return b"--process_index=" in text and str(out).encode() in text
