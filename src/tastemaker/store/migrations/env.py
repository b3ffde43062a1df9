"""Runs the migrations on the connection, and inside the transaction, that `Store.open` passes in."""

from alembic import context

from tastemaker.store.schema import metadata

# transactional_ddl: SQLite rolls table definitions back like anything else, which its adapter does not assume.
context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
