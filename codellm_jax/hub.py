"""Files of a hub, through huggingface_hub (extra `hf`): files of published models, hf://ORG/NAME[@REVISION], are
downloaded; files of data sets, hf://datasets/ORG/NAME[@REVISION]/FILE, are streamed.

That library handles the cache, the server and the access, with its variables HF_HOME, HF_ENDPOINT, HF_TOKEN and
HF_HUB_OFFLINE. It is imported, and reads them, only when a name is used. It resumes interrupted downloads and checks
the size of each file, but not the content; this module checks that, once for each file of a commit.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

HUB = "hf://"
FORM = "hf://ORG/NAME or hf://ORG/NAME@REVISION"
DATASET_FORM = "hf://datasets/ORG/NAME/FILES or hf://datasets/ORG/NAME@REVISION/FILES"
ATTEMPTS = 5  # of a download after a connection reset; the library itself resumes truncated answers as often
LONGEST_WAIT = 60.0  # seconds to wait for the next bytes of an answer, where the library would wait forever
BYTES_A_REQUEST = 1 << 20  # smallest request of a streamed file, since columns are far apart
CHECKED = "checked"  # folder beside the library's own that records which files of a commit were verified


def is_hub_name(path: str) -> bool:
    """Whether a path is a name on a hub, and not a file or folder."""
    return path.startswith(HUB)


def snapshot(name: str, patterns: Sequence[str]) -> tuple[Path, str]:
    """Downloads files of a repository on the hub, unless they are in the cache.

    Args:
      name: hf://ORG/NAME[@REVISION], REVISION a branch, a tag or a commit; by default the branch main.
      patterns: which files, such as "*.safetensors"; `*` also matches folders.

    Returns:
      The folder of the cache that holds them, and the hash of the commit. The folder may also hold other files of the
      commit.

    Raises:
      ValueError: the name is malformed, does not exist, or may not be read without a token.
      OSError: the hub cannot be reached, the disk is full, or a file's content is wrong; all in one line.
    """
    repository, revision = _parse(name)
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(f"{name} needs huggingface_hub: pip install 'codellm_jax[hf]'.") from None
    _bound_waits()
    if not sys.stderr.isatty():  # if it is a terminal, the library shows its progress
        huggingface_hub.utils.disable_progress_bars()
        _say_once(f"{name}: downloading the files that {_cache()} lacks.")
    attempt = 1
    while True:
        try:
            folder = Path(huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=list(patterns), endpoint=_endpoint(), cache_dir=_cache()))
            if not _matching(folder, patterns):
                raise ValueError(f"{name} holds no file {' or '.join(patterns)}.")
            _check(name, repository, folder, patterns)
            return folder, folder.name
        except Exception as error:  # errors of the library, of its transport, of the disk
            if attempt == ATTEMPTS or not _was_reset(error):
                _refuse(name, error)
        time.sleep(attempt)
        attempt += 1


def _parse(name: str) -> tuple[str, str]:
    part = r"\w[\w.-]*"
    found = re.fullmatch(rf"({part}/{part})(?:@([\w.+/-]+))?", name.removeprefix(HUB), re.ASCII)
    if not found or not is_hub_name(name):
        raise ValueError(f"{name} is not a name on the hub; give {FORM}.")
    repository, revision = found[1], found[2] or "main"
    if ".." in name or "--" in repository or revision.startswith("/"):
        raise ValueError(f"{name} is not a name on the hub; give {FORM}.")
    return repository, revision


@functools.cache  # since other files of the same name may be requested
def _say_once(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _endpoint() -> str:
    """The address of the hub; read again here, because the library keeps the value from when it was first imported."""
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")


def _cache() -> str:
    """The folder of the cache, also read again."""
    from huggingface_hub import constants

    home = os.environ.get("HF_HOME")
    return os.environ.get("HF_HUB_CACHE") or (os.path.join(home, "hub") if home else constants.HF_HUB_CACHE)


@functools.cache  # once per process
def _bound_waits() -> None:
    """Limits how long the library's requests wait for an answer, where it sets no limit."""
    import huggingface_hub

    session = huggingface_hub.get_session()

    def bound(request: Any) -> None:
        given = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {
            kind: given.get(kind) or LONGEST_WAIT for kind in ("connect", "read", "write", "pool")}

    hooks = {"request": [*session.event_hooks["request"], bound]}
    huggingface_hub.set_client_factory(lambda: type(session)(event_hooks=hooks, follow_redirects=True))


