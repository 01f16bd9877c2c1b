"""Export: writes a checkpoint, or a run in progress, as a folder that Hugging Face's libraries open.

    t5x export runs/mine@400 --output=mine-hf --dtype=bfloat16

  config.json, generation_config.json   of the family that matches the decoder, else of our own, `codellm`
  model.safetensors                     or shards, with model.safetensors.index.json
  modeling_codellm.py                   the code of our own family
  tokenizer.json or similar             the vocabulary
  README.md                             a model card: training data and provenance

Parameters are read, converted and written one published tensor at a time. A folder is built beside its destination and
moved there when it is complete. On gs:// nothing can be moved: there config.json, without which nothing opens the
folder, is written last, and a marker file says until then that the folder is incomplete.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from codellm_jax.mixture.half_made import half_made
from codellm_jax.model.config import DecoderConfig
from codellm_jax.results.files import read_provenance
from codellm_jax.runtime.checkpoints import resolved
from codellm_jax.runtime.compatibility import trained_config, trained_vocabulary
from codellm_jax.runtime.parts import Damaged, SavedParameters, saved_parameters
from codellm_jax.runtime.provenance import code_version
from codellm_jax.tokenizing.conversion import write_tokenizer
from codellm_jax.vocabulary import Vocabulary
from codellm_jax.weights.card import model_card
from codellm_jax.weights.layouts import PublishedTensor, published_facts, published_tensors, stacked_shapes
from codellm_jax.weights.writing import DTYPES, INDEX, files_of, index_of, parse_size, size_of, write_tensors

Read = Callable[[str, int | None], np.ndarray]  # reads a parameter by name, whole or one layer of it
MODELING = pathlib.Path(__file__).with_name("modeling_codellm.py")
OWN_CLASSES = {"AutoConfig": "CodellmConfig", "AutoModel": "CodellmModel", "AutoModelForCausalLM": "CodellmForCausalLM"}
BUILDING = "being_exported"  # a marker file in an incomplete folder on gs://
DEFAULT_SIZE = "5GB"


@dataclasses.dataclass(frozen=True)
class Folder:
    """The content of an exported folder.

    Attributes:
      texts: the content of all text files but config.json, by file name.
      config: the content of config.json.
      vocabulary: the vocabulary whose files are written.
      files: file name -> the tensors in the file.
      dtypes: tensor name -> its dtype, a key of DTYPES.
    """

    texts: Mapping[str, str]
    config: Mapping[str, Any]
    vocabulary: Vocabulary
    files: Mapping[str, Sequence[PublishedTensor]]
    dtypes: Mapping[str, str]

    @property
    def tensors(self) -> list[PublishedTensor]:
        return [tensor for tensors in self.files.values() for tensor in tensors]


def export(
    source: str, output: str, dtype: str | None = None, max_shard_size: str = DEFAULT_SIZE,
    vocabulary_path: str | None = None, report: Callable[[str], None] = print,
) -> None:
    """Writes a checkpoint as a folder for Hugging Face's libraries.

    Args:
      source: a run directory, whose newest undamaged checkpoint is used, or RUN@STEP.
      output: a folder that does not exist yet, or is empty; local or gs://.
      dtype: of the tensors, a key of DTYPES; None for the original dtypes of an imported model without further
        training, else float32.
      max_shard_size: of a file, such as 5GB; a larger tensor gets its own file.
      vocabulary_path: the location of the run's vocabulary, if it was moved.
      report: called with lines about what was read and written.

    Raises:
      ValueError, FileNotFoundError, OSError: with a one-line message; nothing of the folder remains.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, found {dtype!r}.")
    most = parse_size(max_shard_size)
    run, step = _run_and_step(source)
    place = epath.Path(resolved(output))
    _require_free(place)
    for saved in saved_parameters(run, step, report):
        vocabulary = trained_vocabulary(saved.record, run, vocabulary_path)
        folder = _planned(trained_config(saved.record, vocabulary, run), vocabulary,
                          saved.record | {"step": saved.step}, _code_of(run), dtype, most)
        _require_same_shapes(saved, folder, run)
        try:
            with written_whole(place) as building:
                _write(building, folder, saved.read, report)
                saved.require_undamaged()
        except Damaged as error:
            report(f"WARNING: the checkpoint of step {saved.step} of {run} is damaged ({error}).")
            continue
        size = sum(size_of(tensor, folder.dtypes) for tensor in folder.tensors)
        report(f"Step {saved.step} of {run} as {folder.config['model_type']} in {output}: {len(folder.tensors)} "
               f"tensors, {size / 1e9:.3f} GB of {' and '.join(sorted(set(folder.dtypes.values())))} in "
               f"{len(folder.files)} file(s).")
        return
    raise ValueError(f"{'All checkpoints' if step is None else f'The checkpoint of step {step}'} in {run} "
                     f"{'are' if step is None else 'is'} damaged: restore one from a copy.")


