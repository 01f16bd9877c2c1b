"""Files of a run that others may have touched: checks that they are still in place, and sets them aside."""

import os
from collections.abc import Iterable
from typing import IO, Any

from etils import epath

SET_ASIDE = "set_aside"


def is_still_at(file: IO[Any], path: str) -> bool:
    """Whether an open file is still the one at `path`: not removed, moved or replaced."""
    try:
        there = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return os.path.samestat(there, os.fstat(file.fileno()))


def set_aside(paths: Iterable[epath.Path], directory: epath.Path) -> epath.Path:
    """Moves the existing ones of some files and folders to DIRECTORY/set_aside/NUMBER; returns that folder."""
    number = 1
    while (aside := directory / SET_ASIDE / str(number)).exists():
        number += 1
    aside.mkdir(parents=True, exist_ok=True)
    for path in paths:
        if path.exists():
            path.rename(aside / path.name)
    return aside


def is_step(name: str) -> bool:
    """Whether the name of a checkpoint folder is a step number in the form that a save writes."""
    return name.isascii() and name.isdigit() and str(int(name)) == name
