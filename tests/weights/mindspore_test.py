"""MindSpore's checkpoints, written by protobuf from a schema declared here: joined from ranks, truncated, random."""

import dataclasses
import json
import math
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import optax
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codellm_jax.model.config import DecoderConfig
from codellm_jax.model.decoder import Decoder
from codellm_jax.runtime.checkpoints import restore_parameters
from codellm_jax.runtime.partitioning import MeshShape, make_mesh
from codellm_jax.runtime.state import abstract_state
from codellm_jax.weights.importing import import_run
from codellm_jax.weights.layouts import decoder_values, matched
from codellm_jax.weights.mindspore import open_mindspore
from codellm_jax.weights.wire import layouts, stored_tensors

VOCABULARY_FILE = str(Path(__file__).parents[2] / "codellm_jax/vocabularies/python_8k.model")
HIDDEN, HEADS, VOCABULARY, LENGTH, LAYERS, WIDE = 8, 2, 24, 12, 3, 16

# Message -> (name, number, type, repeated); a type is a scalar's or a message's.
SCHEMA: dict[str, list[tuple[str, int, str, bool]]] = {
    "TensorProto": [("dims", 1, "int64", True), ("tensor_type", 2, "string", False),
                    ("tensor_content", 3, "bytes", False)],
    "MapTensorProto": [("tensor", 1, "TensorProto", True)],
    "Value": [("tag", 1, "string", False), ("tensor", 2, "TensorProto", False),
              ("maptensor", 3, "MapTensorProto", False)],
    "Checkpoint": [("value", 1, "Value", True)],
    "Uints": [("dim", 1, "uint32", True)],
    "Ints": [("dim", 1, "int32", True)],
    "Longs": [("dim", 1, "int64", True)],
    "ParallelLayouts": [("dev_matrix", 1, "Uints", True), ("tensor_map", 2, "Ints", True),
                        ("param_split_shape", 3, "Longs", True), ("indices_offset", 4, "Longs", True),
                        ("field", 5, "int32", False), ("opt_weight_shard_step", 6, "int32", False),
                        ("opt_weight_shard_size", 7, "int32", False)],
    "ParallelLayoutItem": [("param_name", 1, "string", False), ("parallel_layouts", 2, "ParallelLayouts", False)],
    "ParallelStrategys": [("stage", 1, "uint32", False), ("parallel_strategy", 2, "Uints", True)],
    "ParallelStrategyItem": [("node_name", 1, "string", False),
                             ("parallel_strategys", 2, "ParallelStrategys", False)],
    "ParallelStrategyMap": [("current_stage", 1, "uint32", False),
                            ("parallel_strategy_item", 2, "ParallelStrategyItem", True),
                            ("parallel_layout_item", 3, "ParallelLayoutItem", True)],
}


def _messages() -> dict[str, Any]:
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="mindspore_test.proto", package="test", syntax="proto2")
    for message, fields in SCHEMA.items():
        made = file.message_type.add(name=message)
        for name, number, kind, repeated in fields:
            field = made.field.add(name=name, number=number,
                                   label=kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL)
            field.type = kinds.TYPE_MESSAGE if kind in SCHEMA else getattr(kinds, f"TYPE_{kind.upper()}")
            if kind in SCHEMA:
                field.type_name = f".test.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"test.{name}")) for name in SCHEMA}


MESSAGES = _messages()
TYPES = {"float32": "Float32", "float16": "Float16", "bfloat16": "BFloat16", "int32": "Int32"}


def checkpoint(tensors: Mapping[str, np.ndarray], most: int = 1 << 20) -> bytes:
    """A checkpoint as MindSpore writes it: one message a piece, of at most so many bytes, one behind the other."""
    written = b""
    for tag, array in tensors.items():
        for piece in np.array_split(array.reshape(-1), math.ceil(array.nbytes / most)):
            whole = MESSAGES["Checkpoint"]()
            value = whole.value.add(tag=tag)
            value.tensor.dims.extend(array.shape or [0])
            value.tensor.tensor_type = TYPES[str(array.dtype)]
            value.tensor.tensor_content = piece.tobytes()
            written += whole.SerializeToString()
    return written


