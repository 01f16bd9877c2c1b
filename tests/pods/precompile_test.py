"""`t5x precompile`: every shipped gin file compiles for a TPU topology; what it searches and tells is true.

The sizes from 350m on take minutes each, and have a mark of their own: python -m pytest -m pods
"""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import linen as nn

from codellm_jax import cli
from codellm_jax.configuration import build, read_configuration, shipped_gin_files
from codellm_jax.mixture import rows as rows_of_mixture
from codellm_jax.mixture.batches import Batch
from codellm_jax.model.decoder import parameter_count
from codellm_jax.pods import precompile, programs
from codellm_jax.pods.collectives import Part, Traffic
from codellm_jax.pods.programs import (
    Memory,
    Outcome,
    compile_decoding,
    compile_scoring,
    compile_train_step,
    replicated_leaves,
    with_slices,
    with_vocabulary_size,
)
from codellm_jax.pods.topologies import Topology, has_libtpu, parse_topology, with_memory
from codellm_jax.runtime.partitioning import MeshShape
from codellm_jax.runtime.progress import PEAK_FLOPS
from codellm_jax.runtime.state import bytes_per_device
from codellm_jax.training.plan import GIB, Training

needs_libtpu = pytest.mark.skipif(not has_libtpu(), reason="libtpu is not installed: pip install '.[tpu]'")

SHIPPED = list(shipped_gin_files())
SHARED = ("gin/pretrain.gin", "gin/tune.gin")  # included by the arms, not to be run alone
OTHERS = [f"gin/{name}.gin" for name in ("eval", "infer", "study", "contamination", "continue_pretrain", "prepare")]
ARMS = [file for file in SHIPPED if file.count("/") == 1 and file not in (*SHARED, *OTHERS)]
# Where each size is meant to run. The arms are of the tiny size.
PODS = {"125m": "v4-16", "350m": "v4-32", "1_3b": "v4-64", "2_6b": "v4-128", "13b": "v5p-256", "llama_125m": "v4-16",
        "llama_350m": "v4-32", "llama_1b": "v5e-256", "llama_3b": "v4-128", "llama_8b": "v5p-256"}


def training_of(*gin_files: str, **overrides: str) -> Training:
    """A run's settings without its data; arms of tuning take their sizes from a file of gin/models/."""
    nothing_before = [("train.initial_checkpoint_path", "None"), ("vocabulary.path", "python_8k")]
    return build(read_configuration(gin_files, [*nothing_before, *overrides.items()]), "train")


def arm(file: str) -> Training:
    if "/tune_" not in file:
        return training_of(file)
    return training_of("gin/models/tiny.gin", file, TASK_FEATURE_LENGTHS="{'targets': 256}")


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_, **__):
        raise AssertionError("rows were opened")

    monkeypatch.setattr(rows_of_mixture, "cached_rows", opened)
    monkeypatch.setattr("codellm_jax.mixture.mixture.cached_rows", opened)


@pytest.fixture
def lowered_text(monkeypatch: pytest.MonkeyPatch):
    """What compile_train_step would compile, as text."""

    def lower_only(program, training, topology, mesh, config, rows, lower, needed=None):
        with jax.set_mesh(mesh), nn.logical_axis_rules(training.mesh.all_rules()):
            return lower().as_text()

    def text(training: Training, topology: Topology) -> str:
        with monkeypatch.context() as patched:
            patched.setattr(programs, "_compile", lower_only)
            return compile_train_step(training, topology)

    return text


# Compiling.


@pytest.mark.slow
@needs_libtpu
def test_every_arm_compiles_for_its_pod(lowered_text, no_data):
    """Arms of a stage differ in data alone: one of each stage is compiled, the others are the same program."""
    topology, texts = parse_topology("v4-8"), {}
    for file in ARMS:
        training = arm(file)
        text = lowered_text(training, topology)
        if text not in texts.values():
            outcome = compile_train_step(training, topology)
            assert outcome.memory is not None and outcome.memory.peak < topology.chip.memory_gib * GIB, outcome.refusal
            assert outcome.memory.arguments > 12 * parameter_count(outcome.config)
        texts[file] = text
    assert len(ARMS) >= 8 and len(set(texts.values())) == 2


@needs_libtpu
@pytest.mark.pods
@pytest.mark.parametrize("size", [file.removeprefix("gin/models/").removesuffix(".gin") for file in SHIPPED
                                  if file.startswith("gin/models/") and file != "gin/models/tiny.gin"])
