"""The page of `t5x report DIR --serve`, asked over HTTP: what it shows, how it follows files, and what it keeps out."""

import contextlib
import http.client
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from written_runs import write_run, write_study

from codellm_jax.watching import serve, told
from codellm_jax.watching.chart import curves
from codellm_jax.watching.serve import started

EVIL = "<script>document.title='owned'<script>.seed0"  # a name of a directory


@contextlib.contextmanager
def served(directory: Path) -> Iterator[Callable[..., tuple[http.client.HTTPResponse, str]]]:
    """A function that asks the server of a directory for a path."""
    with started(str(directory), "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()

        def ask(path: str, **headers: str) -> tuple[http.client.HTTPResponse, str]:
            connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            return answer, answer.read().decode()

        try:
            ask.port = server.server_address[1]  # type: ignore[attr-defined]
            yield ask
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Directories are read at once again, and effects are left to the tests that are about them."""
    monkeypatch.setattr(serve, "PERIOD", 0.02)
    monkeypatch.setattr(serve.Watched, "_tell", lambda self, done: None)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_study_is_followed_while_its_files_change(tmp_path):
    write_study(tmp_path)
    with served(tmp_path) as ask:
        until(lambda: "1 of 4 runs are done" in ask("/now")[1])
        now, losses = ask("/now")[1], ask("/losses")[1]
        assert "train ended with status 1 (host:7" in now and "2 failed" in now and "1 left" in now
        assert "<td class=\"text\">NL</td>" in losses and "6.5000" in losses and "<polyline" in losses
        (tmp_path / "state" / "NL.seed1.json").write_text('{"state": "done"}')
        until(lambda: "2 of 4 runs are done" in ask("/now")[1])
        shutil.rmtree(tmp_path / "runs" / "NL.seed1")  # it is made again
        write_run(tmp_path / "runs" / "NL.seed1", 4, 10)
        (tmp_path / "state" / "NL.seed1.json").unlink()
        until(lambda: "4 of 10" in ask("/now")[1])
        (tmp_path / "study.json").write_text('{"runs": [')
        until(lambda: "could not be read" in ask("/now")[1])
        assert "4 of 10" in ask("/now")[1]  # the page before it
        assert ask("/now")[1].count("could not be read") == 1


def test_names_and_errors_are_text(tmp_path):
    write_study(tmp_path)
    (tmp_path / "state" / "NL.seed1.json").write_text(json.dumps(
        {"state": "failed", "why": "<img src=x onerror=alert(1)>", "worker": "<b>", "when": 0}))
    write_run(tmp_path / "runs" / EVIL, 4, 10)
    plan = json.loads((tmp_path / "study.json").read_text())
    plan["runs"][0] |= {"run": EVIL, "arm": EVIL}
    (tmp_path / "study.json").write_text(json.dumps(plan))
    with served(tmp_path) as ask:
        until(lambda: "&lt;img src=x onerror=alert(1)&gt;" in ask("/now")[1])
        for path in ("/", "/now", "/losses"):
            page = ask(path)[1].replace('<script src="/page.js" defer></script>', "").replace("<noscript>", "")
            assert "<script" not in page and "<img" not in page and "<b>" not in page
        assert "&lt;script&gt;document.title=" in ask("/now")[1]
        assert "//" not in ask("/")[1] and "http" not in ask("/")[1]


def test_every_answer_lets_nothing_else_run(tmp_path):
    write_study(tmp_path)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.html").write_text("<p>the report</p>")
    (tmp_path / "report" / "notes.sh").write_text("no")
    with served(tmp_path) as ask:
        own = "script-src 'self'"
        for path, script in (("/", own), ("/now", own), ("/nowhere", own),
                             ("/report/report.html", "default-src 'none'; style-src 'unsafe-inline'; img-src")):
            answer, _ = ask(path)
            policy = answer.headers["Content-Security-Policy"]
            assert policy.startswith("default-src 'none'") and script in policy
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert ask("/report/report.html")[1] == "<p>the report</p>"
        for path in ("/report/../study.json", "/report/%2e%2e/study.json", "/report/", "/report/notes.sh",
                     "/study.json"):
            assert ask(path)[0].status == 404, path


def test_another_sites_name_for_this_machine_is_refused(tmp_path):
    write_study(tmp_path)
    with served(tmp_path) as ask:
        assert ask("/now", Host="evil.example:80")[0].status == 421
        assert ask("/now", Host="localhost:1")[0].status == ask("/now", Host="[::1]:1")[0].status == 200


def test_a_run_and_a_folder_of_runs_are_followed_too(tmp_path):
    write_run(tmp_path / "one", 6, 10)
    with served(tmp_path) as ask:
        until(lambda: "stopped normally after step 6 of 10" in ask("/now")[1])
    with served(tmp_path / "one") as ask:
        until(lambda: "stopped normally after step 6 of 10" in ask("/now")[1])
        assert "text.a" in ask("/losses")[1]
    (tmp_path / "empty").mkdir()
    with served(tmp_path / "empty") as ask:
        until(lambda: "no run here yet" in ask("/now")[1])
    with pytest.raises(FileNotFoundError, match="there is no directory"), served(tmp_path / "nowhere"):
        pass


def test_a_taken_port_is_one_line(tmp_path):
    with started(str(tmp_path), "127.0.0.1", 0) as server:
        taken = server.server_address[1]
        with pytest.raises(OSError, match=f"127.0.0.1:{taken} cannot be used"):
            with started(str(tmp_path), "127.0.0.1", taken):
                pass


def test_an_address_of_ipv6_is_listened_at(tmp_path):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    with started(str(tmp_path), "::1", 0) as server:
        assert server.server_address[:2] == ("::1", server.server_port)


def test_effects_that_cannot_be_told_say_why(tmp_path, capsys):
    write_study(tmp_path)
    assert told.main(str(tmp_path)) == 0
    assert "They cannot be determined yet: no two arms" in capsys.readouterr().out
    (tmp_path / "study.json").write_text("[")
    assert told.main(str(tmp_path)) == 0
    assert "They cannot be determined yet: " in capsys.readouterr().out


def test_curves_lie_within_their_frame():
    lines = {"x": [(0, 9.0), (50, 4.0), (100, 3.0)], "y&": [(10, 5.0), (100, 3.5)], "z": [(1, 2)]}
    text = curves("a < b", "nats", lines)
    assert "a &lt; b" in text and ">y&amp;</text>" in text and ">z</text>" not in text
    points = [tuple(map(float, pair.split(","))) for line in text.split('points="')[1:]
              for pair in line.split('"')[0].split()]
    assert len(points) == 4  # the first of x, before a tenth of the steps, is above the frame
    assert all(58 <= x <= 490 and 12 <= y <= 260 for x, y in points)
    assert curves("", "", {"x": [(1, 2.0)]}) == ""


@pytest.mark.slow
def test_a_browser_shows_and_refreshes_the_page(tmp_path, monkeypatch):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    write_study(tmp_path)
    plan = json.loads((tmp_path / "study.json").read_text())
    plan["runs"][0] |= {"arm": EVIL}
    (tmp_path / "study.json").write_text(json.dumps(plan))
    asked, answer = [], serve.Handler.do_GET

    def changing(handler: serve.Handler) -> None:
        """Another run is done by the second time that the page is asked for what there is."""
        asked.append(handler.path)
        if asked.count("/now") == 2:
            (tmp_path / "state" / "NL.seed1.json").write_text('{"state": "done"}')
            until(lambda: "2 of 4 runs are done" in handler.watched.parts["now"])
        answer(handler)

    monkeypatch.setattr(serve.Handler, "do_GET", changing)
    with served(tmp_path) as ask:
        dom = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile",
             "--virtual-time-budget=8000", "--dump-dom", f"http://127.0.0.1:{ask.port}/"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=60).stdout
    assert "2 of 4 runs are done" in dom
    assert f"<title>{tmp_path.name}</title>" in dom and "<polyline" in dom
    assert "&lt;script&gt;document.title=" in dom and dom.count("<script") == 1
    assert set(asked) <= {"/", "/page.css", "/page.js", "/now", "/told", "/losses", "/favicon.ico"}
