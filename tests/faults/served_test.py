"""Tests of the bucket whose service fails as the campaign tells it to."""

import http.client
import os
import random
import signal
import ssl
import subprocess
from collections.abc import Iterator

import pytest

from tests.faults.served import BUCKET, HOSTS, Failure, Served, any_failure
from tests.faults.world import ROOT, kill

NAME = f"/storage/v1/b/{BUCKET}/o/a%2Fb?alt=media"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("served"), os.environ | {"PYTHONPATH": str(ROOT)})
    made.write(made.root / "a" / "b", b"what it holds")
    yield made
    made.close()


def asked(served: Served, method: str = "GET", path: str = NAME, body: bytes | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=20)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def failing(served: Served, failure: Failure) -> None:
    """Lets the next request fail."""
    left = [failure]
    served.fails = lambda: left.pop() if left else None


def test_objects_are_files_and_the_real_hosts_are_answered_for(served: Served) -> None:
    assert (served.root / "a" / "b").read_bytes() == b"what it holds" == asked(served)[1]
    trusting = ssl.create_default_context(cafile=served.environment["CURL_CA_BUNDLE"])
    proxy = http.client.HTTPSConnection(served.url.removeprefix("http://"), timeout=20, context=trusting)
    proxy.set_tunnel(HOSTS[0], 443)
    proxy.request("POST", f"/upload/storage/v1/b/{BUCKET}/o?uploadType=resumable&name=c")
    begun = proxy.getresponse()
    begun.read()
    place = begun.getheader("Location") or ""
    assert place.startswith(f"https://{HOSTS[0]}/upload/")
    asking = {"Content-Range": "bytes */9"}
    proxy.request("PUT", place.removeprefix(f"https://{HOSTS[0]}"), b"", asking)
    unfinished = proxy.getresponse()
    assert (unfinished.status, unfinished.read(), (served.root / "c").exists()) == (308, b"", False)
    proxy.request("PUT", place.removeprefix(f"https://{HOSTS[0]}"), iter([b"in ", b"chunks"]), {
        "Content-Range": "bytes 0-8/9", "Transfer-Encoding": "chunked"}, encode_chunked=True)
    finished = proxy.getresponse()
    assert finished.status == 200
    finished.read()
    proxy.request("PUT", place.removeprefix(f"https://{HOSTS[0]}"), b"", asking)
    assert proxy.getresponse().status == 200
    assert (served.root / "c").read_bytes() == b"in chunks"
    proxy.close()


@pytest.mark.parametrize("done", [False, True])
def test_a_request_that_fails_may_have_had_its_effect(served: Served, done: bool) -> None:
    path = f"/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name=written{done}"
    failing(served, Failure(503, done))
    assert asked(served, "POST", path, b"x")[0] == 503
    assert (served.root / f"written{done}").exists() == done
    assert asked(served, "POST", path, b"x")[0] == 200


def test_connections_that_are_closed_or_cut(served: Served) -> None:
    failing(served, Failure("closed"))
    with pytest.raises(http.client.RemoteDisconnected):
        asked(served)
    failing(served, Failure("cut"))
    with pytest.raises(http.client.IncompleteRead) as caught:
        asked(served)
    assert caught.value.partial == b"what i"
    before = served.failed
    failing(served, Failure("slow", seconds=0.1))
    assert asked(served) == (200, b"what it holds") and served.failed == before + 1


def test_failures_of_many_kinds_are_drawn() -> None:
    dice = random.Random(0)
    drawn = [any_failure(dice) for _ in range(300)]
    assert {503, 429, 500, "closed", "cut", "slow"} <= {one.kind for one in drawn}
    assert {one.done for one in drawn} == {True, False}


@pytest.mark.slow
def test_a_command_is_started_there_and_killed(served: Served) -> None:
    """It has the status and the output of a process of its own, and reads objects under the addresses of its files."""
    program = "import sys\nfrom etils import epath\nprint(epath.Path(sys.argv[1]).read_text(), flush=True)\n{}"
    first = served.start(["-c", program.format("sys.exit(3)"), str(served.root / "a" / "b")])
    assert first.communicate(timeout=200)[0].splitlines()[-1] == "what it holds" and first.returncode == 3
    second = served.start(["-c", "import time\ntime.sleep(1000)"])
    with pytest.raises(subprocess.TimeoutExpired):
        second.communicate(timeout=0.1)
    kill(second)
    assert second.returncode == -signal.SIGKILL and second.communicate() == ("", None)
