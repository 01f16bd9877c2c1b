"""Checks before a checkpoint is reused: everything on which its parameters and token ids depend must be equal."""

import ast
import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from codellm_jax.model.decoder import DecoderConfig
from codellm_jax.runtime.checkpoints import resolved
from codellm_jax.runtime.provenance import is_free_on_resume
from codellm_jax.vocabulary import Vocabulary, load_vocabulary

# The special ids, besides the vocabulary's file.
VOCABULARY_SETTINGS = ("pad_id", "end_of_document_id", "multiple", "size", "begin_id", "text_form")
# Decoder fields that do not change the meaning of its parameters; the first two have their own checks.
FREE_OF_MODEL = frozenset(("vocabulary_size", "length", "dropout_rate", "dtype", "remat", "scan_unroll", "attention",
                           "initializer_std"))
# Values of fields that are newer than a checkpoint, which does not record them.
DEFAULTS = {field.name: repr(field.default) for field in dataclasses.fields(DecoderConfig)
            if field.default is not dataclasses.MISSING}
MEANT = {"kv_heads": "key_heads", "head_size": "size_of_head"}  # field -> the field that gives the meaning of None


def literal(settings: Mapping[str, Any], name: str) -> str | None:
    """The saved value of a setting as a Python literal, macros replaced; None if it is not a plain value.

    A checkpoint is only data. Its values pass through here before gin sees them, because gin could import and call what
    they name.
    """
    text = settings.get(name)
    seen = {name}
    while isinstance(text, str) and re.fullmatch(r"%\w+", text) and text[1:] not in seen:
        seen.add(text[1:])
        text = settings.get(text[1:])
    try:
        return repr(ast.literal_eval(text)) if isinstance(text, str) else None
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def moved_along(settings: Mapping[str, str], model_dir: str) -> dict[str, str]:
    """The settings of an imported run, whose tokenizer is in its directory, with its current path: a run may be
    moved.
    """
    saved = literal(settings, "vocabulary.path")
    path = ast.literal_eval(saved) if saved else None
    if isinstance(path, str) and "://" not in path and not os.path.exists(path):
        below = epath.Path(resolved(model_dir)) / "vocabulary"
        for here in (below, below / os.path.basename(path)):
            if os.path.basename(path) == here.name and here.exists():
                return dict(settings) | {"vocabulary.path": repr(str(here))}
    return dict(settings)


def vocabulary_facts(vocabulary: Vocabulary) -> dict[str, Any]:
    """The ids of a vocabulary that are not in its file, as JSON for the checkpoint: settings lack those from a
    tokenizer_config.json, which may be edited.
    """
    return {"pad_id": vocabulary.pad_id, "end_of_document_id": vocabulary.end_of_document_id,
            "size": vocabulary.size, "begin_ids": list(vocabulary.begin_ids)}


def trained_vocabulary(record: Mapping[str, Any], model_dir: str, path: str | None = None) -> Vocabulary:
    """The vocabulary that a run directory's checkpoint was trained with.

    Args:
      record: of the checkpoint.
      model_dir: the run directory.
      path: the vocabulary's current path; None for the recorded one.

    Raises:
      ValueError, FileNotFoundError: in one line; it does not exist, or is another one.
    """
    saved = literal(moved_along(record["settings"], model_dir), "vocabulary.path")
    if path is None and saved is None:
        raise ValueError(f"The checkpoint in {model_dir} does not record its vocabulary: name it with --vocabulary.")
    chosen = {name: ast.literal_eval(value) for name in VOCABULARY_SETTINGS
              if (value := literal(record["settings"], f"vocabulary.{name}")) is not None}
    try:
        vocabulary = load_vocabulary(path or ast.literal_eval(str(saved)), **chosen)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} If it was moved, name it with --vocabulary.") from None
    require_same_vocabulary(record, vocabulary, model_dir)
    return vocabulary


def trained_config(record: Mapping[str, Any], vocabulary: Vocabulary, model_dir: str) -> DecoderConfig:
    """The decoder of a run directory's checkpoint. Raises ValueError if its settings lack the sizes."""
    values = {field.name: ast.literal_eval(value) for field in dataclasses.fields(DecoderConfig)
              if (value := literal(record["settings"], f"model.{field.name}")) is not None}
    sizes = {"vocabulary_size": vocabulary.size, "length": record["ledger"]["length"]}
    try:
        return DecoderConfig(**values | sizes)
    except TypeError as error:
        raise ValueError(f"The checkpoint in {model_dir} does not record the sizes of its model ({error}): it was "
                         "saved without a gin file.") from None


