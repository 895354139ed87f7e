"""People's accounts and their sessions. Passwords come as argon2id hashes, session tokens as SHA-256."""

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from fleet_server.adapters.database import dialect, tables
from fleet_server.ports import LoginSession


class DatabaseAccounts:
    """`ports.Accounts`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def password_hash(self, account: str) -> str | None:
        query = sa.select(tables.account.c.password_hash).where(tables.account.c.name == account)
        with self._engine.connect() as connection:
            return connection.scalar(query)

    def set_password_hash(self, account: str, password_hash: str) -> None:
        with dialect.writing(self._engine) as connection:
            connection.execute(tables.session.delete().where(tables.session.c.account == account))
            dialect.put(connection, tables.account, [{"name": account, "password_hash": password_hash}])

    def add_session(self, session: LoginSession) -> None:
        row = {
            "token_sha256": session.token_sha256,
            "account": session.account,
            "csrf": session.csrf,
            "expires_at": session.expires_at,
        }
        with dialect.writing(self._engine) as connection:
            connection.execute(tables.session.insert(), row)

    def session(self, token_sha256: str, now: int) -> LoginSession | None:
        session = tables.session
        query = sa.select(session).where(session.c.token_sha256 == token_sha256, session.c.expires_at > now)
        with self._engine.connect() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            return None
        return LoginSession(
            token_sha256=row.token_sha256, account=row.account, csrf=row.csrf, expires_at=row.expires_at
        )

    def extend_session(self, token_sha256: str, expires_at: int) -> None:
        session = tables.session
        with dialect.writing(self._engine) as connection:
            connection.execute(
                session.update().where(session.c.token_sha256 == token_sha256).values(expires_at=expires_at)
            )

    def end_session(self, token_sha256: str) -> None:
        with dialect.writing(self._engine) as connection:
            connection.execute(tables.session.delete().where(tables.session.c.token_sha256 == token_sha256))

    def forget_sessions(self, now: int) -> None:
        """Delete sessions that are over."""
        with dialect.writing(self._engine) as connection:
            connection.execute(tables.session.delete().where(tables.session.c.expires_at <= now))
