"""Published tensors: their names, their shapes, and the places of their numbers in our parameters.

Leaves of our parameters are named by their path, such as "blocks/attention/query_kernel". Leaves in "blocks" are
stacked over layers, and a place in one is a leaf with a layer.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from codellm_jax.model.config import BIASES, DecoderConfig
from codellm_jax.weights.families import decoder_values, published_facts

__all__ = ["Place", "PublishedTensor", "decoder_values", "matched", "published_facts", "published_tensors"]

Key = tuple[str, int | None]  # of a place: the leaf, and the layer if it is stacked


@dataclasses.dataclass(frozen=True)
class Place:
    """A place in our parameters: a leaf, its layer or None, and the shape of one layer there."""

    leaf: str
    layer: int | None
    shape: tuple[int, ...]

    @property
    def key(self) -> Key:
        return self.leaf, self.layer


@dataclasses.dataclass(frozen=True)
class PublishedTensor:
    """A tensor of a published model.

    Attributes:
      name: as published.
      shape: as published.
      places: where its numbers belong in ours; several if queries, keys and values are one tensor.
      transposed: whether it is a kernel [out, in]; ours are [in, out].
      by_head: for several places, 0 if they are concatenated along the last axis, else the number of heads by which
        they alternate along the first.
    """

    name: str
    shape: tuple[int, ...]
    places: tuple[Place, ...]
    transposed: bool = False
    by_head: int = 0

    def read(self, array: np.ndarray) -> dict[Key, np.ndarray]:
        """The part of a published tensor that belongs to each place; views if possible, in the original dtype."""
        pieces = [array]
        if len(self.places) > 1 and self.by_head:
            heads = array.reshape(self.by_head, len(self.places), -1, *array.shape[1:])
            pieces = [heads[:, index].reshape(-1, *array.shape[1:]) for index in range(len(self.places))]
        elif len(self.places) > 1:
            pieces = np.split(array, len(self.places), axis=-1)
        return {place.key: (piece.T if self.transposed else piece).reshape(place.shape)
                for place, piece in zip(self.places, pieces, strict=True)}

    def write(self, arrays: Mapping[Key, np.ndarray]) -> np.ndarray:
        """The published tensor that contains the numbers of its places."""
        out_first = [array.T if self.transposed else array for array in
                     (arrays[place.key].reshape(self._flat(place)) for place in self.places)]
        if len(out_first) == 1:
            return out_first[0].reshape(self.shape)
        if self.by_head:
            by_head = [array.reshape(self.by_head, 1, -1, *array.shape[1:]) for array in out_first]
            return np.concatenate(by_head, axis=1).reshape(self.shape)
        return np.concatenate(out_first, axis=-1)

    def _flat(self, place: Place) -> tuple[int, ...]:
        """A place's shape with all heads in one axis, as in the published tensors."""
        return place.shape if len(self.shape) > 1 else (math.prod(place.shape),)


@dataclasses.dataclass(frozen=True)
class Naming:
    """The names that a family gives to its tensors.

    Attributes:
      prefix: of all names but the head's; a file of the model without its head omits it.
      outside: a leaf outside of the blocks -> its name.
      block: the name of a block, without its number.
      inside: a leaf inside a block -> its name there.
      fused: the name of queries, keys and values in one tensor; None if they are separate.
      by_head: whether they alternate by head.
      kernels_out_first: whether kernels are [out, in].
      heads: the names of an untied head; the first is the one that is written.
    """

    prefix: str
    outside: dict[str, str]
    block: str
    inside: dict[str, str]
    fused: str | None = None
    by_head: bool = False
    kernels_out_first: bool = True
    heads: tuple[str, ...] = ("lm_head.weight",)


LLAMA = Naming(
    "model.", {"token_embedding": "embed_tokens.weight", "final_norm": "norm"}, "layers",
    {"attention_norm": "input_layernorm", "feedforward_norm": "post_attention_layernorm",
     "attention/query": "self_attn.q_proj", "attention/key": "self_attn.k_proj", "attention/value": "self_attn.v_proj",
     "attention/output": "self_attn.o_proj", "attention/query_norm": "self_attn.q_norm",
     "attention/key_norm": "self_attn.k_norm", "feedforward/gate": "mlp.gate_proj", "feedforward/up": "mlp.up_proj",
     "feedforward/down": "mlp.down_proj"})
GPT2 = Naming(
    "transformer.", {"token_embedding": "wte.weight", "position_embedding": "wpe.weight", "final_norm": "ln_f"}, "h",
    {"attention_norm": "ln_1", "feedforward_norm": "ln_2", "attention/output": "attn.c_proj",
     "feedforward/up": "mlp.c_fc", "feedforward/down": "mlp.c_proj"}, fused="attn.c_attn", kernels_out_first=False)