@dataclasses.dataclass(frozen=True)
class Slicing:
    """How a parameter is sliced, as a strategy file says it."""

    devices: list[int]
    axes: list[int]
    step: int = 0
    size: int = 0


def strategy(slicings: Mapping[str, Slicing], **changes: Any) -> bytes:
    whole = MESSAGES["ParallelStrategyMap"](current_stage=1)
    node = whole.parallel_strategy_item.add(node_name="Default/network/MatMul-op1")
    node.parallel_strategys.stage = 0
    node.parallel_strategys.parallel_strategy.add(dim=[1, 2])
    for name, slicing in slicings.items():
        item = whole.parallel_layout_item.add(param_name=name)
        item.parallel_layouts.dev_matrix.add(dim=slicing.devices)
        item.parallel_layouts.tensor_map.add(dim=slicing.axes)
        item.parallel_layouts.param_split_shape.add(dim=changes.get("uneven", []))
        item.parallel_layouts.indices_offset.add()
        item.parallel_layouts.field = changes.get("field", 0)
        item.parallel_layouts.opt_weight_shard_step = slicing.step
        item.parallel_layouts.opt_weight_shard_size = slicing.size
    return whole.SerializeToString()


def part_of(array: np.ndarray, slicing: Slicing | None, rank: int) -> np.ndarray:
    """What a rank has of a parameter, by np.split alone."""
    if slicing is None:
        return array
    turn = np.unravel_index(rank, slicing.devices)
    for axis, device_axis in enumerate(slicing.axes):
        if device_axis >= 0:
            place = len(slicing.devices) - 1 - device_axis
            array = np.split(array, slicing.devices[place], axis)[turn[place]]
    if slicing.step:
        size = slicing.size if slicing.size > 0 else math.prod(slicing.devices) // slicing.step
        array = np.split(array, size)[rank // slicing.step % size]
    return array


# The two ways to name parameters, with what stands in the names' places.
OLD = {"word": "embedding_table", "position": "backbone.embedding.embedding.position_embedding.embedding_table",
       "query": "backbone.embedding_table", "mapped": "mapping_"}
NEW = {"word": "backbone.embedding.word_embedding.embedding_table",
       "position": "backbone.embedding.position_embedding.embedding_table",
       "query": "backbone.top_query_embedding.embedding_table", "mapped": ""}


def pangu(names: Mapping[str, str] = NEW, dtype: Any = np.float32, hidden: int = HIDDEN) -> dict[str, np.ndarray]:
    """A small PanGu-alpha with random numbers; kernels are [out, in] in dense1, dense2, dense3, else [in, out]."""
    shapes = {names["word"]: (VOCABULARY, hidden), names["position"]: (LENGTH, hidden),
              names["query"]: (LENGTH, hidden), "backbone.layernorm.gamma": (hidden,),
              "backbone.layernorm.beta": (hidden,)}
    for block in [*(f"backbone.blocks.{number}" for number in range(LAYERS - 1)), "backbone.top_query_layer"]:
        for norm in ("layernorm1", "layernorm2"):
            shapes |= {f"{block}.{norm}.gamma": (hidden,), f"{block}.{norm}.beta": (hidden,)}
        for number in (1, 2, 3):
            shapes |= {f"{block}.attention.dense{number}.weight": (hidden, hidden),
                       f"{block}.attention.dense{number}.bias": (hidden,)}
        mapped = f"{names['mapped']}weight", f"{names['mapped']}bias"
        for name, into, out in (("attention.projection", hidden, hidden), ("output.mapping", hidden, WIDE),
                                ("output.projection", WIDE, hidden)):
            shapes |= {f"{block}.{name}.{mapped[0]}": (into, out), f"{block}.{name}.{mapped[1]}": (out,)}
    dice = np.random.default_rng(0)
    return {name: (dice.normal(size=shape) * 0.3 + (name.endswith("gamma"))).astype(dtype)
            for name, shape in shapes.items()}


def published(tensors: Mapping[str, np.ndarray], names: Mapping[str, str] = NEW) -> dict[str, np.ndarray]:
    """gpt_pangu's names, written out by hand."""
    found = {"transformer.wte.weight": tensors[names["word"]], "transformer.wpe.weight": tensors[names["position"]],
             "transformer.wqe.weight": tensors[names["query"]],
             "transformer.ln_f.weight": tensors["backbone.layernorm.gamma"],
             "transformer.ln_f.bias": tensors["backbone.layernorm.beta"]}
    for number in range(LAYERS):
        ours = f"transformer.h.{number}"
        theirs = f"backbone.blocks.{number}" if number < LAYERS - 1 else "backbone.top_query_layer"
        for norm in "12":
            found[f"{ours}.ln_{norm}.weight"] = tensors[f"{theirs}.layernorm{norm}.gamma"]
            found[f"{ours}.ln_{norm}.bias"] = tensors[f"{theirs}.layernorm{norm}.beta"]
        for name, dense in (("q", "1"), ("k", "2"), ("v", "3")):
            found[f"{ours}.attn.{name}_proj.weight"] = tensors[f"{theirs}.attention.dense{dense}.weight"]
            found[f"{ours}.attn.{name}_proj.bias"] = tensors[f"{theirs}.attention.dense{dense}.bias"]
        for name, mapping in (("attn.c_proj", "attention.projection"), ("mlp.c_fc", "output.mapping"),
                              ("mlp.c_proj", "output.projection")):
            found[f"{ours}.{name}.weight"] = tensors[f"{theirs}.{mapping}.{names['mapped']}weight"].T
            found[f"{ours}.{name}.bias"] = tensors[f"{theirs}.{mapping}.{names['mapped']}bias"]
    return found


def write(folder: Path, files: Mapping[str, bytes]) -> str:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps({"num_heads": HEADS}))
    return str(folder)


