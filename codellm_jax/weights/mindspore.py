"""PanGu-alpha's checkpoints from MindSpore, as gpt_pangu's tensors: one file, or one for each rank and a strategy file.

The names and orientations were taken from public code, since the tensors do not describe themselves:

  2021    mindspore, model_zoo/official/nlp/pangu_alpha and .../pangu1: backbone.word_embedding.embedding_table or
          embedding_table, backbone.blocks.L, backbone.top_query_layer, .mapping_weight; the release of the
          weights, with the three embeddings as .npy beside 512 files
  later   mindspore-ai/models, official/nlp/Pangu_alpha, with the blocks of mindformers: backbone.embedding.
          word_embedding.embedding_table, backbone.top_query_embedding.embedding_table; the study's release

  kernels     dense1, dense2, dense3 (query, key, value) are nn.Dense, and later Linear with transpose_b: [out, in], as
              published; attention.projection, output.mapping and output.projection are Mapping, later Linear with
              transpose_b=False: [in, out], and are transposed here
  scores      2021: queries times keys / sqrt(head); later: queries / head^(1/4) times keys / head^(1/4), which is the
              same function. The division by the layer's number (`coeff`) applies if `scale` is false, and no
              released code sets it so. Softmax is in float32
  activation  2021: nn.GELU, the tanh form; later: fast_gelu, x * sigmoid(1.702 x)
  norms       epsilon 1e-5. backbone.layernorm precedes the query layer; but in models trained in pipeline stages it
              follows it (`is_pipeline` in both), which is another function and is refused

Shapes do not reveal the heads: they follow from the sizes of PanGu-alpha, or from a config.json beside the checkpoint.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from codellm_jax.tokenizing import foreign
from codellm_jax.weights.reading import Tensors
from codellm_jax.weights.wire import Layout, Stored, layouts, stored_tensors

HEADS = {1024: 16, 2560: 32, 5120: 40, 16384: 128}  # hidden size -> heads, of 350M, 1.3B and 2.6B, 13B, 200B

LONGEST_HEADER = 1 << 16  # bytes of a .npy file

# Entries of checkpoints that are not parameters: optimizer state, counters, caches of keys and values.
NO_PARAMETERS = re.compile(
    r"(.*\.)?(adam_[mv]|moment[12s]|momentum|accu_grads?|optimizer)\..*|"
    r"(.*\.)?(global_step|scale_sense|current_iterator_step|last_overflow_iterator_step|epoch_num|step_num|"
    r"learning_rate|loss_scale|beta[12]_power|key_past|value_past)")
OUTSIDE = {  # suffix of a name -> the name in gpt_pangu
    r"(.*\.)?word_embedding(\.embedding)?_table|embedding_table": "transformer.wte.weight",
    r"(.*\.)?position_embedding(\.embedding)?_table": "transformer.wpe.weight",
    r"(.*\.)?(top_)?query_embedding(\.embedding)?_table|(.*\.)?backbone\.embedding_table": "transformer.wqe.weight",
    r"(.*\.)?backbone\.layernorm\.gamma": "transformer.ln_f.weight",
    r"(.*\.)?backbone\.layernorm\.beta": "transformer.ln_f.bias"}
BLOCK = re.compile(r"(?:.*\.)?(?:blocks\.(\d{1,4})|(top_query_layer))\.(.+?)\.(?:mapping_)?(weight|bias|gamma|beta)")
INSIDE = {"layernorm1": "ln_1", "layernorm2": "ln_2", "attention.dense1": "attn.q_proj",
          "attention.dense2": "attn.k_proj", "attention.dense3": "attn.v_proj", "attention.projection": "attn.c_proj",
          "output.mapping": "mlp.c_fc", "output.projection": "mlp.c_proj"}
QUERY_KERNEL = "attention.dense1.weight"  # a square matrix
IN_FIRST = ("attention.projection", "output.mapping", "output.projection")
ARRAYS = {"word_embedding": "transformer.wte.weight", "position_embedding": "transformer.wpe.weight",
          "top_query_embedding": "transformer.wqe.weight"}  # suffixes of .npy file names


@dataclass(frozen=True)
class Sliced:
    """A tensor made of parts, each with its offset, in MindSpore's layout; and whether its two axes must be swapped."""

    shape: tuple[int, ...]
    parts: tuple[tuple[tuple[int, ...], Stored], ...]
    transposed: bool = False