OWN = dataclasses.replace(
    GPT2, outside=GPT2.outside | {"query_embedding": "wqe.weight"}, fused=None, kernels_out_first=True,
    inside=GPT2.inside | {
        "attention/query": "attn.q_proj", "attention/key": "attn.k_proj", "attention/value": "attn.v_proj",
        "attention/query_norm": "attn.q_norm", "attention/key_norm": "attn.k_norm", "feedforward/gate": "mlp.c_gate"})

# model_type -> its naming.
NAMINGS = {
    "gpt2": GPT2,
    "gpt_neox": Naming(
        "gpt_neox.", {"token_embedding": "embed_in.weight", "final_norm": "final_layer_norm"}, "layers",
        {"attention_norm": "input_layernorm", "feedforward_norm": "post_attention_layernorm",
         "attention/output": "attention.dense", "feedforward/up": "mlp.dense_h_to_4h",
         "feedforward/down": "mlp.dense_4h_to_h"},
        fused="attention.query_key_value", by_head=True, heads=("embed_out.weight", "lm_head.weight")),
    "llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA,
    "olmo2": dataclasses.replace(LLAMA, inside=LLAMA.inside | {
        "attention_norm": "post_attention_layernorm", "feedforward_norm": "post_feedforward_layernorm"}),
    "starcoder2": dataclasses.replace(
        LLAMA, inside=LLAMA.inside | {"feedforward/up": "mlp.c_fc", "feedforward/down": "mlp.c_proj"}),
    "gpt_pangu": OWN,
    "codellm": OWN,
}

# Entries of older files that are not parameters: masks and frequencies.
BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq",
           ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")


def published_tensors(facts: Mapping[str, Any], config: DecoderConfig) -> list[PublishedTensor]:
    """The tensors of a model, in the order of its layers.

    A tied head has no tensor, except in our own family and in gpt_pangu: their `lm_head.weight` shares the place of the
    token embedding, and a file may contain it or not.

    Args:
      facts: the content of config.json, of which only model_type is used.
      config: the decoder that `decoder_values` derives from it.
    """
    kind = facts["model_type"]
    naming = NAMINGS[kind]
    table = (config.vocabulary_size, config.hidden)

    def embedding(name: str, shape: tuple[int, ...]) -> PublishedTensor:
        return PublishedTensor(naming.prefix + naming.outside[name], shape, (Place(name, None, shape),))

    tensors = [embedding("token_embedding", table)]
    positions = (config.length, config.hidden)
    if config.positions == "learned":
        tensors.append(embedding("position_embedding", positions))
    if config.query_layer:
        tensors.append(embedding("query_embedding", positions))
    for number in range(config.layers):
        tensors += _block(naming, config, number)
    tensors += _norm(naming.prefix + naming.outside["final_norm"], config, "final_norm", None)
    if not config.tied_head:
        tensors.append(PublishedTensor(naming.heads[0], table, (Place("lm_head", None, table),)))
    elif naming is OWN:
        tensors.append(PublishedTensor(naming.heads[0], table, (Place("token_embedding", None, table),)))
    return tensors


def matched(
    facts: Mapping[str, Any], config: DecoderConfig, shapes: Mapping[str, Sequence[int]]
) -> list[PublishedTensor]:
    """The tensors of a model under their stored names; a stored copy of a tied head comes last, with the place of the
    token embedding.

    Args:
      facts, config: as for `published_tensors`.
      shapes: name -> shape of all stored tensors. Entries that are not parameters, such as masks, are ignored.

    Raises:
      ValueError: tensors are missing, left over or of another shape; it lists the first few of each and their number.
    """
    naming = NAMINGS[facts["model_type"]]
    if config.layers * len(_block(naming, config, 0)) > 2 * len(shapes):  # most are missing, so none are listed
        raise ValueError(f"config.json has {config.layers} layers, but there are {len(shapes)} tensors.")
    found = {name: tuple(shape) for name, shape in shapes.items() if not name.endswith(BUFFERS)}
    bare = not any(name.startswith(naming.prefix) for name in found)
    table = (config.vocabulary_size, config.hidden)
    tensors = {}
    for tensor in published_tensors(facts, config):
        name = tensor.name.removeprefix(naming.prefix) if bare else tensor.name
        if name in naming.heads:
            name = next((head for head in naming.heads if head in found), name)
            if config.tied_head:
                continue
        tensors[name] = dataclasses.replace(tensor, name=name)
    if config.tied_head:
        place = Place("token_embedding", None, table)
        tensors |= {head: PublishedTensor(head, table, (place,)) for head in naming.heads if head in found}
    missing = [f"{name} {list(tensor.shape)}" for name, tensor in tensors.items() if name not in found]
    left_over = [f"{name} {list(shape)}" for name, shape in found.items() if name not in tensors]
    others = [f"{name} {list(found[name])} instead of {list(tensor.shape)}" for name, tensor in tensors.items()
              if name in found and found[name] != tensor.shape]
    problems = [f"{_listed(names)} {what}" for names, what in (
        (missing, "missing"), (left_over, "left over"), (others, "of another shape")) if names]
    if problems:
        raise ValueError(f"The tensors do not match its config.json ({facts['model_type']}): "
                         f"{'; '.join(problems)}.")
    return list(tensors.values())