def require_same_vocabulary(record: Mapping[str, Any], vocabulary: Vocabulary, model_dir: str) -> None:
    """Raises ValueError if a run directory's checkpoint has another vocabulary, or other ids of it."""
    saved = record["ledger"]["vocabulary_hash"]
    if saved != vocabulary.content_hash:
        raise ValueError(f"{model_dir} was trained with another vocabulary ({saved[:12]}, here "
                         f"{vocabulary.content_hash[:12]}): set VOCABULARY to the file it was trained with.")
    chosen: dict[str, Any] = {name: ast.literal_eval(value) for name in VOCABULARY_SETTINGS
              if (value := literal(record["settings"], f"vocabulary.{name}")) is not None}
    trained = load_vocabulary(vocabulary.path, **chosen)
    for name, there in record.get("vocabulary", {}).items():
        if vocabulary_facts(trained).get(name) != there:
            raise ValueError(f"{model_dir} was trained with {name} = {there}, but the files beside the tokenizer in "
                             f"{vocabulary.path} now say {vocabulary_facts(trained).get(name)}: was "
                             "tokenizer_config.json edited? Restore it.")
    for name, field in (("pad_id", "pad_id"), ("end_of_document_id", "end_of_document_id"),
                        ("multiple and size", "size"), ("begin_id", "begin_ids")):
        there, here = getattr(trained, field), getattr(vocabulary, field)
        if there != here:
            what = f"an embedding of {there} rows" if field == "size" else f"{field} = {there}"
            raise ValueError(f"{model_dir} was trained with vocabulary.{what}, here it is {here}: remove "
                             f"vocabulary.{name} to inherit its own.")


def require_same_model(
    record: Mapping[str, Any], vocabulary: Vocabulary, config: DecoderConfig, model_dir: str
) -> None:
    """Raises ValueError if a run directory's checkpoint has another vocabulary or decoder than `config`, or shorter
    rows."""
    require_same_vocabulary(record, vocabulary, model_dir)
    if record["ledger"]["length"] < config.length:
        raise ValueError(f"{model_dir} was trained on rows of {record['ledger']['length']} tokens, here they have "
                         f"{config.length}: set TASK_FEATURE_LENGTHS to as many or fewer, or remove it to inherit the "
                         "length.")
    for field in dataclasses.fields(config):
        name = f"model.{field.name}"
        saved = literal(record["settings"], name)
        if name not in record["settings"] and "model.layers" in record["settings"]:  # in a gin file, before the field
            saved = DEFAULTS.get(field.name)
        if field.name not in FREE_OF_MODEL and saved is not None and not _is_same(config, field.name, saved):
            raise ValueError(f"{model_dir} was trained with {name} = {saved}, here it is "
                             f"{getattr(config, field.name)!r}: remove {name} to inherit its own.")


def _is_same(config: DecoderConfig, name: str, saved: str) -> bool:
    """Whether a field's literal equals the config's value."""
    try:
        other = dataclasses.replace(config, **{name: ast.literal_eval(saved)})
    except (TypeError, ValueError):  # not a valid value for this field, or not together with the others
        return False
    return getattr(other, MEANT.get(name, name)) == getattr(config, MEANT.get(name, name))


def require_same_stage(ledger: Mapping[str, Any], stage: str, model_dir: str, started_from: str | None) -> None:
    """Raises ValueError if a run directory is of the other stage, or of a run that started elsewhere.

    Args:
      ledger: of its checkpoint.
      stage: of the run that continues there.
      model_dir: the run directory.
      started_from: INITIAL_CHECKPOINT_PATH of the run that continues.
    """
    if ledger["stage"] != stage:
        hint = f" To tune its model, add --gin.INITIAL_CHECKPOINT_PATH={model_dir}." \
            if stage == "tuning" and not (started_from and resolved(started_from) == resolved(model_dir)) else ""
        raise ValueError(f"{model_dir} holds a run of the stage {ledger['stage']}, but this one is of the stage "
                         f"{stage}: use another MODEL_DIR.{hint}")
    if started_from and "before" in ledger:
        before = ledger["before"][-1]["model_dir"] if ledger["before"] else "new parameters"
        if before != resolved(started_from):
            raise ValueError(f"{model_dir} holds a run that started from {before}, not from {resolved(started_from)}: "
                             "use another MODEL_DIR, or set INITIAL_CHECKPOINT_PATH back.")


def require_same_settings(saved: Mapping[str, str], now: Mapping[str, str], model_dir: str) -> None:
    """Raises ValueError, with the differences, if a run directory belongs to another configuration."""
    # Every parameter is saved, including defaults: one that only one side has was added or removed by a version.
    # Added model fields had their default before.
    saved = {f"model.{name}": value for name, value in DEFAULTS.items()} | dict(saved)
    names = sorted(name for name in set(saved) & set(now) if not is_free_on_resume(name))
    differing = [name for name in names if saved[name] != now[name]]
    if differing:
        listed = "; ".join(f"{name} was {saved[name]}, is {now[name]}" for name in differing[:6])
        raise ValueError(f"{model_dir} holds a run of another configuration: {listed}"
                         f"{' and more' if len(differing) > 6 else ''}. Restore them, or use another MODEL_DIR; with "
                         f"--gin.INITIAL_CHECKPOINT_PATH={model_dir} a new run starts from these parameters.")
