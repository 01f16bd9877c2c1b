"""Files of a run that others may have touched: whether they still lie where they were, and how they are set aside."""

import os
from collections.abc import Iterable
from typing import IO, Any

from etils import epath

SET_ASIDE = "set_aside"


def is_still_at(file: IO[Any], path: str) -> bool:
    """Whether an open file is the one that lies at `path`: not removed, moved or replaced since."""
    try:
        there = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return os.path.samestat(there, os.fstat(file.fileno()))


def set_aside(paths: Iterable[epath.Path], directory: epath.Path) -> epath.Path:
    """Moves those of some files and folders that are there to DIRECTORY/set_aside/NUMBER; returns that folder."""
    number = 1
    while (aside := directory / SET_ASIDE / str(number)).exists():
        number += 1
    aside.mkdir(parents=True, exist_ok=True)
    for path in paths:
        if path.exists():
            path.rename(aside / path.name)
    return aside


def is_step(name: str) -> bool:
    """Whether the name of a folder of checkpoints is the number of a step, as a save writes it."""
    return name.isascii() and name.isdigit() and str(int(name)) == name
