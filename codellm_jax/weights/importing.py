"""Published weights as a run: from a folder, local or gs://, a name hf://ORG/NAME[@REVISION], or MindSpore's files.

  open_source(source)                        its content, from config.json, tokenizer and headers alone
  describe_source(source)                    the same as a checkpoint's record: "ledger", "settings",
                                             "step", "digest"
  parameters_on_mesh(source, abstract)       its parameters, read straight onto a mesh's shards
  import_run(source, output)                 makes a run directory

Tensors are read one at a time and processed in pieces, so an import takes about as much memory as the largest tensor.
All errors in a source raise ValueError or OSError with a one-line message.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from codellm_jax import hub
from codellm_jax.mixture.half_made import half_made
from codellm_jax.model.config import DecoderConfig
from codellm_jax.model.decoder import flops_per_token, parameter_count
from codellm_jax.results.files import digest
from codellm_jax.runtime.checkpoints import resolved
from codellm_jax.runtime.parts import Part, rows_of_chunk, save_in_parts
from codellm_jax.runtime.progress import StatusLine, duration, say
from codellm_jax.runtime.provenance import software
from codellm_jax.tokenizing import files as tokenizer_files
from codellm_jax.tokenizing import foreign
from codellm_jax.tokenizing.apart import try_tokenizer
from codellm_jax.vocabulary import Vocabulary, load_vocabulary
from codellm_jax.weights.layouts import PublishedTensor, decoder_values, matched, published_tensors, stacked_shapes
from codellm_jax.weights.mindspore import is_mindspore, open_mindspore
from codellm_jax.weights.reading import FLOATS, Tensors, open_tensors

CONFIGURATION = "config.json"
# The names requested from a hub, one after the other until weights are found.
WEIGHTS = ("model*.safetensors*", "*.safetensors*", "pytorch_model*.bin*")
UNFINISHED = "unfinished_import"
SLAB = 2**24  # bytes of float32 that are converted at a time


@dataclasses.dataclass(frozen=True)
class Source:
    """Published weights that match their configuration; no tensor has been read yet.

    Attributes:
      name: as given, with the path of a folder made absolute.
      folder: the local folder of its files.
      revision: the commit on the hub; None for a folder.
      facts: the content of its config.json.
      values: the decoder's values, as returned by `decoder_values`.
      tensors: all tensors of the folder.
      published: the tensors that are parameters, under their names in the folder, in the order of the files.
      copies: tensors that repeat one of these, such as a stored tied head: name -> the name of the original.
      vocabulary: its tokenizer, with as many rows as its embedding.
    """

    name: str
    folder: str
    revision: str | None
    facts: Mapping[str, Any]
    values: Mapping[str, Any]
    tensors: Tensors
    published: tuple[PublishedTensor, ...]
    copies: Mapping[str, str]
    vocabulary: Vocabulary

    @property
    def config(self) -> DecoderConfig:
        return DecoderConfig(**self.values)

    @property
    def files(self) -> tuple[str, ...]:
        """The files from which it is read; MindSpore checkpoints may have no config.json."""
        configured = (epath.Path(self.folder) / CONFIGURATION).exists()
        return (*([CONFIGURATION] if configured else []), *self.tensors.files)


def open_source(source: str, vocabulary: str | None = None) -> Source:
    """Finds and checks published weights; downloads them if `source` names a repository on a hub.

    Args:
      source: a folder or a name hf://ORG/NAME[@REVISION].
      vocabulary: a tokenizer to use instead of the folder's own.

    Raises:
      OSError, ValueError: with a one-line message; it does not exist, is incomplete, or is not a supported model.
    """
    name, folder, revision = _located(source)
    facts, tensors = _read_headers(folder)
    try:
        values = decoder_values(facts)
        config = DecoderConfig(**values)
        published = matched(facts, config, tensors.shapes)
        for tensor in published:
            if tensor.name in tensors.dtypes and tensors.dtypes[tensor.name] not in {str(d) for d in FLOATS.values()}:
                raise ValueError(f"{tensor.name} has the dtype {tensors.dtypes[tensor.name]}; supported are "
                                 f"{', '.join(str(dtype) for dtype in FLOATS.values())}.")
        _require_memory(tensors, published)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    first: dict[Any, str] = {}
    copies = {tensor.name: other for tensor in published
              if (other := first.setdefault(tensor.places[0].key, tensor.name)) != tensor.name}
    order = {name: number for number, name in enumerate(tensors.shapes)}
    own = sorted((tensor for tensor in published if tensor.name not in copies), key=lambda tensor: order[tensor.name])
    return Source(name, folder, revision, facts, values, tensors, tuple(own), copies,
                  _vocabulary(folder, vocabulary, facts, config.vocabulary_size))


def _require_memory(tensors: Tensors, published: Sequence[PublishedTensor]) -> None:
    """Raises ValueError if a tensor, which is read as a whole, is larger than this machine's memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for tensor in published:
        if (size := _bytes_of(tensors, tensor.name)) > memory:
            raise ValueError(f"{tensor.name} has {size / 1e9:,.0f} GB, more than the memory of this machine.")