# ---- Content -----------------------------------------------------------------------------------


def _matching(folder: Path, patterns: Sequence[str]) -> list[str]:
    """The matching files of a folder of the cache; names have slashes."""
    from huggingface_hub.utils import filter_repo_objects

    files = sorted(str(path.relative_to(folder).as_posix()) for path in folder.rglob("*") if path.is_file())
    return list(filter_repo_objects(files, allow_patterns=list(patterns)))


def _check(name: str, repository: str, folder: Path, patterns: Sequence[str]) -> None:
    """Raises OSError if a file's content differs from the hub's digest, and removes it from the cache."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.hf_api import RepoFile

    known_file = folder.parent.parent / CHECKED / f"{folder.name}.json"
    try:
        known = json.loads(known_file.read_text())
    except (OSError, ValueError):
        known = {}
    stamps = {file: [status.st_size, status.st_mtime_ns]
              for file in _matching(folder, patterns) for status in [(folder / file).stat()]}
    new = [file for file, stamp in stamps.items() if known.get(file) != stamp]
    if not new:
        return
    listed: dict[str, Any] = {}
    if not constants.HF_HUB_OFFLINE:
        tree = HfApi(_endpoint()).list_repo_tree(repository, recursive=True, revision=folder.name)
        listed = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    wrong = []
    for file in new:
        entry, blob = listed.get(file), (folder / file)
        expected = {entry.lfs.sha256 if entry.lfs else entry.blob_id} if entry else set()
        if not (entry and entry.lfs) and blob.is_symlink():
            # Blobs are named by the server's digest of the file; mirrors use digests of various kinds.
            expected.add(blob.readlink().name)
        expected = {digest for digest in expected if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", digest)}
        found = [digest for length in sorted({len(digest) for digest in expected}) for digest in _digests(blob, length)]
        if expected and not expected & set(found):
            _remove(blob)
            wrong.append(f"{file} has the digest {found[0]} instead of {min(expected, key=len)}")
    if wrong:
        raise OSError(f"{name}: {', '.join(wrong)}; removed from the cache, so that the next start downloads it again.")
    with contextlib.suppress(OSError):  # a read-only cache is checked at each start
        known_file.parent.mkdir(exist_ok=True)
        draft = known_file.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({**known, **stamps}))
        draft.replace(known_file)


def _digests(file: Path, length: int) -> list[str]:
    """The digests of a file with this number of hexadecimal digits: its SHA-256, or git's SHA-1 and the plain one."""
    begun = [hashlib.sha256()] if length == 64 else [hashlib.sha1(b"blob %d\0" % file.stat().st_size), hashlib.sha1()]
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            for digest in begun:
                digest.update(piece)
    return [digest.hexdigest() for digest in begun]


def _remove(file: Path) -> None:
    """Removes a file of the cache and everything that its chain of links leads to."""
    while file.is_symlink():
        target = file.parent / file.readlink()
        file.unlink()
        file = target
    file.unlink(missing_ok=True)


# ---- Data sets ---------------------------------------------------------------------------------


class Length(NamedTuple):
    length: int  # bytes


@dataclasses.dataclass(frozen=True)
class DatasetFile:
    """A file or folder of a data set on the hub, with the methods of etils' paths that readers use.

    Each raises ValueError or OSError, in one line, if the hub refuses or cannot be reached; the stream from `open`
    raises the library's errors.

    Attributes:
      path: hf://datasets/ORG/NAME[@REVISION][/FILE].
    """

    path: str

    def __fspath__(self) -> str:
        return self.path

    def exists(self) -> bool:
        return self._info() is not None

    def is_dir(self) -> bool:
        found = self._info()
        return found is not None and found["type"] == "directory"

    def stat(self) -> Length:
        found = self._info()
        if found is None:
            raise FileNotFoundError(f"There is no {self.path}.")
        return Length(found["size"])

    def open(self, mode: str = "rb") -> Any:
        with _in_one_line(self.path):
            return _file_system().open(self.path, mode, block_size=BYTES_A_REQUEST)

    def glob(self, pattern: str) -> "list[DatasetFile]":
        with _in_one_line(self.path):
            found = _file_system().glob(f"{self.path.rstrip('/')}/{pattern}")
            return [DatasetFile(f"{HUB}{name}") for name in sorted(found)]

    def walk(self) -> "list[tuple[DatasetFile, list[str], list[str]]]":
        with _in_one_line(self.path):
            return [(DatasetFile(f"{HUB}{root}"), list(folders), list(names))
                    for root, folders, names in _file_system().walk(self.path)]

    def _info(self) -> dict[str, Any] | None:
        with _in_one_line(self.path):
            try:
                found: dict[str, Any] = _file_system().info(self.path)
                return found
            except FileNotFoundError:
                return None


