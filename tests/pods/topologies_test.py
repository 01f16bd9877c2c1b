"""Names of TPU topologies, and one process at a time."""

import fcntl
import math
import os
import re
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest

from codellm_jax.pods import topologies
from codellm_jax.pods.topologies import (
    CHIPS,
    compile_only_devices,
    has_libtpu,
    parse_topology,
    topology_names,
    with_memory,
)
from codellm_jax.runtime.partitioning import MeshShape, make_mesh


@pytest.mark.parametrize(("name", "chips", "shape"), [
    ("v2-8", 4, (2, 2)), ("v3-32", 16, (4, 4)), ("v3-2048", 1024, (32, 32)), ("v4-8", 4, (2, 2, 1)),
    ("v4-64", 32, (2, 4, 4)), ("v4-128", 64, (4, 4, 4)), ("v4-256", 128, (4, 4, 8)), ("v4-1536", 768, (8, 8, 12)),
    ("v4-2048", 1024, (8, 8, 16)), ("v4-4096", 2048, (8, 16, 16)), ("v5p-128", 64, (4, 4, 4)),
    ("v5p-12288", 6144, (16, 16, 24)), ("v5e-1", 1, (1, 1)), ("v5e-8", 8, (2, 4)), ("v5e-256", 256, (16, 16)),
    ("v6e-32", 32, (4, 8)),
])
def test_names_mean_what_cloud_tpu_means(name, chips, shape):
    """Chips and shapes from the vendor's tables of default topologies."""
    topology = parse_topology(name)
    assert (topology.chips, topology.shape, topology.slices) == (chips, shape, 1)


@pytest.mark.parametrize(("name", "rings"), [
    ("v4-64", (False, False, False)), ("v4-128", (True, True, True)), ("v4-1536", (True, True, True)),
    ("v5p-32", (False, False, False)), ("v5p-256", (True, True, True)), ("v5e-64", (False, False)),
    ("v5e-128", (False, True)), ("2xv5e-256", (True, True)), ("v3-2048", (True, True)),
])
def test_links_that_close_rings(name, rings):
    """By the vendor's pages: cubes of 4 x 4 x 4 and sides of a whole pod have wrap-around links."""
    assert parse_topology(name).rings == rings


def test_slices_and_other_spellings():
    two = parse_topology("2xv5e-256")
    assert (two.name, two.chips, two.slices, two.shape) == ("2xv5e-256", 512, 2, (16, 16))
    assert parse_topology("v5litepod-16") == parse_topology("V5e-16") == parse_topology("1xv5e-16")


@pytest.mark.parametrize(("name", "words"), [
    ("v4-100", "counts TensorCores.*nearest: v4-128"), ("v5e-255", "counts chips.*nearest: v5e-256"),
    ("v5e256", "nearest: v5e-256"), ("v7-8", "nearest: v4-8"), ("h100", "nearest"), ("", "nearest"),
    ("v5p-127", "nearest: v5p-128"), ("v4-1", "nearest: v4-8"), ("v5e-512", "nearest: v5e-256"),
    ("2xv3-8", "slices are joined from v4 on"), ("0xv5e-4", "1 to 256"), ("999xv5e-4", "1 to 256"),
])
def test_unknown_names_are_told_the_nearest(name, words):
    with pytest.raises(ValueError, match=words) as caught:
        parse_topology(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("memory", "gib"), [("80GiB", 80.0), ("24", 24.0), ("1.5 gib", 1.5), ("80GB", 80e9 / 2**30)])
def test_cards_have_the_memory_that_is_given(memory, gib):
    found = with_memory("gpu:2", memory)
    assert (found.name, found.chips, found.rings, found.chip.devices) == ("gpu:2", 2, (False,), 1)
    assert found.chip.memory_gib == pytest.approx(gib)


@pytest.mark.parametrize(("name", "memory", "words"), [
    ("gpu:2", None, "needs the memory of a card, such as --memory=80GiB."), ("gpu:2", "80TiB", "found '80TiB'"),
    ("gpu:2", "0GiB", "found '0GiB'"), ("v4-8", "80GiB", "--memory is for cards such as --topology=gpu:2"),
    ("gpu:0", None, "no TPU topology 'gpu:0'")])
def test_malformed_memory_is_told_in_one_line(name, memory, words):
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        with_memory(name, memory)
    assert "\n" not in str(raised.value)


def test_every_slice_has_as_many_chips_as_its_shape():
    for name, topology in topology_names().items():
        generation, _, number = name.partition("-")
        assert math.prod(topology.shape) * CHIPS[generation].cores_in_name == int(number)


def test_without_libtpu_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setattr(topologies, "has_libtpu", lambda: False)
    with pytest.raises(ValueError, match=r"pip install '\.\[tpu\]'"):
        compile_only_devices(parse_topology("v4-8"))


def test_a_second_process_waits_for_the_first(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(topologies, "_lock", None)
    lock = tmp_path / "codellm_jax_libtpu.lock"
    holder = subprocess.Popen([sys.executable, "-c", (
        "import fcntl, sys, time\n"
        f"file = open({str(lock)!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True); time.sleep(1.5)")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    told: list[str] = []
    start = time.monotonic()
    topologies._wait_for_compiler(told.append)
    topologies._wait_for_compiler(told.append)  # this process has it
    assert told == ["Waiting for another process of this machine that compiles for TPUs."]
    assert time.monotonic() - start > 0.5 and holder.wait() == 0
    with lock.open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(topologies._lock)


@pytest.mark.skipif(not has_libtpu(), reason="libtpu is not installed: pip install '.[tpu]'")
@pytest.mark.parametrize(("name", "kind"), [
    ("v2-8", "TPU v2"), ("v3-8", "TPU v3"), ("v4-16", "TPU v4"), ("v5e-1", "TPU v5 lite"), ("v5p-384", "TPU v5"),
    ("2xv6e-16", "TPU v6 lite"),
])
def test_devices_are_those_of_the_name(name, kind):
    topology = parse_topology(name)
    devices = compile_only_devices(topology)
    assert len(devices) == topology.chips * topology.chip.devices
    assert {device.device_kind for device in devices} == {kind}
    if topology.slices > 1:
        assert {device.slice_index for device in devices} == {0, 1}


@pytest.mark.skipif(not has_libtpu(), reason="libtpu is not installed: pip install '.[tpu]'")
@pytest.mark.parametrize(("name", "model", "slices"), [("v4-128", 2, 1), ("v4-128", 4, 1), ("2xv5e-16", 2, 2)])
def test_a_mesh_may_split_an_axis_of_the_chips(name, model, slices):
    """Those that share a `model` axis are neighbours, also where 4 x 4 x 4 chips have no axis of two."""
    topology = parse_topology(name)
    mesh = make_mesh(MeshShape(data=slices, fsdp=-1, model=model, slices=slices), compile_only_devices(topology))
    places = np.array([device.coords for device in mesh.devices.flat]).reshape(-1, model, 3)
    assert (np.abs(np.diff(places, axis=1)).sum(axis=2) == 1).all()
    assert len(set(mesh.devices.flat)) == topology.chips
