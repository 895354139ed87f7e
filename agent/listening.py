"""The sockets that inference clients connect to: opened here, or taken over from systemd.

Control (or systemd) holds them and the data plane inherits them, so connections made while no data plane lives wait
in the kernel's backlog instead of being refused. They are only ever closed: ``shutdown()`` on a listening socket
would stop it for every process that shares it. What is said over them is ``inference/server.py``'s business.

`CannotListen` is for the person who chose the address; its message says what to do.
"""

import contextlib
import re
import socket
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

BACKLOG = 1024  # a Unix socket with a full backlog turns clients away at once, so it is generous
UNIX_MODE = 0o660
FIRST_SYSTEMD_FD = 3  # sd_listen_fds(3)
LOOPBACK_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})
MAX_PORT = 65535
_TCP = re.compile(r"(?:\[(?P<six>[0-9a-fA-F:]+)\]|(?P<four>[^:\[\]]+)):(?P<port>[0-9]{1,5})")


class CannotListen(Exception):
    """An address cannot be listened on; a person must choose another or free it."""


class ListeningSockets:
    """Listening sockets, held until `close`. A Unix socket that was made here is removed then."""

    def __init__(self, sockets: Sequence[socket.socket], made: Path | None = None) -> None:
        """Hold these; ``made`` is the Unix socket file to remove at the end."""
        self._sockets = tuple(sockets)
        self._made = made
        self._inode = made.stat().st_ino if made else None

    @classmethod
    def open(cls, *, unix: Path | None = None, tcp: tuple[str, int] | None = None) -> "ListeningSockets":
        """Open a Unix socket, a loopback TCP port, or both; raise `CannotListen`."""
        with contextlib.ExitStack() as opened:
            sockets = []
            if tcp:
                sockets.append(opened.enter_context(_listen_tcp(*tcp)))
            if unix:
                sockets.append(opened.enter_context(_listen_unix(unix)))
            opened.pop_all()
        return cls(sockets, made=unix)

    @classmethod
    def from_systemd(cls, environ: Mapping[str, str], pid: int) -> "ListeningSockets | None":
        """Take over the sockets that systemd opened for this process, or return None when there are none."""
        count = environ.get("LISTEN_FDS", "")
        if environ.get("LISTEN_PID") != str(pid) or not count.isdigit() or count == "0":
            return None
        return cls.inherited(range(FIRST_SYSTEMD_FD, FIRST_SYSTEMD_FD + int(count)))

    @classmethod
    def inherited(cls, descriptors: Sequence[int]) -> "ListeningSockets":
        """Take over sockets that another process opened, by descriptor; raise `CannotListen`."""
        try:
            return cls([socket.socket(fileno=number) for number in descriptors])
        except OSError as error:
            raise CannotListen(f"descriptors {list(descriptors)} are not sockets: {error}") from error

    def __iter__(self) -> Iterator[socket.socket]:
        return iter(self._sockets)

    def filenos(self) -> tuple[int, ...]:
        """Return the descriptors to pass on to a child."""
        return tuple(sock.fileno() for sock in self._sockets)

    def addresses(self) -> tuple[str, ...]:
        """Return where clients connect to, for people."""
        return tuple(_address(sock) for sock in self._sockets)

    def close(self) -> None:
        """Close the sockets and remove the Unix socket that was made here, unless another has taken its place."""
        for sock in self._sockets:
            sock.close()
        with contextlib.suppress(OSError):
            if self._made and self._made.stat().st_ino == self._inode:
                self._made.unlink()
        self._made = None


def parse_tcp(text: str) -> tuple[str, int]:
    """Return (host, port) of ``127.0.0.1:8000`` or ``[::1]:8000``; raise `CannotListen` for all but loopback."""
    match = _TCP.fullmatch(text)
    if not match or int(match["port"]) > MAX_PORT:
        raise CannotListen(f"{text!r} is not HOST:PORT; write for example 127.0.0.1:8000")
    host = match["six"] or match["four"]
    if host not in LOOPBACK_HOSTS:
        raise CannotListen(
            f"{host} is not a loopback address; inference is served on this machine only, write 127.0.0.1"
        )
    return host, int(match["port"])


def _listen_tcp(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise CannotListen(f"cannot listen on {host}:{port}: {error.strerror}; choose another port") from error
    return sock


def _listen_unix(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _make_way(path)
        sock.bind(str(path))
        path.chmod(UNIX_MODE)  # before listen(): until then nobody can connect
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise CannotListen(f"cannot listen on {path}: {error.strerror or error}") from error
    except CannotListen:
        sock.close()
        raise
    return sock


def _make_way(path: Path) -> None:
    """Remove a socket file that nobody listens on any more; raise `CannotListen` for anything else in the way."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise CannotListen(f"{path} is in the way and is not a socket; remove it or choose another path")
    if _is_live(path):
        raise CannotListen(f"another process serves on {path}; stop it or choose another path")
    path.unlink()


def _is_live(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except BlockingIOError:
            return True  # its backlog is full
        return True


def _address(sock: socket.socket) -> str:
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix:{name}"
    host = f"[{name[0]}]" if sock.family == socket.AF_INET6 else name[0]
    return f"http://{host}:{name[1]}"


def inherited_descriptors(environ: Mapping[str, str], variable: str) -> tuple[int, ...]:
    """Return the descriptors listed, comma-separated, in an environment variable."""
    return tuple(int(number) for number in environ.get(variable, "").split(",") if number)


def without_activation(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment for a child, without systemd's activation variables (they name this process)."""
    return {name: value for name, value in environ.items() if not name.startswith("LISTEN_")}
