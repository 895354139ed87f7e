"""Answers to requests that carried an Idempotency-Key, so that a repeat gets the same and changes nothing.

An answer may hold a secret that is shown once. It is therefore sealed (Fernet) with the key that the client chose, of
which only a hash is stored: the database alone does not open it.
"""

import base64
import hashlib

import sqlalchemy as sa
from cryptography.fernet import Fernet
from sqlalchemy.engine import Engine

from fleet_server.adapters.database import dialect, tables


class DatabaseKeptAnswers:
    """`ports.KeptAnswers`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def begin(self, key: str, request_sha256: str, now: int) -> bool:
        row = {"key_sha256": _name(key), "request_sha256": request_sha256, "at": now}
        with dialect.writing(self._engine) as connection:
            return bool(dialect.insert_new(connection, tables.kept_answer, [row]))

    def find(self, key: str) -> tuple[str, bytes | None] | None:
        kept = tables.kept_answer
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(kept).where(kept.c.key_sha256 == _name(key))).one_or_none()
        if row is None:
            return None
        return row.request_sha256, None if row.sealed is None else _seal(key).decrypt(row.sealed)

    def keep(self, key: str, answer: bytes) -> None:
        kept = tables.kept_answer
        with dialect.writing(self._engine) as connection:
            mine = kept.update().where(kept.c.key_sha256 == _name(key))
            connection.execute(mine.values(sealed=_seal(key).encrypt(answer)))

    def drop(self, key: str) -> None:
        kept = tables.kept_answer
        with dialect.writing(self._engine) as connection:
            connection.execute(kept.delete().where(kept.c.key_sha256 == _name(key)))

    def forget(self, before: int) -> None:
        """Delete what is older."""
        kept = tables.kept_answer
        with dialect.writing(self._engine) as connection:
            connection.execute(kept.delete().where(kept.c.at < before))


def _name(key: str) -> str:
    return hashlib.sha256(f"name\n{key}".encode()).hexdigest()


def _seal(key: str) -> Fernet:
    return Fernet(base64.urlsafe_b64encode(hashlib.sha256(f"seal\n{key}".encode()).digest()))
