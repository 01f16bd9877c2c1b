"""Finds corpus files, local, gs:// or hf://datasets/; reports unreadable files and lost records."""

import collections
import contextlib
import fnmatch
import functools
import hashlib
import importlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from codellm_jax.contents import (
    UnreadableFile,
    cannot_be_read,
    open_binary,
    pinned,
    remote,
    require_file,
    size,
    without_compression,
)

_WILDCARD = re.compile(r"[*?[]")


class Lost(NamedTuple):
    """Yielded by a reader in place of an unreadable record, or of several records lost to one damage."""

    reason: str
    records: int = 1


class Found(NamedTuple):
    """A reader's result: a document, or why there is none, and its place, such as "a.jsonl, line 3"."""

    place: str
    content: str | bytes | Lost
    language: str | None = None  # the language that its file declares
    ids: Any = None  # the document's tokens, if the corpus is tokenized
    licence: str | None = None  # from the record's field "license"


class Counts(collections.Counter[str]):
    """The number of lost records by reason; printed as a line."""

    def __str__(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.items())) or "there are no records"


class PassedOver(dict[str, tuple[int, str]]):
    """Lost records by reason: their number and the place of the first; printed as a line."""

    def add(self, reason: str, place: str, records: int = 1) -> None:
        """Counts records; `place`, such as "a.jsonl, line 3", is not printed if the reason names it."""
        count, first = self.get(reason, (0, place))
        self[reason] = (count + records, first)

    def __str__(self) -> str:
        told = (f"{count} {reason}" + f" (first: {place})" * (not reason.endswith(f" {os.path.basename(place)}"))
                for reason, (count, place) in sorted(self.items()))
        return ", ".join(told) or "there are no records"


def library(module: str, file: str, what: str, extra: str = "readers") -> Any:
    """Imports a module of a library that reads a kind of files.

    Raises:
      ValueError: it is not installed; one line with how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UnreadableFile(f"{file}: {what} is read by {package}: pip install 'codellm_jax[{extra}]'.") from None


@contextlib.contextmanager
def in_name_of(name: str) -> Iterator[None]:
    """Prefixes an error about a file with the name of a corpus or benchmark."""
    try:
        yield
    except UnreadableFile as error:
        raise ValueError(f"{name}: {error}") from error
    except OSError as error:
        if error.errno is not None:  # else it is one of this package's one-line errors
            raise
        raise type(error)(f"{name}: {error}") from error


def require_readable(files: Sequence[str], require: Callable[[str], object]) -> None:
    """Checks all files before the first is read, so that a long read does not fail at the last one.

    Files on gs:// are checked only when they are read, since each check takes a request.

    Args:
      require: checks one file, and raises UnreadableFile or OSError.

    Raises:
      UnreadableFile, OSError: the error of the first unreadable file, and the names of others.
    """
    refused: list[tuple[str, OSError | UnreadableFile]] = []
    for file in files:
        if "://" not in file:
            try:
                require(file)
            except (OSError, UnreadableFile) as error:
                refused.append((file, error))
    if refused:
        others = [file for file, _ in refused[1:]]
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        told = f" Others that cannot be read: {', '.join(others[:3])}{more}." if others else ""
        raise type(refused[0][1])(f"{refused[0][1]}{told}") from refused[0][1]


# ---- Finding -----------------------------------------------------------------------------------


def matches(
    patterns: str | Sequence[str], name: str, files_of: Callable[[str], list[str] | None] = lambda folder: None
) -> list[str]:
    """The files that one or more globs match, sorted and each once: absolute paths, gs:// addresses, or hf:// ones
    with the data set's current commit.

    `*`, `?` and `[...]` match within a name, but not a leading dot; `**` matches any folders, including links to
    folders, each once. An existing name is taken literally, even with brackets.

    Args:
      files_of: returns the files that a folder stands for; None for an ordinary folder.

    Raises:
      OSError: a pattern matches no file, a broken link, or something unreadable.
      ValueError: a pattern matches only folders, or something that is not a file.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    with in_name_of(name):
        found = {file for pattern in patterns for file in _matched(pattern, files_of)}
    # Through links a file may have several names. The first represents all, also in cache keys.
    once: dict[str, str] = {}
    for file in sorted(found):
        once.setdefault(real(file), file)
    if others := sorted(found - set(once.values())):
        _tell(f"{name}: {len(others)} of {len(found)} names are links to files that other names also reach; each "
              f"file is read once. The first is {others[0]}.")
    return sorted(once.values())


def real(file: str) -> str:
    """The unique path of a file, with links resolved."""
    return file if "://" in file else os.path.realpath(file)


@functools.cache
def _tell(warning: str) -> None:
    """Warns once per process: patterns are matched again for every split."""
    logging.warning(warning)


