"""Types a page of the documentation into one shell, in an empty home, on free ports.

Blocks marked ``sh`` are commands and ``python`` blocks programs; both are run in order. A ``text`` block right after
one is what the page says comes out. ``bash`` blocks are for people only: what they do is done already.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PATIENCE = 120.0  # seconds that a page may take
MARK = "end of block"
_BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```\n(?:```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
_MARK = re.compile(rf"\n{MARK} \d+ (\d+)\n")
_CHANGES = re.compile(
    r"[0-9a-f]{12,}|\b[0-9a-f]{8}\b|-?\d+(?:\.\d+)?|litert|tflite[_-]runtime|\s+"
)  # by run or by machine


@dataclass(frozen=True, kw_only=True)
class Said:
    """One block: what was typed, what the page shows, and what really came out."""

    typed: str
    shown: str
    code: int
    text: str

    @property
    def absent(self) -> list[str]:
        """Lines that the page shows and the programs did not say; ``…`` stands for the rest of a line."""
        real = _plain(self.text)
        return [line for line in self.shown.splitlines() if _plain(line.strip().rstrip("…")) not in real]


@contextmanager
def empty_home() -> Iterator[Path]:
    """Give a home with nothing but the repository in it; its name is short, since that of a socket must be."""
    folder = Path(tempfile.mkdtemp(prefix="ew-"))
    (folder / "edgewarden").symlink_to(ROOT)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def type_page(page: Path, home: Path, ports: Sequence[int]) -> list[Said]:
    """Run a page's blocks with its ports replaced by free ones; whatever it leaves running is ended."""
    blocks = _BLOCK.findall(page.read_text())
    output = _run(_script([(kind, typed) for kind, typed, _ in blocks], ports), home)
    parts = _MARK.split(output)
    outcomes = list(zip(parts[0::2], parts[1::2], strict=False))
    assert len(outcomes) == len(blocks), output
    return [
        Said(typed=typed, shown=shown, code=int(code), text=text)
        for (_, typed, shown), (text, code) in zip(blocks, outcomes, strict=True)
    ]


def typed_in(page: Path) -> list[str]:
    """Return what a page has its reader type."""
    return [typed for _, typed, _ in _BLOCK.findall(page.read_text())]


def processes_naming(folder: Path) -> list[str]:
    """Return the commands of running processes that were started in a folder, or are told of it."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        words = [*(process.info["cmdline"] or []), process.info["cwd"] or ""]
        if any(str(folder) in word for word in words):
            found.append(" ".join(words))
    return found


def _script(blocks: Sequence[tuple[str, str]], ports: Sequence[int]) -> str:
    """Return the blocks as one script that says after each how it ended."""
    parts = [
        (f"python <<'PROGRAM'\n{text}PROGRAM\n" if kind == "python" else text)
        + f"status=$?\nprintf '\\n{MARK} %s %s\\n' {k} $status\n"
        for k, (kind, text) in enumerate(blocks)
    ]
    return _on_free_ports("exec 2>&1\n" + "".join(parts), ports)


def _on_free_ports(text: str, ports: Sequence[int]) -> str:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in ports]
    for port, sock in zip(ports, held, strict=True):
        text = re.sub(rf"\b{port}\b", str(sock.getsockname()[1]), text)
    for sock in held:
        sock.close()
    return text


def _run(script: str, home: Path) -> str:
    environment = {
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "COLUMNS": "132",
        "LANG": "C.UTF-8",
    }
    output = home / "output"
    with output.open("wb") as file:
        shell = subprocess.Popen(
            ["bash", "-s"],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=file,
            cwd=home,
            env=environment,
            start_new_session=True,
        )
        try:
            shell.communicate(script.encode(), timeout=PATIENCE)
        finally:
            _end_group(shell.pid)
            shell.wait()
    return output.read_text()


def _end_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGTERM)
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass  # the page ended everything itself


def _plain(text: str) -> str:
    return _CHANGES.sub("#", text)
