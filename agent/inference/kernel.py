"""What a child asks of the Linux kernel: to die with its parent, to lose the network, to stay within its memory.

By ctypes, for Python has no names for these. A machine that lacks one of them says so in the return value or in
`NoIsolation`; what that means is the caller's decision.
"""

import ctypes
import errno
import os
import platform
import resource
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from agent.channel import PARENT_PID
from runtime.measure import memory_use

_PR_SET_PDEATHSIG = 1
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000

# BPF: load a word of the syscall record; jump if equal; return a verdict (linux/bpf_common.h, linux/seccomp.h).
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _DENY = 0x7FFF0000, 0x00050000 | errno.EPERM
_NUMBER_AT, _ARCHITECTURE_AT = 0, 4
_X32_BIT = 0x40000000
# Per machine: AUDIT_ARCH, then socket, connect, bind, listen, io_uring_setup (a ring opens sockets without socket()).
_SYSCALLS = {
    "x86_64": (0xC000003E, (41, 42, 49, 50, 425)),
    "aarch64": (0xC00000B7, (198, 203, 200, 201, 425)),
    "armv7l": (0x40000028, (281, 283, 282, 284, 425)),
}


class NoIsolation(Exception):
    """This machine offers no way to take the network from a process without privileges."""


def die_with_parent(environ: Mapping[str, str]) -> None:
    """Have the kernel kill this process when the thread that started it ends; exit when that is over already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    expected = environ.get(PARENT_PID)
    if expected is not None and expected != str(os.getppid()):
        sys.exit("the process that started this one is gone")


def limit_memory(more: int) -> None:
    """Let this process take this many bytes of private memory more than it has now (RLIMIT_DATA)."""
    limit = memory_use().data + more
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def memory_available() -> int | None:
    """Return how many bytes this process may still take: the machine's, and those under its own limit."""
    known = [value for value in (_machine_available(), _limit_left()) if value is not None]
    return min(known, default=None)


def _machine_available() -> int | None:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    available = fields.get("MemAvailable", "").split()
    return int(available[0]) * 1024 if available else None


def _limit_left() -> int | None:
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return None if soft == resource.RLIM_INFINITY else max(0, soft - memory_use().data)


def take_network_away() -> str:
    """Leave this process without network and return how: ``unshare`` or ``seccomp``; raise `NoIsolation`.

    Call before other threads start: a namespace is left by one thread only, and so is a filter installed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    # Plain for the privileged; everybody else needs a user namespace of their own, where the kernel allows those.
    if libc.unshare(_CLONE_NEWNET) == 0 or libc.unshare(_CLONE_NEWNET | _CLONE_NEWUSER) == 0:
        return "unshare"
    deny_sockets(libc)
    return "seccomp"


def deny_sockets(libc: ctypes.CDLL) -> None:
    """Install a filter under which making or using a socket fails with EPERM; raise `NoIsolation`."""
    machine = _machine()
    if machine not in _SYSCALLS:
        raise NoIsolation(f"no system call numbers are known for {machine}")
    steps = _filter(*_SYSCALLS[machine])
    code = (_Step * len(steps))(*(_Step(*step) for step in steps))
    program = _Program(len(steps), code)
    zero = ctypes.c_ulong(0)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero) or libc.prctl(
        _PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), ctypes.byref(program), zero, zero
    ):
        raise NoIsolation(f"the kernel refuses a seccomp filter: {os.strerror(ctypes.get_errno())}")


def _machine() -> str:
    """Return the machine this process is built for: a 64-bit kernel also runs 32-bit systems."""
    machine = platform.machine()
    if sys.maxsize > 2**32:
        return machine
    return "armv7l" if machine.startswith(("arm", "aarch64")) else f"32-bit {machine}"


class _Step(ctypes.Structure):
    """One instruction: struct sock_filter."""

    _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    """The filter: struct sock_fprog."""

    _fields_ = (("length", ctypes.c_uint16), ("filter", ctypes.POINTER(_Step)))


def _filter(architecture: int, denied: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """Return the BPF program: deny these calls, and every call of a foreign architecture or of the x32 interface."""
    last = len(denied)
    return [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_JUMP_EQUAL, 0, last + 3, architecture),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_JUMP_AT_LEAST, last + 1, 0, _X32_BIT),
        *((_JUMP_EQUAL, last - k, 0, number) for k, number in enumerate(denied)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _DENY),
    ]
