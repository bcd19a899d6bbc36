"""Which writer is the single one: an epoch in the database."""

from collections.abc import Callable

from sqlalchemy import and_, bindparam, func, select, update

from billing.store.connection import WriterConnection
from billing.store.sql import Query
from billing.tables import entry, reservation, wallet, writer_fence

_FENCE = "SELECT epoch FROM writer_fence WHERE fence_id = 1"
# The lock makes a successor wait for this transaction, and this one for a successor's. Every row is reached by its key:
# on young tables PostgreSQL would plan scans and joins of whole tables, and keep those plans for the whole connection
# (a hash over the open reservations reads each that was ever open, until vacuum has been there). So no plan depends on
# parameters, and each is made once: PostgreSQL would plan for the first five, which doubles a young writer's commits.
_FENCE_POSTGRESQL = (
    "SELECT epoch, set_config('enable_seqscan', 'off', true), set_config('enable_hashjoin', 'off', true),"
    " set_config('enable_mergejoin', 'off', true), set_config('enable_bitmapscan', 'off', true),"
    " set_config('plan_cache_mode', 'force_generic_plan', true)"
    " FROM writer_fence WHERE fence_id = 1 FOR UPDATE"
)
_TAKE = Query(
    update(writer_fence)
    .values(epoch=writer_fence.c.epoch + 1, taken_at=bindparam("now"))
    .returning(writer_fence.c.epoch)
)
_NEWEST_TS = Query(
    select(func.max(entry.c.ts)).select_from(
        wallet.join(entry, and_(entry.c.customer_id == wallet.c.customer_id, entry.c.seq == wallet.c.seq))
    )
)
_EXTEND_LEASES = Query(
    update(reservation)
    .where(reservation.c.state == "open", reservation.c.lease_until < bindparam("until"))
    .values(lease_until=bindparam("until"))
)


def ask_fence(connection: WriterConnection) -> Callable[[], int]:
    """The newest writer's epoch, held still until this transaction ends. It is asked now and waited for when called."""
    cursor = connection.execute(_FENCE if connection.is_sqlite else _FENCE_POSTGRESQL)
    return lambda: int(cursor.fetchone()[0])


def take_fence(connection: WriterConnection, now: float) -> int:
    """Make every earlier writer stale."""
    [(epoch,)] = _TAKE(connection, now=now)
    return int(epoch)


def extend_open_leases(connection: WriterConnection, until: float) -> None:
    _EXTEND_LEASES(connection, until=until)


def newest_ts(connection: WriterConnection) -> float:
    """The time of the newest entry of any wallet; 0 when there is none."""
    [(newest,)] = _NEWEST_TS(connection)
    return newest or 0.0
