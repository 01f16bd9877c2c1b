"""Files of a hub, by huggingface_hub (extra `hf`): of published models, hf://ORG/NAME[@REVISION], which are downloaded;
and of data sets, hf://datasets/ORG/NAME[@REVISION]/FILE, which are read as they come.

The cache, the server and the access are that library's, with its variables: HF_HOME, HF_ENDPOINT, HF_TOKEN,
HF_HUB_OFFLINE. It is imported, and reads them, only where a name is used. It resumes a download that breaks off, and
checks the size of what it downloads, but not the content; that is done here, once for each file of a commit.
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
ATTEMPTS = 5  # of a download whose connection is reset; what ends early, the library resumes as often by itself
LONGEST_WAIT = 60.0  # seconds for the next bytes of an answer, where the library would wait without an end
BYTES_A_REQUEST = 1 << 20  # of a file that is read as it comes, at least: columns lie apart from each other
CHECKED = "checked"  # folder, beside the library's own: which files of a commit have the content they should have


def is_hub_name(path: str) -> bool:
    """Whether a path is a name on a hub, and not that of a file or folder."""
    return path.startswith(HUB)


def snapshot(name: str, patterns: Sequence[str]) -> tuple[Path, str]:
    """Downloads files of a repository on the hub, unless they are in the cache.

    Args:
      name: hf://ORG/NAME[@REVISION], REVISION a branch, a tag or a commit; the branch main if it is left out.
      patterns: which files, such as "*.safetensors"; `*` matches folders, too.

    Returns:
      The folder of the cache that holds them, and the hash of the commit. It may hold other files of the commit, too.

    Raises:
      ValueError: the name is no name, or what it names is not there, or may not be read without a token.
      OSError: the hub cannot be reached, the disk is full, or a file has another content than it should have; all in
        one line.
    """
    repository, revision = _parse(name)
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(f"{name} needs huggingface_hub: pip install 'codellm_jax[hf]'.") from None
    _bound_waits()
    if not sys.stderr.isatty():  # where it is, the library shows its progress
        huggingface_hub.utils.disable_progress_bars()
        _say_once(f"{name}: downloading what {_cache()} lacks of it.")
    attempt = 1
    while True:
        try:
            folder = Path(huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=list(patterns), endpoint=_endpoint(), cache_dir=_cache()))
            if not _matching(folder, patterns):
                raise ValueError(f"{name} holds no file {' or '.join(patterns)}.")
            _check(name, repository, folder, patterns)
            return folder, folder.name
        except Exception as error:  # of the library, of what it connects by, of the disk
            if attempt == ATTEMPTS or not _was_reset(error):
                _refuse(name, error)
        time.sleep(attempt)
        attempt += 1


def _parse(name: str) -> tuple[str, str]:
    part = r"\w[\w.-]*"
    found = re.fullmatch(rf"({part}/{part})(?:@([\w.+/-]+))?", name.removeprefix(HUB), re.ASCII)
    if not found or not is_hub_name(name):
        raise ValueError(f"{name} is no name on the hub; give {FORM}.")
    repository, revision = found[1], found[2] or "main"
    if ".." in name or "--" in repository or revision.startswith("/"):
        raise ValueError(f"{name} is no name on the hub; give {FORM}.")
    return repository, revision


@functools.cache  # for other files of the same name may be asked for
def _say_once(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _endpoint() -> str:
    """The address of the hub; read again here, as the library keeps what it was when another module imported it."""
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")


def _cache() -> str:
    """The folder of the cache; likewise."""
    from huggingface_hub import constants

    home = os.environ.get("HF_HOME")
    return os.environ.get("HF_HUB_CACHE") or (os.path.join(home, "hub") if home else constants.HF_HUB_CACHE)


@functools.cache  # once in a process
def _bound_waits() -> None:
    """Bounds how long the library's requests wait for an answer, where it sets no bound of its own."""
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
    """The files of a folder of the cache that match; names have slashes."""
    from huggingface_hub.utils import filter_repo_objects

    files = sorted(str(path.relative_to(folder).as_posix()) for path in folder.rglob("*") if path.is_file())
    return list(filter_repo_objects(files, allow_patterns=list(patterns)))


def _check(name: str, repository: str, folder: Path, patterns: Sequence[str]) -> None:
    """Raises OSError where a file has another content than the hub says; it is removed from the cache."""
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
            # Blobs have the name that the server gives a file, for which mirrors take a digest of their own kind.
            expected.add(blob.readlink().name)
        expected = {digest for digest in expected if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", digest)}
        found = [digest for length in sorted({len(digest) for digest in expected}) for digest in _digests(blob, length)]
        if expected and not expected & set(found):
            _remove(blob)
            wrong.append(f"{file} has the digest {found[0]} in the place of {min(expected, key=len)}")
    if wrong:
        raise OSError(f"{name}: {', '.join(wrong)}; removed from the cache, so that the next start downloads it anew.")
    with contextlib.suppress(OSError):  # a cache that may only be read is checked at each start
        known_file.parent.mkdir(exist_ok=True)
        draft = known_file.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({**known, **stamps}))
        draft.replace(known_file)


def _digests(file: Path, length: int) -> list[str]:
    """The digests of a file that have so many hexadecimal digits: its SHA-256, or git's SHA-1 and the plain one."""
    begun = [hashlib.sha256()] if length == 64 else [hashlib.sha1(b"blob %d\0" % file.stat().st_size), hashlib.sha1()]
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            for digest in begun:
                digest.update(piece)
    return [digest.hexdigest() for digest in begun]


def _remove(file: Path) -> None:
    """Removes a file of the cache, and what its link, or a link to a link, leads to."""
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
    """A file or folder of a data set on the hub, with those methods of etils' paths that readers use.

    Each raises ValueError or OSError, in one line, where the hub refuses or cannot be reached; what `open` gives raises
    what the library does.

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
    """A path of a data set, or a pattern of such, with the commit that its branch or tag is at now as its revision.

    Raises:
      ValueError: it is no such path; or there is no such data set, or it may not be read without a token.
      OSError: the hub cannot be reached.
    """
    part = r"\w[\w.-]*"
    revision = r"refs/(?:convert|pr)/[\w.-]+|[^/@]+"
    found = re.fullmatch(rf"hf://datasets/({part}/{part})(?:@({revision}))?(/.*)?", path, re.ASCII)
    if not found:
        raise ValueError(f"{path} names no files of a data set on the hub; give {DATASET_FORM}.")
    with _in_one_line(f"{HUB}datasets/{found[1]}@{found[2] or 'main'}"):
        _file_system()  # which needs the library
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
    return huggingface_hub.HfFileSystem(endpoint=_endpoint())  # which is the same one each time


@contextlib.contextmanager
def _in_one_line(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        _refuse(name, error, "read")


# ---- Errors ------------------------------------------------------------------------------------


def _causes(error: BaseException | None) -> list[BaseException]:
    """An error and what caused it, and so on."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__
    return found


def _is_of_transport(error: BaseException) -> bool:
    """Whether a connection failed; told by name, as the library has changed the one that it connects by."""
    return any(kind.__name__ in ("TransportError", "RequestException") for kind in type(error).__mro__)


def _was_reset(error: Exception) -> bool:
    """Whether a connection was reset while an answer came, which the library does not take up again by itself."""
    kinds = [kind.__name__ for kind in type(error).__mro__]
    return "NetworkError" in kinds and "ConnectError" not in kinds


def _refuse(name: str, error: Exception, done: str = "downloaded") -> NoReturn:
    """Raises, in one line, what an error of the library means."""
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
