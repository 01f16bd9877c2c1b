"""Kernel features that confine an untrusted program: namespaces, a separate file system, limits.

Runs in the small process that `sandbox` starts, never in the process of training. Standard library only.
"""

import ctypes
import os
import resource
import signal
from collections.abc import Sequence

_NEW_MOUNTS, _NEW_IPC, _NEW_USER, _NEW_PIDS, _NEW_NET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_BIND, _REC, _PRIVATE, _NOSUID, _NODEV, _DETACH = 0x1000, 0x4000, 0x40000, 2, 4, 2
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_WORK = "/tmp"  # the only writable folder in a program's view of the file system

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _call(name: str, *arguments: object) -> None:
    encoded = [argument.encode() if isinstance(argument, str) else argument for argument in arguments]
    if getattr(_libc, name)(*encoded) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    _call("mount", source, target, kind, ctypes.c_ulong(flags), options)


def new_process_ids() -> None:
    """Puts future children into a new PID namespace, the first as its init: when it dies, all of them die.

    Raises:
      OSError: the kernel refuses.
    """
    _call("unshare", _NEW_PIDS)


def new_namespaces() -> None:
    """Leaves the host's network, mounts and IPC namespaces, and for future children its PID namespace.

    Root does so directly. Other users, and root in an unprivileged container, do so in a user namespace.

    Raises:
      OSError: the kernel refuses.
    """
    wanted = _NEW_MOUNTS | _NEW_NET | _NEW_PIDS | _NEW_IPC
    user, group = os.geteuid(), os.getegid()
    try:
        _call("unshare", wanted)
    except OSError:
        _call("unshare", wanted | _NEW_USER)
        maps = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
        for name, content in maps.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(content)


def new_file_system(folder: str, visible: Sequence[str], work_bytes: int) -> None:
    """Replaces the root with one that holds `visible` and three devices, read-only, and an empty /tmp in memory.

    Args:
      folder: an existing folder of the host, used as mount point in this mount namespace only.
      visible: files and folders to show at their own paths; missing ones are left out.
      work_bytes: capacity of /tmp.

    Raises:
      OSError: the kernel refuses, as before Linux 5.12. Earlier mounts remain, in this namespace only.
    """
    _mount(None, "/", None, _REC | _PRIVATE)  # else root's mounts would reach the host
    _mount("tmpfs", folder, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    world = f"{folder}/world"
    for path in (*visible, *_DEVICES):
        if os.path.isdir(path):
            os.makedirs(world + path, mode=0o755, exist_ok=True)
        elif os.path.exists(path):
            os.makedirs(os.path.dirname(world + path), mode=0o755, exist_ok=True)
            os.close(os.open(world + path, os.O_CREAT | os.O_WRONLY, 0o644))
        else:
            continue
        if path not in _DEVICES:
            _mount(path, world + path, None, _BIND | _REC)
    os.makedirs(world + _WORK, exist_ok=True)
    _make_read_only(folder)
    for path in _DEVICES:  # after making mounts read-only, since devices do not work on read-only mounts
        if os.path.exists(path):
            _mount(path, world + path, None, _BIND)
    _mount("tmpfs", world + _WORK, "tmpfs", _NOSUID | _NODEV, f"size={work_bytes},nr_inodes=4096,mode=1777")
    os.chdir(folder)
    _call("pivot_root", ".", ".")  # the old root now covers the new one, and is removed
    _call("umount2", ".", _DETACH)
    os.chroot("world")  # in a chroot the kernel grants no further user namespaces, hence no new capabilities
    os.chdir(_WORK)


def _make_read_only(path: str) -> None:
    """Uses mount_setattr(2), whose number is the same everywhere and which, unlike remounting, reaches mounts below."""
    no_writes_suid_devices = (ctypes.c_uint64 * 4)(1 | _NOSUID | _NODEV, 0, 0, 0)
    _call("syscall", ctypes.c_long(442), ctypes.c_long(-100), path, ctypes.c_long(0x8000), no_writes_suid_devices,
          ctypes.c_long(ctypes.sizeof(no_writes_suid_devices)))


def drop_privileges(user: int | None) -> None:
    """Drops all capabilities, for good, and, if `user` is given, changes to that user and group."""
    if user is not None:
        try:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        except OSError:
            pass  # in a container that maps few users; without capabilities the current user is as weak
    _call("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
    _call("prctl", 38, *map(ctypes.c_ulong, (1, 0, 0, 0)))  # PR_SET_NO_NEW_PRIVS
    die_with_parent()  # a change of user resets it


def die_with_parent() -> None:
    """Has the kernel kill this process when its parent thread ends."""
    _call("prctl", 1, *map(ctypes.c_ulong, (signal.SIGKILL, 0, 0, 0)))


def limit(cpu_seconds: int, memory_bytes: int, file_bytes: int, processes: int | None) -> None:
    """Limits this process and, separately, each that it starts; `processes` counts all processes of this user."""
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: 64, resource.RLIMIT_CPU: cpu_seconds,
              resource.RLIMIT_AS: memory_bytes, resource.RLIMIT_FSIZE: file_bytes, resource.RLIMIT_MEMLOCK: 0,
              resource.RLIMIT_MSGQUEUE: 0, resource.RLIMIT_SIGPENDING: 64}
    if processes is not None:
        limits[resource.RLIMIT_NPROC] = processes
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))  # init ignores the signal of the soft limit, not of the hard one