def _read(tensor: Sliced, dtype: np.dtype, index: slice) -> np.ndarray:
    """The rows of a tensor, as published, that a slice without steps selects."""
    ranges = [(0, size) for size in tensor.shape]
    axis = 1 if tensor.transposed else 0
    if ranges:
        ranges[axis] = index.indices(tensor.shape[axis])[:2]
    wanted = np.empty([max(stop - start, 0) for start, stop in ranges], dtype)
    for begin, stored in tensor.parts:
        both = [(max(start, first), min(stop, first + size))
                for (start, stop), first, size in zip(ranges, begin, stored.shape, strict=True)]
        if any(start >= stop for start, stop in both):
            continue
        within = [slice(start - first, stop - first) for (start, stop), first in zip(both, begin, strict=True)]
        place = [slice(start - first, stop - first) for (start, stop), (first, _) in zip(both, ranges, strict=True)]
        rows = stored.rows(within[0].start, within[0].stop) if within else stored.rows(0, 0)
        wanted[tuple(place)] = rows[(slice(None), *within[1:])] if within else rows
    return wanted.T if tensor.transposed else wanted


def open_mindspore(source: str) -> tuple[dict[str, Any], Tensors]:
    """Opens a checkpoint of PanGu-alpha; the numbers are not read yet.

    Args:
      source: a folder with a .ckpt file for each rank, in it or in its subfolders; a file or folder in it named
        ...strategy... is the strategy. It may also contain the embeddings as .npy, and a config.json whose `num_heads`
        and `activation_function` are used.

    Returns:
      The config.json of a gpt_pangu with these tensors, with `left_out`, the number of entries that are not parameters;
      and the tensors by gpt_pangu's names. Their files are named relative to the folder.

    Raises:
      ValueError: something is missing, damaged, or unsupported; the message is one line that names it.
      OSError: a file cannot be read.
    """
    folder = epath.Path(source)
    files = _found(folder, ".ckpt")
    for file in (*files, *_found(folder, ".npy")):
        foreign.require_own(file, source)
    strategies = [file for file in files if "strategy" in file.removeprefix(str(folder))]
    ranks = _by_rank([file for file in files if file not in strategies])
    if not ranks:
        raise ValueError(f"{source} holds no MindSpore checkpoint (*.ckpt).")
    slicing = _slicing(source, strategies, len(ranks))
    stored: dict[str, dict[int, Stored]] = {}
    for rank, file in ranks.items():
        for tag, tensor in stored_tensors(file).items():
            stored.setdefault(tag, {})[rank] = tensor
    left_out = [tag for tag in stored if NO_PARAMETERS.fullmatch(tag)]
    kept = {tag: by_rank for tag, by_rank in stored.items() if tag not in left_out}
    if len(ranks) > 1 and not slicing.keys() & kept.keys():
        raise ValueError(f"{strategies[0]} slices none of the checkpoints' parameters; it belongs to another model.")
    if len(ranks) == 1 and all(by_rank[0].shape[0] == by_rank[0].shape[-1] for tag, by_rank in kept.items()
                               if tag.endswith(QUERY_KERNEL) and by_rank[0].shape):
        slicing = {}  # all ranks were already joined to one file, and the strategy file remained
    gathered = _gathered(kept, slicing)
    names = {tag: _published(tag) for tag in kept}
    last = max((int(number) for number in (_block_number(tag) for tag in kept) if number is not None), default=-1) + 1
    tensors: dict[str, Sliced] = {}
    for tag, by_rank in kept.items():
        name, transposed = names[tag]
        name = name.replace("transformer.h.last.", f"transformer.h.{last}.")
        if name in tensors:
            raise ValueError(f"{source} has {name} twice, the second time as {tag}.")
        tensors[name] = _joined(tag, by_rank, slicing.get(tag), gathered, transposed)
    arrays = _arrays(_found(folder, ".npy"))
    tensors |= {name: Sliced(array.shape, (((0, 0), array),)) for name, array in arrays.items() if name not in tensors}
    facts = _facts(source, folder, tensors, list(kept), last + 1)
    facts["left_out"] = len(left_out)
    dtypes = {name: _dtype(name, tensor) for name, tensor in tensors.items()}

    def load(name: str, index: slice) -> np.ndarray:
        return _read(tensors[name], dtypes[name], index)

    used = [*ranks.values(), *strategies, *(array.file for array in arrays.values())]
    return facts, Tensors(
        {name: tensor.shape[::-1] if tensor.transposed else tensor.shape for name, tensor in tensors.items()},
        {name: dtype.name for name, dtype in dtypes.items()},
        tuple(str(epath.Path(file).relative_to(folder)) for file in used), load)


def is_mindspore(folder: str) -> bool:
    """Whether a folder or one of its subfolders contains .ckpt files, and the folder no weights in another format."""
    place = epath.Path(folder)
    return bool(_found(place, ".ckpt")) and not any(any(place.glob(other)) for other in ("*.safetensors", "*.bin"))


# ---- Files -------------------------------------------------------------------------------------


def _found(folder: epath.Path, suffix: str) -> list[str]:
    """The files of a folder and of two levels of subfolders."""
    return sorted({str(path) for depth in ("*", "*/*", "*/*/*") for path in folder.glob(depth + suffix)})


