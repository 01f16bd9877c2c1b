"""The table of official files, `releases.toml`, as objects."""

import difflib
import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class File:
    """A file, or an archive of files, as published.

    Attributes:
      url: None if the publisher provides it only on request.
      places: paths below DATA_DIR, each with the matching member of the archive, or None for the file itself.
      size: in bytes; None if unknown.
      digest: "sha256:", "md5:" or "git:" and hexadecimal digits; None if none is published.
    """

    url: str | None
    places: Mapping[str, str | None]
    size: int | None = None
    digest: str | None = None


@dataclass(frozen=True)
class Release:
    """A published benchmark or instruction set; `tasks` and `corpora` name its readers."""

    name: str
    title: str
    homepage: str
    licence: str
    citation: str
    tasks: tuple[str, ...]
    corpora: tuple[str, ...]
    files: tuple[File, ...]
    ask: str | None = None  # where to request files that are not published


@functools.cache
def releases() -> dict[str, Release]:
    """All releases by name."""
    table = tomllib.loads(resources.files(__package__).joinpath("releases.toml").read_text(encoding="utf-8"))
    return {name: Release(
        name=name, files=tuple(_file(entry) for entry in row.pop("files")), tasks=tuple(row.pop("tasks")),
        corpora=tuple(row.pop("corpora")), **row) for name, row in table.items()}


def _file(entry: Mapping[str, Any]) -> File:
    kind = next((kind for kind in ("sha256", "md5", "git") if kind in entry), None)
    places = entry["members"] if "members" in entry else {entry["path"]: None}
    return File(entry.get("url"), places, entry.get("bytes"), kind and f"{kind}:{entry[kind]}")


def release(name: str) -> Release:
    """Finds a release by its name, or by the name of a task or corpus that reads it, such as "code.mbpp".

    Raises:
      ValueError: there is none; the one-line message lists all names.
    """
    by_name = {alias: each for each in releases().values() for alias in (*each.tasks, *each.corpora)} | releases()
    if name not in by_name:
        near = difflib.get_close_matches(name, by_name, n=1)
        raise ValueError(f"there are no official files named {name!r}" + (f"; nearest: {near[0]}" if near else "")
                         + f". The names are {', '.join(releases())}.")
    return by_name[name]


def listing() -> str:
    """A table of all releases for printing."""
    rows = [("name", "licence", "what"), *((each.name, each.licence, each.title) for each in releases().values())]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}" for row in rows)
