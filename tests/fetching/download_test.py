"""Downloads from a publisher with every fault: nothing but the right content comes out, and it ends."""

import errno
import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_publisher import Publisher

from codellm_jax.fetching import download as module
from codellm_jax.fetching.download import Refused, Unreachable, digest_of, download, matches, partial

CONTENT = random.Random(0).randbytes(3 << 20)
SHA = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
PATH = "/files/a.bin"


@pytest.fixture
def target(tmp_path: Path, publisher: Publisher) -> Path:
    publisher.files[PATH] = CONTENT
    return tmp_path / "a.bin"


def get(publisher: Publisher, target: Path, size: int | None = len(CONTENT), digest: str | None = SHA) -> bytes:
    found = download(publisher.address + PATH, target, size, digest)
    assert found == partial(target) and not target.exists()
    return found.read_bytes()


def test_plain(publisher: Publisher, target: Path):
    assert get(publisher, target) == CONTENT
    assert publisher.asked == [(PATH, None)]
    assert os.listdir(target.parent) == [".a.bin.part"]


@pytest.mark.parametrize("digest", [SHA, None])
def test_a_dropped_connection_is_gone_on_from_where_it_broke(publisher: Publisher, target: Path, digest: str | None):
    publisher.drop[PATH] = [1_000_000, 500_001]
    assert get(publisher, target, None, digest) == CONTENT
    assert [asked for _, asked in publisher.asked] == [None, "bytes=1000000-", "bytes=1500001-"]


def test_a_server_without_parts_is_asked_for_the_whole(publisher: Publisher, target: Path):
    publisher.ranges = False
    publisher.drop[PATH] = [1_000_000]
    assert get(publisher, target) == CONTENT
    assert len(publisher.asked) == 2


def test_without_digest_and_etag_nothing_is_joined(publisher: Publisher, target: Path):
    publisher.etags = False
    publisher.drop[PATH] = [1_000_000]
    assert get(publisher, target, None, None) == CONTENT
    assert [asked for _, asked in publisher.asked] == [None, None]


def test_a_file_that_changes_between_two_parts_is_not_joined(publisher: Publisher, target: Path):
    publisher.drop[PATH] = [1_000_000] + [0] * 10
    with pytest.raises(OSError, match="the connection broke, 5 times in a row; 1,000,000 bytes are here"):
        get(publisher, target, None, None)
    publisher.reset()
    publisher.files[PATH] = CONTENT[::-1]
    assert get(publisher, target, None, None) == CONTENT[::-1]
    assert publisher.asked == [(PATH, "bytes=1000000-")]


def test_a_partial_file_of_another_address_is_not_gone_on_with(publisher: Publisher, target: Path):
    publisher.files["/old"] = CONTENT[::-1]
    publisher.drop["/old"] = [2_000_000] + [0] * 10
    with pytest.raises(OSError, match="5 times in a row"):
        download(publisher.address + "/old", target, None, None)
    publisher.reset()
    assert get(publisher, target) == CONTENT
    assert publisher.asked == [(PATH, None)]


def test_a_broken_partial_file_is_found_by_the_digest_and_begun_anew(publisher: Publisher, target: Path):
    publisher.drop[PATH] = [1_000_000] + [0] * 10
    with pytest.raises(OSError, match="5 times in a row"):
        get(publisher, target)
    with partial(target).open("r+b") as stream:
        stream.write(b"\0" * 1000)
    publisher.reset()
    assert get(publisher, target) == CONTENT
    assert [asked for _, asked in publisher.asked] == ["bytes=1000000-", None]


def test_a_partial_file_that_is_too_long(publisher: Publisher, target: Path):
    publisher.drop[PATH] = [1_000_000] + [0] * 10
    with pytest.raises(OSError, match="5 times in a row"):
        get(publisher, target, None)
    with partial(target).open("ab") as stream:
        stream.write(CONTENT)
    publisher.reset()
    assert get(publisher, target, None) == CONTENT


def test_another_file_than_the_digest_says_is_not_kept(publisher: Publisher, target: Path):
    publisher.files[PATH] = CONTENT[:-1] + b"x"
    with pytest.raises(OSError, match="is not the published file: sha256 [0-9a-f]{64} instead of "):
        get(publisher, target)
    assert not partial(target).exists() and not target.exists()


def test_another_size_is_refused_before_it_is_downloaded(publisher: Publisher, target: Path):
    publisher.files[PATH] = CONTENT * 2
    with pytest.raises(OSError, match="6,291,456 bytes instead of 3,145,728"):
        get(publisher, target)
    assert not partial(target).exists()


def test_a_length_that_is_not_told_and_a_file_that_breaks_off(publisher: Publisher, target: Path):
    publisher.lengths = False
    publisher.drop[PATH] = [1_000_000]
    with pytest.raises(OSError, match="1,000,000 bytes instead of 3,145,728"):
        get(publisher, target)
    assert get(publisher, target) == CONTENT


