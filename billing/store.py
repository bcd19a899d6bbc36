"""Between the book and the database: loads what a batch can see, and writes what it decided, in few statements.

Decides nothing. Everything happens on the caller's connection, inside the caller's transaction.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, assert_never

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Row,
    Select,
    Table,
    and_,
    bindparam,
    func,
    or_,
    select,
    text,
    tuple_,
    update,
)

from billing.commands import (
    NO_TERMS,
    Command,
    CreateKey,
    CustomerId,
    ExpireLeases,
    Grant,
    Heartbeat,
    KeyId,
    KeyTerms,
    Quote,
    Reserve,
    RevokeKey,
    RotateKey,
    SetKeyTerms,
    Settle,
)
from billing.core import (
    DAY_S,
    KEY_MEMORY_S,
    MAX_FORGOTTEN_PER_SWEEP,
    Book,
    Entry,
    Key,
    QuoteRow,
    Reservation,
    Submission,
    Wallet,
)
from billing.keys import initial_grant_id
from billing.tables import (
    INT64,
    SECONDS,
    api_key,
    billing_metadata,
    budget_use,
    entry,
    key_terms,
    quote,
    reservation,
    submission,
    wallet,
    writer_fence,
)

AnyRow = Row[*tuple[Any, ...]]

MAX_IDS_PER_QUERY = 500
"""Longer lists are asked for in parts; both databases bound the parameters of one statement."""

_FENCE = select(writer_fence.c.epoch)
# The lock makes a successor wait for this transaction, and this one for a successor's. Every row is reached by its key:
# on young tables PostgreSQL would plan scans and joins of whole tables, and keep those plans for the whole connection
# (a hash over the open reservations reads each that was ever open, until vacuum has been there).
_FENCE_POSTGRESQL = text(
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

_at_creation = entry.alias("at_creation")
_KEYS = (
    select(
        api_key,
        _at_creation.c.balance_after.label("balance_at_creation"),
        *(column for column in key_terms.c if column.name != "key_id"),
    )
    .join_from(
        api_key,
        _at_creation,
        and_(_at_creation.c.customer_id == api_key.c.customer_id, _at_creation.c.seq == api_key.c.created_seq),
    )
    .outerjoin(key_terms, key_terms.c.key_id == api_key.c.key_id)
)
_debit = entry.alias("debit")
_settlement = entry.alias("settlement")
_RESERVATIONS = (
    select(
        reservation,
        _debit.c.balance_after.label("balance_after_debit"),
        _settlement.c.balance_after.label("balance_after_settlement"),
        budget_use.c.budget_id,
        budget_use.c.day.label("budget_day"),
    )
    .join_from(
        reservation,
        _debit,
        and_(_debit.c.customer_id == reservation.c.customer_id, _debit.c.seq == reservation.c.debit_seq),
    )
    .outerjoin(
        _settlement,
        and_(_settlement.c.customer_id == reservation.c.customer_id, _settlement.c.seq == reservation.c.settled_seq),
    )
    .outerjoin(budget_use, budget_use.c.request_id == reservation.c.request_id)
)


@dataclass(frozen=True, slots=True)
class _ByText:
    """A query for the rows whose `column` is in `wanted`, a JSON array: constant text, so it is prepared once."""

    sqlite: Any
    postgresql: Any


def _by(statement: Select[Any], column: Column[str]) -> _ByText:
    # As text: SQLAlchemy's `in_` would put parentheses around the query, which makes it a single value.
    return _ByText(
        statement.where(text(f"{column} IN (SELECT value FROM json_each(:wanted))")),  # noqa: S608 - our own name
        statement.where(text(f"{column} IN (SELECT json_array_elements_text(CAST(:wanted AS json)))")),
    )


_KEYS_BY_ID = _by(_KEYS, api_key.c.key_id)
_KEYS_BY_SHA256 = _by(_KEYS, api_key.c.sha256)
_RESERVATIONS_BY_ID = _by(_RESERVATIONS, reservation.c.request_id)
_RUN_OUT = _RESERVATIONS.where(reservation.c.state == "open", reservation.c.lease_until <= bindparam("now"))
_WALLETS_BY_ID = _by(select(wallet), wallet.c.customer_id)
_WALLETS_BY_NAME = _by(select(wallet), wallet.c.name)
_SPENT = _by(
    select(
        budget_use.c.budget_id,
        budget_use.c.day,
        func.sum(reservation.c.amount - reservation.c.refunded).label("spent"),
    )
    .join(reservation, reservation.c.request_id == budget_use.c.request_id)
    .where(budget_use.c.day >= bindparam("since"))
    .group_by(budget_use.c.budget_id, budget_use.c.day),
    budget_use.c.budget_id,
)
_QUOTES = _by(select(quote), quote.c.quote_id)
_CREDITS = _by(select(entry).where(entry.c.kind == "credit"), entry.c.public_id)
_SUBMISSIONS = select(submission)
_stands = or_(reservation.c.state == "open", reservation.c.captured > 0)
_STANDING = select(submission).join(reservation, reservation.c.request_id == submission.c.request_id).where(_stands)
_FORGETTABLE = (
    select(submission)
    .join(reservation, reservation.c.request_id == submission.c.request_id)
    .where(reservation.c.state == "settled", submission.c.created_at <= bindparam("before"))
    .order_by(submission.c.created_at, submission.c.request_id)
    .limit(MAX_FORGOTTEN_PER_SWEEP)
)

# One statement of constant text for any number of rows: SQLite runs it once per row, prepared; PostgreSQL once, over
# one array for each column.
_COLUMNS = {table.name: tuple(column.name for column in table.columns) for table in billing_metadata.sorted_tables}
_POSTGRESQL_TYPES = {INT64: "bigint", SECONDS: "float8"}


@dataclass(frozen=True, slots=True)
class _Write:
    """One kind of change, of many rows at once. Rows are tuples in the order of `columns`."""

    sqlite: str
    postgresql: str

    def __call__(self, connection: Connection, rows: list[tuple[Any, ...]]) -> None:
        if not rows:
            return
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql(self.sqlite, rows)
        else:
            connection.exec_driver_sql(self.postgresql, tuple(map(_array, zip(*rows, strict=True))))


def _array(column: Sequence[Any]) -> str:
    """A PostgreSQL array, as text. All that is stored is printable, so JSON quotes it as PostgreSQL wants it."""
    return f"{{{json.dumps(column, ensure_ascii=False)[1:-1]}}}"


def _recordset(table: Table, columns: Sequence[str]) -> str:
    """One array parameter for each column, as rows of the table's types."""
    arrays = ", ".join(f"%s::{_POSTGRESQL_TYPES.get(table.c[name].type, 'text')}[]" for name in columns)
    return f"SELECT * FROM unnest({arrays}) AS r ({', '.join(columns)})"  # noqa: S608 - our own names


