"""``edgewarden-server doctor``: looks at a server from outside, whether it runs or not, and changes nothing.

Gathers facts; `core/findings.py` judges them. What cannot be looked at is a finding too.
"""

import os
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import sqlalchemy as sa

from fleet_server.adapters.authority import facts_of
from fleet_server.adapters.backup import BadBackup, refuse_unfinished
from fleet_server.adapters.database import dialect, sums, tables
from fleet_server.adapters.database.opening import knows, newest_revision, revision_of
from fleet_server.adapters.director import OnlineDirector
from fleet_server.adapters.durable import read_capped
from fleet_server.adapters.image_repository import ImageFolder
from fleet_server.adapters.mosquitto import BrokerMissing, find_mosquitto
from fleet_server.config import ServerConfig
from fleet_server.core.findings import (
    Finding,
    fine,
    judge_certificate,
    judge_clock,
    judge_disk,
    judge_mode,
    judge_role,
    judge_schema,
    judge_sums,
    trouble,
    warning,
)

PATIENCE = 3.0  # seconds for a connection to the broker
_MAX_PEM = 64 * 1024  # bytes
_NOT_IN_USE = frozenset({"device-cas", "device-ca-retired"})  # a list made from the others, and what has ended


def examine(config: ServerConfig) -> Sequence[Finding]:
    """Return what was found, in the order in which things depend on each other."""
    now = time.time_ns() // 1_000_000
    if not config.data.is_dir():
        said = f"there is no {config.data}"
        return [trouble("data folder", said, "name the right folder with --data, or start the server: it makes one")]
    looks: Sequence[tuple[str, Callable[[], Iterator[Finding]]]] = (
        ("data folder", lambda: _folder(config.data)),
        ("disk", lambda: _disk(config.data)),
        ("database", lambda: _database(config.database, now)),
        ("certificates", lambda: _certificates(config.data / "authority", now)),
        ("trust", lambda: _trust(config.data, now)),
        ("broker", lambda: _broker(config)),
    )
    return [finding for about, look in looks for finding in _looked(about, look)]


def _looked(about: str, look: Callable[[], Iterator[Finding]]) -> list[Finding]:
    try:
        return list(look())
    except Exception as error:  # noqa: BLE001 - one thing that cannot be looked at must not hide the others
        return [
            trouble(about, f"cannot look at it: {error}", "make it readable for this user, or mend what it names")
        ]


def _folder(data: Path) -> Iterator[Finding]:
    try:
        refuse_unfinished(data)
    except BadBackup as error:
        yield trouble("data folder", str(error), "restore again with --force")
    for path in (data, data / "authority", data / "director", data / "image"):
        if path.exists():
            about = path.stat()
            yield judge_mode(str(path), stat.S_IMODE(about.st_mode), is_ours=os.geteuid() in (0, about.st_uid))


def _disk(data: Path) -> Iterator[Finding]:
    usage = shutil.disk_usage(data)
    yield judge_disk(usage.free, usage.total)


def _database(url: str, now: int) -> Iterator[Finding]:
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").exists():
        yield warning("database", f"there is no {parsed.database} yet", "start the server: it makes one")
        return
    engine = dialect.connect(url)
    try:
        with dialect.reading(engine) as connection:
            found = revision_of(connection)
            yield judge_schema(found, newest_revision(), is_known=found is not None and knows(found))
            if found == newest_revision():
                newest = connection.scalar(sa.select(sa.func.max(tables.presence.c.last_seen)))
                yield judge_clock(now, newest)
                yield judge_sums(sums.oldest_dirty(connection), now)
    except sa.exc.OperationalError as error:
        remedy = (
            "start it, or mend `database` in the settings; until then nothing that devices report is acknowledged"
        )
        yield trouble("database", f"it cannot be reached: {str(error.orig).strip()}", remedy)
    finally:
        engine.dispose()


def _certificates(folder: Path, now: int) -> Iterator[Finding]:
    if not folder.is_dir():
        yield warning("certificates", "the server has no CA yet", "start the server: it makes one")
    for path in sorted(path for path in folder.glob("*.pem") if path.stem not in _NOT_IN_USE):
        pem = read_capped(path, _MAX_PEM) or b""
        facts = facts_of(pem.decode())
        # A CA's file holds its own certificate; that of a leaf names the CA that signed it.
        yield judge_certificate(path.stem, facts.expires_at, now, is_ca="ca" in path.stem.split("-"))


def _trust(data: Path, now: int) -> Iterator[Finding]:
    if not (data / "director").is_dir() or not (data / "image").is_dir():
        yield warning(
            "trust", "the server has made no online keys yet", "start the server, then: edgewarden keys init"
        )
        return
    root = OnlineDirector(data / "director").root_fact()
    roles = ImageFolder(data / "image").roles()
    if root is None or not roles:
        yield warning("trust", "there are no offline keys yet: nothing can be released", "run: edgewarden keys init")
    for fact in (*([root] if root else ()), *roles):
        yield judge_role(fact.name, fact.expires_at, now)


def _broker(config: ServerConfig) -> Iterator[Finding]:
    try:
        find_mosquitto()
    except BrokerMissing as error:
        yield trouble("broker", str(error), "install it: apt-get install mosquitto")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.broker.host, config.broker.host)  # noqa: S104 - compared only
    try:
        socket.create_connection((host, config.broker.port), PATIENCE).close()
    except OSError as error:
        said = f"nothing answers at {config.broker}: {error}"
        yield trouble("broker", said, "start the server, which runs it; if it runs, look for 'broker' in its log")
        return
    yield fine("broker", f"something answers at {config.broker}")
