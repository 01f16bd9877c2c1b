"""The allowed system calls of an untrusted program; a seccomp filter makes all others fail.

It excludes above all calls that hold memory outside the limits of a process: shared memory, semaphores and queues
(System V's and POSIX's), anonymous memory files, growing buffers, record locks, watches, keys. Programs that use the
standard library need none of these; an excluded call fails as if the kernel lacked it.
"""

import ctypes
import errno
import platform
import sys
from collections.abc import Sequence

# Name, number on x86_64, number on aarch64; "-" where it does not exist.
_ALLOWED = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, preadv 295 69, pwritev 296 70,
preadv2 327 286, pwritev2 328 287, lseek 8 62, close 3 57, close_range 436 436, dup 32 23, dup2 33 -, dup3 292 24,
open 2 -, openat 257 56, openat2 437 437, creat 85 -, access 21 -, faccessat 269 48, faccessat2 439 439, stat 4 -,
lstat 6 -, fstat 5 80, newfstatat 262 79, statx 332 291, statfs 137 43, fstatfs 138 44, readlink 89 -,
readlinkat 267 78, getdents 78 -, getdents64 217 61, getcwd 79 17, chdir 80 49, fchdir 81 50, rename 82 -,
renameat 264 38, renameat2 316 276, mkdir 83 -, mkdirat 258 34, rmdir 84 -, link 86 -, linkat 265 37, unlink 87 -,
unlinkat 263 35, symlink 88 -, symlinkat 266 36, chmod 90 -, fchmod 91 52, fchmodat 268 53, fchmodat2 452 452,
chown 92 -, fchown 93 55, lchown 94 -, fchownat 260 54, umask 95 166, utime 132 -, utimes 235 -, utimensat 280 88,
futimesat 261 -, truncate 76 45, ftruncate 77 46, fallocate 285 47, fadvise64 221 223, fsync 74 82, fdatasync 75 83,
copy_file_range 326 285, flock 73 32, mknod 133 -, mknodat 259 33, getxattr 191 8, lgetxattr 192 9, fgetxattr 193 10,
listxattr 194 11, llistxattr 195 12, flistxattr 196 13, ioctl 16 29, pipe 22 -, pipe2 293 59, poll 7 -, ppoll 271 73,
select 23 -, pselect6 270 72, epoll_create 213 -, epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -,
epoll_pwait 281 22, epoll_pwait2 441 441, eventfd 284 -, eventfd2 290 19, munmap 11 215, mprotect 10 226,
 madvise 28 233, msync 26 227, brk 12 214, membarrier 324 283, fork 57 -, vfork 58 -, exit 60 93,
