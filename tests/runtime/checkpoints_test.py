"""What is saved comes back bit for bit, on any mesh, or is said to be damaged."""

import json
import resource
import shutil
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import codellm_jax.runtime.checkpoints as checkpoints_module
from codellm_jax.runtime.checkpoints import Checkpoints, checksums, newest_record, record_of, restore_parameters
from codellm_jax.runtime.partitioning import MeshShape, make_mesh

RECORD = {"settings": {"SEED": "0"}, "ledger": {"rows": {"text.a": 3}}}
ONE, EIGHT, MIXED = (MeshShape(), 1), (MeshShape(data=1, fsdp=8), 8), (MeshShape(data=2, fsdp=4), 8)
SPECS = {"params": {"kernel": PartitionSpec("fsdp"), "bias": PartitionSpec()}, "half": PartitionSpec(None, "fsdp"),
         "flag": PartitionSpec(), "step": PartitionSpec(), "rng": PartitionSpec()}


def values(seed: int) -> dict:
    dice = np.random.default_rng(seed)
    kernel = dice.normal(size=(16, 24)).astype(np.float32)
    # What is equal but not the same bits, or not equal to itself.
    kernel[0, :5] = [-0.0, np.nan, np.inf, 1e-45, np.float32(np.uint32(0x7FC12345).view(np.float32))]
    return {"params": {"kernel": kernel, "bias": dice.normal(size=5).astype(np.float32)},
            "half": np.asarray(jnp.asarray(dice.normal(size=(3, 8)), jnp.bfloat16)),
            "flag": np.array([True, False, True]), "step": np.int32(seed),
            "rng": dice.integers(0, 2**32, 2, dtype=np.uint32)}


def shardings(where: tuple[MeshShape, int]) -> dict:
    mesh = make_mesh(where[0], jax.devices()[: where[1]])
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS, is_leaf=lambda x: isinstance(x, PartitionSpec))


def state(seed: int, where: tuple[MeshShape, int] = ONE) -> dict:
    return jax.tree.map(jax.device_put, values(seed), shardings(where))


def abstract(where: tuple[MeshShape, int] = ONE) -> dict:
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                        values(0), shardings(where))


def assert_same_bits(found: dict, expected: dict) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == two.dtype and one.shape == np.shape(two)
        assert np.asarray(one).tobytes() == np.asarray(two).tobytes()


def ignore(record: dict) -> None:
    del record


def save(model_dir: Path, *steps: int, where: tuple[MeshShape, int] = ONE, **options) -> None:
    with Checkpoints(str(model_dir / "checkpoints"), **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step, where), RECORD | {"number": step})
            checkpoints.wait()


def restore(model_dir: Path, where: tuple[MeshShape, int] = ONE) -> tuple[dict, dict, list[str]]:
    reports: list[str] = []
    with Checkpoints(str(model_dir / "checkpoints")) as checkpoints:
        found = checkpoints.restore_newest(abstract(where), ignore, reports.append)
    assert found is not None
    return *found, reports


def kept(model_dir: Path) -> list[int]:
    return sorted(int(path.name) for path in (model_dir / "checkpoints").iterdir() if path.name.isdigit())


def test_there_is_none_yet(tmp_path):
    with Checkpoints(str(tmp_path / "run" / "checkpoints")) as checkpoints:
        assert checkpoints.newest_step() is None
        assert checkpoints.restore_newest(abstract(), ignore) is None


def test_the_state_comes_back_bit_for_bit(tmp_path):
    save(tmp_path, 3, 4)
    restored, record, reports = restore(tmp_path)
    assert_same_bits(restored, values(4))
    assert {name: record[name] for name in ("settings", "ledger", "number")} == RECORD | {"number": 4}
    assert reports == []
    with Checkpoints(str(tmp_path / "checkpoints")) as checkpoints:
        assert checkpoints.newest_step() == 4 and checkpoints.record(3)["number"] == 3


def test_onto_other_meshes_one_after_the_other(tmp_path):
    save(tmp_path, 5, where=EIGHT)
    for step, where in enumerate((ONE, MIXED, EIGHT), 6):
        restored, _, _ = restore(tmp_path, where)
        assert_same_bits(restored, values(5))
        for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(abstract(where)), strict=True):
            assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
        with Checkpoints(str(tmp_path / "checkpoints")) as checkpoints:
            checkpoints.save(step, restored, RECORD)


