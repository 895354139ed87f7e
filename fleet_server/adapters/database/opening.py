"""Opens the database and brings its schema up to date, once, whoever comes first."""

from pathlib import Path

import alembic.command
import alembic.config
from sqlalchemy.engine import Engine

from fleet_server.adapters.database import dialect

MIGRATIONS = Path(__file__).parent / "migrations"


def open_database(url: str) -> Engine:
    """Return an engine on a database with the newest schema.

    The migration runs inside the writers' lock, so that several servers may start at once.
    """
    engine = dialect.connect(url)
    with dialect.writing(engine) as connection:
        config = alembic.config.Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, "head")
    return engine
