"""`t5x report DIR --serve`: a page on this machine that follows a study while it runs.

One thread reads the directory, at intervals that keep its share of the time small, and renders the page. Requests get
the latest rendered page, so neither a slow bucket nor many readers block each other. Another process computes effects
and laws each time that more runs are done.
"""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from etils import epath

from codellm_jax.runtime.terminal import one_line
from codellm_jax.study.status import read_status
from codellm_jax.watching import live
from codellm_jax.watching.runs import is_run, read_run
from codellm_jax.watching.show import read_runs

PORT = 8000
PERIOD = 2.0  # seconds between two reads of the directory, and never less than REST times the duration of a read
REST = 4.0
TOLD_SECONDS = 3600.0  # after which the process that computes effects and laws is stopped
LOOPBACK = ("127.0.0.1", "localhost", "::1")
POLICY = ("default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; connect-src 'self'; "
          "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
# The report page has an inline style and no script.
REPORT_POLICY = ("default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:; base-uri 'none'; "
                 "form-action 'none'; frame-ancestors 'none'")
TYPES = {".html": "text/html; charset=utf-8", ".svg": "image/svg+xml", ".png": "image/png", ".pdf": "application/pdf",
         ".csv": "text/csv; charset=utf-8", ".json": "application/json", ".md": "text/plain; charset=utf-8",
         ".tex": "text/plain; charset=utf-8"}


class Watched:
    """The latest reading of a directory: the parts of its page, by name."""

    def __init__(self, directory: str) -> None:
        self.folder = epath.Path(directory).expanduser()
        self.parts = {"now": "<p>Reading …</p>", "told": "", "losses": ""}
        self._directory = directory
        self._done: frozenset[str] = frozenset()  # the runs in the last effects and laws
        self._process: subprocess.Popen[str] | None = None

    def follow(self, ended: threading.Event) -> None:
        """Reads the directory repeatedly until `ended` is set."""
        while True:
            began = time.monotonic()
            try:
                self.parts |= self._read()
            except Exception as error:  # a bucket that does not answer, files that are being replaced
                notice = live.notice(f"The directory could not be read ({one_line(error)}). The content below is "
                                     "older.")
                self.parts["now"] = notice + self.parts["now"].rpartition(live.END_OF_NOTICE)[2]
            if ended.wait(max(PERIOD, REST * (time.monotonic() - began))):
                break

    def _read(self) -> dict[str, str]:
        if (self.folder / "study.json").exists():
            study = read_status(self._directory)
            report = self.folder / "report" / "report.html"
            done = frozenset(name for name, of_run in study.runs.items() if of_run.state == "done")
            self._tell(done)
            return live.study_now(study, read_runs(self.folder / "runs"),
                                  float(report.stat().mtime) if report.exists() else None)
        if is_run(self.folder):
            return live.run_now(read_run(self.folder), time.time())
        if runs := read_runs(self.folder):
            return live.runs_now(runs, time.time())
        return {"now": "<p>There is no run here yet.</p>"}

    def _tell(self, done: frozenset[str]) -> None:
        """Starts the computation of effects and laws if more runs are done than last time and none is in progress."""
        if self._process is None and done and done != self._done:
            self._done = done
            self._process = subprocess.Popen(
                [sys.executable, "-m", "codellm_jax.watching.told", self._directory], stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
                env=os.environ | {"JAX_PLATFORMS": "cpu"})
            threading.Thread(target=self._take, args=(self._process, len(done)), daemon=True).start()

    def _take(self, process: subprocess.Popen[str], done: int) -> None:
        try:
            text, _ = process.communicate(timeout=TOLD_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            text, _ = process.communicate()
        if process.returncode:
            text = live.notice(f"The process that computes effects and laws ended with status {process.returncode}. "
                               "It is restarted when more runs are done.")
        self.parts["told"] = f'<p class="caption">Of the {done} finished runs:</p>\n{text}'
        self._process = None

    def close(self) -> None:
        """Stops the process that computes effects and laws, if one runs."""
        if (process := self._process) is not None:
            process.kill()


def serve(directory: str, host: str, port: int | None) -> int:
    """Serves the page until the process is interrupted; returns the exit status.

    Args:
      directory: of a study, a run or any folder of runs, local or gs://.
      host: the address to listen on.
      port: None for 8000, or a free port if that is taken; 0 for a free port.

    Raises:
      FileNotFoundError: there is no such directory.
      OSError: the server cannot listen on this address.
    """
    with started(directory, host, port) as server:
        address = f"[{host}]" if ":" in host else host
        print(f"Following {directory} at http://{address}:{server.server_address[1]}/  (Ctrl-C ends it)", flush=True)
        server.serve_forever()
    return 0


@contextlib.contextmanager
def started(directory: str, host: str, port: int | None) -> Iterator[ThreadingHTTPServer]:
    """A listening server, and the thread that reads the directory; both end with the context."""
    if not epath.Path(directory).expanduser().is_dir():
        raise FileNotFoundError(f"there is no directory {directory}: name a study, a run or a folder of runs.")
    watched, ended = Watched(directory), threading.Event()
    with _listening(host, port, watched) as server:
        thread = threading.Thread(target=watched.follow, args=(ended,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            ended.set()
            watched.close()


def _listening(host: str, port: int | None, watched: Watched) -> ThreadingHTTPServer:
    answers: Any = type("Answers", (Handler,), {"watched": watched, "host": host})
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server: Any = type("Server", (ThreadingHTTPServer,), {"address_family": family})
    try:
        return server((host, PORT if port is None else port), answers)
    except (OSError, OverflowError) as error:
        if port is None and isinstance(error, OSError):
            with contextlib.suppress(OSError):
                return server((host, 0), answers)
        raise OSError(f"{host}:{PORT if port is None else port} cannot be used ({error}): choose another --host "
                      "or --port; --port=0 takes a free one.") from None


class Handler(BaseHTTPRequestHandler):
    """Answers with the latest parts of the page, and with the files of DIR/report."""

    watched: Watched
    host: str
    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds for a request

    def do_GET(self) -> None:
        # A page of another site, through a host name that resolves to this machine, must not read along.
        asked_of = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        if self.host in LOOPBACK and asked_of.strip("[]") not in LOOPBACK:
            self._send("This page is only for this machine.", "text/plain", HTTPStatus.MISDIRECTED_REQUEST)
            return
        path = self.path.partition("?")[0]
        name = path.rpartition("/")[2]
        fixed = {"/": (live.page(self.watched.folder.name), TYPES[".html"]),
                 "/page.css": (live.LIVE_STYLE, "text/css"), "/page.js": (live.SCRIPT, "text/javascript"),
                 **{f"/{part}": (text, TYPES[".html"]) for part, text in self.watched.parts.items()}}
        if path in fixed:
            self._send(*fixed[path])
        elif path == f"/report/{name}" and (content := self._of_report(name)) is not None:
            self._send(content, TYPES[epath.Path(name).suffix], policy=REPORT_POLICY)
        else:
            self._send("There is no such page.", "text/plain", HTTPStatus.NOT_FOUND)

    do_HEAD = do_GET

    def _of_report(self, name: str) -> bytes | None:
        """A file in DIR/report with exactly this name."""
        folder = self.watched.folder / "report"
        try:
            names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
            return (folder / name).read_bytes() if name in names and epath.Path(name).suffix in TYPES else None
        except OSError:
            return None

    def _send(self, content: str | bytes, kind: str, status: HTTPStatus = HTTPStatus.OK, policy: str = POLICY) -> None:
        body = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
        with contextlib.suppress(ConnectionError):  # the reader has left
            self.send_response(status)
            for name, value in (("Content-Type", kind), ("Content-Length", str(len(body))),
                                ("Content-Security-Policy", policy), ("X-Content-Type-Options", "nosniff"),
                                ("Referrer-Policy", "no-referrer"), ("Cache-Control", "no-store"),
                                ("Cross-Origin-Resource-Policy", "same-origin")):
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are not printed."""