@pytest.mark.parametrize("vocabulary", [40_000, 130_344])
def test_every_size_compiles_for_its_pod(size, vocabulary, no_data):
    topology = parse_topology(PODS[size])
    training = with_vocabulary_size(training_of("gin/mixed_pretrain.gin", f"gin/models/{size}.gin"), vocabulary)
    for compile_program in (compile_train_step, compile_scoring, compile_decoding):
        outcome = compile_program(training, topology)
        assert outcome.memory is not None and outcome.memory.peak < topology.chip.memory_gib * GIB, outcome.refusal


@pytest.mark.slow
@needs_libtpu
def test_the_command_tells_and_writes_what_it_found(no_data, tmp_path, capsys):
    page = tmp_path / "page.md"
    assert cli.main([
        "precompile", "--gin_file=gin/mixed_pretrain.gin", "--topology=v5e-4", "--vocabulary_size=1000", "--scoring",
        "--decode", "--no_search", f"--report={page}", "--gin.model.layers=2", "--gin.mesh.data=1",
        "--gin.mesh.fsdp=-1", "--gin.VOCABULARY=nowhere.model"]) == 0
    text = page.read_text()
    assert text in capsys.readouterr().out
    assert "# gin/mixed_pretrain.gin model.layers=2" in text and "on v5e-4" in text
    assert "vocabulary 1,024" in text and "mesh data 1 x fsdp 4 x model 1" in text
    for program in ("train step", "scoring", "decoding"):
        assert f"| {program} | " in text and f"{program} sends" in text
    # Gathered once forward and once backward at least, three quarters each; biases are whole on every device.
    assert "| blocks/attention/query_bias | 1 x 4 x 64 | fsdp | 3 |" in text
    assert "| all-gather | fsdp |" in text


@needs_libtpu
def test_a_run_that_does_not_fit_ends_with_status_1(no_data, capsys):
    status = cli.main(["precompile", "--gin_file=gin/mixed_pretrain.gin", "--topology=v5e-1", "--no_search",
                       "--gin.BATCH_SIZE=65536", "--gin.model.remat=none", "--gin.model.layers=2"])
    told = capsys.readouterr()
    assert status == 1 and told.err.endswith("error: the run does not fit v5e-1.\n")
    assert "The train step does not fit: " in told.out and "15.75G" in told.out


@pytest.mark.parametrize(("flags", "words"), [
    (["--topology=v4-129"], "nearest: v4-128"),
    (["--topology=gpu:2"], "--topology=gpu:2 needs the memory of a card"),
    (["--topology=v4-8", "--compare=--model.remat=full"], "unknown argument --model.remat=full"),
    (["--topology=v4-8", "--compare=--gin.A='b"], "--compare=--gin.A='b cannot be read (No closing quotation)"),
    (["--topology=v4-8", "--vocabulary_size=0"], "--vocabulary_size must be positive"),
    (["--topology=v4-8", "--report=nowhere/page.md"], "nowhere/page.md cannot be written"),
    (["--topology=v4-8", "--gin_file=gin/tune_mixed.gin"], "TASK_FEATURE_LENGTHS"),
    (["--topolgy=v4-8", "--topology=v4-8"], "nearest: --topology"),
])
def test_mistakes_are_told_in_one_line(flags, words, capsys):
    files = [] if any("--gin_file" in flag for flag in flags) else ["--gin_file=gin/mixed_pretrain.gin"]
    assert cli.main(["precompile", *files, *flags]) == 1
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1, told


@pytest.mark.parametrize(("message", "refusal"), [
    ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (50.25G) exceeds "
     "available HBM (30.75G).", "Ran out of memory on HBM, the total memory required for HLO temporaries (50.25G) "
     "exceeds available HBM (30.75G)"),
    ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 35.8G of 30.7G hbm. Exceeded hbm capacity by "
     "5.1G.\n\nTotal hbm usage >= 36.3G:\n    reserved 530M", "Ran out of memory in memory space hbm. Used 35.8G of "
     "30.7G hbm. Exceeded hbm capacity by 5.1G"),
])
def test_a_refusal_gives_the_reason_and_no_table(message, refusal):
    assert programs._refusal(message) == refusal


# Searching, with a compiler whose memory is known.