def _insert(table: Table) -> _Write:
    columns = _COLUMNS[table.name]
    into = f"INSERT INTO {table.name} ({', '.join(columns)})"
    return _Write(f"{into} VALUES ({', '.join('?' * len(columns))})", f"{into} {_recordset(table, columns)}")


def _update(table: Table, key: str, columns: Sequence[str], only: str = "") -> _Write:
    """Rows are the new values and then the key."""
    condition = f" AND {table.name}.{only}" if only else ""
    rows = _recordset(table, [*columns, key])
    one = ", ".join(f"{name} = ?" for name in columns)
    many = ", ".join(f"{name} = new.{name}" for name in columns)
    return _Write(
        f"UPDATE {table.name} SET {one} WHERE {key} = ?{condition}",  # noqa: S608 - our own names
        f"UPDATE {table.name} SET {many} FROM ({rows}) AS new"  # noqa: S608 - our own names
        f" WHERE {table.name}.{key} = new.{key}{condition}",
    )


def _upsert(table: Table, key: str) -> _Write:
    changes = ", ".join(f"{name} = excluded.{name}" for name in _COLUMNS[table.name] if name != key)
    write = _insert(table)
    conflict = f" ON CONFLICT ({key}) DO UPDATE SET {changes}"
    return _Write(write.sqlite + conflict, write.postgresql + conflict)


