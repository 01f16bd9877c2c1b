"""What a process asks of the C library."""

import subprocess
import sys

import pytest

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
