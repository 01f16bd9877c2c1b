"""A fake on loopback of the servers that publish files, with the faults that a test sets.

    with fake_publisher({"/a.json": b"[]"}) as publisher:
        download(publisher.address + "/a.json", ...)

    with official_publisher():  # small files in official form, in place of all releases
        cli.main(["fetch", "mbpp", "--data_dir=..."])
"""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import os
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

from codellm_jax.fetching import download, releases
from tasks.benchmarks.locating import SAMPLES


@dataclass
class Publisher:
    """The served files, by path, and the faults; all may be changed while it serves."""

    files: dict[str, bytes]
    address: str = ""
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # path and Range of each request
    drop: dict[str, list[int]] = field(default_factory=dict)  # by path: after how many bytes successive answers end
    statuses: dict[str, list[int]] = field(default_factory=dict)  # by path: statuses of the first answers
    redirects: dict[str, str] = field(default_factory=dict)  # from a path to another path or an address
    silent: set[str] = field(default_factory=set)  # paths that are never answered
    stuck: dict[str, int] = field(default_factory=dict)  # by path: after how many bytes answers stall
    ranges: bool = True  # whether ranges may be requested
    etags: bool = True
    lengths: bool = True  # whether answers state their length

    def reset(self) -> None:
        """Removes all faults and recorded requests."""
        for each in (self.asked, self.drop, self.statuses, self.redirects, self.silent, self.stuck):
            each.clear()
        self.ranges = self.etags = self.lengths = True


@contextlib.contextmanager
def fake_publisher(files: dict[str, bytes]) -> Iterator[Publisher]:
    """Serves files until the block ends."""
    publisher = Publisher(files)
    released = threading.Event()

    class Answer(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            publisher.asked.append((self.path, asked))
            if self.path in publisher.silent:
                released.wait()
                return
            if statuses := publisher.statuses.get(self.path):
                self._head(statuses.pop(0), {"Content-Length": "0", "Retry-After": "0"})
                return
            if self.path in publisher.redirects:
                self._head(302, {"Location": publisher.redirects[self.path], "Content-Length": "0"})
                return
            if self.path not in publisher.files:
                self._head(404, {"Content-Length": "0"})
                return
            self._give(publisher.files[self.path], asked)

        def _give(self, content: bytes, asked: str | None) -> None:
            etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
            headers = {"ETag": etag} if publisher.etags else {}
            status, begin = 200, 0
            if asked and publisher.ranges and self.headers.get("If-Range", etag) == etag:
                begin = int(asked.removeprefix("bytes=").rstrip("-"))
                if begin >= len(content):
                    self._head(416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": "0"})
                    return
                status, headers["Content-Range"] = 206, f"bytes {begin}-{len(content) - 1}/{len(content)}"
            if publisher.lengths:
                headers["Content-Length"] = str(len(content) - begin)
            self._head(status, headers)
            drops = publisher.drop.get(self.path)
            most = drops.pop(0) if drops else publisher.stuck.get(self.path)
            with contextlib.suppress(ConnectionError):  # a client that was killed
                self.wfile.write(content[begin:][:most])
                if self.path in publisher.stuck:
                    self.wfile.flush()
                    released.wait()

        def _head(self, status: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.daemon_threads = True
    publisher.address = f"http://127.0.0.1:{server.server_port}"
    serving = threading.Thread(target=server.serve_forever, args=(0.02,))
    serving.start()
    try:
        yield publisher
    finally:
        released.set()
        server.shutdown()
        serving.join()
        server.server_close()


# ---- Official files ------------------------------------------------------------------------------

INSTRUCTIONS = b'[{"instruction": "Name a colour.", "input": "", "output": "Green."},' + b"\n" * 200_000 + (
    b'{"instruction": "Name a town.", "input": "", "output": "Ulm."}]')


def official(place: str) -> bytes:
    """A small file in the official form of the file at this path in DATA_DIR."""
    if place.endswith(".gz"):
        return gzip.compress(official(place.removesuffix(".gz")))
    name = place.replace("ekar_chinese", "ekar").replace("dureader_robust", "dureader").replace("train.50k", "train")
    for sample in (Path(SAMPLES, name), Path(SAMPLES, Path(name).name)):
        if sample.is_file():
            return sample.read_bytes()
    if place.startswith("pclue/"):
        return b'{"input": "%s", "target": "yes"}\n' % place.encode()
    assert place.startswith(("alpaca_gpt4/", "codealpaca/", "humaneval/")), place
    return INSTRUCTIONS


def archived(url: str, members: dict[str, bytes]) -> bytes:
    """A zip or tar archive, by the address's suffix, with these members and a README.md."""
    made = io.BytesIO()
    members = members | {"README.md": b"Cite us."}
    if url.endswith(".zip"):
        with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as zipped:
            for name, content in members.items():
                zipped.writestr(name, content)
    else:
        with tarfile.open(fileobj=made, mode="w:gz") as tape:
            for name, content in members.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tape.addfile(entry, io.BytesIO(content))
    return made.getvalue()


DIGESTS: dict[str, Any] = {
    "sha256": lambda content: hashlib.sha256(content).hexdigest(),
    "md5": lambda content: hashlib.md5(content).hexdigest(),
    "git": lambda content: hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}


@contextlib.contextmanager
def official_publisher() -> Iterator[Publisher]:
    """Serves small files in official form at the addresses in the table of releases, except for the host.

    Sizes and digests are stated if the table states them, and of the same kinds.
    """
    environment = {name: value for name, value in os.environ.items()
                   if not name.lower().endswith("_proxy") and name != "HF_ENDPOINT"}
    with (fake_publisher({}) as publisher, mock.patch.dict(os.environ, environment, clear=True),
          mock.patch.object(download, "TIMEOUT", 1.0), mock.patch.object(download, "FIRST_WAIT", 0.01)):
        table = {name: dataclasses.replace(each, files=tuple(_served(file, publisher) for file in each.files))
                 for name, each in releases.releases().items()}
        with mock.patch.object(releases, "releases", lambda: table):
            yield publisher


def _served(file: releases.File, publisher: Publisher) -> releases.File:
    if file.url is None:
        return file
    path = "/" + file.url.split("/", 3)[3]
    members = {member: official(place) for place, member in file.places.items() if member}
    content = archived(file.url, members) if members else official(next(iter(file.places)))
    publisher.files[path] = content
    kind = file.digest and file.digest.partition(":")[0]
    return dataclasses.replace(file, url=publisher.address + path, size=file.size and len(content),
                               digest=kind and f"{kind}:{DIGESTS[kind](content)}")