def export_while_training(
    params: Any, config: DecoderConfig, vocabulary: Vocabulary, record: Mapping[str, Any], place: str,
    report: Callable[[str], None],
) -> None:
    """Writes the parameters of a run in progress, in float32, and replaces the content of `place`. All processes call
    it; the first one writes. If it fails, a warning is reported and the run continues.

    Args:
      params: on their devices; gathered one tensor at a time.
      config, vocabulary: of the model.
      record: "step", "settings" and "ledger", as in a checkpoint of this step.
      place: the folder, local or gs://.
      report: called with a line if the export fails.
    """
    folder = _planned(config, vocabulary, record, code_version(), "float32", parse_size(DEFAULT_SIZE))
    gather, waiting = _gathering(params), [place.key for tensor in folder.tensors for place in tensor.places]

    def read(name: str, layer: int | None) -> np.ndarray:
        assert waiting.pop(0) == (name, layer)
        return gather(name, layer)

    if jax.process_index() == 0:
        try:
            with written_whole(epath.Path(place)) as building:
                _write(building, folder, read, report)
        except (OSError, ValueError) as error:
            report(f"WARNING: the export after step {record['step']} failed: {error}")
    while waiting:  # all processes must make the same requests, even if nothing is written
        read(*waiting[0])


def _gathering(params: Any) -> Read:
    """Reads parameters from the devices of all processes, one layer at a time."""
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    leaves = {"/".join(key.key for key in path): leaf for path, leaf in paths}
    take = jax.jit(lambda leaf, layer: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False))
    replicated = functools.cache(lambda mesh: jax.jit(
        lambda leaf: leaf, out_shardings=NamedSharding(mesh, PartitionSpec())))

    def read(name: str, layer: int | None) -> np.ndarray:
        leaf = leaves[name] if layer is None else take(leaves[name], layer)
        if not leaf.is_fully_addressable:
            leaf = replicated(leaf.sharding.mesh)(leaf)
        return np.asarray(leaf)

    return read


def _planned(
    config: DecoderConfig, vocabulary: Vocabulary, record: Mapping[str, Any], code: Mapping[str, Any] | None,
    dtype: str | None, most: int,
) -> Folder:
    """The content of a folder, without the numbers."""
    stages = [record["ledger"], *reversed(record["ledger"].get("before", []))]
    imported: Mapping[str, Any] = next((stage for stage in stages if stage["stage"] == "imported"), {})
    facts = published_facts(config, imported.get("model_type"))
    tensors = published_tensors(facts, config)
    dtypes = dict.fromkeys((tensor.name for tensor in tensors), dtype or "float32")
    if dtype is None and imported is record["ledger"]:  # parameters keep their original dtypes, but float64 was rounded
        own = {name: imported.get("other_dtypes", {}).get(name, imported["dtype"]) for name in dtypes}
        dtypes |= {name: found for name, found in own.items() if found in DTYPES}
    usual = collections.Counter(dtypes.values()).most_common(1)[0][0]
    files = files_of(tensors, dtypes, most)
    begin = vocabulary.begin_ids[0] if vocabulary.begin_ids else None
    ids = {"bos_token_id": begin, "eos_token_id": vocabulary.end_of_document_id, "pad_token_id": vocabulary.pad_id}
    texts = {"README.md": model_card(config, facts, usual, record, code),
             "generation_config.json": _as_json({name: value for name, value in ids.items() if value is not None})}
    if len(files) > 1:
        texts[INDEX] = _as_json(index_of(files, dtypes))
    facts = facts | ids | {"torch_dtype": usual, "use_cache": True}
    if facts["model_type"] == "codellm":
        facts["auto_map"] = {name: f"{MODELING.stem}.{kind}" for name, kind in OWN_CLASSES.items()}
        texts[MODELING.name] = MODELING.read_text()
    return Folder(texts, facts, vocabulary, files, dtypes)


