"""A stand-in on loopback for the servers that publish files, with the faults that a test wants.

    with fake_publisher({"/a.json": b"[]"}) as publisher:
        download(publisher.address + "/a.json", ...)
"""

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Publisher:
    """What is served, by path, and the faults; all may be changed while it serves."""

    files: dict[str, bytes]
    address: str = ""
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # path and Range of each request
    drop: dict[str, list[int]] = field(default_factory=dict)  # of a path: after how many bytes each answer breaks off
    statuses: dict[str, list[int]] = field(default_factory=dict)  # of a path: statuses that are answered first
    redirects: dict[str, str] = field(default_factory=dict)  # from a path to another, or to an address
    silent: set[str] = field(default_factory=set)  # paths that are never answered
    stuck: dict[str, int] = field(default_factory=dict)  # of a path: after how many bytes nothing more comes
    ranges: bool = True  # whether a part may be asked for
    etags: bool = True
    lengths: bool = True  # whether an answer says how long it is

    def reset(self) -> None:
        """Takes all faults away, and forgets what was asked."""
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
