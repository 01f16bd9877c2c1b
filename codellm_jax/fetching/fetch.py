"""`t5x fetch`: downloads official files to the folder DATA_DIR, where the readers look for them.

    t5x fetch mbpp logic --data_dir=/data

HF_ENDPOINT names a mirror of huggingface.co, as it does for Hugging Face's libraries.

SHA256SUMS in that folder, in the format of `sha256sum --check`, records the SHA-256 of each file at its first download.
Files without a published digest are checked against it from then on.
"""

import contextlib
import errno
import fcntl
import gzip
import os
import shlex
import shutil
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from codellm_jax.fetching.download import Refused, Unreachable, digest_of, download, matches, partial
from codellm_jax.fetching.releases import File, Release, listing, release

SUMS, LOCK = "SHA256SUMS", ".fetch.lock"
HUB = "https://huggingface.co"


class NeedsSignature(ValueError):
    """The publisher provides the files only on request."""


def fetch(names: Sequence[str], data_dir: str | None, say: Callable[[str], None] = print) -> None:
    """Downloads the files of releases to a folder. Existing files are checked and kept.

    Args:
      names: in the format of `releases.release`; without names, the releases are listed.
      data_dir: a local folder, which is created if needed.
      say: prints a progress line.

    Raises:
      ValueError: a name or the folder is wrong, and nothing was done; or the publisher provides the files only on
        request.
      OSError: some files are unavailable, or another process fetches into the same folder. The other files are fetched
        first, unless there is no network.
    """
    if not names:
        say(listing())
        return
    wanted = {each.name: each for each in map(release, names)}.values()
    if not data_dir:
        raise ValueError("no --data_dir is given: the folder that other commands take as --gin.DATA_DIR.")
    if "://" in data_dir:
        raise ValueError(f"{data_dir} is not a local folder: fetch into a local one and copy it there.")
    top = Path(data_dir).expanduser()
    top.mkdir(parents=True, exist_ok=True)
    failures: list[OSError | ValueError] = []
    with _alone(top):
        present = {name: os.path.join(folder, name) for folder, _, names in os.walk(top) for name in names}
        for each in wanted:
            say(f"{each.name}: {each.title} (licence: {each.licence}; {each.homepage})")
            try:
                _fetch_release(each, top, present, say)
            except NeedsSignature as error:
                failures.append(ValueError(f"{each.name}: {error}"))
            except Unreachable as error:
                failures.append(OSError(f"{each.name}: {error} Without a network, run this command elsewhere and "
                                        f"copy its folder to {top}."))
                break
            except Refused as error:
                failures.append(OSError(f"{each.name}: {error} Look at {each.homepage} for where the files are now, "
                                        f"and put them at {_places(each.files, top)}."))
            except OSError as error:
                failures.append(OSError(f"{each.name}: {error}"))
    if failures:
        raise type(failures[0])(" ".join(map(str, failures)))
    say(f"Use them with --gin.DATA_DIR={shlex.quote(str(top))}")


def _fetch_release(each: Release, top: Path, present: Mapping[str, str], say: Callable[[str], None]) -> None:
    """Downloads the files of a release; `present` maps the names of files below the folder to one path each."""
    for place in (place for file in each.files for place in file.places):
        name = Path(place).name
        # Readers refuse two files of the same name, except for these, which they distinguish by their folders.
        if name in present and not (top / place).exists() and name not in ("train.json", "dev.json", "test.json"):
            raise OSError(f"{present[name]} exists already. Move it to {top / place}, where it will be checked, or "
                          "remove it.")
    missing = [file for file in each.files if not all((top / place).exists() for place in file.places)]
    if each.ask and missing:
        raise NeedsSignature(f"the publisher provides the files only on request. Ask for them at {each.ask} and put "
                             f"them at {_places(missing, top)}.")
    for file in each.files:
        _fetch_file(file, top, say)


def _places(files: Sequence[File], top: Path) -> str:
    return " and ".join(str(top / place) for file in files for place in file.places)