exit_group 231 94, wait4 61 260, waitid 247 95, set_tid_address 218 96, set_robust_list 273 99,
get_robust_list 274 100, rseq 334 293, futex 202 98, getpid 39 172, getppid 110 173, gettid 186 178, getuid 102 174,
geteuid 107 175, getgid 104 176, getegid 108 177, getresuid 118 148, getresgid 120 150, getgroups 115 158,
getpgid 121 155, getpgrp 111 -, getsid 124 156, setsid 112 157, setpgid 109 154, capget 125 90, kill 62 129,
tkill 200 130, tgkill 234 131, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigpending 127 136, rt_sigreturn 15 139,
rt_sigsuspend 130 133, rt_sigtimedwait 128 137, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240,
sigaltstack 131 132, pause 34 -, restart_syscall 219 128, alarm 37 -, getitimer 36 102, setitimer 38 103,
nanosleep 35 101, clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169,
time 201 -, times 100 153, sched_yield 24 124, sched_getaffinity 204 123, sched_setaffinity 203 122,
sched_getparam 143 121, sched_getscheduler 145 120, sched_get_priority_max 146 125, sched_get_priority_min 147 126,
sched_rr_get_interval 148 127, getpriority 140 141, setpriority 141 140, getcpu 309 168, getrlimit 97 163,
setrlimit 160 164, prlimit64 302 261, getrusage 98 165, sysinfo 99 179, uname 63 160, getrandom 318 278,
arch_prctl 158 -, sendto 44 206, recvfrom 45 207, shutdown 48 210,
getsockname 51 204, getpeername 52 205, getsockopt 55 209"""
# Allowed only with some arguments.
_CLONE, _FCNTL, _PRCTL, _SOCKET, _SOCKET_PAIR = (56, 220), (72, 25), (157, 167), (41, 198), (53, 199)
_MMAP, _MREMAP = (9, 222), (25, 216)
_MREMAP_FIXED = 2
_NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS and the following
# Duplicating, flags, reading a pipe's size; not record locks, whose number nothing limits, nor larger pipes.
_FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030, 1032)
# The parent's death, core dumps, names, no new privileges; not the size of the kernel's futex table.
_PRCTL_OPTIONS = (1, 2, 3, 4, 15, 16, 38, 39)
_AF_UNIX, _SOCK_STREAM, _SOCK_TYPE_MASK = 1, 1, 0xF

# BPF: load a word of `struct seccomp_data`; and; jump if equal, if any bit is set; return.
_LOAD, _AND, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x54, 0x15, 0x45, 0x06
_NUMBER, _ARCHITECTURE = 0, 4
_ARGUMENTS = (16, 24, 32, 40)  # the low words of the first four arguments, which suffice for these calls
_HIGH = 4  # from an argument's low word to its high one
_PERMIT = (_RETURN, 0, 0, 0x7FFF0000)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, value


def allow_listed() -> None:
    """Restricts this process, and those it starts, to the listed calls for good; needs PR_SET_NO_NEW_PRIVS.

    All sockets except stream pairs are refused, of every family: some, such as AF_VSOCK, reach beyond network
    namespaces, and a queue of pending connections holds memory that no limit counts.

    Raises:
      OSError: the kernel has no such filters, or there is no list for this processor architecture.
    """
    machine = platform.machine()
    if machine not in _ARCHITECTURES or sys.byteorder != "little" or ctypes.sizeof(ctypes.c_void_p) != 8:
        raise OSError(errno.ENOSYS, f"no list of system calls for {machine}")
    instructions = _filter(machine)
    encoded = b"".join(code.to_bytes(2, "little") + bytes((yes, no)) + value.to_bytes(4, "little")
                       for code, yes, no, value in instructions)
    buffer = ctypes.create_string_buffer(encoded, len(encoded))
    program = (ctypes.c_uint64 * 2)(len(instructions), ctypes.addressof(buffer))  # struct sock_fprog
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(22, *map(ctypes.c_ulong, (2, ctypes.addressof(program), 0, 0))):  # PR_SET_SECCOMP
        raise OSError(ctypes.get_errno(), "the kernel accepts no filter of system calls")


def _filter(machine: str) -> list[Instruction]:
    column, architecture = _ARCHITECTURES[machine]
    numbers = [entry.split()[1 + column] for entry in _ALLOWED.split(",")]
    found = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, architecture), _refuse(errno.ENOSYS), (_LOAD, 0, 0, _NUMBER)]
    for number in numbers:
        if number != "-":
            found += [(_EQUAL, 0, 1, int(number)), _PERMIT]
    of_clone = [(_LOAD, 0, 0, _ARGUMENTS[0]), (_ANY_BIT, 0, 1, _NEW_NAMESPACES), _refuse(errno.EPERM), _PERMIT]
    of_pair = [(_LOAD, 0, 0, _ARGUMENTS[0]), (_EQUAL, 1, 0, _AF_UNIX), _refuse(errno.ENETDOWN),
               (_LOAD, 0, 0, _ARGUMENTS[1]), (_AND, 0, 0, _SOCK_TYPE_MASK), (_EQUAL, 1, 0, _SOCK_STREAM),
               _refuse(errno.ENETDOWN), _PERMIT]
    # Mappings far apart each take a page of page tables, two if gigabytes apart: new ones go near others.
    here = (ctypes.cast(ctypes.CDLL(None).mmap, ctypes.c_void_p).value or 0) >> 32
    of_mmap = _only(_ARGUMENTS[0] + _HIGH, (0, here - 1, here, here + 1), errno.ENOMEM)
    of_mremap = [(_LOAD, 0, 0, _ARGUMENTS[3]), (_ANY_BIT, 0, 1, _MREMAP_FIXED), _refuse(errno.ENOMEM), _PERMIT]
    of_fcntl = _only(_ARGUMENTS[1], _FCNTL_COMMANDS, errno.ENOLCK)
    of_prctl = _only(_ARGUMENTS[0], _PRCTL_OPTIONS, errno.EINVAL)
    for call, rest in ((_MMAP, of_mmap), (_MREMAP, of_mremap), (_CLONE, of_clone), (_FCNTL, of_fcntl),
                       (_PRCTL, of_prctl), (_SOCKET_PAIR, of_pair), (_SOCKET, [_refuse(errno.ENETDOWN)])):
        found += [(_EQUAL, 0, len(rest), call[column]), *rest]
    return [*found, _refuse(errno.ENOSYS)]


def _only(argument: int, values: Sequence[int], otherwise: int) -> list[Instruction]:
    """Permits a call whose argument is one of the values; else fails it with an error number."""
    found: list[Instruction] = [(_LOAD, 0, 0, argument)]
    for value in values:
        found += [(_EQUAL, 0, 1, value), _PERMIT]
    return [*found, _refuse(otherwise)]


def _refuse(number: int) -> Instruction:
    return _RETURN, 0, 0, 0x00050000 | number