def require_equal(source: str, expected: Mapping[str, np.ndarray]) -> None:
    _, tensors = open_mindspore(source)
    assert tensors.shapes == {name: array.shape for name, array in expected.items()}
    for name, array in expected.items():
        assert tensors.dtypes[name] == array.dtype.name
        assert np.array_equal(tensors.read(name), array), name


# ---- Whole -------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [OLD, NEW])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_one_file(tmp_path: Path, names: Mapping[str, str], dtype: Any):
    tensors = pangu(names, dtype)
    source = write(tmp_path, {"pangu.ckpt": checkpoint(tensors)})
    require_equal(source, published(tensors, names))


def test_what_the_configuration_is(tmp_path: Path):
    facts, tensors = open_mindspore(write(tmp_path, {"pangu.ckpt": checkpoint(pangu())}))
    assert facts == {
        "model_type": "gpt_pangu", "architectures": ["GPTPanguForCausalLM"], "vocab_size": VOCABULARY,
        "max_position_embeddings": LENGTH, "hidden_size": HIDDEN, "num_layers": LAYERS, "num_heads": HEADS,
        "intermediate_size": WIDE, "layer_norm_epsilon": 1e-5, "activation_function": "quick_gelu",
        "tie_word_embeddings": True, "left_out": 0}
    assert tensors.files == ("pangu.ckpt",)


def test_the_first_code_has_another_activation(tmp_path: Path):
    source = write(tmp_path, {"pangu.ckpt": checkpoint(pangu(OLD))})
    assert open_mindspore(source)[0]["activation_function"] == "gelu_new"
    (tmp_path / "config.json").write_text('{"num_heads": 4, "activation_function": "gelu"}')
    facts, _ = open_mindspore(source)
    assert (facts["num_heads"], facts["activation_function"]) == (4, "gelu")


