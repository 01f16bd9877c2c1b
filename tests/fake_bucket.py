"""A fake gs:// bucket over HTTP on loopback, with preconditions and the requests that TensorStore makes."""

import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeBucket:
    """A context manager; `url` is for TENSORSTORE_GCS_HTTP_URL. `objects` maps names to (generation, content). The next
    requests fail with the statuses in `failures`, one each; the next writes with those in `lost`, after they had their
    effect. `asked` has the name and range of each object read.
    """

    def __init__(self) -> None:
        self.objects: dict[str, tuple[int, bytes]] = {}
        self.failures: list[int] = []
        self.lost: list[int] = []
        self.asked: list[tuple[str, str | None]] = []
        self.refused = 0  # writes whose precondition does not hold
        self.lock = threading.Lock()
        self._last = 0
        bucket = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(bucket.read)

            def do_POST(self) -> None:
                self._answer(bucket.write)

            def do_DELETE(self) -> None:
                self._answer(bucket.delete)

            def log_message(self, *_: Any) -> None:
                pass

            def _answer(self, ask: Any) -> None:
                parts = urllib.parse.urlsplit(self.path)
                name = urllib.parse.unquote(parts.path.partition("/o/")[2])
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                with bucket.lock:
                    failure = bucket.failures.pop(0) if bucket.failures else None
                    status, generation, content = (failure, 0, b"") if failure else ask(
                        name, dict(urllib.parse.parse_qsl(parts.query)), body)
                    if bucket.lost and self.command != "GET":
                        status, content = bucket.lost.pop(0), b""
                    if self.command == "GET" and name:
                        bucket.asked.append((name, self.headers.get("Range")))
                if status == 200 and name and (wanted := self.headers.get("Range")):
                    begin, end = map(int, wanted.removeprefix("bytes=").split("-"))
                    status, whole, content = 206, len(content), content[begin : end + 1]
                    self.range = f"bytes {begin}-{begin + len(content) - 1}/{whole}"
                self.send_response(status)
                self.send_header("x-goog-generation", str(generation))
                if status == 206:
                    self.send_header("Content-Range", self.range)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FakeBucket":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _holds(self, name: str, query: dict[str, str]) -> bool:
        wanted = query.get("ifGenerationMatch")
        holds = wanted is None or int(wanted) == self.objects.get(name, (0, b""))[0]
        self.refused += not holds
        return holds

    def read(self, name: str, query: dict[str, str], _: bytes) -> tuple[int, int, bytes]:
        if not name:
            found = [{"name": key} for key in sorted(self.objects) if key.startswith(query.get("prefix", ""))]
            return 200, 0, json.dumps({"items": found}).encode()
        if name not in self.objects:
            return 404, 0, b""
        generation, content = self.objects[name]
        return 200, generation, content

    def write(self, _: str, query: dict[str, str], body: bytes) -> tuple[int, int, bytes]:
        name = query["name"]
        if not self._holds(name, query):
            return 412, 0, b""
        self._last += 1
        self.objects[name] = (self._last, body)
        return 200, self._last, json.dumps({"name": name, "generation": str(self._last)}).encode()

    def delete(self, name: str, query: dict[str, str], _: bytes) -> tuple[int, int, bytes]:
        if not self._holds(name, query):
            return 412, 0, b""
        return (204 if self.objects.pop(name, None) else 404), 0, b""