def _located(source: str) -> tuple[str, str, str | None]:
    """The name, the folder and the revision of a source."""
    if not hub.is_hub_name(source):
        return resolved(source), resolved(source), None
    for weights in WEIGHTS:
        folder, revision = hub.snapshot(source, (CONFIGURATION, *tokenizer_files.PATTERNS, weights))
        if any(folder.glob(weights)):
            break
    return source, str(folder), revision


def _read_headers(folder: str) -> tuple[dict[str, Any], Tensors]:
    """The configuration and the tensors of a folder."""
    place = epath.Path(folder)
    if not place.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}: give that of a published model, or hf://ORG/NAME.")
    if (place / "checkpoints").exists():
        raise ValueError(f"{folder} is a run directory: it needs no import.")
    if is_mindspore(folder):
        return open_mindspore(folder)
    configuration = place / CONFIGURATION
    if not configuration.exists():
        raise FileNotFoundError(f"{folder} holds no {CONFIGURATION}, so it is not a published model.")
    return foreign.json_object(str(configuration)), open_tensors(folder)


def _vocabulary(folder: str, given: str | None, facts: Mapping[str, Any], rows: int) -> Vocabulary:
    """The tokenizer of a folder, or the one given instead."""
    path, options = given or folder, dict[str, Any](size=rows)
    try:
        if given is None or re.search(r"[./\\]", given):  # not the name of a shipped one
            file = tokenizer_files.tokenizer_file(tokenizer_files.resolve(path))
            try_tokenizer(tokenizer_files.read(file), file)
            if facts["model_type"] == "gpt_pangu" and file.endswith(".model"):
                options["text_form"] = "pangu"
        return load_vocabulary(path, **options)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} Name one: t5x import {folder} --output=RUN --vocabulary=FILE.") from None
    except ValueError as error:
        ids: dict[str, Any] = {"end_of_document_id": facts.get("eos_token_id"), "pad_id": facts.get("pad_token_id")}
        if "end_of_document" in str(error) and type(ids["end_of_document_id"]) is int:  # the model's own id
            return load_vocabulary(path, **options, **ids)
        raise ValueError(str(error).replace("vocabulary.size is", "the model's embedding has").replace(
            ", fewer rows", " rows, fewer")) from None


def describe_source(source: str | Source) -> dict[str, Any]:
    """A source in the form of a checkpoint's record: its "ledger" and "settings", "step" 0, and a "digest" of
    everything that is known without reading a tensor.
    """
    opened = source if isinstance(source, Source) else open_source(source)
    place = epath.Path(opened.folder)
    files = {name: {"bytes": (place / name).stat().length} for name in opened.files}
    own = opened.vocabulary.path == opened.folder and opened.revision is not None
    path = f"{opened.name.split('@')[0]}@{opened.revision}" if own else opened.vocabulary.path
    record = {"ledger": imported_ledger(opened, files), "settings": settings(opened, path), "step": 0}
    shapes = [[name, list(shape), opened.tensors.dtypes[name]] for name, shape in opened.tensors.shapes.items()]
    return record | {"digest": digest(record | {"tensors": shapes, "facts": dict(opened.facts)})}


def imported_ledger(source: Source, files: Mapping[str, Any]) -> dict[str, Any]:
    """The ledger, as JSON, of a model with a known origin and unknown training data.

    In addition to the entries of every ledger, it has "source", "revision", "files" (name -> bytes and, after an
    import, SHA-256), "model_type", "dtype", the most common one, and "other_dtypes", by the names of
    `published_tensors`.
    """
    # Names in a file may lack the prefix; both lists have the same order.
    places = {tensor.places[0].key: source.tensors.dtypes[tensor.name] for tensor in source.published}
    dtypes = {tensor.name: places[tensor.places[0].key] for tensor in published_tensors(source.facts, source.config)}
    usual = Counter(dtypes.values()).most_common(1)[0][0]
    return {"stage": "imported", "order_fingerprint": "", "vocabulary_hash": source.vocabulary.content_hash,
            "length": source.config.length, "rows": {}, "tokens": {}, "phases": [], "before": [],
            "source": source.name, "revision": source.revision, "files": dict(files),
            "model_type": source.facts["model_type"], "dtype": usual,
            "other_dtypes": {name: dtype for name, dtype in dtypes.items() if dtype != usual}}