def _by_rank(files: Sequence[str]) -> dict[int, str]:
    """Rank -> file; the rank is a number after "rank" in the name of its folder or file, or at the end of the file's
    name.
    """
    if len(files) == 1:
        return {0: files[0]}
    ranks: dict[int, str] = {}
    for file in files:
        *_, parent, name = ["", *file.split("/")]
        found = (re.search(r"rank_?(\d{1,6})", parent) or re.search(r"rank_?(\d{1,6})", name)
                 or re.search(r"(\d{1,6})\.ckpt$", name))
        if not found:
            raise ValueError(f"{file} does not contain its rank; name it ..._RANK.ckpt or rank_RANK/....ckpt.")
        if int(found[1]) in ranks:
            raise ValueError(f"{ranks[int(found[1])]} and {file} both belong to rank {int(found[1])}; keep the files "
                             "of one step.")
        ranks[int(found[1])] = file
    return dict(sorted(ranks.items()))


def _slicing(source: str, strategies: Sequence[str], ranks: int) -> dict[str, Layout]:
    """Parameter -> its layout, from the strategy file; empty if one file contains everything."""
    if not strategies:
        if ranks > 1:
            raise ValueError(f"{source} holds checkpoints of {ranks} ranks but no strategy file, which is needed to "
                             "join them; put it beside them, as strategy.ckpt.")
        return {}
    found = layouts(strategies[0])
    if len(strategies) > 1 or any(re.match(r"[1-9]\d*-", name) for name in found):
        raise ValueError(f"{strategies[-1]}: this model was trained in pipeline stages, or has several strategy files. "
                         "PanGu-alpha's last norm then follows the query layer, which this decoder does not support.")
    return {name.removeprefix("0-"): layout for name, layout in found.items()}


def _arrays(files: Sequence[str]) -> dict[str, Stored]:
    """The embeddings in .npy files, by gpt_pangu's names."""
    found = {}
    for file in files:
        ending = next((ending for ending in ARRAYS if file.removesuffix(".npy").endswith(ending)), None)
        if ending is None:
            continue
        size = epath.Path(file).stat().length
        with epath.Path(file).open("rb") as opened:
            stream = io.BytesIO(opened.read(LONGEST_HEADER))
        try:
            version = np.lib.format.read_magic(stream)
            read = (np.lib.format.read_array_header_1_0 if version == (1, 0)
                    else np.lib.format.read_array_header_2_0)
            shape, by_columns, dtype = read(stream)
        except Exception as error:  # the header is an expression, whose reader raises many
            raise ValueError(f"{file} is not a NumPy array: {' '.join(str(error).split())[:200]}") from None
        begin = stream.tell()
        if (by_columns or dtype.hasobject or len(shape) != 2 or any(axis < 1 for axis in shape)
                or math.prod(shape) * dtype.itemsize != size - begin):
            raise ValueError(f"{file} does not hold a row-major table of numbers, or is truncated.")
        found[ARRAYS[ending]] = Stored(file, shape, dtype, ((begin, size - begin),))
    return found


# ---- Names and facts ---------------------------------------------------------------------------


def _block_number(tag: str) -> str | None:
    found = BLOCK.fullmatch(tag)
    return found[1] if found else None


def _published(tag: str) -> tuple[str, bool]:
    """gpt_pangu's name of a parameter, and whether it is transposed; the query layer's block is called "last". Unknown
    names are returned unchanged.
    """
    found = BLOCK.fullmatch(tag)
    if found and found[3] in INSIDE:
        kind = {"gamma": "weight", "beta": "bias"}.get(found[4], found[4])
        return (f"transformer.h.{int(found[1]) if found[1] else 'last'}.{INSIDE[found[3]]}.{kind}",
                found[3] in IN_FIRST and kind == "weight")
    return next((name for pattern, name in OUTSIDE.items() if re.fullmatch(pattern, tag)), tag), False


