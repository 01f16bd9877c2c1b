"""Ways to hold memory that no limit of a process counts: the sandbox refuses or bounds each."""

import pytest

from tasks.programs import sandbox
from tasks.programs.sandbox import Limits, Program, run_programs

# `held()` tells how many bytes the kernel has granted.
HOARD = """
import contextlib, ctypes, errno, fcntl, os, platform, socket, struct, time
libc = ctypes.CDLL(None, use_errno=True)
kept = []
BLOCK = bytes(1 << 20)
WANTED = 256 << 20
def granted(grant):
    total = 0
    while total < WANTED:
        try: one = grant()
        except OSError: break
        if not one: break
        total += one
    return total
def syscall(x86, arm, *arguments):
    number = {{"x86_64": x86, "aarch64": arm}}[platform.machine()]
    return libc.syscall(ctypes.c_long(number), *arguments)
def held():
{body}
"""
HOARDS = {
    "System V shared memory": """
        libc.shmat.restype = ctypes.c_void_p
        def grant():
            number = libc.shmget(0, len(BLOCK), 0o1600)
            if number < 0: return 0
            address = libc.shmat(number, None, 0)
            ctypes.memset(address, 1, len(BLOCK))
            libc.shmdt(ctypes.c_void_p(address))
            return len(BLOCK)
        return granted(grant)""",
    "System V queues": """
        def grant():
            number = libc.msgget(0, 0o1600)
            message = struct.pack("l", 1) + bytes(8000)
            return 0 if number < 0 or libc.msgsnd(number, message, 8000, 0o4000) else 8000
        return granted(grant)""",
    "System V semaphores": """
        return granted(lambda: 64 * 32_000 if libc.semget(0, 32_000, 0o1600) >= 0 else 0)""",
    "POSIX queues": """
        def grant():
            libc.mq_open.restype = ctypes.c_int
            number = libc.mq_open(b"/%d" % len(kept), os.O_CREAT | os.O_RDWR, 0o600, None)
            kept.append(number)
            return 0 if number < 0 else 80_000
        return granted(grant)""",
    "files in memory": """
        def grant():
            file = os.memfd_create("file")
            kept.append(file)
            return sum(os.write(file, BLOCK) for _ in range(10))
        return granted(grant)""",
    "secret memory": """
        return 1 << 30 if libc.syscall(ctypes.c_long(447), 0) >= 0 else 0""",
    "files of /dev/shm": """
        file = open("/dev/shm/file", "wb") if os.path.exists("/dev/shm") else None
        return granted(lambda: file.write(BLOCK)) if file else 0""",
    "files that are removed while open": """
        def grant():
            number = len(kept)
            kept.append(open(str(number), "wb", buffering=0))
            os.remove(str(number))
            return sum(kept[-1].write(BLOCK) for _ in range(8))
        return max(0, granted(grant) - {folder_bytes})""",
    "files without a name": """
        def grant():
            file = os.open("/tmp", os.O_TMPFILE | os.O_RDWR)
            kept.append(file)
            return sum(os.write(file, BLOCK) for _ in range(8))
        return max(0, granted(grant) - {folder_bytes})""",
    "attributes of files": """
        file = open("file", "w")
        def grant():
            kept.append(None)
            os.setxattr("file", f"user.{len(kept)}", bytes(60_000))
            return 60_000
        return granted(grant)""",
    "names of files": """
        def grant():
            kept.append(None)
            os.mkdir(f"{len(kept):0>200}")
            return 1 << 10
        return granted(grant)""",
    "large pipes": """
        def grant():
            kept.append(os.pipe())
            fcntl.fcntl(kept[-1][1], 1031, 1 << 20)
            return 1 << 20
        return granted(grant)""",
    "pipes": """
        def grant():
            reading, writing = os.pipe()
            os.set_blocking(writing, False)
            total = 0
            with contextlib.suppress(BlockingIOError):
                while True: total += os.write(writing, BLOCK)
            kept.append((reading, writing))
            return total
        return granted(grant)""",
    "pages spliced into pipes": """
        vector = ctypes.create_string_buffer(BLOCK, len(BLOCK))
        one = struct.pack("PN", ctypes.addressof(vector), len(BLOCK))
        def grant():
            kept.append(os.pipe())
            return max(0, syscall(278, 75, kept[-1][1], one, ctypes.c_ulong(1), ctypes.c_uint(2)))
        return granted(grant)""",
    "pairs of sockets": """
        def grant():
            one, other = socket.socketpair()
            one.setblocking(False), other.setblocking(False)
            kept.append((one, other))
            total = 0
            for end in (one, other):
                with contextlib.suppress(BlockingIOError):
                    while True: total += end.send(BLOCK)
            return total
        return granted(grant)""",
    "buffers of sockets": """
        one, other = socket.socketpair()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 26)
        return WANTED""",
    "connections that wait": """
        server = socket.socket(socket.AF_UNIX)
        server.bind("server")
        server.listen(4096)
        def grant():
            with socket.socket(socket.AF_UNIX) as client:
                client.connect("server")
                client.setblocking(False)
                return client.send(bytes(200_000))
        return granted(grant)""",
    "datagrams": """
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        return WANTED""",
    "sockets beyond the namespace": """
        def opened(family):
            try: socket.socket(family, socket.SOCK_RAW if family == 16 else socket.SOCK_STREAM).close()
            except OSError: return False
            return True
        assert not any(map(opened, range(1, 46)))
        return 0""",
    "record locks": """
        file = open("file", "w")
        def grant():
            kept.append(None)
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 2 * (10 ** 9 - len(kept)))
            return 200
        return min(WANTED, 50 * granted(grant))""",
    "watches": """
        one = libc.inotify_init()
        return 0 if one < 0 else WANTED""",
    "keys": """
        return 0 if syscall(248, 217, b"user", b"name", b"x" * 100, ctypes.c_size_t(100), -3) < 0 else WANTED""",
    "rings": """
        parameters = ctypes.create_string_buffer(200)
        context = ctypes.c_ulong(0)
        return WANTED * any(number >= 0 for number in (
            libc.syscall(ctypes.c_long(425), 4096, parameters), syscall(206, 0, 1000, ctypes.byref(context)),
            syscall(323, 282, 1), syscall(321, 280, 0, parameters, 72),
            syscall(298, 241, parameters, 0, -1, -1, 0)))""",
    "a table of futexes": """
        return 0 if libc.prctl(78, 1, ctypes.c_ulong(1 << 20), 0, 0) else WANTED""",
    "timers": """
        def grant():
            number = ctypes.c_int()
            kept.append(libc.timer_create(1, None, ctypes.byref(number)))
            return 0 if kept[-1] else 300
        return min(WANTED, 50 * granted(grant))""",
    "signals that wait": """
        libc.sigprocmask(0, (ctypes.c_ulong * 16)(*[(1 << 64) - 1] * 16), None)
        def grant():
            kept.append(libc.sigqueue(os.getpid(), 40, None))
            return 0 if kept[-1] else 100
        return min(WANTED, 50 * granted(grant))""",
    "a file system of its own": """
        return WANTED * (libc.unshare(0x10020000) == 0 or libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None) == 0)""",
    "tables of mappings far apart": """
        libc.mmap.restype = ctypes.c_void_p
        def grant():
            kept.append(None)
            place = ctypes.c_void_p((len(kept) << 30) + (1 << 44))
            address = libc.mmap(place, ctypes.c_size_t(4096), 3, 0x100022, -1, ctypes.c_long(0))
            if address in (None, ctypes.c_void_p(-1).value): return 0
            ctypes.memset(address, 1, 1)
            return 8192
        return granted(grant)""",
    "memory shared with children that go on": """
        import mmap
        def grant():
            block = mmap.mmap(-1, 200 << 20)
            if os.fork() == 0:
                time.sleep(100)
            block.close()
            return 200 << 20
        return 0 if granted(grant) <= 8 * (200 << 20) else WANTED""",
}


@pytest.fixture(scope="module")
def hoarded() -> dict[str, sandbox.Outcome]:
    sources = {name: HOARD.format(body=body.replace("{folder_bytes}", str(Limits().folder_bytes)))
               for name, body in HOARDS.items()}
    tests = (f"assert held() <= {16 << 20}",)
    return dict(zip(sources, run_programs([Program(source, tests) for source in sources.values()]), strict=True))


@pytest.mark.parametrize("name", HOARDS)
def test_no_memory_is_held_that_no_limit_counts(hoarded, name):
    """What the kernel grants in some way is at most the 16 MiB that the docstring has; an error is a refusal."""
    outcome = hoarded[name]
    assert outcome.passed or outcome.detail.startswith(("OSError", "PermissionError")), outcome
