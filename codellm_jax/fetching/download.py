"""A file from an HTTP address: resumed after a break, checked, and complete before anything else sees it."""

import hashlib
import http.client
import json
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

ATTEMPTS = 5  # in a row that each bring less than PROGRESS
PROGRESS = 1 << 20  # bytes
TIMEOUT = 20.0  # seconds for a connection, and for the next bytes of an answer
FIRST_WAIT = 1.0  # seconds before the second attempt; doubled before each further one
LONGEST_WAIT = 30.0
PIECE = 1 << 16
LOG_EVERY = 10.0  # seconds between lines of progress, where stderr is no terminal
PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses of a server that may answer later
WEB_PAGE = re.compile(rb"\s*<(!doctype html|html)", re.IGNORECASE)


class Unreachable(OSError):
    """There is no connection to a server at all."""


class Refused(OSError):
    """A server does not give the file."""


class _Interrupted(Exception):
    """An answer broke off, or none came; the next may be whole."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


def partial(target: Path) -> Path:
    """Where a file lies until it is whole: beside its place, so that moving it there takes no copying."""
    return target.with_name(f".{target.name}.part")


def download(url: str, target: Path, size: int | None = None, digest: str | None = None) -> Path:
    """Downloads a file to `partial(target)`, from where its caller moves it.

    What an earlier attempt left there is gone on with, where the server gives parts and the rest is sure to belong to
    it: the digest will tell, or the server's ETag does.

    Args:
      url: http or https; redirects are followed.
      size: in bytes, where it is known.
      digest: as `matches` takes it, where it is known.

    Returns:
      `partial(target)`, whole.

    Raises:
      Unreachable: there is no connection to the server; in one line, as the others.
      Refused: the server does not give the file.
      OSError: it breaks off again and again, or gives another file than the size or digest say; or the disk is full.
    """
    part = partial(target)
    attempts, most = 0, 0
    while True:
        begun, etag = _left_over(part, url, digest)
        most = max(most, begun)
        try:
            if not (begun and begun == size):
                _append(url, part, begun, etag, size, target.name)
        except (_Interrupted, Unreachable) as error:
            found = _size(part)
            if isinstance(error, Unreachable) and not attempts and found <= begun:
                raise
            attempts = 1 if found >= most + PROGRESS else attempts + 1
            most = max(most, found)
            if attempts >= ATTEMPTS:
                raise OSError(f"{url}: {error}, {attempts} times in a row, with {found:,} bytes here; the same command "
                              "goes on from there.") from None
            asked = error.wait if isinstance(error, _Interrupted) else 0.0
            time.sleep(max(asked, min(FIRST_WAIT * 2 ** (attempts - 1), LONGEST_WAIT)))
            continue
        wrong = _wrong(part, size, digest)
        if wrong is None:
            _origin(part).unlink(missing_ok=True)
            return part
        part.unlink()
        if not begun:  # else the beginning may have been that of another file
            raise OSError(f"{url} gives another file than the published one: {wrong}. Nothing of it is kept.")


def matches(file: Path, digest: str) -> bool:
    """Whether a file has a digest: "sha256:", "md5:" or "git:" (the name of a blob) and hexadecimal digits."""
    kind, _, digits = digest.partition(":")
    return digest_of(file, kind) == digits


def digest_of(file: Path, kind: str = "sha256") -> str:
    """The digest of a file, of the kind "sha256", "md5" or "git", in hexadecimal."""
    found = hashlib.sha1(b"blob %d\0" % file.stat().st_size) if kind == "git" else hashlib.new(kind)
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


# ---- What an earlier attempt left ----------------------------------------------------------------


def _origin(part: Path) -> Path:
    """The file that says where a partial file came from."""
    return part.with_suffix(".from")


def _left_over(part: Path, url: str, digest: str | None) -> tuple[int, str | None]:
    """How many bytes of an earlier attempt can be gone on with, and the ETag of the file that they are of."""
    try:
        origin = json.loads(_origin(part).read_text())
        if origin["url"] == url and (digest or origin["etag"]):
            return _size(part), origin["etag"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # there is none, or it was killed while it was written: begin anew
    return 0, None


# ---- One request ---------------------------------------------------------------------------------


def _append(url: str, part: Path, begin: int, etag: str | None, size: int | None, name: str) -> None:
    """Asks for what is missing behind the first `begin` bytes, and writes it there.

    Raises:
      _Interrupted: there is more to come.
      Unreachable, Refused: as `download`.
      OSError: a full disk, or another file than the size says.
    """
    headers = {"User-Agent": "codellm_jax", "Accept-Encoding": "identity"}
    if begin:
        headers |= {"Range": f"bytes={begin}-"} | ({"If-Range": etag} if etag else {})
    with _opened(url, headers, part) as answer:
        if answer.status == 206:
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
            if not found or int(found[1]) != begin or (etag and answer.headers.get("ETag", etag) != etag):
                part.unlink(missing_ok=True)
                raise _Interrupted("gives another part than was asked for")
            total = None if found[2] == "*" else int(found[2])
        else:
            begin, length = 0, answer.headers.get("Content-Length", "")
            total = int(length) if length.isdecimal() else None
        if size is not None and total is not None and total != size:
            part.unlink(missing_ok=True)
            raise OSError(f"{url} gives another file than the published one: {total:,} bytes instead of {size:,}.")
        if not begin:
            part.unlink(missing_ok=True)  # before what says whose beginning it is
            given = answer.headers.get("ETag")
            strong = given if given and given.startswith('"') else None  # W/"..." stands for several contents
            _origin(part).write_text(json.dumps({"url": url, "etag": strong}))
        with part.open("r+b" if begin else "wb") as stream, _bar(name, begin, total) as bar:
            stream.seek(begin)
            while piece := _next(answer):
                if not stream.tell() and WEB_PAGE.match(piece):
                    raise Refused(f"{url} gives a web page instead of the file.")
                stream.write(piece)
                bar.update(len(piece))
            stream.flush()
            os.fsync(stream.fileno())
    if total is not None and _size(part) < total:
        raise _Interrupted("breaks off the connection")


def _opened(url: str, headers: dict[str, str], part: Path) -> Any:
    """The answer to a request; raises as `_append` does."""
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # what lies here is no beginning of what lies there
            part.unlink(missing_ok=True)
            raise _Interrupted("has no such part") from None
        if error.code in PASSING:
            asked = error.headers.get("Retry-After", "")
            wait = min(float(asked), LONGEST_WAIT) if asked.isdecimal() else 0.0
            raise _Interrupted(f"answers with HTTP {error.code}", wait) from None
        meaning = {401: "it asks for a login", 403: "it is forbidden", 404: "it is not there any more",
                   410: "it is not there any more"}.get(error.code, error.reason)
        raise Refused(f"the server refuses {url} (HTTP {error.code}: {meaning}).") from None
    except urllib.error.URLError as error:
        host = urllib.parse.urlsplit(url).hostname
        raise Unreachable(f"there is no connection to {host} ({error.reason}).") from error
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(_what(error)) from None


def _next(answer: Any) -> bytes:
    try:
        return answer.read1(PIECE)
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(_what(error)) from None


def _what(error: Exception) -> str:
    return f"gives nothing for {TIMEOUT:g} seconds" if isinstance(error, TimeoutError) else "breaks off the connection"


class _Log:
    """Takes what a progress bar draws, and prints it as lines."""

    def write(self, text: str) -> None:
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass


def _bar(name: str, begin: int, total: int | None) -> Any:
    """Bytes, rate and time left: a bar on a terminal, elsewhere a line every `LOG_EVERY` seconds."""
    from tqdm import tqdm

    shared: dict[str, Any] = dict(desc=name, initial=begin, total=total, unit="B", unit_scale=True, leave=False)
    if sys.stderr.isatty():
        return tqdm(**shared, dynamic_ncols=True)
    return tqdm(**shared, file=_Log(), mininterval=LOG_EVERY, delay=LOG_EVERY, bar_format=(
        "{desc}: {percentage:.0f}%, {n_fmt} of {total_fmt}B, {rate_fmt}, {remaining} left"))


def _wrong(part: Path, size: int | None, digest: str | None) -> str | None:
    """What is wrong with a file that is whole; None if nothing is."""
    if size is not None and _size(part) != size:
        return f"{_size(part):,} bytes instead of {size:,}"
    if digest is None or matches(part, digest):
        return None
    kind, _, digits = digest.partition(":")
    return f"{kind} {digest_of(part, kind)} instead of {digits}"

