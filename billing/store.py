"""Between the book and the database: loads what a batch can see, and writes what it decided, in few statements.

Decides nothing. Everything happens on the caller's connection, inside the caller's transaction.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, assert_never

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    and_,
    bindparam,
    delete,
    func,
    insert,
    or_,
    select,
    text,
    tuple_,
    update,
)

from billing.commands import (
    Command,
    CreateKey,
    CustomerId,
    ExpireLeases,
    Grant,
    Heartbeat,
    KeyId,
    Reserve,
    RevokeKey,
    Settle,
)
from billing.core import KEY_MEMORY_S, MAX_FORGOTTEN_PER_SWEEP, Book, Entry, Key, Reservation, Submission, Wallet
from billing.keys import initial_grant_id
from billing.tables import api_key, entry, reservation, submission, wallet, writer_fence

AnyRow = Row[*tuple[Any, ...]]

MAX_IDS_PER_QUERY = 500
"""Longer lists are asked for in parts; both databases bound the parameters of one statement."""

_FENCE = select(writer_fence.c.epoch)
# The lock makes a successor wait for this transaction, and this one for a successor's. On a young, nearly empty table
# PostgreSQL would plan the checks of foreign keys as sequential scans and keep those plans for the whole connection.
_FENCE_POSTGRESQL = text(
    "SELECT epoch, set_config('enable_seqscan', 'off', true) FROM writer_fence WHERE fence_id = 1 FOR UPDATE"
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
_KEYS = select(api_key, _at_creation.c.balance_after.label("balance_at_creation")).join_from(
    api_key,
    _at_creation,
    and_(_at_creation.c.customer_id == api_key.c.customer_id, _at_creation.c.seq == api_key.c.created_seq),
)
_debit = entry.alias("debit")
_settlement = entry.alias("settlement")
_RESERVATIONS = (
    select(
        reservation,
        _debit.c.balance_after.label("balance_after_debit"),
        _settlement.c.balance_after.label("balance_after_settlement"),
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
)
_WALLETS = select(wallet)
_CREDITS = select(entry).where(entry.c.kind == "credit")
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

_INSERT_WALLET = insert(wallet)
_INSERT_KEY = insert(api_key)
_INSERT_RESERVATION = insert(reservation)
_INSERT_ENTRY = insert(entry)
_INSERT_SUBMISSION = insert(submission)
_RELEASE_KEY = update(submission).where(submission.c.request_id == bindparam("of")).values(released_at=bindparam("at"))
_FORGET = delete(submission).where(submission.c.request_id == bindparam("of"))
_UPDATE_WALLET = (
    update(wallet)
    .where(wallet.c.customer_id == bindparam("of"))
    .values(seq=bindparam("new_seq"), balance_mils=bindparam("new_balance"))
)
_REVOKE_KEY = (
    update(api_key)
    .where(api_key.c.key_id == bindparam("of"))
    .values(revoked_at=bindparam("at"), revoked_seq=bindparam("at_seq"))
)
_UPDATE_RESERVATION = (
    update(reservation)
    .where(reservation.c.request_id == bindparam("of"), reservation.c.state == "open")
    .values(
        {
            name: bindparam(f"new_{name}")
            for name in ("captured", "refunded", "state", "lease_until", "reason", "settled_at", "settled_seq")
        }
    )
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


def load(connection: Connection, commands: Sequence[Command], now: float, ts: float, epoch: int) -> Book:
    """Everything that these commands can read or change."""
    book = Book(now, ts, epoch)
    key_ids: set[str] = set()
    sha256s: set[str] = set()
    request_ids: set[str] = set()
    customer_ids: set[str] = set()
    names: set[str] = set()
    credit_ids: set[str] = set()
    recognised: list[Reserve] = []
    expires = False
    for command in commands:
        match command:
            case Reserve():
                key_ids.add(command.key_id)
                request_ids.add(command.request_id)
                if command.payload_sha256:
                    recognised.append(command)
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
            case ExpireLeases():
                expires = True
            case _:
                assert_never(command)

    def fetch(statement: Any, column: ColumnElement[Any], wanted: set[Any], add: Callable[[AnyRow], None]) -> None:
        for part in _parts(wanted):
            for row in connection.execute(statement.where(column.in_(part))):
                add(row)

    def add_key(row: AnyRow) -> None:
        book.add_key(_key(row))
        customer_ids.add(row.customer_id)

    def add_reservation(row: AnyRow) -> None:
        book.reservations[row.request_id] = _reservation(row)
        customer_ids.add(row.customer_id)

    fetch(_KEYS, api_key.c.key_id, key_ids, add_key)
    fetch(_KEYS, api_key.c.sha256, sha256s, add_key)

    def add_submission(row: AnyRow) -> None:
        book.add_submission(Submission(*row))
        request_ids.add(row.request_id)

    if recognised:
        fetch(_WALLETS, wallet.c.name, names, lambda row: book.add_wallet(Wallet(*row)))
        owners = {key_id: key.customer_id for key_id, key in book.keys.items()}
        for command in commands:  # a key may be made and used in one batch
            if isinstance(command, CreateKey) and command.customer_name in book.customer_by_name:
                owners.setdefault(command.key_id, book.customer_by_name[command.customer_name])
        _load_submissions(owners, recognised, ts, fetch, add_submission)
    if expires:
        for row in connection.execute(_FORGETTABLE, {"before": now - KEY_MEMORY_S}):
            add_submission(row)
    fetch(_RESERVATIONS, reservation.c.request_id, request_ids, add_reservation)
    if expires:
        run_out = _RESERVATIONS.where(reservation.c.state == "open", reservation.c.lease_until <= now)
        for row in connection.execute(run_out):
            add_reservation(row)
    fetch(_CREDITS, entry.c.public_id, credit_ids, lambda row: book.credits.update({row.public_id: Entry(*row)}))
    fetch(_WALLETS, wallet.c.customer_id, customer_ids, lambda row: book.add_wallet(Wallet(*row)))
    fetch(_WALLETS, wallet.c.name, names - book.customer_by_name.keys(), lambda row: book.add_wallet(Wallet(*row)))
    return book


def _load_submissions(
    owners: Mapping[KeyId, CustomerId],
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
    """Write what the batch decided. Reservations go before the entries that point at them."""
    wallets, keys, reservations = book.wallets.values(), book.keys.values(), book.reservations.values()
    _execute(connection, _INSERT_WALLET, [_wallet_row(each) for each in wallets if each.is_new])
    _execute(connection, _INSERT_KEY, [_key_row(each) for each in keys if each.is_new])
    _execute(
        connection,
        _REVOKE_KEY,
        [
            {"of": each.key_id, "at": each.revoked_at, "at_seq": each.revoked_seq}
            for each in keys
            if each.is_changed and not each.is_new
        ],
    )
    _execute(connection, _INSERT_RESERVATION, [_reservation_row(each) for each in reservations if each.is_new])
    _execute(
        connection,
        _UPDATE_RESERVATION,
        [_reservation_change(each) for each in reservations if each.is_changed and not each.is_new],
    )
    submissions = book.submissions.values()
    _execute(connection, _FORGET, [{"of": request_id} for request_id in book.forgotten])
    _execute(
        connection,
        _RELEASE_KEY,
        [
            {"of": each.request_id, "at": each.released_at}
            for each in submissions
            if each.is_changed and not each.is_new
        ],
    )
    _execute(connection, _INSERT_SUBMISSION, [_submission_row(each) for each in submissions if each.is_new])
    _execute(connection, _INSERT_ENTRY, [_entry_row(each) for each in book.entries])
    _execute(
        connection,
        _UPDATE_WALLET,
        [
            {"of": each.customer_id, "new_seq": each.seq, "new_balance": each.balance}
            for each in wallets
            if each.is_changed and not each.is_new
        ],
    )


def _execute(connection: Connection, statement: Any, rows: list[dict[str, Any]]) -> None:
    if rows:
        connection.execute(statement, rows)


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
    )


def _wallet_row(each: Wallet) -> dict[str, Any]:
    return {
        "customer_id": each.customer_id,
        "name": each.name,
        "seq": each.seq,
        "balance_mils": each.balance,
        "created_at": each.created_at,
    }


def _key_row(each: Key) -> dict[str, Any]:
    return {
        "key_id": each.key_id,
        "sha256": each.sha256,
        "last4": each.last4,
        "customer_id": each.customer_id,
        "refill_per_s": each.refill_per_s,
        "burst": each.burst,
        "created_at": each.created_at,
        "created_seq": each.created_seq,
        "revoked_at": each.revoked_at,
        "revoked_seq": each.revoked_seq,
    }


def _reservation_row(each: Reservation) -> dict[str, Any]:
    return {
        "request_id": each.request_id,
        "customer_id": each.customer_id,
        "key_id": each.key_id,
        "frames": each.frames,
        "mils_per_frame": each.mils_per_frame,
        "amount": each.amount,
        "captured": each.captured,
        "refunded": each.refunded,
        "state": each.state,
        "lease_until": each.lease_until,
        "reason": each.reason,
        "created_at": each.created_at,
        "debit_seq": each.debit_seq,
        "settled_at": each.settled_at,
        "settled_seq": each.settled_seq,
    }


def _reservation_change(each: Reservation) -> dict[str, Any]:
    return {
        "of": each.request_id,
        "new_captured": each.captured,
        "new_refunded": each.refunded,
        "new_state": each.state,
        "new_lease_until": each.lease_until,
        "new_reason": each.reason,
        "new_settled_at": each.settled_at,
        "new_settled_seq": each.settled_seq,
    }


def _submission_row(each: Submission) -> dict[str, Any]:
    return {
        "request_id": each.request_id,
        "customer_id": each.customer_id,
        "amount": each.amount,
        "idempotency_key": each.idempotency_key,
        "payload_sha256": each.payload_sha256,
        "created_at": each.created_at,
        "released_at": each.released_at,
    }


def _entry_row(each: Entry) -> dict[str, Any]:
    return {
        "customer_id": each.customer_id,
        "seq": each.seq,
        "prev_seq": each.prev_seq,
        "prev_balance": each.prev_balance,
        "amount": each.amount,
        "balance_after": each.balance_after,
        "kind": each.kind,
        "public_id": each.public_id,
        "reserved": each.reserved,
        "ts": each.ts,
        "detail": each.detail,
        "epoch": each.epoch,
    }
