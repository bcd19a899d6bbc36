"""Which writer is the single one: an epoch in the database."""

from sqlalchemy import Connection, and_, bindparam, func, select, update

from billing.tables import entry, reservation, wallet, writer_fence

# As text, which costs SQLAlchemy half as much: it is read in every transaction.
_FENCE = "SELECT epoch FROM writer_fence WHERE fence_id = 1"
# The lock makes a successor wait for this transaction, and this one for a successor's. Every row is reached by its key:
# on young tables PostgreSQL would plan scans and joins of whole tables, and keep those plans for the whole connection
# (a hash over the open reservations reads each that was ever open, until vacuum has been there).
_FENCE_POSTGRESQL = (
    "SELECT epoch, set_config('enable_seqscan', 'off', true), set_config('enable_hashjoin', 'off', true),"
    " set_config('enable_mergejoin', 'off', true), set_config('enable_bitmapscan', 'off', true)"
    " FROM writer_fence WHERE fence_id = 1 FOR UPDATE"
)
_TAKE = (
    update(writer_fence)
    .values(epoch=writer_fence.c.epoch + 1, taken_at=bindparam("now"))
    .returning(writer_fence.c.epoch)
)
_NEWEST_TS = select(func.max(entry.c.ts)).select_from(
    wallet.join(entry, and_(entry.c.customer_id == wallet.c.customer_id, entry.c.seq == wallet.c.seq))
)
_EXTEND_LEASES = (
    update(reservation)
    .where(reservation.c.state == "open", reservation.c.lease_until < bindparam("until"))
    .values(lease_until=bindparam("until"))
)


def read_fence(connection: Connection) -> int:
    """The newest writer's epoch, held still until this transaction ends."""
    statement = _FENCE_POSTGRESQL if connection.dialect.name == "postgresql" else _FENCE
    return int(connection.exec_driver_sql(statement).scalar_one())


def take_fence(connection: Connection, now: float) -> int:
    """Make every earlier writer stale."""
    return int(connection.execute(_TAKE, {"now": now}).scalar_one())


def extend_open_leases(connection: Connection, until: float) -> None:
    connection.execute(_EXTEND_LEASES, {"until": until})


def newest_ts(connection: Connection) -> float:
    """The time of the newest entry of any wallet; 0 when there is none."""
    return connection.execute(_NEWEST_TS).scalar_one() or 0.0
