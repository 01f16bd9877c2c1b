"""Half-made folders: whoever makes one keeps it, and what killed processes left is cleared away."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from codellm_jax.mixture import half_made as module
from codellm_jax.mixture.half_made import half_made

HOLDER = """
import sys, time
from codellm_jax.mixture.half_made import half_made
with half_made(sys.argv[1]) as folder:
    (folder / "rows").write_text("of another")
    print(folder, flush=True)
    sys.stdin.readline()
    folder.rename(sys.argv[1])
"""
ROOT = Path(__file__).resolve().parents[2]


def holder(place: Path, *before: str) -> "subprocess.Popen[str]":
    return subprocess.Popen([*before, sys.executable, "-c", HOLDER, str(place)], text=True, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})


def told(process: "subprocess.Popen[str]") -> Path:
    return Path(process.stdout.readline().strip())


def can_unshare() -> bool:
    command = ["unshare", "--pid", "--fork", "true"]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.parametrize("before", [[], pytest.param(
    ["unshare", "--pid", "--fork", "--kill-child"],
    marks=pytest.mark.skipif(not can_unshare(), reason="this host makes no PID namespaces"))])
def test_nobody_removes_what_another_still_makes(tmp_path, before):
    """Under process numbers of its own, as in another container, a process is not seen, and its lock is."""
    with holder(tmp_path / "place", *before) as other:
        folder = told(other)
        with half_made(tmp_path / "place") as own:
            assert own != folder and (folder / "rows").read_text() == "of another"
        other.stdin.write("\n")
        other.stdin.close()
        assert other.wait() == 0
    assert [file.name for file in tmp_path.iterdir()] == ["place"]
    assert (tmp_path / "place" / "rows").read_text() == "of another"


def test_what_a_killed_process_left_is_removed(tmp_path):
    with holder(tmp_path / "place") as other:
        folder = told(other)
        other.send_signal(signal.SIGKILL)
    (tmp_path / ".place.empty").mkdir()  # of one that was killed before it held it
    (tmp_path / ".places.empty").mkdir()  # of another place
    assert folder.exists()
    with half_made(tmp_path / "place") as own:
        assert not folder.exists() and not (tmp_path / ".place.empty").exists() and list(own.iterdir()) == []
    assert [file.name for file in tmp_path.iterdir()] == [".places.empty"]


def test_one_taken_before_it_is_held_is_made_again(tmp_path, monkeypatch):
    """Between making a folder and holding it another process may take it for one that was left."""
    real, taken = fcntl.flock, []

    def late(lock, how):
        if len(taken) < 2:
            [folder] = tmp_path.glob(".place.*")
            taken.append(folder)
            if len(taken) == 1:  # removed already
                shutil.rmtree(folder)
            else:  # held by the one that removes it in a moment
                shutil.rmtree(folder)
                raise BlockingIOError
        real(lock, how)

    monkeypatch.setattr(module.fcntl, "flock", late)
    with half_made(tmp_path / "place") as own:
        assert len(taken) == 2 and own.exists() and own.parent not in taken
    assert list(tmp_path.iterdir()) == []


def test_without_locks_nothing_is_removed(tmp_path, monkeypatch):
    def none(lock, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(module.fcntl, "flock", none)
    with half_made(tmp_path / "place") as first, half_made(tmp_path / "place") as second:
        assert first.exists() and second.exists() and first != second
    assert list(tmp_path.iterdir()) == []


def test_mistakes_leave_nothing(tmp_path):
    with pytest.raises(KeyError), half_made(tmp_path / "below" / "place"):
        raise KeyError
    assert list((tmp_path / "below").iterdir()) == []
