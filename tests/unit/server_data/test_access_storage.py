"""Users, sessions, API tokens and kept answers on a database: a change and its entry in the log are one thing."""

import pytest
import sqlalchemy as sa
from cryptography.fernet import InvalidToken
from data_world import NOW
from sqlalchemy.engine import Engine

from fleet_server.access import LastAdmin, Stale, UnknownUser, UserExists
from fleet_server.adapters.database import tables
from fleet_server.adapters.database.accounts import DatabaseAccounts
from fleet_server.adapters.database.audit_log import DatabaseAuditLog
from fleet_server.adapters.database.kept_answers import DatabaseKeptAnswers
from fleet_server.core.access import Permission, Role
from fleet_server.core.audit import Act, check
from fleet_server.ports import Account, ApiToken, LoginSession

ACT = Act(at=NOW, who="ada", by="session", address="::1", action="test")


@pytest.fixture
def accounts(opened: Engine) -> DatabaseAccounts:
    store = DatabaseAccounts(opened)
    store.add_account(Account(name="ada", password_hash="h", role=Role.ADMIN, created_at=NOW), ACT)
    store.add_account(Account(name="bob", password_hash="h", role=Role.VIEWER, created_at=NOW), ACT)
    return store


def session(token: str = "1", account: str = "bob", **fields: object) -> LoginSession:
    said: dict[str, object] = {"csrf": "c", "expires_at": NOW + 100, "started_at": NOW, "renewed_at": NOW}
    return LoginSession(token_sha256=token * 64, account=account, **(said | fields))  # type: ignore[arg-type]  # any


def test_a_change_that_is_refused_leaves_neither_itself_nor_an_entry(
    accounts: DatabaseAccounts, opened: Engine
) -> None:
    accounts.add_session(session(account="ada"), ACT)
    before = check(DatabaseAuditLog(opened).entries(after=0, limit=100))
    for change in (
        lambda: accounts.change_account("ada", None, ACT, role=Role.VIEWER),
        lambda: accounts.remove_account("ada", None, ACT),
        lambda: accounts.change_account("ada", None, ACT, disabled=True),
    ):
        with pytest.raises(LastAdmin):
            change()
    with pytest.raises(Stale):
        accounts.change_account("bob", 7, ACT, role=Role.ADMIN)
    with pytest.raises(UnknownUser):
        accounts.remove_account("eve", None, ACT)
    with pytest.raises(UserExists):
        accounts.add_account(Account(name="bob", password_hash="x", role=Role.ADMIN, created_at=NOW), ACT)
    assert check(DatabaseAuditLog(opened).entries(after=0, limit=100)) == before
    assert accounts.session("1" * 64, NOW) is not None
    assert [account.role for account in accounts.accounts()] == [Role.ADMIN, Role.VIEWER]


def test_a_disabled_admin_does_not_count_as_the_other_one(accounts: DatabaseAccounts) -> None:
    accounts.change_account("bob", 1, ACT, role=Role.ADMIN, disabled=True)
    with pytest.raises(LastAdmin):
        accounts.remove_account("ada", None, ACT)
    assert accounts.change_account("bob", 2, ACT, disabled=False).revision == 3
    accounts.remove_account("ada", None, ACT)


def test_removing_a_user_removes_sessions_and_tokens(accounts: DatabaseAccounts, opened: Engine) -> None:
    accounts.add_session(session(), ACT)
    token = ApiToken(
        id="t1",
        account="bob",
        name="ci",
        secret_sha256="0" * 64,
        scopes=frozenset({Permission.LOOK, Permission.ORDER}),
        created_at=NOW,
        expires_at=NOW + 9,
    )
    accounts.add_api_token(token, ACT)
    accounts.note_use("t1", NOW + 1)
    found = accounts.api_token("t1")
    assert found is not None
    assert (found[0].scopes, found[0].last_used_at, found[1].name) == (token.scopes, NOW + 1, "bob")
    accounts.remove_account("bob", None, ACT)
    assert (accounts.api_token("t1"), accounts.session("1" * 64, NOW)) == (None, None)
    with opened.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(tables.session)) == 0


def test_a_session_is_replaced_once(accounts: DatabaseAccounts) -> None:
    accounts.add_session(session("1"), ACT)
    assert accounts.replace_session("1" * 64, session("2"), NOW + 5)
    assert not accounts.replace_session("1" * 64, session("3"), NOW + 5)
    assert [accounts.session(token * 64, NOW + 6) is not None for token in "123"] == [False, True, False]
    assert accounts.end_sessions("bob", ACT) == 1
    accounts.forget_sessions(NOW + 1000)
    assert accounts.session("2" * 64, NOW) is None


def test_an_answer_opens_only_with_its_key(opened: Engine) -> None:
    answers = DatabaseKeptAnswers(opened)
    assert answers.begin("ada\nk1", "r1", NOW)
    assert not answers.begin("ada\nk1", "r1", NOW)
    assert answers.find("ada\nk1") == ("r1", None)
    answers.keep("ada\nk1", b"secret")
    assert answers.find("ada\nk1") == ("r1", b"secret")
    assert answers.begin("bob\nk1", "r1", NOW + 5)
    with opened.begin() as connection:
        kept = tables.kept_answer
        stolen = connection.scalar(sa.select(kept.c.sealed).where(kept.c.at == NOW))
        connection.execute(sa.update(kept).where(kept.c.at == NOW + 5).values(sealed=stolen))
    with pytest.raises(InvalidToken):
        answers.find("bob\nk1")
    answers.forget(NOW + 5)
    assert (answers.find("ada\nk1"), answers.begin("ada\nk1", "r2", NOW)) == (None, True)
    answers.drop("ada\nk1")
    assert answers.find("ada\nk1") is None