def test_a_configuration_that_is_none(tmp_path: Path):
    source = write(tmp_path, {"pangu.ckpt": checkpoint(pangu())})
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json holds no JSON object"):
        open_mindspore(source)


def test_known_sizes_need_no_configuration(tmp_path: Path):
    large = {name: array for name, array in pangu(hidden=1024).items() if "attention" not in name}
    (tmp_path / "pangu.ckpt").write_bytes(checkpoint(large))
    assert open_mindspore(str(tmp_path))[0]["num_heads"] == 16
    (tmp_path / "pangu.ckpt").write_bytes(checkpoint(pangu()))
    with pytest.raises(ValueError, match=r'how many heads .* 8; write {"num_heads": ...} into .*config.json'):
        open_mindspore(str(tmp_path))


def test_a_tensor_in_several_pieces(tmp_path: Path):
    tensors = pangu()
    source = write(tmp_path, {"pangu.ckpt": checkpoint(tensors, most=37)})
    require_equal(source, published(tensors))
    _, found = open_mindspore(source)
    whole = tensors[NEW["word"]]
    for start in range(VOCABULARY):
        for stop in (start, start + 1, VOCABULARY):
            assert np.array_equal(found.read("transformer.wte.weight", slice(start, stop)), whole[start:stop])


def test_what_is_no_parameter_is_left_out(tmp_path: Path):
    tensors = pangu()
    states = ("adam_m", "adam_v", "accu_grads")
    others = {f"{state}.{name}": array for state in states for name, array in tensors.items()}
    others |= {"global_step": np.array([7], np.int32), "scale_sense": np.array(1.0, np.float32),
               "backbone.blocks.0.key_past": np.zeros((1, 2), np.float16)}
    source = write(tmp_path, {"pangu.ckpt": checkpoint(others | tensors)})
    require_equal(source, published(tensors))
    assert open_mindspore(source)[0]["left_out"] == len(others)


def test_a_checksum_at_the_end_is_passed_over(tmp_path: Path):
    tensors = pangu()
    require_equal(write(tmp_path, {"pangu.ckpt": checkpoint(tensors) + b"crc_num" + bytes(10)}), published(tensors))


def test_what_is_unknown_keeps_its_name(tmp_path: Path):
    source = write(tmp_path, {"pangu.ckpt": checkpoint(pangu() | {"backbone.adapter.weight": np.ones(3, np.float32)})})
    facts, tensors = open_mindspore(source)
    with pytest.raises(ValueError, match=r"backbone.adapter.weight \[3\] is left over"):
        matched(facts, DecoderConfig(**decoder_values(facts)), tensors.shapes)


# ---- Of several ranks --------------------------------------------------------------------------

SHARDED = ("attention.dense1.weight", "attention.dense2.weight", "attention.dense3.weight", "output.mapping.weight",
           "output.projection.weight", "attention.projection.weight")


def megatron(devices: list[int], name: str, optimizer: int = 0) -> Slicing:
    """The slicing of the released code: the last axis of the devices is the model's, kernels are sliced where they
    give, and then where they take.
    """
    axes = [-1, -1]
    if name.endswith(("dense1.weight", "dense2.weight", "dense3.weight", "output.projection.weight",
                      "attention.projection.weight")) or name == NEW["word"]:
        axes = [0, -1]
    elif name.endswith("output.mapping.weight"):
        axes = [-1, 0]
    elif name.endswith(("dense1.bias", "dense2.bias", "dense3.bias", "output.mapping.bias")):
        axes = [0]
    elif name.endswith(("bias", "gamma", "beta")):
        axes = [-1]
    sharded = optimizer and name.endswith(SHARDED)
    step = math.prod(devices[-1 - axis] for axis in axes if axis >= 0)
    return Slicing(devices, axes, step if sharded else 0, optimizer if sharded else 0)


