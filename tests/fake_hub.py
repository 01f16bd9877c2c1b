"""A fake hub on loopback, with the requests that huggingface_hub makes, and the faults that a test sets.

    with fake_hub(folder) as hub:                     # folder/ORG/NAME/... are the repositories' files
        environment = {**os.environ, **hub.environment(cache)}

The branch main is the folder's own content, and its commit's name a hash of it. Other commits are in
folder/ORG/NAME/.commits/HASH/..., and a branch or tag is a file folder/ORG/NAME/.refs/REVISION with such a HASH. Files
whose names end as in LARGE are served as in Git LFS: named by their SHA-256, and from another address.
"""

import contextlib
import hashlib
import json
import os
import socket
import struct
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

from huggingface_hub import constants

LARGE = (".safetensors", ".bin", ".ckpt")


@dataclass
class Hub:
    """The served content and the faults; all may be changed while it serves."""

    folder: Path
    address: str = ""
    elsewhere: str = ""  # the same server under another name, which serves large files
    requests: list[tuple[str, str]] = field(default_factory=list)  # method and path of each request
    drop: dict[str, list[int]] = field(default_factory=dict)  # by file: after how many bytes successive answers end
    drop_always: dict[str, int] = field(default_factory=dict)  # by file: the same, for every answer
    reset: dict[str, int] = field(default_factory=dict)  # by file: how many answers are reset half-way
    content: dict[str, bytes] = field(default_factory=dict)  # by file: content served instead
    refuse: dict[str, tuple[int, str]] = field(default_factory=dict)  # by ORG/NAME: status and X-Error-Code
    refuse_files: dict[str, tuple[int, str]] = field(default_factory=dict)  # the same, only for files
    token: str | None = None  # requests with this token are not refused
    listed_besides: list[str] = field(default_factory=list)  # further file names that every repository lists
    silent: bool = False  # whether requests are accepted but not answered
    ranges: bool = True  # whether ranges of files may be requested
    handler: Any = None  # the request handler's class

    def environment(self, cache: Path) -> dict[str, str]:
        """Environment variables by which a process uses this hub, with its own cache."""
        return {"HF_ENDPOINT": self.address, "HF_HOME": str(cache), "HF_HUB_CACHE": str(cache / "hub"),
                "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5",
                "HF_HUB_ETAG_TIMEOUT": "5"}

    def files(self, repository: str, commit: str) -> dict[str, Path]:
        """The files of a commit, by name."""
        own = self.folder / repository
        folder = own / ".commits" / commit if (own / ".commits" / commit).is_dir() else own
        return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))
                if path.is_file() and not path.relative_to(folder).parts[0].startswith((".commits", ".refs"))}

    def commit(self, repository: str, revision: str) -> str | None:
        """The commit of a branch, a tag or a commit's hash; None if there is none."""
        own = self.folder / repository
        if (own / ".refs" / revision).is_file():
            return (own / ".refs" / revision).read_text().strip()
        if (own / ".commits" / revision).is_dir():
            return revision
        newest = hashlib.sha1(b"".join(name.encode() + path.read_bytes()
                                       for name, path in self.files(repository, "").items())).hexdigest()
        return newest if revision in ("main", newest) else None