def test_redirects_are_followed(publisher: Publisher, target: Path):
    publisher.redirects[PATH] = publisher.address.replace("127.0.0.1", "localhost") + "/moved"
    publisher.files["/moved"] = CONTENT
    publisher.drop["/moved"] = [1_000_000]
    assert get(publisher, target) == CONTENT
    assert publisher.asked[-1] == ("/moved", "bytes=1000000-")


def test_redirects_in_a_circle_end(publisher: Publisher, target: Path):
    publisher.redirects |= {PATH: "/other", "/other": PATH}
    with pytest.raises(Refused, match="HTTP 302"):
        get(publisher, target)


@pytest.mark.parametrize("status, message", [(404, "not found"), (403, "forbidden"), (401, "login")])
def test_refusals_are_not_repeated(publisher: Publisher, target: Path, status: int, message: str):
    publisher.statuses[PATH] = [status]
    with pytest.raises(Refused, match=f"HTTP {status}: .*{message}"):
        get(publisher, target)
    assert len(publisher.asked) == 1 and not target.exists()


def test_a_busy_server_is_asked_again(publisher: Publisher, target: Path):
    publisher.statuses[PATH] = [503, 429, 500]
    assert get(publisher, target) == CONTENT
    publisher.statuses[PATH] = [503] * 10
    with pytest.raises(OSError, match="the server answers with HTTP 503, 5 times in a row"):
        get(publisher, target)


def test_a_server_that_never_answers(publisher: Publisher, target: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "TIMEOUT", 0.2)
    publisher.silent.add(PATH)
    begun = time.monotonic()
    with pytest.raises(OSError, match=r"no data for 0.2 seconds, 5 times in a row"):
        get(publisher, target)
    assert time.monotonic() - begun < 5


def test_a_server_that_stops_half_way(publisher: Publisher, target: Path, monkeypatch: pytest.MonkeyPatch):
    """Each answer brings a bit more, so it is gone on with as long as that is so."""
    monkeypatch.setattr(module, "TIMEOUT", 0.2)
    monkeypatch.setattr(module, "PROGRESS", 400_000)
    publisher.stuck[PATH] = 500_000
    assert get(publisher, target) == CONTENT
    assert len(publisher.asked) == 7


def test_a_server_that_always_breaks_off_ends(publisher: Publisher, target: Path):
    publisher.ranges = False
    publisher.drop[PATH] = [2_000_000] * 50
    with pytest.raises(OSError, match="5 times in a row"):
        get(publisher, target)
    assert len(publisher.asked) == 5


def test_no_connection(publisher: Publisher, target: Path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(Unreachable, match="no connection to 127.0.0.1 .*refused"):
            download(f"http://127.0.0.1:{unused.getsockname()[1]}/a", target)
    with pytest.raises(Unreachable, match="no connection to no-such-host.invalid"):
        download("http://no-such-host.invalid/a", target)


def test_a_web_page_in_the_place_of_the_file(publisher: Publisher, target: Path):
    publisher.files[PATH] = b"\n<!DOCTYPE html><html>Log in, please.</html>"
    with pytest.raises(Refused, match="is a web page instead of the file"):
        get(publisher, target, None, None)


def test_a_full_disk(publisher: Publisher, target: Path, monkeypatch: pytest.MonkeyPatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        get(publisher, target)
    monkeypatch.undo()
    assert not target.exists() and get(publisher, target) == CONTENT


def test_a_killed_download_is_gone_on_with(publisher: Publisher, target: Path):
    publisher.stuck[PATH] = 2_000_000
    child = subprocess.Popen([sys.executable, "-c", (
        "import sys; from pathlib import Path; from codellm_jax.fetching.download import download\n"
        "download(sys.argv[1], Path(sys.argv[2]))"), publisher.address + PATH, str(target)])
    try:
        deadline = time.monotonic() + 60
        while not partial(target).exists() or partial(target).stat().st_size < 1_500_000:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert not target.exists()
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    publisher.reset()
    assert get(publisher, target, None, None) == CONTENT
    [(_, asked)] = publisher.asked
    assert asked and int(asked.removeprefix("bytes=").rstrip("-")) >= 1_500_000


def test_digests(tmp_path: Path):
    file = tmp_path / "a"
    file.write_bytes(b"hello\n")
    # As `git hash-object`, `sha256sum` and `md5sum` give them.
    assert digest_of(file, "git") == "ce013625030ba8dba906f756967f9e9ca394464a"
    assert digest_of(file) == "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
    assert matches(file, "md5:b1946ac92492d2347c6235b4d2611184") and not matches(file, "md5:0")