CASES: dict[str, Callable[[str], Slicing]] = {
    "2 ranks": lambda name: megatron([2], name),
    "4 ranks": lambda name: megatron([4], name),
    "copies": lambda name: megatron([2, 2], name),
    "optimizer's shards": lambda name: megatron([2, 2], name, 2),
    "all optimizer's shards": lambda name: megatron([2, 2], name, -1),
    "shards and copies": lambda name: megatron([4, 2], name, 2),
    "both axes": lambda name: Slicing([2, 2], [1, 0]) if name.endswith(SHARDED) else megatron([2, 2], name),
    "both axes turned": lambda name: Slicing([2, 2], [0, 1]) if name.endswith(SHARDED) else megatron([2, 2], name),
    "first axis of the devices": lambda name: Slicing([2, 4], [1, -1]) if name.endswith(SHARDED)
    else megatron([2, 4], name),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("case", CASES)
def test_ranks_are_joined(tmp_path: Path, case: str, dtype: Any):
    tensors = pangu(dtype=dtype)
    slicings = {name: CASES[case](name) for name in tensors}
    ranks = math.prod(slicings[NEW["word"]].devices)
    files = {f"filtered_{rank}.ckpt": checkpoint(
        {name: part_of(array, slicings[name], rank) for name, array in tensors.items()}) for rank in range(ranks)}
    source = write(tmp_path, files | {"strategy.ckpt": strategy(slicings)})
    require_equal(source, published(tensors))
    _, found = open_mindspore(source)
    for name, index in (("transformer.wte.weight", slice(5, 17)), ("transformer.h.0.mlp.c_fc.weight", slice(3, 13)),
                        ("transformer.h.2.mlp.c_proj.weight", slice(1, 2)), ("transformer.wpe.weight", slice(4, 4)),
                        ("transformer.h.1.attn.q_proj.bias", slice(2, -1))):
        assert np.array_equal(found.read(name, index), published(tensors)[name][index]), name


def test_the_release_has_folders_and_embeddings_beside(tmp_path: Path):
    tensors = pangu(OLD)
    slicings = {name: megatron([2, 2], name) for name in tensors}
    embeddings = {"word_embedding": OLD["word"], "position_embedding": OLD["position"],
                  "top_query_embedding": OLD["query"]}
    parts = {f"ckpts/rank_{rank}/pangu-100_2.ckpt": checkpoint(
        {name: part_of(array, slicings[name], rank) for name, array in tensors.items()
         if name not in embeddings.values()}) for rank in range(4)}
    source = write(tmp_path, parts | {"strategy_load_ckpt/pangu.ckpt": strategy(slicings)})
    for file, name in embeddings.items():
        np.save(tmp_path / f"ckpts/2.6B_{file}.npy", tensors[name])
    require_equal(source, published(tensors, OLD))
    assert len(open_mindspore(source)[1].files) == 4 + 1 + 3


def test_shards_that_were_joined_before_they_were_saved(tmp_path: Path):
    tensors = pangu()
    slicings = {name: megatron([2, 2], name, 2) for name in tensors}
    saved = {name: dataclasses.replace(slicing, step=0) for name, slicing in slicings.items()}
    files = {f"rank_{rank}.ckpt": checkpoint({name: part_of(array, saved[name], rank)
                                              for name, array in tensors.items()}) for rank in range(4)}
    require_equal(write(tmp_path, files | {"strategy.ckpt": strategy(slicings)}), published(tensors))


def test_copies_of_ranks_may_be_missing(tmp_path: Path):
    tensors = pangu()
    slicings = {name: megatron([2, 2], name) for name in tensors}
    files = {f"rank_{rank}.ckpt": checkpoint({name: part_of(array, slicings[name], rank)
                                              for name, array in tensors.items()}) for rank in (0, 3)}
    source = write(tmp_path, files | {"strategy.ckpt": strategy(slicings)})
    require_equal(source, published(tensors))
    (tmp_path / "rank_3.ckpt").rename(tmp_path / "rank_2.ckpt")
    with pytest.raises(ValueError, match="has 2 parts, but only 1 are here: the file of rank 1 is missing"):
        open_mindspore(source)


def test_a_strategy_beside_what_was_joined_before(tmp_path: Path):
    tensors = pangu()
    slicings = {name: megatron([4], name) for name in tensors}
    require_equal(write(tmp_path, {"pangu.ckpt": checkpoint(tensors), "strategy.ckpt": strategy(slicings)}),
                  published(tensors))
    part = {name: part_of(array, slicings[name], 0) for name, array in tensors.items()}
    with pytest.raises(ValueError, match="but only 1 are here: the file of rank 1 is missing"):
        open_mindspore(write(tmp_path, {"pangu.ckpt": checkpoint(part)}))


def test_what_cannot_be_joined(tmp_path: Path):
    tensors = pangu()
    slicings = {name: megatron([2], name) for name in tensors}
    parts = [checkpoint({name: part_of(array, slicings[name], rank) for name, array in tensors.items()})
             for rank in range(2)]
    source = write(tmp_path, {"a_0.ckpt": parts[0], "a_1.ckpt": parts[1]})
    with pytest.raises(ValueError, match="of 2 ranks but no strategy file"):
        open_mindspore(source)
    for content, line in (
            (strategy({f"1-{name}": slicing for name, slicing in slicings.items()}), "in pipeline stages"),
            (strategy(slicings, uneven=[3, 5]), "unevenly"), (strategy(slicings, field=3), "unevenly"),
            (strategy({"other": Slicing([2], [0])}), "belongs to another model"),
            (strategy({name: Slicing([2], [0, 0, 0]) for name in slicings}), "3 axes"),
            (strategy({name: Slicing([2], [1, -1]) for name in slicings}), "is damaged"),
            (strategy({name: Slicing([1], slicing.axes) for name, slicing in slicings.items()}), "does not fit the"),
            (strategy({}), "slices no parameter"), (b"", "slices no parameter"), (b"\x1a\xff", "damaged or truncated")):
        write(tmp_path, {"strategy.ckpt": content})
        with pytest.raises(ValueError, match=line) as raised:
            open_mindspore(source)
        assert "\n" not in str(raised.value)
    write(tmp_path, {"strategy.ckpt": strategy(slicings), "b_1.ckpt": parts[1]})
    with pytest.raises(ValueError, match="a_1.ckpt and .*b_1.ckpt both belong to rank 1"):
        open_mindspore(source)
    (tmp_path / "b_1.ckpt").rename(tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="b.ckpt does not contain its rank"):
        open_mindspore(source)


# ---- Other models, and damaged files -----------------------------------------------


def test_other_models_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="holds no MindSpore checkpoint"):
        open_mindspore(write(tmp_path, {}))
    with pytest.raises(ValueError, match="is not a PanGu-alpha: it has no table wte, wpe, wqe"):
        open_mindspore(write(tmp_path, {"m.ckpt": checkpoint({"conv1.weight": np.ones((2, 2), np.float32)})}))
    staged = {name.replace("top_query_layer", f"blocks.{LAYERS - 1}"): array for name, array in pangu().items()}
    with pytest.raises(ValueError, match="no top_query_layer, like models trained in pipeline stages"):
        open_mindspore(write(tmp_path, {"m.ckpt": checkpoint(staged)}))
    for content in (b"PK\x03\x04" + bytes(40), b"version https://git-lfs.github.com/spec/v1\n", b"", b"\x0a\x00"):
        with pytest.raises(ValueError, match="m.ckpt .*not a MindSpore checkpoint"):
            open_mindspore(write(tmp_path, {"m.ckpt": content}))