def pinned(path: str) -> str:
    """A path or pattern of a data set, with the current commit of its branch or tag as its revision.

    Raises:
      ValueError: it is not such a path, there is no such data set, or it may not be read without a token.
      OSError: the hub cannot be reached.
    """
    part = r"\w[\w.-]*"
    revision = r"refs/(?:convert|pr)/[\w.-]+|[^/@]+"
    found = re.fullmatch(rf"hf://datasets/({part}/{part})(?:@({revision}))?(/.*)?", path, re.ASCII)
    if not found:
        raise ValueError(f"{path} names no files of a data set on the hub; give {DATASET_FORM}.")
    with _in_one_line(f"{HUB}datasets/{found[1]}@{found[2] or 'main'}"):
        _file_system()  # this needs the library
        from huggingface_hub import HfApi

        revision = (found[2] or "main").replace("%2F", "/")
        commit = HfApi(_endpoint()).dataset_info(found[1], revision=revision).sha
    return f"{HUB}datasets/{found[1]}@{commit}{found[3] or ''}"


def _file_system() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(f"Names that begin with {HUB} need huggingface_hub: pip install 'codellm_jax[hf]'.") from None
    _bound_waits()
    return huggingface_hub.HfFileSystem(endpoint=_endpoint())  # cached by the library


@contextlib.contextmanager
def _in_one_line(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        _refuse(name, error, "read")


# ---- Errors ------------------------------------------------------------------------------------


def _causes(error: BaseException | None) -> list[BaseException]:
    """An error and its chain of causes."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__
    return found


def _is_of_transport(error: BaseException) -> bool:
    """Whether a connection failed; decided by class name, because the library has changed its transport."""
    return any(kind.__name__ in ("TransportError", "RequestException") for kind in type(error).__mro__)


def _was_reset(error: Exception) -> bool:
    """Whether a connection was reset during an answer, after which the library does not retry."""
    kinds = [kind.__name__ for kind in type(error).__mro__]
    return "NetworkError" in kinds and "ConnectError" not in kinds


def _refuse(name: str, error: Exception, done: str = "downloaded") -> NoReturn:
    """Raises a one-line error that explains an error of the library."""
    if isinstance(error, ValueError | OSError) and str(error).startswith((name, "Names that begin with")):  # our own
        raise error
    from huggingface_hub import errors

    causes = _causes(error)
    status = next((cause.response.status_code for cause in causes if isinstance(cause, errors.HfHubHTTPError)), None)
    no_room = next((cause for cause in causes if isinstance(cause, OSError) and cause.errno == errno.ENOSPC), None)
    repository = name.partition("@")[0]
    token = "set HF_TOKEN to a token that may read it"
    if isinstance(error, errors.GatedRepoError):
        raise ValueError(f"{repository} is gated: accept its terms on its page, and {token}.") from error
    if isinstance(error, errors.RepositoryNotFoundError):
        raise ValueError(f"{_endpoint()} has no {repository}, or it is private: check the name, or {token}."
                         ) from error
    if isinstance(error, errors.RevisionNotFoundError):
        raise ValueError(f"{repository} has no revision {name.partition('@')[2] or 'main'}.") from error
    if status in (401, 403):
        raise ValueError(f"{_endpoint()} refuses {name} (HTTP {status}): {token}.") from error
    if no_room:
        raise OSError(errno.ENOSPC, f"{name}: the disk of {_cache()} is full; make room, or set HF_HOME to "
                      "a folder elsewhere") from error
    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in causes):
        raise OSError(f"{name} is not in {_cache()}, or not all of it, and HF_HUB_OFFLINE forbids to "
                      "download it.") from error
    first_line = (str(causes[-1]).strip().splitlines() or [type(causes[-1]).__name__])[0]
    if any(_is_of_transport(cause) for cause in causes):
        raise OSError(f"{name}: the connection to {_endpoint()} failed ({first_line}); start again to go on, and "
                      "where a mirror is used, set HF_ENDPOINT to it.") from error
    if status is not None:
        raise OSError(f"{_endpoint()} answers {name} with an error (HTTP {status}): {first_line}") from error
    raise OSError(f"{name} cannot be {done}: {first_line}") from error