def settings(source: Source, vocabulary: str) -> dict[str, str]:
    """The settings of a run of these weights, as gin literals, which runs that start from it inherit."""
    model = {f"model.{name}": repr(value) for name, value in source.values.items()
             if name not in ("vocabulary_size", "length")}
    own = source.vocabulary
    ids = {"vocabulary.path": repr(vocabulary), "vocabulary.size": repr(own.size),
           "vocabulary.pad_id": repr(own.pad_id), "vocabulary.end_of_document_id": repr(own.end_of_document_id)}
    form = {} if own.text_form == "plain" else {"vocabulary.text_form": repr(own.text_form)}
    return model | ids | form | {"mixture.lengths": repr({"targets": source.config.length})}


def parameters_on_mesh(source: Source, abstract: Any) -> Any:
    """Reads parameters directly onto a mesh, one tensor at a time; each process reads all of them.

    Args:
      source: as returned by `open_source`.
      abstract: the decoder's parameters as jax.ShapeDtypeStructs of float32 with shardings, as for
        `restore_parameters`.
    """
    paths, tree = jax.tree_util.tree_flatten_with_path(abstract)
    wanted = {"/".join(str(key.key) for key in path): leaf for path, leaf in paths}
    shapes = {name: leaf.shape for name, leaf in wanted.items()}
    if shapes != stacked_shapes(source.published):
        raise ValueError(f"{source.name} has other parameters than the requested model.")
    arrays: dict[str, Any] = {}
    for tensor in source.published:
        for (leaf, layer), piece in tensor.read(source.tensors.read(tensor.name)).items():
            sharding = wanted[leaf].sharding
            if layer is not None:
                sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
            made = jax.make_array_from_callback(
                piece.shape, sharding, functools.partial(_floats, tensor.name, piece))
            if layer is None:
                arrays[leaf] = made
            else:
                if leaf not in arrays:
                    arrays[leaf] = jax.jit(functools.partial(jnp.zeros, shapes[leaf], jnp.float32),
                                           out_shardings=wanted[leaf].sharding)()
                arrays[leaf] = _layer_writer(wanted[leaf].sharding)(arrays[leaf], made, layer)
    _require_equal_copies(source)
    return jax.tree.unflatten(tree, [arrays[name] for name in wanted])


@functools.cache
def _layer_writer(sharding: NamedSharding) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    """Writes a layer into a stack, in place."""

    def write(stack: jax.Array, layer: jax.Array, number: int) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stack, layer, number, axis=0)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)


def _floats(name: str, array: np.ndarray, index: Any = ...) -> np.ndarray:
    """Numbers of a tensor in float32, contiguous. Raises ValueError if one is not finite."""
    found = np.array(array[index], np.float32, order="C")
    if not np.isfinite(found).all():
        raise ValueError(f"{name} holds numbers that are not finite, {np.count_nonzero(~np.isfinite(found))} of "
                         f"{found.size} that were checked.")
    return found