def _write(building: epath.Path, folder: Folder, read: Read, report: Callable[[str], None]) -> None:
    """Writes a folder's files; config.json, without which nothing opens it, comes last."""
    for name, text in folder.texts.items():
        (building / name).write_bytes(text.encode())
    if told := write_tokenizer(folder.vocabulary, str(building)):
        report(f"WARNING: {told}")
    for name, tensors in folder.files.items():
        with (building / name).open("wb") as file:
            write_tensors(file, tensors, _arrays(tensors, read), folder.dtypes)
    (building / "config.json").write_bytes(_as_json(folder.config).encode())


def _arrays(tensors: Sequence[PublishedTensor], read: Read) -> Iterator[np.ndarray]:
    """The numbers of tensors, as published; only one is held at a time."""
    for tensor in tensors:
        yield tensor.write({place.key: read(*place.key) for place in tensor.places})


@contextlib.contextmanager
def written_whole(place: epath.Path) -> Iterator[epath.Path]:
    """A folder to write to. It replaces the existing content of `place` once it is complete; on an error it is removed.
    """
    try:
        with _built_there(place) if "://" in str(place) else _built_beside(place) as building:
            yield building
    except OSError as error:
        raise OSError(f"Writing {place} failed: {error.strerror or error}. Nothing of it remains. Free some space "
                      "there, or name another folder.") from error


@contextlib.contextmanager
def _built_beside(place: epath.Path) -> Iterator[epath.Path]:
    with half_made(place) as content:
        yield epath.Path(content)
        if place.exists():
            os.rename(place, content.parent / "before")  # which is removed together with its parent folder
        os.rename(content, place)


@contextlib.contextmanager
def _built_there(place: epath.Path) -> Iterator[epath.Path]:
    if place.exists():
        place.rmtree()
    place.mkdir(parents=True, exist_ok=True)
    (place / BUILDING).write_text("This folder is incomplete.\n")
    try:
        yield place
    except BaseException:
        place.rmtree()
        raise
    (place / BUILDING).unlink()


def _require_free(place: epath.Path) -> None:
    """Raises FileExistsError if `place` is not empty, unless it holds the incomplete result of a killed export."""
    if not place.exists():
        return
    if not place.is_dir():
        raise FileExistsError(f"--output={place} is a file: name a new folder.")
    found = sorted(path.name for path in place.iterdir())
    if found and BUILDING not in found:
        raise FileExistsError(f"--output={place} holds {found[0]}{' and more' if len(found) > 1 else ''}: name a new "
                              "folder, or remove that one.")


def _require_same_shapes(saved: SavedParameters, folder: Folder, run: str) -> None:
    """Raises ValueError if a checkpoint's parameters differ from those implied by its settings."""
    wanted = stacked_shapes(folder.tensors)
    for name in [*wanted, *saved.shapes]:
        found, asked = saved.shapes.get(name, "absent"), wanted.get(name, "absent")
        if found != asked:
            raise ValueError(f"The checkpoint of step {saved.step} of {run} does not match the model in its settings: "
                             f"{name} has the shape {found} instead of {asked}.")


def _run_and_step(source: str) -> tuple[str, int | None]:
    """Splits RUN or RUN@STEP. A directory whose own name contains an @ is a RUN."""
    run, at, step = source.rpartition("@")
    if not at or epath.Path(source).expanduser().exists():
        return source, None
    if not (step.isascii() and step.isdigit()):
        raise ValueError(f"RUN@STEP must end in a step number, found {source!r}.")
    return run, int(step)


def _code_of(run: str) -> Mapping[str, Any] | None:
    """The version and commit that a run was trained with; None if unknown."""
    return (read_provenance(epath.Path(run).expanduser()) or {}).get("code")


def _as_json(facts: Mapping[str, Any]) -> str:
    return json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
