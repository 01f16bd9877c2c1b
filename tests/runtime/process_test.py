"""What a process asks of the C library, and how it keeps others out of a directory."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from codellm_jax.runtime import process
from codellm_jax.runtime.process import alone_in, stop_on_signal

# As XLA does with a step's temporaries: large blocks, taken, written and freed again and again in a thread of its own.
PROGRAM = """
import ctypes, resource, sys, threading
from codellm_jax.runtime.process import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
libc, size, faults = ctypes.CDLL(None), 64 * 2**20, []
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes, libc.free.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]

def work():
    for _ in range(4):
        block = libc.malloc(size)
        libc.memset(block, 1, size)
        libc.free(block)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)

thread = threading.Thread(target=work)
thread.start()
thread.join()
print(faults[-1] - faults[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_memory_that_is_freed_is_not_asked_of_the_kernel_again(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    kept, left = (int(subprocess.run([sys.executable, "-c", PROGRAM, how], check=True, capture_output=True).stdout)
                  for how in ("keep", "leave"))
    assert kept < 10 < 50 < left  # 49,152 with pages of 4 KiB, 96 with pages of 2 MiB


def test_one_process_at_a_time_is_in_a_directory(tmp_path):
    code = f"from codellm_jax.runtime.process import alone_in\nwith alone_in({str(tmp_path)!r}): print('in')"
    with alone_in(str(tmp_path)):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "Another process is training in" in other.stderr and not other.stdout
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "in\n"


def test_parts_of_a_directory_are_held_apart(tmp_path):
    with alone_in(str(tmp_path), part="logic"), alone_in(str(tmp_path), part="cosqa"), alone_in(str(tmp_path)):
        with pytest.raises(ValueError, match="Another process is asking in "):
            with alone_in(str(tmp_path), doing="asking", part="cosqa"):
                pass
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("number, raised", [(errno.ENOLCK, False), (errno.ENOSYS, False), (errno.EIO, True)])
def test_where_there_are_no_locks_nothing_is_held(tmp_path, monkeypatch, number, raised):
    def fails(lock, how):
        raise OSError(number, "no")

    monkeypatch.setattr(process.fcntl, "flock", fails)
    entered = []
    try:
        with alone_in(str(tmp_path)):
            entered.append(True)
    except OSError:
        assert raised
    assert bool(entered) != raised


def test_two_ctrl_c_in_a_row_are_one(monkeypatch):
    """A terminal sends it, and so does a parent that passes it on; a later one means that a person is in a hurry."""
    with stop_on_signal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(5)
        monkeypatch.setattr(process, "ONE_CTRL_C", -1.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("change", ["removed", "moved", "replaced"])
def test_a_directory_that_goes_away_is_noticed(tmp_path, change):
    directory = tmp_path / "run"
    with alone_in(str(directory)) as require_held:
        require_held()
        if change == "moved":
            directory.rename(tmp_path / "other")
        else:
            (directory / ".lock").unlink()
        if change == "replaced":
            (directory / ".lock").touch()
        with pytest.raises(OSError, match="MODEL_DIR .*run was moved, removed or replaced during training"):
            require_held()