_INSERT_WALLETS = _insert(wallet)
_INSERT_KEYS = _insert(api_key)
_INSERT_RESERVATIONS = _insert(reservation)
_INSERT_SUBMISSIONS = _insert(submission)
_INSERT_ENTRIES = _insert(entry)
_INSERT_BUDGET_USES = _insert(budget_use)
_INSERT_QUOTES = _insert(quote)
_PUT_TERMS = _upsert(key_terms, "key_id")
_MOVE_WALLETS = _update(wallet, "customer_id", ("seq", "balance_mils"))
_REVOKE_KEYS = _update(api_key, "key_id", ("revoked_at", "revoked_seq"))
_SETTLE = _update(
    reservation,
    "request_id",
    ("captured", "refunded", "state", "reason", "settled_at", "settled_seq"),
    only="state = 'open'",
)
_RENEW = _update(reservation, "request_id", ("lease_until",), only="state = 'open'")
_RELEASE = _update(submission, "request_id", ("released_at",))
_FORGET = _Write(
    "DELETE FROM submission WHERE request_id = ?",
    f"DELETE FROM submission WHERE request_id IN ({_recordset(submission, ('request_id',))})",  # noqa: S608 - our own
)


def read_fence(connection: Connection) -> int:
    """The newest writer's epoch, held still until this transaction ends."""
    statement = _FENCE_POSTGRESQL if connection.dialect.name == "postgresql" else _FENCE
    return int(connection.execute(statement).scalar_one())


def take_fence(connection: Connection, now: float) -> int:
    """Make every earlier writer stale."""
    return int(connection.execute(_TAKE, {"now": now}).scalar_one())


def extend_open_leases(connection: Connection, until: float) -> None:
    connection.execute(_EXTEND_LEASES, {"until": until})


def newest_ts(connection: Connection) -> float:
    """The time of the newest entry of any wallet; 0 when there is none."""
    return connection.execute(_NEWEST_TS).scalar_one() or 0.0