def git_name(content: bytes) -> str:
    """Git's name (blob hash) of a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextlib.contextmanager
def fake_hub(folder: Path) -> Iterator[Hub]:
    """Serves a folder of repositories until the block ends."""
    hub = Hub(folder)
    released = threading.Event()

    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
            hub.requests.append((self.command, path))
            if hub.silent:
                released.wait()
                self.close_connection = True
                return
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "datasets"]:
                self._api("/".join(parts[2:4]), parts[4], parts[5], "/".join(parts[6:]))
            elif parts[0] == "api":
                self._api("/".join(parts[2:4]), parts[4], "/".join(parts[5:]) or "main")
            elif parts[0] == "large":
                self._give("/".join(parts[4:]), hub.files("/".join(parts[1:3]), parts[3])["/".join(parts[4:])])
            else:
                parts = parts[1:] if parts[0] == "datasets" else parts
                self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

        def _refused(self, refused: tuple[int, str] | None) -> bool:
            if refused and (hub.token is None or self.headers.get("Authorization") != f"Bearer {hub.token}"):
                self._send(refused[0], b"", {"X-Error-Code": refused[1], "X-Error-Message": "Access is restricted"})
                return True
            return False

        def _api(self, repository: str, what: str, revision: str, folder: str | None = None) -> None:
            """Sends the facts of a repository, or the content of a data set's folder."""
            if self._refused(hub.refuse.get(repository)):
                return
            if not (hub.folder / repository).is_dir():
                self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
                return
            commit = hub.commit(repository, revision)
            if commit is None:
                self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
                return
            entries: list[dict[str, Any]] = []
            for name, file in hub.files(repository, commit).items():
                content = file.read_bytes()
                entries.append({"type": "file", "path": name, "size": len(content), "oid": git_name(content)})
                if name.endswith(LARGE):
                    digest = hashlib.sha256(content).hexdigest()
                    entries[-1]["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
            entries += [{"type": "file", "path": name, "size": 4, "oid": git_name(b"evil")}
                        for name in hub.listed_besides]
            siblings = [{"rfilename": entry["path"]} for entry in entries]
            if folder is not None and "recursive=true" not in self.path.lower():
                within = f"{folder}/" if folder else ""
                entries = [entry for entry in entries if entry["path"].startswith(within)]
                deeper = {entry["path"][len(within) :].partition("/")[0] for entry in entries
                          if "/" in entry["path"][len(within) :]}
                entries = [entry for entry in entries if "/" not in entry["path"][len(within) :]] + [
                    {"type": "directory", "path": f"{within}{name}", "oid": git_name(name.encode()), "size": 0}
                    for name in sorted(deeper)]
            found: Any = entries if what == "tree" else {"id": repository, "sha": commit, "siblings": siblings}
            self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

        def _resolve(self, repository: str, revision: str, name: str) -> None:
            if self._refused(hub.refuse.get(repository)) or self._refused(hub.refuse_files.get(repository)):
                return
            commit = hub.commit(repository, revision)
            files = hub.files(repository, commit) if commit else {}
            if name not in files:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound" if commit else "RevisionNotFound"})
                return
            content = files[name].read_bytes()
            headers = {"X-Repo-Commit": str(commit)}
            if name.endswith(LARGE):
                headers |= {"X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                            "X-Linked-Size": str(len(content)),
                            "Location": hub.elsewhere + urllib.parse.quote(f"/large/{repository}/{commit}/{name}")}
                self._send(302, b"", headers)
                return
            self._give(name, files[name], {**headers, "ETag": f'"{git_name(content)}"'})

        def _give(self, name: str, file: Path, headers: dict[str, str] | None = None) -> None:
            content = hub.content.get(name, file.read_bytes())
            status, begin, headers = 200, 0, dict(headers or {})
            asked = self.headers.get("Range")
            if asked and hub.ranges:
                first, _, last = asked.removeprefix("bytes=").partition("-")
                status, begin, whole = 206, int(first), len(content)
                content = content[: int(last) + 1] if last else content
                headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{whole}"
            most = None
            if self.command == "GET":
                most = hub.drop_always.get(name)
                if hub.drop.get(name):
                    most = hub.drop[name].pop(0)
            resets = self.command == "GET" and hub.reset.get(name, 0) > 0
            if resets:
                hub.reset[name] -= 1
            self._send(status, content[begin:], headers, most, resets)

        def _send(self, status: int, body: bytes, headers: dict[str, str], most: int | None = None,
                  resets: bool = False) -> None:
            """Sends an answer; closes the connection after `most` bytes if given, or resets it half-way."""
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[:len(body) // 2 if resets else most])
                self.close_connection = resets or most is not None
            if resets:
                self.wfile.flush()
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    hub.handler = Answer
    hub.address, hub.elsewhere = (f"http://{host}:{server.server_port}" for host in ("127.0.0.1", "localhost"))
    serving = threading.Thread(target=server.serve_forever, args=(0.05,))
    serving.start()
    try:
        # Other tests may set the library offline, which it reads when imported, and processes inherit.
        with (mock.patch.object(constants, "HF_HUB_OFFLINE", False),
              mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "0"})):
            yield hub
    finally:
        released.set()
        server.shutdown()
        serving.join()
        server.server_close()