def stand_in(training: Training, topology: Topology, fixed: float = 4.0, a_row: float = 0.25) -> Outcome:
    """Needs `fixed` GiB and `a_row` for each row of a device's microbatch; a quarter of that under remat "full"."""
    devices = np.array(jax.devices()[:4]).reshape(training.mesh.sizes(4))
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "model"))
    config = training.model(vocabulary_size=128, length=8)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = training.batch_size / shards / training.microbatches
    if rows % 1:
        raise ValueError("does not divide")
    temporaries = rows * a_row * (0.25 if config.remat == "full" else 1)
    fits = fixed + temporaries <= topology.chip.memory_gib
    memory = Memory(int(fixed * GIB), int(temporaries * GIB), 0, int((fixed + temporaries) * GIB))
    return Outcome("train step", training, topology, mesh, config, training.batch_size, memory if fits else None,
                   "" if fits else "too large", [], 0, 0.0)


@pytest.mark.parametrize("batch_size", [4, 64, 120])
def test_the_largest_batch_is_found_to_an_eighth(batch_size, monkeypatch, make_training):
    """15.75 - 4 GiB hold 47 rows on each of four devices."""
    monkeypatch.setattr(precompile, "compile_train_step", stand_in)
    outcome = stand_in(make_training(batch_size=batch_size, mesh=MeshShape(fsdp=-1, data=1)), parse_topology("v5e-4"))
    told: list[str] = []
    fitting, refused = precompile.largest_batch(outcome, told.append)
    assert fitting <= 47 * 4 < refused <= fitting + max(4, fitting // 8)
    assert told and all(line.startswith("batch of ") for line in told)


def test_changes_are_tried_cheapest_first(monkeypatch, make_training):
    monkeypatch.setattr(precompile, "compile_train_step", stand_in)
    monkeypatch.setattr(precompile, "bytes_per_device", lambda tree: 0)
    monkeypatch.setattr(precompile, "lay_out", lambda training, topology: (None, None, SimpleNamespace(params=()), 0))
    model = functools.partial(make_training().model, remat="dots")
    training = make_training(batch_size=512, model=model, mesh=MeshShape(fsdp=-1, data=1))
    refused = stand_in(training, parse_topology("v5e-4"))
    assert refused.memory is None
    told: list[str] = []
    found = precompile.cheapest_changes(refused, told.append)
    assert told == ["--gin.model.remat=attention: does not fit", "--gin.model.remat=full: 12.00 GiB, 0 s to compile",
                    "--gin.model.remat=offload: does not fit", "--gin.train.microbatches=2: does not fit",
                    "--gin.train.microbatches=4: 12.00 GiB, 0 s to compile"]
    assert [flags for flags, _ in found] == ["--gin.model.remat=full", "--gin.train.microbatches=4"]
    assert all(outcome.memory is not None for _, outcome in found)


def test_two_configurations_in_one_table(monkeypatch, make_training):
    """8 rows of 32 tokens on four devices; the clock, the links and the peak are a v5e's."""
    monkeypatch.setitem(PEAK_FLOPS, "cpu", 197e12)
    parts = {"dots": (Part(1, 1.5e9, 0.0, 0.0, 0.0),), "full": (Part(2, 1.5e9, 0.0, 0.0, 0.0),)}
    traffic = [Traffic("all-gather", ("fsdp",), 1, GIB, GIB / 4)]

    def compiled(training, topology):
        found = stand_in(training, topology)
        return found._replace(parts=parts[found.config.remat], traffic=traffic)

    monkeypatch.setattr(precompile, "compile_train_step", compiled)
    monkeypatch.setattr(precompile, "replicated_leaves", lambda training, topology: [])
    mesh = MeshShape(fsdp=-1, data=1)
    dots, full = (make_training(mesh=mesh, model=functools.partial(make_training().model, remat=remat))
                  for remat in ("dots", "full"))
    fits, page = precompile.precompile(dots, parse_topology("v5e-4"), search=False, report=lambda line: None,
                                       other=("--gin.model.remat=full", full))
    rows = {cells[0]: cells[1:] for line in page.splitlines()
            if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 4}
    assert fits and rows["train step"] == ["this run", "with `--gin.model.remat=full`", "second / first"]
    assert rows["peak, GiB per device"] == ["4.500", "4.125", "0.92"]
    assert rows["of that asynchronous, GiB"] == ["0.250", "0.250", "1.00"]
    assert rows["estimated step, s"] == ["1.000", "2.000", "2.00"]
    assert rows["tokens/s per device"] == ["64.000", "32.000", "0.50"]
    assert "By this estimate (not a measurement), 64 tokens/s per device" in page and "- compiled by jax " in page
    huge = dataclasses.replace(full, batch_size=4096)
    _, page = precompile.precompile(dots, parse_topology("v5e-4"), search=False, report=lambda line: None,
                                    other=("--gin.BATCH_SIZE=4096", huge))
    assert "| estimated step, s | 1.000 | does not fit |  |" in page


@pytest.mark.slow
def test_cards_are_judged_by_their_memory(make_training):
    """Compiled for two of the host's devices. By hand: parameters and two moments, of which the mesh splits all but the
    biases of projections and the norms' scales, and the batch's five arrays."""
    training = make_training(mesh=MeshShape(fsdp=-1, data=1))
    found = compile_train_step(training, with_memory("gpu:2", "80GiB"))
    state = programs.lay_out(training, found.topology).state
    assert found.memory is not None and found.memory.peak > bytes_per_device(state)
    assert found.memory.arguments == bytes_per_device(state) + len(Batch._fields) * 4 * 32 * 4
    parts = parameter_count(found.config) * 4 / 2
    assert 3 * parts < bytes_per_device(state) < 3.1 * parts
    few = with_memory("gpu:2", f"{found.memory.peak / GIB / 2}GiB")
    refused = compile_train_step(training, few)
    assert refused.memory is None and "it takes about" in refused.refusal
    fits, page = precompile.precompile(training, few, search=False, report=lambda line: None)
    assert not fits and "on gpu:2" in page and "- 2 cards; mesh data 1 x fsdp 2 x model 1" in page
    assert "By calculation, which gives the peak above and decides" in page and "All are estimates." in page


def test_topologies_in_words():
    assert [precompile.chips_of(parse_topology(name)) for name in ("v4-128", "2xv5e-256", "v5e-1", "v3-8")] == [
        "64 chips, 4 x 4 x 4", "512 chips, 2 slices of 16 x 16", "1 chip, 1 x 1", "4 chips, 2 x 2, 2 devices each"]


def test_every_change_is_what_its_flags_say(make_training):
    """Flags are read back as a user would give them, and must make the same run."""
    heads = functools.partial(make_training().model, heads=8)
    training = make_training(batch_size=64, mesh=MeshShape(data=2, fsdp=-1), model=heads)
    outcome = stand_in(training, parse_topology("v5e-4"))
    seen = set()
    for flags, changed, topology in precompile.changes(outcome):
        for flag in flags.split():
            name, value = flag.removeprefix("--").split("=")
            seen.add(name)
            found = {
                "gin.mesh.data": changed.mesh.data, "gin.mesh.fsdp": changed.mesh.fsdp,
                "gin.mesh.model": changed.mesh.model, "gin.train.microbatches": changed.microbatches,
                "gin.model.remat": changed.model(vocabulary_size=8, length=8).remat,
                "gin.BATCH_SIZE": changed.batch_size, "topology": topology.name}[name]
            assert str(found) == value
    assert seen == {"gin.mesh.data", "gin.mesh.fsdp", "gin.mesh.model", "gin.train.microbatches", "gin.model.remat",
                    "gin.BATCH_SIZE", "topology"}


# Laying out.


def test_slices_are_joined_along_data(make_training):
    two = parse_topology("2xv5e-256")
    joined = with_slices(make_training(mesh=MeshShape(data=1, fsdp=-1)), two).mesh
    assert (joined.data, joined.fsdp, joined.slices) == (2, -1, 2)
    chosen = with_slices(make_training(mesh=MeshShape(data=8, fsdp=-1, slices=2)), two).mesh
    assert (chosen.data, chosen.slices) == (8, 2)


def test_a_vocabulary_is_padded_as_one_that_is_read(make_training):
    assert [with_vocabulary_size(make_training(), pieces).vocabulary.size for pieces in (40_000, 130_344, 128)] == [
        40_064, 130_432, 128]


def test_leaves_that_are_whole_though_an_axis_divides_them(monkeypatch, make_training):
    """On a mesh of eight host devices; by hand: of a block all biases split along heads or the MLP are whole."""
    monkeypatch.setattr(programs, "compile_only_devices", lambda topology: jax.devices())
    training = make_training(mesh=MeshShape(data=2, fsdp=4))
    leaves = {name: row for name, *row in replicated_leaves(training, parse_topology("v5e-8"))}
    assert set(leaves) == {
        f"{block}/{name}_bias" for block in ("blocks", "query_block")
        for name in ("attention/query", "attention/key", "attention/value", "feedforward/up")}
    # [2 layers, 64] float32, and Adam's two moments of it
    assert leaves["blocks/feedforward/up_bias"] == [(2, 64), "fsdp", 3, 3 * 2 * 64 * 4]
    assert replicated_leaves(make_training(mesh=MeshShape()), parse_topology("v5e-8")) == []