def test_truncated_anywhere(tmp_path: Path):
    tensors = {name: array for name, array in pangu().items() if "blocks" not in name and "query_layer" not in name}
    whole = checkpoint(tensors)
    ends = [0]
    for name, array in tensors.items():
        ends.append(ends[-1] + len(checkpoint({name: array})))
    file = tmp_path / "m.ckpt"
    for length in {*range(200), *range(0, len(whole), 7), *ends[1:], *(end - 1 for end in ends[1:])}:
        file.write_bytes(whole[:length])
        if length in ends[1:]:  # whole tensors are missing, which the names tell
            assert len(stored_tensors(str(file))) == ends.index(length)
            continue
        with pytest.raises(ValueError, match="m.ckpt") as raised:
            stored_tensors(str(file))
        assert "\n" not in str(raised.value)


def test_a_file_that_becomes_shorter(tmp_path: Path):
    source = write(tmp_path, {"pangu.ckpt": checkpoint(pangu())})
    _, tensors = open_mindspore(source)
    with (tmp_path / "pangu.ckpt").open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(OSError, match="pangu.ckpt ends within a tensor"):
        for name in tensors.shapes:
            tensors.read(name)


def _tensor(**changes: Any) -> bytes:
    whole = MESSAGES["Checkpoint"]()
    value = whole.value.add(tag=changes.get("tag", "a"))
    value.tensor.dims.extend(changes.get("dims", [2]))
    value.tensor.tensor_type = changes.get("tensor_type", "Float32")
    value.tensor.tensor_content = changes.get("content", bytes(8))
    return whole.SerializeToString()


