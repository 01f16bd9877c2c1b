"""Export: a checkpoint of a run, or a run under way, as a folder that Hugging Face's libraries open.

    t5x export runs/mine@400 --output=mine-hf --dtype=bfloat16

  config.json, generation_config.json   of the family whose values the decoder has, else of our own, `codellm`
  model.safetensors                     or shards, with model.safetensors.index.json
  modeling_codellm.py                   of our own family: its code
  tokenizer.json and its like           the vocabulary
  README.md                             a model card: what it was trained on, and where it comes from

Parameters are read, laid out and written one published tensor at a time. A folder is built beside its place and moved
there when it is whole. In gs:// nothing can be moved: there config.json, without which nothing opens the folder, is
written last, and a file tells until then that the folder is being built.
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

Read = Callable[[str, int | None], np.ndarray]  # a parameter by name, whole or one layer of it
MODELING = pathlib.Path(__file__).with_name("modeling_codellm.py")
OWN_CLASSES = {"AutoConfig": "CodellmConfig", "AutoModel": "CodellmModel", "AutoModelForCausalLM": "CodellmForCausalLM"}
BUILDING = "being_exported"  # a file in a folder in gs:// that is not whole yet
DEFAULT_SIZE = "5GB"


@dataclasses.dataclass(frozen=True)
class Folder:
    """What an exported folder holds.

    Attributes:
      texts: content by file name, of all but config.json.
      config: of config.json.
      vocabulary: whose files are written.
      files: name -> the tensors of a file.
      dtypes: name -> dtype of a tensor, a key of DTYPES.
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
      source: a run directory, whose newest undamaged checkpoint is taken, or RUN@STEP.
      output: a folder that is not there yet, or empty; local or gs://.
      dtype: of the tensors, a key of DTYPES; None for those of a model that was imported and not trained since, else
        float32.
      max_shard_size: of a file, such as 5GB; one tensor that is larger has a file to itself.
      vocabulary_path: where the run's vocabulary lies, if it was moved.
      report: is told what was read and written, in lines.

    Raises:
      ValueError, FileNotFoundError, OSError: in one line; nothing is left of the folder.
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
    """Writes the parameters of a run under way, in float32; what lies at `place` is replaced. Called by all processes,
    of which the first one writes. Where it cannot, a warning is reported, and the run goes on.

    Args:
      params: on their devices; gathered one tensor at a time.
      config, vocabulary: of the model.
      record: "step", "settings" and "ledger", as a checkpoint of this step has them.
      place: the folder, local or gs://.
      report: is told of a failure, in a line.
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
    while waiting:  # all processes have to ask for the same, whether it is written or not
        read(*waiting[0])


def _gathering(params: Any) -> Read:
    """Reads parameters off the devices of all processes, one layer at a time."""
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
    """All of a folder but the numbers."""
    stages = [record["ledger"], *reversed(record["ledger"].get("before", []))]
    imported: Mapping[str, Any] = next((stage for stage in stages if stage["stage"] == "imported"), {})
    facts = published_facts(config, imported.get("model_type"))
    tensors = published_tensors(facts, config)
    dtypes = dict.fromkeys((tensor.name for tensor in tensors), dtype or "float32")
    if dtype is None and imported is record["ledger"]:  # parameters are as they came, of which float64 are rounded
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
    """The numbers of tensors, as published; no more than one is held at a time."""
    for tensor in tensors:
        yield tensor.write({place.key: read(*place.key) for place in tensor.places})


@contextlib.contextmanager
def written_whole(place: epath.Path) -> Iterator[epath.Path]:
    """A folder to write into, which takes the place of what lies there once it is whole; else nothing is left of it."""
    try:
        with _built_there(place) if "://" in str(place) else _built_beside(place) as building:
            yield building
    except OSError as error:
        raise OSError(f"Writing {place} failed: {error.strerror or error}. Nothing of it is left; make room there, or "
                      "name another folder.") from error


@contextlib.contextmanager
def _built_beside(place: epath.Path) -> Iterator[epath.Path]:
    with half_made(place) as content:
        yield epath.Path(content)
        if place.exists():
            os.rename(place, content.parent / "before")  # which is removed with what held it
        os.rename(content, place)


@contextlib.contextmanager
def _built_there(place: epath.Path) -> Iterator[epath.Path]:
    if place.exists():
        place.rmtree()
    place.mkdir(parents=True, exist_ok=True)
    (place / BUILDING).write_text("This folder is not whole yet.\n")
    try:
        yield place
    except BaseException:
        place.rmtree()
        raise
    (place / BUILDING).unlink()


def _require_free(place: epath.Path) -> None:
    """Raises FileExistsError where something lies in the place, which is not the rest of an export that was killed."""
    if not place.exists():
        return
    if not place.is_dir():
        raise FileExistsError(f"--output={place} is a file: name a new folder.")
    found = sorted(path.name for path in place.iterdir())
    if found and BUILDING not in found:
        raise FileExistsError(f"--output={place} holds {found[0]}{' and more' if len(found) > 1 else ''}: name a new "
                              "folder, or remove that one.")


def _require_same_shapes(saved: SavedParameters, folder: Folder, run: str) -> None:
    """Raises ValueError where a checkpoint has other parameters than its settings tell."""
    wanted = stacked_shapes(folder.tensors)
    for name in [*wanted, *saved.shapes]:
        found, asked = saved.shapes.get(name, "absent"), wanted.get(name, "absent")
        if found != asked:
            raise ValueError(f"The checkpoint of step {saved.step} of {run} is not of the model in its settings: "
                             f"{name} is {found} there and should be {asked}.")


def _run_and_step(source: str) -> tuple[str, int | None]:
    """RUN or RUN@STEP in parts. A directory whose own name has an @ is one."""
    run, at, step = source.rpartition("@")
    if not at or epath.Path(source).expanduser().exists():
        return source, None
    if not (step.isascii() and step.isdigit()):
        raise ValueError(f"RUN@STEP must end in the number of a step, found {source!r}.")
    return run, int(step)


def _code_of(run: str) -> Mapping[str, Any] | None:
    """Version and commit that a run was trained with; None where it does not tell."""
    return (read_provenance(epath.Path(run).expanduser()) or {}).get("code")


def _as_json(facts: Mapping[str, Any]) -> str:
    return json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