def _matched(pattern: str, files_of: Callable[[str], list[str] | None]) -> set[str]:
    """The files that one glob matches; raises as `matches` does."""
    candidates = set(_remote_matches(pattern) if "://" in pattern else _local_matches(pattern))
    folders = {found for found in candidates if _is_folder(found)}
    files = candidates - folders | {file for folder in folders for file in files_of(folder) or ()}
    if "://" not in pattern:
        for file in sorted(files):
            require_file(file)
    if files:
        return files
    if not folders:
        hint = " A literal bracket is written [[]." if "[" in pattern else ""
        raise FileNotFoundError(f"no file matches {pattern!r} (seen from {os.getcwd()}).{hint}")
    is_one = os.path.basename(pattern.rstrip("/")) == os.path.basename(min(folders))
    raise UnreadableFile(f"{pattern!r} {'is a folder' if is_one else 'matches only folders'}; "
                         f"{_advice(pattern, min(folders))}")


def _advice(pattern: str, folder: str) -> str:
    """Suggests a pattern in place of one that names folders, from the content of one of them."""
    files = below(folder)
    if not files:
        return f"there is no file in {folder}."
    names = [os.path.basename(file) for file in files]
    suffixes = collections.Counter(
        os.path.splitext(without_compression(name))[1] + name[len(without_compression(name)):] for name in names)
    deep = "**/" if any(os.path.dirname(file) != folder.rstrip("/") for file in files) else ""
    return f"write such as '{pattern.rstrip('/')}/{deep}*{max(suffixes, key=suffixes.__getitem__)}'."


def _is_folder(found: str) -> bool:
    if "://" not in found:
        return os.path.isdir(found)
    return bool(remote(found).is_dir())


def _local_matches(pattern: str) -> Iterator[str]:
    """Yields everything that a pattern matches, files or not, including broken links."""
    path = os.path.expanduser(pattern)
    start = os.sep if os.path.isabs(path) else os.getcwd()
    # The current directory, implied by a relative pattern, may also hold brackets.
    parts = [part for part in os.path.normpath(path).split(os.sep) if part not in ("", ".")]
    return _led_to(start, parts)


def _led_to(folder: str, parts: Sequence[str]) -> Iterator[str]:
    if not parts:
        yield folder
        return
    first, rest = parts[0], parts[1:]
    if first == "..":
        yield from _led_to(os.path.dirname(folder), rest)
    elif first == "**":
        for each in _folders(folder):
            yield from _led_to(each, rest or ["*"])
    elif not re.search("[*?]", first) and os.path.lexists(os.path.join(folder, first)):
        yield from _led_to(os.path.join(folder, first), rest)
    elif _WILDCARD.search(first) and os.path.isdir(folder):
        for name in sorted(_names(folder)):
            if fnmatch.fnmatchcase(name, first) and (first.startswith(".") or not name.startswith(".")):
                yield from _led_to(os.path.join(folder, name), rest)


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        raise cannot_be_read(folder, error) from error


def _folders(top: str) -> Iterator[str]:
    """Yields a folder and all folders in it, each once, without hidden ones; follows links."""
    waiting, visited = [top], set()
    while waiting:
        folder = waiting.pop()
        # A link may lead to a folder that is visited anyway, or form a cycle.
        if not os.path.isdir(folder) or os.path.realpath(folder) in visited:
            if not os.path.exists(folder) and os.path.islink(folder) and not os.path.splitext(folder)[1]:
                _tell(f"{folder} is a link to {os.readlink(folder)}, which does not exist; if that was a folder, none "
                      "of its files are read.")
            continue
        visited.add(os.path.realpath(folder))
        yield folder
        waiting += [os.path.join(folder, name) for name in sorted(_names(folder), reverse=True)
                    if not name.startswith(".")]


def _remote_matches(pattern: str) -> list[str]:
    pattern = pinned(pattern)
    parts = pattern.split("/")
    fixed = next((i for i, part in enumerate(parts) if _WILDCARD.search(part)), len(parts))
    if fixed == len(parts) or ("[" in pattern and remote(pattern).exists()):
        return [os.fspath(remote(pattern))] if remote(pattern).exists() else []
    return [os.fspath(file) for file in remote("/".join(parts[:fixed])).glob("/".join(parts[fixed:]))]


def glance(file: str) -> str:
    """A hash of 32 evenly spread pieces of a file, in hexadecimal; detects most changes that keep the size, without
    reading everything.
    """
    digest, length = hashlib.sha256(), size(file)
    with open_binary(file) as stream:
        for part in range(33):
            stream.seek(min(part * (length // 32), max(0, length - 4096)))
            digest.update(stream.read(4096))
    return digest.hexdigest()[:16]


def below(folder: str) -> list[str]:
    """All files in a folder and its sub-folders, sorted; hidden folders are left out, links are followed.

    Broken links are included: `require_file` reports one that is needed.

    Raises:
      OSError: there is no such folder, or one of them cannot be read.
    """
    if "://" in folder:
        walk = ((os.fspath(root), folders, names) for root, folders, names in remote(folder).walk())
        files = [f"{root.rstrip('/')}/{name}" for root, _, names in walk for name in names]
        files = [file for file in files if "/." not in file.removeprefix(folder)]
        if not files and not remote(folder).exists():
            raise FileNotFoundError(f"there is no folder {folder!r}")
        return sorted(files)
    top = os.path.abspath(os.path.expanduser(folder))
    if not os.path.isdir(top):
        raise FileNotFoundError(f"there is no folder {top!r}")
    found = (os.path.join(each, name) for each in _folders(top) for name in _names(each))
    return sorted(file for file in found if not os.path.isdir(file))