@pytest.mark.parametrize(("options", "expected"), [
    ({}, [5, 6]), ({"keep_last": 1}, [6]), ({"keep_last": 3}, [4, 5, 6]),
    ({"keep_last": 1, "keep_every": 2}, [2, 4, 6]),
    ({"keep_last": 2, "keep_every": 3}, [3, 5, 6])])
def test_which_are_kept(tmp_path, options, expected):
    save(tmp_path, *range(1, 7), **options)
    assert kept(tmp_path) == expected


def test_older_ones_are_kept_over_a_resume(tmp_path):
    save(tmp_path, 1, 2, 3, keep_last=2, keep_every=2)
    save(tmp_path, 4, 5, keep_last=2, keep_every=2)
    assert kept(tmp_path) == [2, 4, 5]


def test_buffers_may_be_donated_while_a_save_is_in_flight(tmp_path):
    def update(tree: dict) -> dict:
        return jax.tree.map(lambda leaf: leaf * 1.5 + 1, tree)

    donated = jax.jit(update, donate_argnums=0)
    large = jax.device_put({f"w{k}": np.random.default_rng(k).normal(size=(512, 2000)).astype(np.float32)
                            for k in range(6)}, NamedSharding(make_mesh(MeshShape()), PartitionSpec("data")))
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    first, large = large, donated(large)
    assert first["w0"].is_deleted()  # donation does happen here
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), large)
    expected = []
    with Checkpoints(str(tmp_path / "checkpoints"), keep_last=5) as checkpoints:
        for step in range(3):
            # Of a copy: on CPU, an array that the host has looked at is never donated.
            expected.append(jax.device_get(copy(large)))
            checkpoints.save(step, large, RECORD)
            for _ in range(5):
                large = donated(large)
    for step in (2, 1, 0):
        with Checkpoints(str(tmp_path / "checkpoints")) as checkpoints:
            restored, _ = checkpoints.restore_newest(like, ignore)
        assert_same_bits(restored, expected[step])
        shutil.rmtree(tmp_path / "checkpoints" / str(step))


def test_a_step_that_is_there_already_is_not_passed_over_in_silence(tmp_path):
    save(tmp_path, 1, 2)
    with Checkpoints(str(tmp_path / "checkpoints")) as checkpoints:
        with pytest.raises(OSError, match="step 2 is not after step 2"):
            checkpoints.save(2, state(7), RECORD)