def _require_equal_copies(source: Source) -> None:
    """Raises ValueError if a stored tied head differs from the token embedding."""
    for name, other in source.copies.items():
        shape = source.tensors.shapes[name]
        step = max(1, SLAB // (4 * shape[1]))
        for first in range(0, shape[0], step):
            rows = slice(first, first + step)
            found, expected = (source.tensors.read(which, rows).astype(np.float32) for which in (name, other))
            if not np.array_equal(found, expected):
                raise ValueError(f"{source.folder}: {name} differs from {other}, to which the configuration ties it "
                                 "(tie_word_embeddings): one of the two is wrong.")


def import_run(source: str, output: str, vocabulary: str | None = None, report: Callable[[str], None] = say) -> Source:
    """Makes a run directory from published weights: a checkpoint of step 0 with its record, config.gin, provenance.json
    and the tokenizer's files in `vocabulary/`.

    It is built beside its destination and moved there when complete. On gs://, where nothing can be moved, a marker
    file says that it is incomplete, and the checkpoint only counts once its record, the last file, is there.

    Raises:
      ValueError: `output` already exists; or as `open_source`.
      OSError: as `open_source`, or the disk is full.
    """
    run = epath.Path(resolved(output))
    unfinished = run / UNFINISHED  # on gs:// only
    if unfinished.exists():
        run.rmtree()
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise ValueError(f"{run} exists already, but an import needs a new run: choose another --output or remove it.")
    opened = open_source(source, vocabulary)
    size = sum(_bytes_of(opened.tensors, tensor.name) for tensor in opened.published)
    report(f"{opened.name}: {opened.facts['model_type']}, {parameter_count(opened.config):,} parameters in "
           f"{len(opened.published)} tensors, {size / 1e9:.3f} GB.")
    with contextlib.ExitStack() as stack:
        if "://" in str(run):
            made = run
            made.mkdir(parents=True, exist_ok=True)
            unfinished.touch()
        else:
            made = epath.Path(stack.enter_context(half_made(run)))
        record = _write_run(opened, made, run, size)
        if made == run:
            unfinished.unlink()
        else:
            os.rename(made, run)  # also works onto an empty folder
    report(f"The run:     {run}, step 0, checkpoint {record['digest'][:12]}")
    return opened


def _bytes_of(tensors: Tensors, name: str) -> int:
    return math.prod(tensors.shapes[name]) * jnp.dtype(tensors.dtypes[name]).itemsize


def _write_run(source: Source, made: epath.Path, run: epath.Path, size: int) -> dict[str, Any]:
    """Writes the files of `run` to the folder `made`; returns the record."""
    place = epath.Path(source.folder)
    path = _copy_tokenizer(source.vocabulary.path, made / "vocabulary", run / "vocabulary")
    held = settings(source, path)
    name_in_a_line = " ".join(source.name.split())
    (made / "config.gin").write_text("".join(f"{name} = {value}  # {name_in_a_line}\n" for name, value in held.items()))
    status = StatusLine(0, max(1, size // 10**6), active=jax.process_index() == 0, unit="MB")
    with contextlib.closing(status), concurrent.futures.ThreadPoolExecutor(1) as beside:
        sums = [beside.submit(_file_facts, place / name) for name in source.files]
        # The record contains facts that are only known after the last part.
        record: dict[str, Any] = {"settings": held}

        def parts() -> Iterator[Part]:
            yield from _parts(source, status, size)
            _require_equal_copies(source)
            record["ledger"] = imported_ledger(
                source, {name: found.result() for name, found in zip(source.files, sums, strict=True)})

        whole = save_in_parts(made / "checkpoints" / "0", stacked_shapes(source.published), parts(), record)
    facts = software() | {
        "arm": "imported", "parameters": parameter_count(source.config),
        "flops_per_token": flops_per_token(source.config, causal=False), "vocabulary": source.vocabulary.content_hash,
        "ledger": whole["ledger"], "step": 0, "last_step": 0, "finished": True, "checkpoint": whole["digest"]}
    (made / "provenance.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    return whole


def _parts(source: Source, status: StatusLine, size: int) -> Iterator[Part]:
    """All parameters, in pieces, tensor by tensor in the order of the files."""
    began, done = time.monotonic(), 0
    for tensor in source.published:
        array = source.tensors.read(tensor.name)
        for (leaf, layer), piece in tensor.read(array).items():
            rows = rows_of_chunk(piece.shape)
            for first in range(0, len(piece), rows):
                yield Part(leaf, layer, first, _floats(tensor.name, piece, slice(first, first + rows)))
        done += array.nbytes
        del array, piece  # free them before the next read
        rate = max(done / max(time.monotonic() - began, 1e-9), 1.0)
        status.show(done // 10**6, f"at {rate / 1e6:.0f} MB/s, {duration((size - done) / rate)} left")


def _file_facts(file: epath.Path) -> dict[str, Any]:
    """The size and SHA-256 of a file."""
    hashed, size = hashlib.sha256(), 0
    with file.open("rb") as opened:
        while piece := opened.read(2**20):
            hashed.update(piece)
            size += len(piece)
    return {"bytes": size, "sha256": hashed.hexdigest()}


def _copy_tokenizer(path: str, made: epath.Path, place: epath.Path) -> str:
    """Copies a tokenizer's files to the folder `made`, which will be moved to `place`; returns their path below
    `place`.
    """
    folder, found = tokenizer_files.folder_of(path), epath.Path(path)
    if folder is None:
        made.mkdir(parents=True)
        found.copy(made / found.name)
        return str(place / found.name)
    made.mkdir(parents=True)
    for name in tokenizer_files.names_in(folder):
        (made / name).write_bytes(tokenizer_files.read_beside(folder, name))
    return str(place)