def load(connection: Connection, commands: Sequence[Command], book: Book) -> None:
    """Whatever these commands can read or change and the book does not know yet."""
    key_ids: set[str] = set()
    sha256s: set[str] = set()
    request_ids: set[str] = set()
    customer_ids: set[str] = set()
    names: set[str] = set()
    credit_ids: set[str] = set()
    quote_ids: set[str] = set()
    recognised: list[Reserve] = []
    expires = changes_budgets = False
    for command in commands:
        match command:
            case Reserve():
                key_ids.add(command.key_id)
                request_ids.add(command.request_id)
                if command.quote_id:
                    quote_ids.add(command.quote_id)
                if command.payload_sha256:
                    recognised.append(command)
            case Quote():
                key_ids.add(command.key_id)
                quote_ids.add(command.quote_id)
            case Settle():
                request_ids.add(command.request_id)
            case Heartbeat():
                request_ids.update(command.request_ids)
            case Grant():
                customer_ids.add(command.customer_id)
                credit_ids.add(command.public_id)
            case CreateKey():
                key_ids.add(command.key_id)
                sha256s.add(command.sha256)
                names.add(command.customer_name)
                customer_ids.add(command.customer_id)
                credit_ids.add(initial_grant_id(command.key_id))
            case RevokeKey():
                key_ids.add(command.key_id)
            case SetKeyTerms():
                key_ids.add(command.key_id)
                changes_budgets = True
            case RotateKey():
                key_ids.update((command.key_id, command.new_key_id))
                sha256s.add(command.sha256)
                changes_budgets = True
            case ExpireLeases():
                expires = True
            case _:
                assert_never(command)

    is_sqlite = connection.dialect.name == "sqlite"

    def among(statement: _ByText, wanted: Iterable[str], add: Callable[[AnyRow], None], **parameters: object) -> None:
        if ids := sorted(wanted):
            values = {"wanted": json.dumps(ids), **parameters}
            for row in connection.execute(statement.sqlite if is_sqlite else statement.postgresql, values):
                add(row)

    def fetch(statement: Any, column: ColumnElement[Any], wanted: set[Any], add: Callable[[AnyRow], None]) -> None:
        for part in _parts(wanted):
            for row in connection.execute(statement.where(column.in_(part))):
                add(row)

    def add_key(row: AnyRow) -> None:
        book.add_key(_key(row))
        customer_ids.add(row.customer_id)

    def add_wallet(row: AnyRow) -> None:
        book.add_wallet(Wallet(*row))

    def add_reservation(row: AnyRow) -> None:
        if row.request_id not in book.reservations:
            book.reservations[row.request_id] = _reservation(row)
            if row.state == "settled":
                book.passing.append(row.request_id)
        customer_ids.add(row.customer_id)

    among(_KEYS_BY_ID, key_ids - book.keys.keys(), add_key)
    among(_KEYS_BY_SHA256, sha256s - book.key_by_sha256.keys(), add_key)

    keys = [book.keys[KeyId(key_id)] for key_id in key_ids & book.keys.keys()]
    budget_ids = {key.budget_id for key in keys if key.has_budget or changes_budgets} - book.spent.keys()
    if budget_ids:
        for budget_id in budget_ids:
            book.spent[budget_id] = {}
        among(
            _SPENT,
            budget_ids,
            lambda row: book.spent[row.budget_id].update({row.day: int(row.spent)}),
            since=int(book.ts // DAY_S) - 31,
        )

    def add_submission(row: AnyRow) -> None:
        book.add_submission(Submission(*row))
        request_ids.add(row.request_id)

    if recognised:
        among(_WALLETS_BY_NAME, names - book.customer_by_name.keys(), add_wallet)
        owners = {key_id: book.keys[KeyId(key_id)].customer_id for key_id in key_ids & book.keys.keys()}
        for command in commands:  # a key may be made and used in one batch
            if isinstance(command, CreateKey) and command.customer_name in book.customer_by_name:
                owners.setdefault(command.key_id, book.customer_by_name[command.customer_name])
        _load_submissions(owners, recognised, book.ts, fetch, add_submission)
    if expires:
        for row in connection.execute(_FORGETTABLE, {"before": book.now - KEY_MEMORY_S}):
            add_submission(row)
    among(_RESERVATIONS_BY_ID, request_ids - book.reservations.keys(), add_reservation)
    if expires:
        for row in connection.execute(_RUN_OUT, {"now": book.now}):
            add_reservation(row)
    among(_QUOTES, quote_ids, lambda row: book.quotes.update({row.quote_id: QuoteRow(*row)}))
    among(_CREDITS, credit_ids, lambda row: book.credits.update({row.public_id: Entry(*row)}))
    among(_WALLETS_BY_ID, customer_ids - book.wallets.keys(), add_wallet)
    among(_WALLETS_BY_NAME, names - book.customer_by_name.keys(), add_wallet)


def _load_submissions(
    owners: Mapping[str, CustomerId],
    commands: Sequence[Reserve],
    ts: float,
    fetch: Callable[[Any, ColumnElement[Any], set[Any], Callable[[AnyRow], None]], None],
    add: Callable[[AnyRow], None],
) -> None:
    """Those that the commands may repeat."""
    fetch(_SUBMISSIONS, submission.c.request_id, {command.request_id for command in commands}, add)
    by_key, by_payload = set(), set()
    window_s = 0.0
    for command in commands:
        customer_id = owners.get(command.key_id)
        if customer_id is None:
            continue
        if command.idempotency_key:
            by_key.add((customer_id, command.idempotency_key))
        elif command.dedupe_window_s:
            by_payload.add((customer_id, command.payload_sha256))
            window_s = max(window_s, command.dedupe_window_s)
    held = _SUBMISSIONS.where(submission.c.released_at.is_(None), submission.c.idempotency_key != "")
    fetch(held, tuple_(submission.c.customer_id, submission.c.idempotency_key), by_key, add)
    recent = _STANDING.where(submission.c.created_at >= ts - window_s)
    fetch(recent, tuple_(submission.c.customer_id, submission.c.payload_sha256), by_payload, add)


def write(connection: Connection, book: Book) -> None:
    """Write what the batch decided. Reservations go before the entries that point at them, entries before wallets."""
    new_wallets = {each.customer_id for each in book.new_wallets}
    new_keys = {each.key_id for each in book.new_keys}
    _INSERT_WALLETS(connection, [_wallet_row(each) for each in book.new_wallets])
    _INSERT_KEYS(connection, [_key_row(each) for each in book.new_keys])
    _REVOKE_KEYS(
        connection,
        [(each.revoked_at, each.revoked_seq, each.key_id) for each in book.revoked_keys if each.key_id not in new_keys],
    )
    _PUT_TERMS(connection, [_terms_row(each) for each in book.new_terms.values()])
    _INSERT_RESERVATIONS(connection, [_reservation_row(each) for each in book.new_reservations])
    _INSERT_BUDGET_USES(
        connection,
        [(each.request_id, each.budget_id, each.budget_day) for each in book.new_reservations if each.budget_id],
    )
    _RENEW(
        connection,
        [(each.lease_until, each.request_id) for each in book.renewed.values() if not each.is_new],
    )
    _SETTLE(connection, [_settlement_row(each) for each in book.settled])
    _FORGET(connection, [(request_id,) for request_id in book.forgotten])
    _RELEASE(connection, [(each.released_at, each.request_id) for each in book.released])
    _INSERT_SUBMISSIONS(connection, [_submission_row(each) for each in book.new_submissions])
    _INSERT_QUOTES(connection, book.new_quotes)  # type: ignore[arg-type]
    _INSERT_ENTRIES(connection, book.entries)  # type: ignore[arg-type]
    _MOVE_WALLETS(
        connection,
        [
            (each.seq, each.balance, each.customer_id)
            for each in book.moved_wallets.values()
            if each.customer_id not in new_wallets
        ],
    )


def _parts(wanted: Iterable[Any]) -> Iterator[list[Any]]:
    ids = iter(sorted(wanted))
    while part := list(islice(ids, MAX_IDS_PER_QUERY)):
        yield part


def _key(row: AnyRow) -> Key:
    return Key(
        key_id=row.key_id,
        sha256=row.sha256,
        last4=row.last4,
        customer_id=row.customer_id,
        refill_per_s=row.refill_per_s,
        burst=row.burst,
        created_at=row.created_at,
        created_seq=row.created_seq,
        balance_at_creation=row.balance_at_creation,
        revoked_at=row.revoked_at,
        revoked_seq=row.revoked_seq,
        terms=terms_of(row),
        budget_id=row.budget_id or row.key_id,
    )


def terms_of(row: Any) -> KeyTerms:
    """From a row that was joined with the terms, of which there may be none."""
    if row.scope is None:
        return NO_TERMS
    return KeyTerms(
        label=row.label,
        scope=row.scope,
        models=tuple(row.models.split()),
        expires_at=row.expires_at,
        daily_budget_mils=row.daily_budget_mils,
        monthly_budget_mils=row.monthly_budget_mils,
    )


def _reservation(row: AnyRow) -> Reservation:
    return Reservation(
        request_id=row.request_id,
        customer_id=row.customer_id,
        key_id=row.key_id,
        frames=row.frames,
        mils_per_frame=row.mils_per_frame,
        amount=row.amount,
        lease_until=row.lease_until,
        created_at=row.created_at,
        debit_seq=row.debit_seq,
        balance_after_debit=row.balance_after_debit,
        captured=row.captured,
        refunded=row.refunded,
        state=row.state,
        reason=row.reason,
        settled_at=row.settled_at,
        settled_seq=row.settled_seq,
        balance_after_settlement=row.balance_after_settlement,
        budget_id=row.budget_id,
        budget_day=row.budget_day,
    )


def _wallet_row(each: Wallet) -> tuple[Any, ...]:
    return (each.customer_id, each.name, each.seq, each.balance, each.created_at)


def _key_row(each: Key) -> tuple[Any, ...]:
    return (
        each.key_id,
        each.sha256,
        each.last4,
        each.customer_id,
        each.refill_per_s,
        each.burst,
        each.created_at,
        each.created_seq,
        each.revoked_at,
        each.revoked_seq,
    )


def _terms_row(each: Key) -> tuple[Any, ...]:
    terms = each.terms
    return (
        each.key_id,
        each.budget_id,
        terms.label,
        terms.scope,
        " ".join(terms.models),
        terms.expires_at,
        terms.daily_budget_mils,
        terms.monthly_budget_mils,
    )


def _reservation_row(each: Reservation) -> tuple[Any, ...]:
    return (
        each.request_id,
        each.customer_id,
        each.key_id,
        each.frames,
        each.mils_per_frame,
        each.amount,
        each.captured,
        each.refunded,
        each.state,
        each.lease_until,
        each.reason,
        each.created_at,
        each.debit_seq,
        each.settled_at,
        each.settled_seq,
    )


def _settlement_row(each: Reservation) -> tuple[Any, ...]:
    return (
        each.captured,
        each.refunded,
        each.state,
        each.reason,
        each.settled_at,
        each.settled_seq,
        each.request_id,
    )


def _submission_row(each: Submission) -> tuple[Any, ...]:
    return (
        each.request_id,
        each.customer_id,
        each.amount,
        each.idempotency_key,
        each.payload_sha256,
        each.created_at,
        each.released_at,
    )
