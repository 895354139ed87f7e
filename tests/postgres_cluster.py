"""A private PostgreSQL for a test session: its own cluster on a unix socket, never root's, gone with the session."""

import getpass
import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path

import psycopg
import sqlalchemy as sa

START_PATIENCE = 60  # seconds, as `pg_ctl` counts them
# Durability costs time and the cluster does not outlive the session. A small one starts faster.
SETTINGS = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "shared_buffers=16MB", "listen_addresses=")


class Cluster:
    """A running cluster. `database` gives a new, empty database; `stop` and `start` are a restart's halves."""

    def __init__(self) -> None:
        """Make the cluster and start it."""
        self.folder = Path(tempfile.mkdtemp(prefix="ewpg", dir="/tmp"))
        self._user = _account()
        os.chown(self.folder, pwd.getpwnam(self._user).pw_uid, pwd.getpwnam(self._user).pw_gid)
        self._run(
            "initdb", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C", "--username=test", "-D", "data"
        )
        self.start()

    def start(self) -> None:
        """Start it and wait until it answers."""
        options = " ".join(f"-c {setting}" for setting in (*SETTINGS, f"unix_socket_directories={self.folder}"))
        patience = str(START_PATIENCE)
        self._run("pg_ctl", "start", "-w", "-t", patience, "-s", "-D", "data", "-l", "log", "-o", options)

    def stop(self) -> None:
        """Stop it at once, as when the power goes: connections die in the middle of what they do."""
        self._run("pg_ctl", "stop", "-w", "-s", "-m", "immediate", "-D", "data")

    def remove(self) -> None:
        """Stop it and delete all of it."""
        self.stop()
        shutil.rmtree(self.folder)

    def url(self, database: str) -> sa.URL:
        """Return the address of a database."""
        return sa.URL.create("postgresql+psycopg", "test", database=database, query={"host": str(self.folder)})

    def database(self, template: str = "template0") -> sa.URL:
        """Make a database: empty, or the copy of another one that nobody is connected to."""
        name = f"t{secrets.token_hex(6)}"
        self.do(f"CREATE DATABASE {name} TEMPLATE {template}")
        return self.url(name)

    def drop(self, url: sa.URL) -> None:
        """Remove a database, whoever is connected to it."""
        self.do(f"DROP DATABASE {url.database} WITH (FORCE)")

    def do(self, statement: str) -> None:
        """Run a statement as the cluster's owner."""
        with psycopg.connect(host=str(self.folder), user="test", dbname="postgres", autocommit=True) as connection:
            connection.execute(statement.encode())

    def _run(self, program: str, *arguments: str) -> None:
        # The log is a file and not a pipe: the server that `pg_ctl` leaves behind would hold a pipe open.
        with (self.folder / "said").open("w+b") as said:
            done = subprocess.run(
                [_found(program), *arguments],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                timeout=START_PATIENCE * 2,
                check=False,
                **_as(self._user),
            )
            said.seek(0)
            assert done.returncode == 0, f"{program}: {said.read().decode(errors='replace')}"


def _account() -> str:
    """Return who may run it: PostgreSQL refuses root."""
    return "postgres" if os.getuid() == 0 else getpass.getuser()


def _as(user: str) -> dict[str, object]:
    """Return what makes a child somebody else, when we are root."""
    if os.getuid() != 0:
        return {}
    return {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": ()}


def _found(program: str) -> str:
    """Return a program of PostgreSQL: Debian keeps them out of PATH, the newest version is the last."""
    kept = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"), key=lambda path: int(path.parts[4]))
    found = str(kept[-1]) if kept else shutil.which(program)
    assert found, f"{program} is missing: apt-get install postgresql (scripts/setup.sh dev does)"
    return found
