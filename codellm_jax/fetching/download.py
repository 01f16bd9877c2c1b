"""Downloads a file over HTTP: resumes after a break, verifies the content, and never exposes a partial file."""

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

ATTEMPTS = 5  # consecutive attempts that each bring less than PROGRESS
PROGRESS = 1 << 20  # bytes
TIMEOUT = 20.0  # seconds for a connection, and for the next bytes of an answer
FIRST_WAIT = 1.0  # seconds before the second attempt; doubled before each further one
LONGEST_WAIT = 30.0
PIECE = 1 << 16
LOG_EVERY = 10.0  # seconds between lines of progress, if stderr is not a terminal
PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses of a server that may answer later
WEB_PAGE = re.compile(rb"\s*<(!doctype html|html)", re.IGNORECASE)


class Unreachable(OSError):
    """No connection to the server is possible."""


class Refused(OSError):
    """The server does not provide the file."""


class _Interrupted(Exception):
    """The response broke off or did not arrive; another attempt may succeed."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


def partial(target: Path) -> Path:
    """The path of an incomplete file: beside its final place, so that a rename completes it."""
    return target.with_name(f".{target.name}.part")


def download(url: str, target: Path, size: int | None = None, digest: str | None = None) -> Path:
    """Downloads a file to `partial(target)`; the caller moves it to its place.

    Resumes an earlier attempt if the server supports ranges, and either the digest or the server's ETag ensures that
    both parts belong to the same file.

    Args:
      url: http or https; redirects are followed.
      size: in bytes, if known.
      digest: in the format of `matches`, if known.

    Returns:
      `partial(target)`, which is complete.

    Raises:
      Unreachable: no connection to the server is possible. All error messages are one line.
      Refused: the server does not provide the file.
      OSError: the connection breaks repeatedly, the file does not match its size or digest, or the disk is full.
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
                raise OSError(f"{url}: {error}, {attempts} times in a row; {found:,} bytes are here, and the same "
                              "command resumes from there.") from None
            asked = error.wait if isinstance(error, _Interrupted) else 0.0
            wait = max(asked, min(FIRST_WAIT * 2 ** (attempts - 1), LONGEST_WAIT))
            print(f"  {target.name}: {error}; trying again in {wait:.0f} s.", file=sys.stderr, flush=True)
            time.sleep(wait)
            continue
        wrong = _wrong(part, size, digest)
        if wrong is None:
            _origin(part).unlink(missing_ok=True)
            return part
        part.unlink()
        if not begun:  # otherwise the first part may be damaged, and is downloaded again
            raise OSError(f"{url} is not the published file: {wrong}. It was deleted.")


def matches(file: Path, digest: str) -> bool:
    """Whether a file has a digest: "sha256:", "md5:" or "git:" (a blob's name) followed by hexadecimal digits."""
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
    """The file that records the origin of a partial file."""
    return part.with_suffix(".from")


def _left_over(part: Path, url: str, digest: str | None) -> tuple[int, str | None]:
    """The number of bytes from an earlier attempt that can be resumed, and the ETag of their file."""
    try:
        origin = json.loads(_origin(part).read_text())
        if origin["url"] == url and (digest or origin["etag"]):
            return _size(part), origin["etag"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # missing, or incomplete after a kill: start from the beginning
    return 0, None


# ---- One request ---------------------------------------------------------------------------------


def _append(url: str, part: Path, begin: int, etag: str | None, size: int | None, name: str) -> None:
    """Requests the bytes from `begin` on, and appends them to the partial file.

    Raises:
      _Interrupted: the rest is still missing.
      Unreachable, Refused: as `download`.
      OSError: the disk is full, or the file is not of the given size.
    """
    headers = {"User-Agent": "codellm_jax", "Accept-Encoding": "identity"}
    if begin:
        headers |= {"Range": f"bytes={begin}-"} | ({"If-Range": etag} if etag else {})
    with _opened(url, headers, part) as answer:
        if answer.status == 206:
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
            if not found or int(found[1]) != begin or (etag and answer.headers.get("ETag", etag) != etag):
                part.unlink(missing_ok=True)
                raise _Interrupted("the server sent another range than requested")
            total = None if found[2] == "*" else int(found[2])
        else:
            begin, length = 0, answer.headers.get("Content-Length", "")
            total = int(length) if length.isdecimal() else None
        if size is not None and total is not None and total != size:
            part.unlink(missing_ok=True)
            raise OSError(f"{url} is not the published file: {total:,} bytes instead of {size:,}.")
        if not begin:
            part.unlink(missing_ok=True)  # first, so that the next line never describes an older part
            given = answer.headers.get("ETag")
            strong = given if given and given.startswith('"') else None  # a weak one, W/"...", does not fix the bytes
            _origin(part).write_text(json.dumps({"url": url, "etag": strong}))
        with part.open("r+b" if begin else "wb") as stream, _bar(name, begin, total) as bar:
            stream.seek(begin)
            while piece := _next(answer):
                if not stream.tell() and WEB_PAGE.match(piece):
                    raise Refused(f"{url} is a web page instead of the file.")
                stream.write(piece)
                bar.update(len(piece))
            stream.flush()
            os.fsync(stream.fileno())
    if total is not None and _size(part) < total:
        raise _Interrupted("the connection broke")


def _opened(url: str, headers: dict[str, str], part: Path) -> Any:
    """Opens the response to a request; raises as `_append` does."""
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the partial file is not a prefix of the server's
            part.unlink(missing_ok=True)
            raise _Interrupted("the server has no such range") from None
        if error.code in PASSING:
            asked = error.headers.get("Retry-After", "")
            wait = min(float(asked), LONGEST_WAIT) if asked.isdecimal() else 0.0
            raise _Interrupted(f"the server answers with HTTP {error.code}", wait) from None
        meaning = {401: "it requires a login", 403: "forbidden", 404: "not found", 410: "no longer there"}
        raise Refused(f"the server refuses {url} (HTTP {error.code}: {meaning.get(error.code, error.reason)})."
                      ) from None
    except urllib.error.URLError as error:
        host = urllib.parse.urlsplit(url).hostname
        raise Unreachable(f"no connection to {host} ({error.reason}).") from error
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(_what(error)) from None


def _next(answer: Any) -> bytes:
    try:
        return answer.read1(PIECE)
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(_what(error)) from None


def _what(error: Exception) -> str:
    return f"no data for {TIMEOUT:g} seconds" if isinstance(error, TimeoutError) else "the connection broke"


class _Log:
    """Prints the output of a progress bar as lines."""

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
    """The reason why a complete file is not the expected one; None if it is."""
    if size is not None and _size(part) != size:
        return f"{_size(part):,} bytes instead of {size:,}"
    if digest is None or matches(part, digest):
        return None
    kind, _, digits = digest.partition(":")
    return f"{kind} {digest_of(part, kind)} instead of {digits}"

