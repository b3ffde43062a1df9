"""Runs the migrations on the connection, and inside the transaction, that `Store.open` passes in."""

from alembic import context

from tastemaker.store.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():  # the one that is open already: it is committed, or rolled back, by `Store`
    context.run_migrations()