MALICIOUS = {
    "dims of the size of the world": _tensor(dims=[1 << 62]),
    "dims whose product is small again": _tensor(dims=[1 << 32, 1 << 32, 2]),
    "a negative dim": _tensor(dims=[-1, -2]), "a dim of nothing": _tensor(dims=[0, 3], content=b""),
    "many dims": _tensor(dims=[1] * 2000 + [2]), "too few bytes": _tensor(content=bytes(7)),
    "too many bytes": _tensor(content=bytes(9)), "another shape": _tensor() + _tensor(dims=[3]),
    "another type": _tensor() + _tensor(tensor_type="Float16"), "a long tag": _tensor(tag="a" * 5000),
    "a length beyond the file": b"\x0a\xff\xff\xff\xff\x7f" + bytes(20),
    "a varint without an end": b"\x0a" + b"\xff" * 30, "a varint of eleven bytes": b"\x0a" + b"\x80" * 10 + b"\x00",
    "a varint of 70 bits": b"\x08" + b"\xff" * 9 + b"\x7f", "a group": b"\x0b" + bytes(4), "a number": b"\x08\x01",
    "field 0": b"\x02\x00", "fixed bytes": b"\x09" + bytes(8), "a tag alone": b"\x0a\x03\x0a\x01a",
    "a tensor alone": b"\x0a\x02\x12\x00", "a tag that is a number": b"\x0a\x02\x08\x01",
    "a tag that is no text": b"\x0a\x03\x0a\x01\xff",
    "a map": MESSAGES["Checkpoint"](value=[{"tag": "a", "maptensor": {}}]).SerializeToString(),
}


@pytest.mark.parametrize("case", MALICIOUS)
def test_malicious_files(tmp_path: Path, case: str):
    file = tmp_path / "m.ckpt"
    file.write_bytes(MALICIOUS[case])
    with pytest.raises(ValueError, match="m.ckpt") as raised:
        stored_tensors(str(file))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.binary(max_size=300), at=st.floats(0, 1), kept=st.booleans())
def test_random_bytes_neither_crash_nor_hang_nor_allocate(tmp_path: Path, junk: bytes, at: float, kept: bool):
    """Junk by itself, or in the place of some bytes of a good file."""
    for good, read in ((checkpoint({"a": np.ones((3, 5), np.float32), "b": np.ones(4, np.float16)}), stored_tensors),
                       (strategy({"a": Slicing([2, 2], [0, -1], 2, 2)}), layouts)):
        begin = int(at * len(good))
        content = good[:begin] + junk[:8] + good[begin + len(junk[:8]):] if kept else junk
        file = tmp_path / "m.ckpt"
        file.write_bytes(content)
        tracemalloc.start()
        try:
            found = read(str(file))
            for stored in found.values() if read is stored_tensors else ():
                if stored.dtype is not None:
                    stored.rows(0, stored.shape[0] if stored.shape else 0)
        except ValueError as error:
            assert "m.ckpt" in str(error)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 4 << 20