def _facts(source: str, folder: epath.Path, tensors: Mapping[str, Sliced], tags: Sequence[str],
           layers: int) -> dict[str, Any]:
    """The config.json of a gpt_pangu with these tensors."""
    needed = {name: tensors[f"transformer.{name}.weight"].shape if f"transformer.{name}.weight" in tensors else None
              for name in ("wte", "wpe", "wqe", "h.0.mlp.c_fc")}
    missing = [name for name, shape in needed.items() if shape is None or len(shape) != 2]
    if missing:
        raise ValueError(f"{source} is not a PanGu-alpha: it has no table {', '.join(missing)}; its names are such as "
                         f"{', '.join(tags[:3])}.")
    if not any("top_query_layer." in tag for tag in tags):
        raise ValueError(f"{source} has no top_query_layer, like models trained in pipeline stages: their last "
                         "norm follows the query layer, which this decoder does not support.")
    beside = folder / "config.json"
    given = foreign.json_object(str(beside)) if beside.exists() else {}
    (vocabulary, hidden), (length, _) = tensors["transformer.wte.weight"].shape, tensors["transformer.wpe.weight"].shape
    heads = given.get("num_heads", HEADS.get(hidden))
    if heads is None:
        raise ValueError(f"{source} does not say how many heads share its hidden size of {hidden}; write "
                         f'{{"num_heads": ...}} into {beside}.')
    later = any(re.search(r"embedding\.word_embedding", tag) for tag in tags)
    return {"model_type": "gpt_pangu", "architectures": ["GPTPanguForCausalLM"], "vocab_size": vocabulary,
            "max_position_embeddings": length, "hidden_size": hidden, "num_layers": layers, "num_heads": heads,
            "intermediate_size": tensors["transformer.h.0.mlp.c_fc.weight"].shape[1], "layer_norm_epsilon": 1e-5,
            "activation_function": given.get("activation_function", "quick_gelu" if later else "gelu_new"),
            "tie_word_embeddings": True}


def _dtype(name: str, tensor: Sliced) -> np.dtype:
    first = tensor.parts[0][1]
    if first.dtype is None or any(stored.dtype != first.dtype for _, stored in tensor.parts):
        raise ValueError(f"{first.file}: {name} has an unsupported type, or different types in the ranks' files.")
    return first.dtype


# ---- Parts -------------------------------------------------------------------------------------


def _gathered(kept: Mapping[str, Mapping[int, Stored]], slicing: Mapping[str, Layout]) -> bool:
    """Whether the optimizer's shards were joined before they were saved (optimizer_weight_shard_aggregated_save).
    Strategy files do not say; the kernels of queries, which are square, do.
    """
    for tag, by_rank in kept.items():
        layout = slicing.get(tag)
        if tag.endswith(QUERY_KERNEL) and layout and len(layout.axes) == 2:
            shape, counts = next(iter(by_rank.values())).shape, _counts(layout)
            return len(shape) == 2 and shape[0] * counts[0] == shape[1] * counts[1]
    return False


def _counts(layout: Layout) -> list[int]:
    """The number of slices along each axis."""
    return [1 if axis < 0 else layout.devices[-1 - axis] for axis in layout.axes]


def _begin(layout: Layout, rank: int, shape: tuple[int, ...], shards: int) -> tuple[int, ...]:
    """The offset of a rank's part, given its shape."""
    turns = [rank // math.prod(layout.devices[len(layout.devices) - axis:]) % layout.devices[-1 - axis]
             if axis >= 0 else 0 for axis in layout.axes]
    if shards > 1:
        turns[0] = turns[0] * shards + rank // layout.shard_step % shards
    return tuple(turn * size for turn, size in zip(turns, shape, strict=True))


def _joined(tag: str, by_rank: Mapping[int, Stored], layout: Layout | None, gathered: bool, transposed: bool) -> Sliced:
    """Joins a parameter from the parts of all ranks."""
    first = next(iter(by_rank.values()))
    if transposed and len(first.shape) != 2:
        raise ValueError(f"{first.file}: {tag} has the shape {list(first.shape)}, which is not that of a kernel.")
    if layout is None:
        return Sliced(first.shape, (((0,) * len(first.shape), first),), transposed)
    if len(layout.axes) != len(first.shape):
        raise ValueError(f"{first.file}: {tag} has the shape {list(first.shape)}, its layout {len(layout.axes)} axes.")
    counts, devices = _counts(layout), math.prod(layout.devices)
    shards = 1
    if layout.shard_step > 0 and layout.shard_size and first.shape and not gathered:
        shards = layout.shard_size if layout.shard_size > 0 else devices // layout.shard_step
        counts[0] *= shards
        if layout.shard_step * shards > devices:
            raise ValueError(f"{first.file}: {tag} would have {shards} shards, {layout.shard_step} apart, on {devices} "
                             "devices; the strategy file is damaged, or of another model.")
    parts: dict[tuple[int, ...], Stored] = {}
    for rank, stored in by_rank.items():
        if rank >= devices or stored.shape != first.shape:
            raise ValueError(f"{stored.file}: {tag} {list(stored.shape)} of rank {rank} does not fit the "
                             f"{list(first.shape)} of {first.file} and the strategy's {devices} devices.")
        parts.setdefault(_begin(layout, rank, first.shape, shards), stored)
    if len(parts) != math.prod(counts):
        absent = next((rank for rank in range(devices) if _begin(layout, rank, first.shape, shards) not in parts), None)
        raise ValueError(f"{tag} has {math.prod(counts)} parts, but only {len(parts)} are here: the file of rank "
                         f"{absent} is missing.")
    return Sliced(tuple(size * count for size, count in zip(first.shape, counts, strict=True)),
                  tuple(parts.items()), transposed)