def _listed(names: list[str], most: int = 3) -> str:
    """The first few of a list, its length, and the verb of the following text."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more} {'are' if len(names) > 1 else 'is'}"


def _block(naming: Naming, config: DecoderConfig, number: int) -> list[PublishedTensor]:
    """The tensors of a block; the last one of a query layer is a leaf of its own."""
    own = config.query_layer and number == config.layers - 1
    at, layer = ("query_block", None) if own else ("blocks", number)
    prefix = f"{naming.prefix}{naming.block}.{number}."
    hidden, wide = config.hidden, config.feedforward
    query, key = (config.heads, config.size_of_head), (config.key_heads, config.size_of_head)
    # Projection -> the kernel's input, and the shape of its output.
    projections: dict[str, tuple[int, tuple[int, ...]]] = {
        "attention/query": (hidden, query), "attention/key": (hidden, key), "attention/value": (hidden, key),
        "attention/output": (config.query_width, (hidden,)),
        **({"feedforward/gate": (hidden, (wide,))} if config.is_gated else {}),
        "feedforward/up": (hidden, (wide,)), "feedforward/down": (wide, (hidden,))}

    def kernel(name: str) -> Place:
        return Place(f"{at}/{name}_kernel", layer, (projections[name][0], math.prod(projections[name][1])))

    def bias(name: str) -> Place:
        return Place(f"{at}/{name}_bias", layer, projections[name][1])

    def projection(parts: Sequence[str], name: str) -> list[PublishedTensor]:
        places = tuple(kernel(part) for part in parts)
        by_head = config.heads if naming.by_head and len(parts) > 1 else 0
        shape = (places[0].shape[0], sum(place.shape[1] for place in places))
        out_first = naming.kernels_out_first
        tensors = [PublishedTensor(
            f"{prefix}{name}.weight", shape[::-1] if out_first else shape, places, out_first, by_head)]
        if parts[0].split("/")[1] in BIASES[config.biases]:
            tensors.append(PublishedTensor(
                f"{prefix}{name}.bias", shape[1:], tuple(bias(part) for part in parts), by_head=by_head))
        return tensors

    tensors = _norm(prefix + naming.inside["attention_norm"], config, f"{at}/attention_norm", layer)
    separate = list(projections)
    if naming.fused:
        tensors += projection(separate[:3], naming.fused)
        separate = separate[3:]
    for name in separate:
        tensors += projection([name], naming.inside[name])
    if config.query_key_norm != "none":
        for part, heads in (("attention/query_norm", query), ("attention/key_norm", key)):
            shape = heads if config.query_key_norm == "width" else heads[1:]
            tensors.append(PublishedTensor(f"{prefix}{naming.inside[part]}.weight", (math.prod(shape),),
                                           (Place(f"{at}/{part}/scale", layer, shape),)))
    return tensors + _norm(prefix + naming.inside["feedforward_norm"], config, f"{at}/feedforward_norm", layer)


def _norm(name: str, config: DecoderConfig, leaf: str, layer: int | None) -> list[PublishedTensor]:
    kinds: dict[str, str] = {"weight": "scale", **({"bias": "bias"} if config.norm == "layer" else {})}
    shape = (config.hidden,)
    return [PublishedTensor(f"{name}.{theirs}", shape, (Place(f"{leaf}/{ours}", layer, shape),))
            for theirs, ours in kinds.items()]


def stacked_shapes(tensors: Sequence[PublishedTensor]) -> dict[str, tuple[int, ...]]:
    """Leaf -> shape of our parameters, with layers stacked, as the tensors fill them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for place in (place for tensor in tensors for place in tensor.places):
        if place.layer is None:
            shapes[place.leaf] = place.shape
        else:
            shapes[place.leaf] = (max(place.layer + 1, *shapes.get(place.leaf, (0,))[:1]), *place.shape)
    return shapes
