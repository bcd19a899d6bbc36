"""Runs the revisions on the connection, and in the transaction, that `billing.database.migrate` hands over."""

from alembic import context

from billing.job_tables import billing_metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=billing_metadata)
with context.begin_transaction():
    context.run_migrations()