def flip(path: Path, dice: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    content[int(dice.integers(len(content)))] ^= 1 << int(dice.integers(8))
    path.write_bytes(bytes(content))


def data_files(step: Path) -> list[Path]:
    return sorted(path for path in (step / "state").rglob("*") if path.is_file() and "/d/" in path.as_posix())


def all_of(step: Path, damage) -> None:
    for path in data_files(step):
        damage(path)


DAMAGES = {
    "a data file is truncated": lambda step: max(data_files(step), key=lambda path: path.stat().st_size).write_bytes(
        b"cut short"),
    "data files are empty": lambda step: all_of(step, lambda path: path.write_bytes(b"")),
    "data files are zeros": lambda step: all_of(step, lambda path: path.write_bytes(bytes(path.stat().st_size))),
    "data files are gone": lambda step: all_of(step, Path.unlink),
    "the state is gone": lambda step: shutil.rmtree(step / "state"),
    "the state is an empty folder": lambda step: (shutil.rmtree(step / "state"), (step / "state").mkdir()),
    "the record is gone": lambda step: shutil.rmtree(step / "record"),
    "the record is empty": lambda step: (step / "record" / "metadata").write_bytes(b""),
    "the record is cut short": lambda step: (step / "record" / "metadata").write_text(
        (step / "record" / "metadata").read_text()[:-20]),
    "the record is zeros": lambda step: (step / "record" / "metadata").write_bytes(bytes(100)),
    "the record is no UTF-8": lambda step: (step / "record" / "metadata").write_bytes(b"\xff\xfe{}"),
    "the record holds nothing": lambda step: (step / "record" / "metadata").write_text("{}"),
    "the record is a list": lambda step: (step / "record" / "metadata").write_text("[1]"),
    "the array index is garbage": lambda step: (step / "state" / "_METADATA").write_text("garbage"),
    "everything is empty": lambda step: [path.write_bytes(b"") for path in step.rglob("*") if path.is_file()],
    "the folder is empty": lambda step: (shutil.rmtree(step), step.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_newest_is_reported_and_the_one_before_it_used(tmp_path, damage):
    save(tmp_path, 3, 4)
    damage(tmp_path / "checkpoints" / "4")
    reports: list[str] = []
    checked: list[int] = []
    with Checkpoints(str(tmp_path / "checkpoints")) as checkpoints:
        restored, record = checkpoints.restore_newest(
            abstract(), lambda record: checked.append(record["number"]), reports.append)
        assert_same_bits(restored, values(3))
        assert record["number"] == checked[-1] == 3
        assert len(reports) == 1 and "\n" not in reports[0]
        assert reports[0].startswith("WARNING: the checkpoint of step 4 is damaged (")
        assert [path.name for path in (tmp_path / "damaged_checkpoints").iterdir()] == ["4"]
        # Training comes to the same step again.
        checkpoints.save(4, state(44), RECORD | {"number": 44})
    again, record, reports = restore(tmp_path)
    assert_same_bits(again, values(44))
    assert record["number"] == 44 and reports == []
    assert kept(tmp_path) == [3, 4]


@pytest.mark.parametrize("reading", [0, 1, 2], ids=["record", "state", "checksums"])
def test_what_another_process_cannot_read_this_one_does_not_take(tmp_path, monkeypatch, reading):
    """Else they would go on from different steps, and wait for each other for ever."""
    save(tmp_path, 3, 4)
    readings: list[np.ndarray] = []

    def gathered(failed: np.ndarray) -> np.ndarray:
        readings.append(failed)
        return np.array([failed, [len(readings) == reading + 1]])

    monkeypatch.setattr(checkpoints_module, "gathered", gathered)
    restored, record, reports = restore(tmp_path)
    assert record["number"] == 3 and not np.any(readings)  # here nothing failed
    assert_same_bits(restored, values(3))
    assert "the checkpoint of step 4 is damaged (another process could not read it)" in reports[0]


def test_any_flipped_byte_is_noticed_or_harmless(tmp_path):
    save(tmp_path / "whole", 3, 4)
    dice = np.random.default_rng(0)
    names = sorted(path.relative_to(tmp_path / "whole" / "checkpoints" / "4").as_posix()
                   for path in data_files(tmp_path / "whole" / "checkpoints" / "4"))
    noticed = 0
    for number, name in enumerate(names * 2):
        copy = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", copy)
        flip(copy / "checkpoints" / "4" / name, dice)
        restored, record, reports = restore(copy)
        assert_same_bits(restored, values(record["number"]))
        assert record["number"] == (3 if reports else 4)
        noticed += bool(reports)
    assert noticed  # how many bytes a restore reads depends on how Orbax happened to lay them out


def test_another_array_in_its_place_is_noticed(tmp_path):
    """Well-formed files of another save: only the checksums can tell."""
    save(tmp_path, 3, 4)
    save(tmp_path / "other", 9)
    shutil.rmtree(tmp_path / "checkpoints" / "4" / "state")
    shutil.copytree(tmp_path / "other" / "checkpoints" / "9" / "state", tmp_path / "checkpoints" / "4" / "state")
    restored, _, reports = restore(tmp_path)
    assert_same_bits(restored, values(3))
    assert len(reports) == 1 and "differ from what was saved" in reports[0]


def test_two_damaged_ones(tmp_path):
    save(tmp_path, 3, 4, 5, keep_last=3)
    for step in ("4", "5"):
        shutil.rmtree(tmp_path / "checkpoints" / step / "state")
    restored, _, reports = restore(tmp_path)
    assert_same_bits(restored, values(3))
    assert ["step 5" in reports[0], "step 4" in reports[1], len(reports)] == [True, True, 2]
    # The same step damaged again takes the other's place.
    save(tmp_path, 4, 5, keep_last=3)
    (tmp_path / "checkpoints" / "5" / "record" / "metadata").write_text("{")
    assert_same_bits(restore(tmp_path)[0], values(4))
    assert sorted(path.name for path in (tmp_path / "damaged_checkpoints").iterdir()) == ["4", "5"]


@pytest.mark.parametrize("content", ["[" * 99_999, '{"commit_timestamp_nsecs": 1e308}', '{"item_handlers": 1}', "null"])
def test_what_orbax_notes_of_each_step_is_not_needed(tmp_path, content):
    save(tmp_path, 3, 4, 5, keep_last=3)
    for step in ("4", "5"):
        (tmp_path / "checkpoints" / step / "_CHECKPOINT_METADATA").write_text(content)
    restored, _, reports = restore(tmp_path)
    assert_same_bits(restored, values(5))
    assert not reports
    save(tmp_path, 6, keep_last=2)
    assert kept(tmp_path) == [5, 6]


def test_all_are_damaged(tmp_path):
    save(tmp_path, 3, 4)
    for step in ("3", "4"):
        all_of(tmp_path / "checkpoints" / step, lambda path: path.write_bytes(b""))
    with pytest.raises(ValueError, match="All checkpoints in .* are damaged") as raised:
        restore(tmp_path)
    assert "\n" not in str(raised.value)
    assert kept(tmp_path) == [3, 4]


def test_what_a_kill_left_of_a_save_is_no_checkpoint(tmp_path):
    save(tmp_path, 3)
    partial = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "3", partial)
    restored, record, reports = restore(tmp_path)
    assert_same_bits(restored, values(3))
    assert record["number"] == 3 and reports == []
    save(tmp_path, 4)  # Orbax removes it in the background, and waits for that before it saves
    assert not partial.exists()
    assert_same_bits(restore(tmp_path)[0], values(4))


def test_a_run_of_other_settings_is_refused_and_nothing_moved(tmp_path):
    save(tmp_path, 3, 4)

    def refuse(record: dict) -> None:
        raise ValueError(f"other settings than {record['settings']}")

    with Checkpoints(str(tmp_path / "checkpoints")) as checkpoints:
        with pytest.raises(ValueError, match="other settings than {'SEED': '0'}"):
            checkpoints.restore_newest(abstract(), refuse)
    assert kept(tmp_path) == [3, 4] and not (tmp_path / "damaged_checkpoints").exists()


@pytest.mark.parametrize(("change", "message"), [
    (lambda tree: tree["params"].update(kernel=jax.ShapeDtypeStruct((16, 23), jnp.float32)),
     r"params/kernel is \[16, 24\] there and \[16, 23\] here"),
    (lambda tree: tree["params"].update(extra=jax.ShapeDtypeStruct((2,), jnp.float32)),
     r"params/extra is absent there and \[2\] here"),
    (lambda tree: tree.pop("half"), r"half is \[3, 8\] there and absent here")])
def test_a_checkpoint_of_another_model_is_refused_in_one_line(tmp_path, change, message):
    save(tmp_path, 3)
    other = abstract()
    change(other)
    with Checkpoints(str(tmp_path / "checkpoints")) as checkpoints:
        with pytest.raises(ValueError, match=f"step 3 has another model or optimizer: {message}") as raised:
            checkpoints.restore_newest(other, ignore)
    assert "\n" not in str(raised.value) and kept(tmp_path) == [3]


@pytest.fixture
def no_room():
    """As on a full disk, whoever asks: no file can grow beyond 64 KiB. Returns a state that is larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield {"noise": jax.random.bits(jax.random.key(0), (1 << 18,))}
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_failed_save_is_raised_at_a_later_step(tmp_path, no_room):
    checkpoints = Checkpoints(str(tmp_path / "checkpoints"))
    checkpoints.save(1, state(1), RECORD)
    checkpoints.wait()
    checkpoints.raise_if_failed()
    with pytest.raises(OSError, match="Saving to .*checkpoints failed.*from the last complete checkpoint") as raised:
        checkpoints.save(2, no_room, RECORD)
        for _ in range(200):
            checkpoints.raise_if_failed()
            time.sleep(0.05)
    assert "\n" not in str(raised.value)
    assert_same_bits(restore(tmp_path)[0], values(1))


def test_a_failed_save_is_raised_by_waiting(tmp_path, no_room):
    checkpoints = Checkpoints(str(tmp_path / "checkpoints"))
    with pytest.raises(OSError, match="Saving to .*checkpoints failed"):
        checkpoints.save(2, no_room, RECORD)
        checkpoints.wait()


def test_what_is_already_being_raised_matters_more(tmp_path, no_room):
    with pytest.raises(FloatingPointError, match="the loss"):
        with Checkpoints(str(tmp_path / "checkpoints")) as checkpoints:
            checkpoints.save(2, no_room, RECORD)
            raise FloatingPointError("the loss")


def test_a_folder_that_cannot_be_made_is_raised_and_leaves_no_thread_behind(tmp_path):
    checkpoints = Checkpoints(str(tmp_path / "checkpoints"))
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("")  # a file where the folder was
    before = set(threading.enumerate())
    with pytest.raises(OSError, match="Saving to .*checkpoints failed") as raised:
        checkpoints.save(2, state(2), RECORD)
        checkpoints.wait()
    assert "\n" not in str(raised.value)
    # One that waits would keep the process from ending.
    waiting = [thread for thread in set(threading.enumerate()) - before if not thread.daemon]
    for thread in waiting:
        thread.join(5)
    assert not any(thread.is_alive() for thread in waiting if "ThreadPoolExecutor" not in thread.name)


def test_leaving_waits_for_the_save_in_flight(tmp_path):
    with Checkpoints(str(tmp_path / "checkpoints")) as checkpoints:
        checkpoints.save(1, state(1), RECORD)
    assert_same_bits(restore(tmp_path)[0], values(1))


def test_a_relative_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpoints("run/checkpoints") as checkpoints:
        checkpoints.save(1, state(1), RECORD)
    assert_same_bits(restore(tmp_path / "run")[0], values(1))


def test_checksums_by_hand():
    tree = {"f": jnp.array([1.0, -0.0], jnp.float32), "h": jnp.array([1.0, 2.0], jnp.bfloat16),
            "i": jnp.array([[-1, 2]], jnp.int32), "flag": jnp.array([True, True, False]), "step": jnp.int32(7),
            "byte": jnp.array([255, 255], jnp.uint8)}
    assert checksums(tree) == {
        "f": [[2], "float32", (0x3F800000 + 0x80000000) % 2**32], "h": [[2], "bfloat16", 0x3F80 + 0x4000],
        "i": [[1, 2], "int32", 1], "flag": [[3], "bool", 2], "step": [[], "int32", 7], "byte": [[2], "uint8", 510]}


def test_checksums_do_not_depend_on_the_mesh():
    assert checksums(state(3, ONE)) == checksums(state(3, EIGHT)) == checksums(state(3, MIXED))
    assert json.loads(json.dumps(checksums(state(3)))) == checksums(state(3))


def test_parameters_alone(tmp_path):
    save(tmp_path, 3, 4, where=MIXED)
    reports: list[str] = []
    params, record = restore_parameters(str(tmp_path), abstract(EIGHT)["params"], report=reports.append)
    assert_same_bits(params, values(4)["params"])
    assert params["kernel"].sharding.is_equivalent_to(shardings(EIGHT)["params"]["kernel"], 2)
    assert record["ledger"] == RECORD["ledger"] and reports == [f"Parameters from step 4 of {tmp_path}."]


def test_parameters_of_no_run(tmp_path):
    (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    for folder, why in ((tmp_path, "No checkpoint in"), (tmp_path / "nothing", "There is no directory")):
        with pytest.raises(FileNotFoundError, match=f"{why} .*name the MODEL_DIR of a run"):
            restore_parameters(str(folder), abstract()["params"])


def test_parameters_of_another_model(tmp_path):
    save(tmp_path, 3)
    other = abstract()["params"] | {"bias": jax.ShapeDtypeStruct((6,), jnp.float32)}
    with pytest.raises(ValueError, match=r"params/bias is \[5\] there and \[6\] here"):
        restore_parameters(str(tmp_path), other)


def test_parameters_that_are_damaged(tmp_path):
    save(tmp_path, 3)
    _, record = restore_parameters(str(tmp_path), abstract()["params"], report=lambda line: None)
    save(tmp_path, 4)
    save(tmp_path / "other", 9)
    shutil.rmtree(tmp_path / "checkpoints" / "4" / "state")
    shutil.copytree(tmp_path / "other" / "checkpoints" / "9" / "state", tmp_path / "checkpoints" / "4" / "state")
    said: list[str] = []
    _, used = restore_parameters(str(tmp_path), abstract()["params"], report=said.append)
    assert used == record  # of step 3
    assert "4 is damaged" in said[0] and "differ from what was saved" in said[0] and "from step 3" in said[1]
    shutil.rmtree(tmp_path / "checkpoints" / "3")
    with pytest.raises(ValueError, match="All checkpoints in .* are damaged"):
        restore_parameters(str(tmp_path), abstract()["params"], report=said.append)


def test_what_is_no_run_directory_is_told_apart(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").touch()
    (tmp_path / "weights" / "config.json").touch()
    (tmp_path / "run" / "checkpoints" / "4").mkdir(parents=True)
    for path, message in (("weights", "weights holds model.safetensors, weights of an unsupported format"),
                          ("nowhere", "There is no directory .*nowhere"),
                          ("weights/config.json", "config.json is a file, not a run directory"),
                          ("run/checkpoints", "run/checkpoints is a part of the run directory .*run"),
                          ("run/checkpoints/4", "checkpoints/4 is a part of the run directory .*run")):
        with pytest.raises(FileNotFoundError, match=message + ".*name the MODEL_DIR of a run that saved one"):
            newest_record(str(tmp_path / path))


def test_a_checkpoint_under_another_number_is_set_aside(tmp_path):
    save(tmp_path, 3, 4)
    shutil.copytree(tmp_path / "checkpoints" / "4", tmp_path / "checkpoints" / "9")
    with pytest.raises(ValueError, match="The record of step 9 in .* is damaged"):
        record_of(str(tmp_path), 9)
    restored, record, reports = restore(tmp_path)
    assert_same_bits(restored, values(4))
    assert record["number"] == record["step"] == 4 and len(reports) == 1
    assert "the checkpoint of step 9 is damaged (it is the checkpoint of step 4 under another number)" in reports[0]
    save(tmp_path, 5, keep_last=3)  # Orbax passes over a step that is not after the newest
    assert kept(tmp_path) == [3, 4, 5]


@pytest.mark.parametrize("fails, is_read", [(2, True), (4, False)])
def test_a_checkpoint_that_storage_does_not_give_now_is_left_in_its_place(tmp_path, monkeypatch, fails, is_read):
    save(tmp_path, 3, 4)
    left = [fails]
    whole = Checkpoints.record

    def failing(self: Checkpoints, step: int) -> dict:
        left[0] -= 1
        if left[0] >= 0:
            raise RuntimeError("UNAVAILABLE: 503 from the service")
        return whole(self, step)

    monkeypatch.setattr(checkpoints_module, "SECONDS_BETWEEN_TRIES", (0, 0, 0))
    monkeypatch.setattr(Checkpoints, "record", failing)
    if is_read:
        assert restore(tmp_path)[1]["number"] == 4
    else:
        with pytest.raises(OSError, match="cannot be read now and is left unchanged: UNAVAILABLE"):
            restore(tmp_path)
    assert kept(tmp_path) == [3, 4] and not (tmp_path / "damaged_checkpoints").exists()


def test_a_save_that_fails_for_a_peer_names_no_disk(tmp_path):
    checkpoints = Checkpoints(str(tmp_path / "checkpoints"))
    with pytest.raises(RuntimeError, match="^Gloo AllReduce failed"), checkpoints._one_line():
        raise RuntimeError("Gloo AllReduce failed: Connection closed by peer")
    with pytest.raises(OSError, match=r"No space left on device. The checkpoint takes 3.0 MB. Fix this"):
        checkpoints._bytes = 3_000_000
        with checkpoints._one_line():
            raise RuntimeError("INTERNAL: Error writing: No space left on device [and pages more]\nof detail")
