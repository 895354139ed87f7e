"""Users, their sessions and their API tokens. Passwords come as argon2id hashes, tokens as SHA-256.

What was changed and who changed it are written in one transaction (`audit_log.append`).
"""

from collections.abc import Sequence

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from fleet_server.access import LastAdmin, Stale, UnknownUser, UserExists
from fleet_server.adapters.database import dialect, tables
from fleet_server.adapters.database.audit_log import append
from fleet_server.core.access import Permission, Role
from fleet_server.core.audit import Act
from fleet_server.ports import Account, ApiToken, LoginSession

_SCOPES = msgspec.json.Decoder(frozenset[Permission])


class DatabaseAccounts:
    """`ports.Accounts`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    # ------------------------------------------------------------ users
    def account(self, name: str) -> Account | None:
        with self._engine.connect() as connection:
            return _account_of(connection, name)

    def accounts(self) -> Sequence[Account]:
        with self._engine.connect() as connection:
            rows = connection.execute(sa.select(tables.account).order_by(tables.account.c.name))
            return [_account(row) for row in rows]

    def add_account(self, account: Account, act: Act) -> None:
        with dialect.writing(self._engine) as connection:
            if not dialect.insert_new(connection, tables.account, [_account_row(account)]):
                raise UserExists(account.name)
            append(connection, [act])

    def change_account(
        self,
        name: str,
        revision: int | None,
        act: Act,
        *,
        role: Role | None = None,
        disabled: bool | None = None,
        password_hash: str | None = None,
    ) -> Account:
        account = tables.account
        with dialect.writing(self._engine) as connection:
            before = _expect(connection, name, revision)
            values: dict[str, object] = {"revision": before.revision + 1}
            values |= {} if role is None else {"role": role.value}
            values |= {} if disabled is None else {"disabled": disabled}
            values |= {} if password_hash is None else {"password_hash": password_hash}
            connection.execute(account.update().where(account.c.name == name).values(values))
            _expect_an_admin(connection, name)
            _end_sessions(connection, name)
            append(connection, [act])
            return _expect(connection, name, None)

    def remove_account(self, name: str, revision: int | None, act: Act) -> None:
        with dialect.writing(self._engine) as connection:
            _expect(connection, name, revision)
            _end_sessions(connection, name)
            connection.execute(tables.api_token.delete().where(tables.api_token.c.account == name))
            connection.execute(tables.account.delete().where(tables.account.c.name == name))
            _expect_an_admin(connection, name)
            append(connection, [act])

    # ------------------------------------------------------------ sessions
    def add_session(self, session: LoginSession, act: Act) -> None:
        with dialect.writing(self._engine) as connection:
            connection.execute(tables.session.insert(), _session_row(session))
            append(connection, [act])

    def session(self, token_sha256: str, now: int) -> tuple[LoginSession, Account] | None:
        session, account = tables.session, tables.account
        query = (
            sa.select(session)
            .join(account, account.c.name == session.c.account)
            .where(session.c.token_sha256 == token_sha256, session.c.expires_at > now, account.c.disabled.is_(False))
        )
        with self._engine.connect() as connection:
            row = connection.execute(query).one_or_none()
            owner = None if row is None else _account_of(connection, row.account)
        return None if row is None or owner is None else (_session(row), owner)

    def extend_session(self, token_sha256: str, expires_at: int) -> None:
        session = tables.session
        with dialect.writing(self._engine) as connection:
            connection.execute(
                session.update().where(session.c.token_sha256 == token_sha256).values(expires_at=expires_at)
            )

    def replace_session(self, token_sha256: str, new: LoginSession, until: int) -> bool:
        session = tables.session
        mine = session.update().where(session.c.token_sha256 == token_sha256, session.c.replaced.is_(False))
        with dialect.writing(self._engine) as connection:
            if connection.execute(mine.values(replaced=True, expires_at=until)).rowcount == 0:
                return False
            connection.execute(session.insert(), _session_row(new))
        return True

    def end_session(self, token_sha256: str, act: Act) -> None:
        """End a session, under the id that it had before as well."""
        session = tables.session
        with dialect.writing(self._engine) as connection:
            started = sa.select(session.c.started_at).where(session.c.token_sha256 == token_sha256).scalar_subquery()
            mine = sa.and_(session.c.account == act.who, session.c.started_at == started, session.c.replaced)
            connection.execute(session.delete().where(mine))
            connection.execute(session.delete().where(session.c.token_sha256 == token_sha256))
            append(connection, [act])

    def end_sessions(self, account: str, act: Act) -> int:
        with dialect.writing(self._engine) as connection:
            ended = _end_sessions(connection, account)
            append(connection, [act])
        return ended

    def forget_sessions(self, now: int) -> None:
        """Delete sessions that are over."""
        with dialect.writing(self._engine) as connection:
            connection.execute(tables.session.delete().where(tables.session.c.expires_at <= now))

    # ------------------------------------------------------------ API tokens
    def add_api_token(self, token: ApiToken, act: Act) -> None:
        with dialect.writing(self._engine) as connection:
            connection.execute(tables.api_token.insert(), _token_row(token))
            append(connection, [act])

    def api_token(self, token_id: str) -> tuple[ApiToken, Account] | None:
        query = sa.select(tables.api_token).where(tables.api_token.c.id == token_id)
        with self._engine.connect() as connection:
            row = connection.execute(query).one_or_none()
            owner = None if row is None else _account_of(connection, row.account)
        return None if row is None or owner is None else (_token(row), owner)

    def api_tokens(self, account: str | None = None) -> Sequence[ApiToken]:
        token = tables.api_token
        query = sa.select(token).order_by(token.c.account, token.c.created_at, token.c.id)
        if account is not None:
            query = query.where(token.c.account == account)
        with self._engine.connect() as connection:
            return [_token(row) for row in connection.execute(query)]

    def revoke_api_token(self, token_id: str, act: Act) -> None:
        token = tables.api_token
        mine = token.update().where(token.c.id == token_id, token.c.revoked_at.is_(None))
        with dialect.writing(self._engine) as connection:
            connection.execute(mine.values(revoked_at=act.at))
            append(connection, [act])

    def note_use(self, token_id: str, now: int) -> None:
        token = tables.api_token
        with dialect.writing(self._engine) as connection:
            connection.execute(token.update().where(token.c.id == token_id).values(last_used_at=now))


# ---------------------------------------------------------------- inside a transaction
def _account_of(connection: Connection, name: str) -> Account | None:
    row = connection.execute(sa.select(tables.account).where(tables.account.c.name == name)).one_or_none()
    return None if row is None else _account(row)


def _expect(connection: Connection, name: str, revision: int | None) -> Account:
    account = _account_of(connection, name)
    if account is None:
        raise UnknownUser(name)
    if revision is not None and account.revision != revision:
        raise Stale(name, account.revision)
    return account


def _expect_an_admin(connection: Connection, name: str) -> None:
    """Raise `LastAdmin`, and undo the transaction, when nobody could manage users any more."""
    account = tables.account
    admins = sa.select(sa.func.count()).where(account.c.role == Role.ADMIN.value, account.c.disabled.is_(False))
    if connection.scalar(admins) == 0:
        raise LastAdmin(name)


def _end_sessions(connection: Connection, account: str) -> int:
    live = sa.select(sa.func.count()).where(tables.session.c.account == account, tables.session.c.replaced.is_(False))
    count = connection.scalar(live) or 0
    connection.execute(tables.session.delete().where(tables.session.c.account == account))
    return count


# ---------------------------------------------------------------- rows
def _account_row(account: Account) -> dict[str, object]:
    return {
        "name": account.name,
        "password_hash": account.password_hash,
        "role": account.role.value,
        "disabled": account.disabled,
        "created_at": account.created_at,
        "revision": account.revision,
    }


def _account(row: sa.Row[tuple[object, ...]]) -> Account:
    return Account(
        name=row.name,
        password_hash=row.password_hash,
        role=Role(row.role),
        disabled=row.disabled,
        created_at=row.created_at,
        revision=row.revision,
    )


def _session_row(session: LoginSession) -> dict[str, object]:
    return {
        "token_sha256": session.token_sha256,
        "account": session.account,
        "csrf": session.csrf,
        "expires_at": session.expires_at,
        "started_at": session.started_at,
        "renewed_at": session.renewed_at,
        "replaced": session.replaced,
    }


def _session(row: sa.Row[tuple[object, ...]]) -> LoginSession:
    return LoginSession(
        token_sha256=row.token_sha256,
        account=row.account,
        csrf=row.csrf,
        expires_at=row.expires_at,
        started_at=row.started_at,
        renewed_at=row.renewed_at,
        replaced=row.replaced,
    )


def _token_row(token: ApiToken) -> dict[str, object]:
    return {
        "id": token.id,
        "account": token.account,
        "name": token.name,
        "secret_sha256": token.secret_sha256,
        "scopes_json": msgspec.json.encode(sorted(scope.value for scope in token.scopes)).decode(),
        "created_at": token.created_at,
        "expires_at": token.expires_at,
    }


def _token(row: sa.Row[tuple[object, ...]]) -> ApiToken:
    return ApiToken(
        id=row.id,
        account=row.account,
        name=row.name,
        secret_sha256=row.secret_sha256,
        scopes=_SCOPES.decode(row.scopes_json),
        created_at=row.created_at,
        expires_at=row.expires_at,
        last_used_at=row.last_used_at,
        revoked_at=row.revoked_at,
    )