def _fetch_file(file: File, top: Path, say: Callable[[str], None]) -> None:
    recorded = _recorded(top)
    missing = [place for place in file.places if not (top / place).exists()]
    for place in file.places:
        if place not in missing:
            say(f"  {place} exists already, {_checked(file, place, top, recorded.get(place))}")
    if not missing:
        return
    assert file.url is not None
    url = file.url.replace(HUB, os.environ.get("HF_ENDPOINT", "").rstrip("/") or HUB)
    first, start = top / missing[0], time.monotonic()
    for place in missing:
        (top / place).parent.mkdir(parents=True, exist_ok=True)
    is_archive = file.places[missing[0]] is not None
    # An archive stays beside its members until they are unpacked.
    target = first.with_name(url.rpartition("/")[2]) if is_archive else first
    say(f"  {target.name}: downloading {url}")
    part = download(url, target, file.size, file.digest)
    size, seconds = part.stat().st_size, time.monotonic() - start
    say(f"  {target.name}: {size:,} bytes in {seconds:.1f} s ({size / 1e6 / max(seconds, 1e-3):.1f} MB/s), "
        + ("matches the published digest" if file.digest else f"no digest is published; recorded in {SUMS}"))
    whole = {missing[0]: part}
    if is_archive:
        whole = _members(part, {place: str(file.places[place]) for place in missing}, top)
        part.unlink()
    for place, content in whole.items():
        found = digest_of(content)
        if not file.digest and recorded.get(place, found) != found:
            for left in whole.values():
                left.unlink()
            raise OSError(f"{url} has changed since its first download: the sha256 of {place} is {found} instead of "
                          f"{recorded[place]}. Remove its line in {top / SUMS} to accept the change.")
        recorded[place] = found
    _record(top, recorded)  # before the renames, so that no file is ever there unrecorded
    for place, content in whole.items():
        os.replace(content, top / place)


def _checked(file: File, place: str, top: Path, recorded: str | None) -> str:
    """Describes how an existing file was checked. Raises OSError if it is not the expected one."""
    digest = file.digest if file.places[place] is None and file.digest else recorded and f"sha256:{recorded}"
    if not digest:
        return "not checked: no digest is published, and it was not fetched here"
    if not matches(top / place, digest):
        raise OSError(f"{top / place} is not the official file: its digest is not {digest}. Move it elsewhere or "
                      "remove it to fetch the official one.")
    return "matches the published digest" if digest == file.digest else "unchanged since it was fetched"


def _members(archive: Path, members: dict[str, str], top: Path) -> dict[str, Path]:
    """Unpacks members of a zip or tar archive beside their destinations; returns the path of each by its destination.

    Raises:
      OSError: the file is not an archive, is damaged, or lacks a member.
    """
    found = {place: partial(top / place) for place in members}
    try:
        with _opened(archive) as opened:
            for place, member in members.items():
                with opened(member) as source, found[place].open("wb") as stream:
                    shutil.copyfileobj(source, stream)
                    stream.flush()
                    os.fsync(stream.fileno())
    except (KeyError, EOFError, gzip.BadGzipFile, zlib.error, tarfile.TarError, zipfile.BadZipFile) as error:
        for left in [archive, *found.values()]:
            left.unlink(missing_ok=True)
        raise OSError(f"{archive.name[1:].removesuffix('.part')} is not an archive with "
                      f"{' and '.join(members.values())}: {error}.") from error
    return found


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[Callable[[str], IO[bytes]]]:
    """A function that opens a member of an archive by its path."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            yield zipped.open
        return
    with tarfile.open(archive) as tape:
        def member(path: str) -> IO[bytes]:
            stream = tape.extractfile(path)
            if stream is None:
                raise KeyError(f"{path} is not a file")
            return stream

        yield member


def _recorded(top: Path) -> dict[str, str]:
    """The SHA-256 by path, from SHA256SUMS."""
    try:
        lines = (top / SUMS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    return {path: digits for digits, _, path in (line.partition("  ") for line in lines) if path}


def _record(top: Path, recorded: dict[str, str]) -> None:
    draft = top / f".{SUMS}"
    draft.write_text("".join(f"{digits}  {path}\n" for path, digits in sorted(recorded.items())), encoding="utf-8")
    os.replace(draft, top / SUMS)


@contextlib.contextmanager
def _alone(top: Path) -> Iterator[None]:
    """Prevents other processes from fetching into the same folder at the same time."""
    with (top / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"another process is fetching into {top}; wait until it ends.") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # a file system without locks
                raise
        yield
