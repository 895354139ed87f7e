"""Opens the database and brings its schema up to date, once, whoever comes first."""

from pathlib import Path

import alembic.command
import alembic.config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import Connection, Engine

from fleet_server.adapters.database import dialect

MIGRATIONS = Path(__file__).parent / "migrations"


class DatabaseTooNew(Exception):
    """A newer server has been here; going on would spoil what it stored."""


def open_database(url: str) -> Engine:
    """Return an engine on a database with the newest schema; raise `DatabaseTooNew`.

    The migration runs inside the writers' lock, so that several servers may start at once.
    """
    engine = dialect.connect(url)
    try:
        with dialect.writing(engine) as connection:
            migrate(connection)
    except BaseException:
        engine.dispose()
        raise
    return engine


def migrate(connection: Connection) -> None:
    """Bring the schema up to date; raise `DatabaseTooNew`."""
    config = alembic.config.Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    _refuse_newer(connection)
    alembic.command.upgrade(config, "head")


def newest_revision() -> str:
    """Return the schema that this code knows."""
    head = ScriptDirectory(str(MIGRATIONS)).get_current_head()
    if head is None:
        raise RuntimeError(f"there are no migrations in {MIGRATIONS}")
    return head


def knows(revision: str) -> bool:
    """Tell whether a schema is one that this code can bring up to date."""
    return revision in {script.revision for script in ScriptDirectory(str(MIGRATIONS)).walk_revisions()}


def revision_of(connection: Connection) -> str | None:
    """Return the schema that a database has; None while it is empty."""
    return MigrationContext.configure(connection).get_current_revision()


def _refuse_newer(connection: Connection) -> None:
    found = revision_of(connection)
    if found is not None and not knows(found):
        raise DatabaseTooNew(
            f"the database has schema {found}, and this server knows only up to {newest_revision()}: "
            "a newer edgewarden-server has used it. Install that version again, or restore a backup made before"
        )
