"""Runs migrations on the connection that `opening.open_database` holds; there is no other way in."""

from alembic import context

from fleet_server.adapters.database.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
