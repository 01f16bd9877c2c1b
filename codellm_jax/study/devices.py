"""Several workers on one machine, each with some of its devices."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

from codellm_jax.runtime.commands import side_by_side

# The layout of the chips of one process, for Cloud TPU's runtime.
CHIPS_PER_PROCESS_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}
_HOST_DEVICES = r"--xla_force_host_platform_device_count=\d+"


def run_side_by_side(arguments: Sequence[str], devices_per_run: int, report: Callable[[str], None]) -> int:
    """Runs `t5x ARGUMENTS` once for each group of `devices_per_run` devices of this machine, concurrently; returns the
    exit status.

    Raises:
      ValueError: the machine has fewer devices, or they cannot be divided into such groups.
    """
    platform, count = _devices()
    shares = surroundings(devices_per_run, platform, count, os.environ)
    report(f"{len(shares)} workers with {devices_per_run} of the {count} {platform} devices each")
    return side_by_side(["codellm_jax.cli", *arguments], shares, report)


def _devices() -> tuple[str, int]:
    """The platform and the number of this machine's devices, found by a subprocess that releases them when it ends."""
    script = "import jax, json; print(json.dumps([jax.default_backend(), jax.local_device_count()]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise ValueError(f"--devices_per_run: JAX finds no devices here: {last}")
    platform, count = json.loads(done.stdout.splitlines()[-1])
    return platform, count


def surroundings(
    devices_per_run: int, platform: str, count: int, environment: Mapping[str, str]
) -> list[dict[str, str]]:
    """Environments in which each process sees `devices_per_run` devices that no other process sees.

    Args:
      platform: "cpu", "gpu" or "tpu", as JAX names it.
      count: the number of devices that a process in `environment` sees.
      environment: of this process.

    Raises:
      ValueError: there are fewer devices, or they cannot be divided into such groups.
    """
    if not 1 <= devices_per_run <= count:
        raise ValueError(f"--devices_per_run={devices_per_run}: this machine has {count} {platform} device(s).")
    if platform == "tpu" and devices_per_run not in CHIPS_PER_PROCESS_BOUNDS:
        raise ValueError(f"--devices_per_run={devices_per_run}: a process can use "
                         f"{', '.join(map(str, CHIPS_PER_PROCESS_BOUNDS))} TPU chips.")
    variable = {"tpu": "TPU_VISIBLE_CHIPS"}.get(platform, "CUDA_VISIBLE_DEVICES")
    visible = [name for name in environment.get(variable, "").split(",") if name] or [str(n) for n in range(count)]
    shares = []
    for first in range(0, count - devices_per_run + 1, devices_per_run):
        own = ",".join(visible[first:first + devices_per_run])
        if platform == "cpu":
            others = re.sub(_HOST_DEVICES, "", environment.get("XLA_FLAGS", ""))
            share = {"XLA_FLAGS": f"{others} --xla_force_host_platform_device_count={devices_per_run}".strip()}
        elif platform == "tpu":
            share = {variable: own, "TPU_PROCESS_BOUNDS": "1,1,1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
                     "TPU_CHIPS_PER_PROCESS_BOUNDS": CHIPS_PER_PROCESS_BOUNDS[devices_per_run]}
        else:
            share = {variable: own}
        shares.append(dict(environment) | share)
    return shares
