"""The manifest of `t5x prepare` in the folder of a corpus's files: their steps and inputs."""

import json
import os
from collections.abc import Iterable
from typing import Any

from codellm_jax.contents import content, is_file

NAMED = 20  # input files that are named one by one; beyond that, only their folders
_HASHES = ("steps_sha256", "inputs_sha256")


def prepared(files: Iterable[str]) -> list[dict[str, Any]]:
    """The manifest of each folder of these files that `t5x prepare` wrote.

    Returns:
      As JSON: "folder", "steps_sha256" (of the steps with all options), "inputs_sha256" (of the inputs' specs, names
      and sizes), and "inputs": the files of each prepared corpus, or if there are more than 20, their folders with the
      number of files in each.

    Raises:
      OSError: a manifest cannot be read.
    """
    found = []
    for folder in sorted({file.rpartition("/")[0] for file in files}):
        manifest = f"{folder}/manifest.json"
        if is_file(manifest) and (told := _told(content(manifest))):
            found.append({"folder": folder, **told})
    return found


def _told(text: bytes) -> dict[str, Any] | None:
    """The content of a manifest; None if another program wrote the file."""
    try:
        manifest = json.loads(text)
    except ValueError:
        return None
    if not isinstance(manifest, dict) or not all(isinstance(manifest.get(key), str) for key in _HASHES):
        return None
    return {**{key: manifest[key] for key in _HASHES},
            "inputs": {one["source"]: _paths(one) for one in manifest["inputs"]}}


def _paths(one: dict[str, Any]) -> list[str]:
    if one["files"] is None:
        return [json.dumps(one["spec"], sort_keys=True)]
    names = [name for name, *_ in one["files"]]
    if len(names) <= NAMED:
        return names
    folders = [os.path.dirname(name) for name in names]
    return [f"{folder}: {folders.count(folder)} files" for folder in dict.fromkeys(folders)]