# ---- The same function -------------------------------------------------------------------------


def forward(tensors: Mapping[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """PanGu-alpha as MindSpore's code computes it, in NumPy, one sequence: logits of each position."""

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
        return x * tensors[f"{name}.gamma"] + tensors[f"{name}.beta"]

    def block(name: str, x: np.ndarray, asking: np.ndarray | None = None) -> np.ndarray:
        taken = norm(x, f"{name}.layernorm1")
        query, key, value = (
            (source @ tensors[f"{name}.attention.dense{number}.weight"].T
             + tensors[f"{name}.attention.dense{number}.bias"]).reshape(len(ids), HEADS, -1)
            for number, source in ((1, taken if asking is None else asking), (2, taken), (3, taken)))
        fourth_root = math.sqrt(math.sqrt(HIDDEN // HEADS))
        scores = np.einsum("qhk,shk->hqs", query / fourth_root, key / fourth_root)
        scores += np.where(np.tril(np.ones((len(ids), len(ids)))), 0.0, -10_000.0)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        merged = np.einsum("hqs,shk->qhk", weights, value).reshape(len(ids), HIDDEN)
        x = x + (merged @ tensors[f"{name}.attention.projection.weight"] + tensors[f"{name}.attention.projection.bias"])
        wide = norm(x, f"{name}.layernorm2") @ tensors[f"{name}.output.mapping.weight"]
        wide = wide + tensors[f"{name}.output.mapping.bias"]
        wide = wide / (1 + np.exp(-1.702 * np.abs(wide))) * np.exp(0.851 * (wide - np.abs(wide)))  # FastGelu
        return x + (wide @ tensors[f"{name}.output.projection.weight"] + tensors[f"{name}.output.projection.bias"])

    x = tensors[NEW["word"]][ids] + tensors[NEW["position"]][:len(ids)]
    for number in range(LAYERS - 1):
        x = block(f"backbone.blocks.{number}", x)
    x = norm(x, "backbone.layernorm")
    x = block("backbone.top_query_layer", x, tensors[NEW["query"]][:len(ids)])
    return x @ tensors[NEW["word"]].T


def test_an_imported_run_is_the_function_of_the_released_code(tmp_path: Path):
    dice = np.random.default_rng(2)
    tensors = pangu() | {NEW["word"]: (dice.normal(size=(8192, HIDDEN)) * 0.3).astype(np.float32)}
    slicings = {name: megatron([2, 2], name, 2) for name in tensors}
    files = {f"rank_{rank}.ckpt": checkpoint({name: part_of(array, slicings[name], rank)
                                              for name, array in tensors.items()}) for rank in range(4)}
    source = write(tmp_path / "released", files | {"strategy.ckpt": strategy(slicings)})
    imported = import_run(source, str(tmp_path / "run"), VOCABULARY_FILE)
    record = json.loads((tmp_path / "run/provenance.json").read_text())
    assert record["ledger"]["files"].keys() == {"config.json", "strategy.ckpt", *files}

    decoder, shape = Decoder(dataclasses.replace(imported.config, dtype="float32")), MeshShape(data=1)
    wanted = abstract_state(decoder, optax.identity(), make_mesh(shape, jax.devices()[:1]), shape).params
    parameters, _ = restore_parameters(str(tmp_path / "run"), wanted)
    ids = dice.integers(0, 8192, (1, LENGTH))
    positions = np.arange(LENGTH, dtype=np.int32)[None]

    @jax.jit
    def ours(parameters: Any) -> jax.Array:
        hidden = decoder.apply({"params": parameters}, ids, positions, np.ones_like(positions))
        return decoder.apply({"params": parameters}, hidden, method="logits")

    np.testing.assert_allclose(np.asarray(ours(parameters))[0], forward(tensors, ids[0]), atol=2e-4)
