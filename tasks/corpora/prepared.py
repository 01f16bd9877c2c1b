"""What `t5x prepare` says of the folder that a corpus's files lie in: how, and of what, they were prepared."""

import json
import os
from collections.abc import Iterable
from typing import Any

from codellm_jax.contents import content, is_file

NAMED = 20  # input files that are named one by one; of more it is their folders
_HASHES = ("steps_sha256", "inputs_sha256")


def prepared(files: Iterable[str]) -> list[dict[str, Any]]:
    """For each folder of some files in which `t5x prepare` left its manifest, what that says.

    Returns:
      As JSON: "folder", "steps_sha256" (of the steps with all options), "inputs_sha256" (of the inputs' specs, names
      and sizes), and "inputs": of each corpus that was prepared its files, or, of more than 20, their folders with how
      many lie in each.

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
    """What a manifest says; None where it is another program's."""
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
