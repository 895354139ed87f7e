import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from agent.listening import CannotListen, ListeningSockets, parse_tcp


def connect(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))


def test_a_unix_socket_is_for_owner_and_group_and_goes_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "i.sock"
    sockets = ListeningSockets.open(unix=path)
    connect(path)
    assert oct(path.stat().st_mode & 0o777) == "0o660"
    assert sockets.addresses() == (f"unix:{path}",)
    sockets.close()
    assert not path.exists()
    sockets.close()


def test_a_stale_socket_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "i.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    sockets = ListeningSockets.open(unix=path)
    connect(path)
    sockets.close()


def test_a_live_socket_is_not_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "i.sock"
    first = ListeningSockets.open(unix=path)
    with pytest.raises(CannotListen, match="another process serves on"):
        ListeningSockets.open(unix=path)
    connect(path)
    first.close()


def test_a_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "i.sock"
    path.write_text("precious")
    with pytest.raises(CannotListen, match="is not a socket"):
        ListeningSockets.open(unix=path)
    assert path.read_text() == "precious"


def test_a_socket_that_another_put_in_its_place_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "i.sock"
    first = ListeningSockets.open(unix=path)
    path.unlink()
    second = ListeningSockets.open(unix=path)
    first.close()
    connect(path)
    second.close()


def test_a_busy_port_is_an_error_and_leaves_nothing_open(tmp_path: Path) -> None:
    first = ListeningSockets.open(tcp=("127.0.0.1", 0))
    port = int(first.addresses()[0].rpartition(":")[2])
    with pytest.raises(CannotListen, match="choose another port"):
        ListeningSockets.open(unix=tmp_path / "i.sock", tcp=("127.0.0.1", port))
    first.close()


def test_a_unix_path_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CannotListen, match="cannot listen on"):
        ListeningSockets.open(unix=tmp_path / "missing" / "i.sock", tcp=("127.0.0.1", 0))
    with pytest.raises(CannotListen, match="too long"):
        ListeningSockets.open(unix=tmp_path / ("x" * 200))


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8000", ("127.0.0.1", 8000)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:9", ("::1", 9)),
        ("0.0.0.0:8000", None),
        ("192.168.1.2:8000", None),
        ("127.0.0.1", None),
        (":8000", None),
        ("127.0.0.1:99999", None),
        ("::1:80", None),
    ],
)
def test_only_loopback_addresses_are_accepted(text: str, address: tuple[str, int] | None) -> None:
    if address:
        assert parse_tcp(text) == address
    else:
        with pytest.raises(CannotListen):
            parse_tcp(text)


@pytest.mark.parametrize(
    "environ",
    [{}, {"LISTEN_FDS": "1"}, {"LISTEN_FDS": "1", "LISTEN_PID": "1"}, {"LISTEN_FDS": "0", "LISTEN_PID": "7"}],
)
def test_systemds_sockets_are_taken_only_when_they_are_for_this_process(environ: dict[str, str]) -> None:
    assert ListeningSockets.from_systemd(environ, 7) is None


def test_sockets_of_systemd_are_taken_over(tmp_path: Path) -> None:
    """As systemd does it: the socket is descriptor 3 of a process whose id is in LISTEN_PID."""
    path = tmp_path / "activated.sock"
    story = (
        "import os\n"
        "from agent.listening import ListeningSockets\n"
        "sockets = ListeningSockets.from_systemd({'LISTEN_FDS': '1', 'LISTEN_PID': str(os.getpid())}, os.getpid())\n"
        "print(sockets.addresses()[0])\n"
        "sockets.close()\n"
    )
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        shell = f'exec 3<&{listener.fileno()}; exec {sys.executable} -c "$0"'
        done = subprocess.run(
            ["bash", "-c", shell, story], pass_fds=[listener.fileno()], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == f"unix:{path}"
        connect(path)  # the process ended; the socket lives on
    assert path.exists()


@pytest.mark.parametrize("way", ["take_network_away()", "deny_sockets(ctypes.CDLL(None, use_errno=True))"])
def test_without_network_nothing_can_be_reached(way: str) -> None:
    story = (
        "import ctypes, socket, sys\n"
        "from agent.inference.kernel import deny_sockets, take_network_away\n"
        f"{way}\n"
        "try:\n"
        "    with socket.socket() as sock: sock.connect(('127.0.0.1', int(sys.argv[1])))\n"
        "except OSError as error: print(type(error).__name__, error.errno)\n"
        "print(open('/proc/self/comm').read())\n"
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        done = subprocess.run([sys.executable, "-c", story, port], capture_output=True, text=True, check=True)
    refusal, comm, *_ = done.stdout.splitlines()
    assert refusal in {"OSError 101", "PermissionError 1"}  # network unreachable, or not permitted
    assert comm  # files still open


def test_an_orphan_ends_at_once() -> None:
    story = (
        "import os\nfrom agent.inference.kernel import die_with_parent\ndie_with_parent(os.environ)\nprint('lives')"
    )
    for parent, lives in ((os.getpid(), True), (1, False)):
        environment = {**os.environ, "EW_PARENT_PID": str(parent)}
        done = subprocess.run(
            [sys.executable, "-c", story], env=environment, capture_output=True, text=True, check=False
        )
        assert ("lives" in done.stdout, done.returncode == 0) == (lives, lives), done.stderr
