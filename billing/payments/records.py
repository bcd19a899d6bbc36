"""Carries out the commands of payments inside the writer's transaction.

They are rare beside reservations, so each is a few statements of its own; money moves only through the ledger's own
commands, which `ApplyPayment` brings along.
"""

import calendar
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update

from billing.checks import printable
from billing.commands import CustomerId, PaymentCommand, PaymentOutcome, Rejected, UnknownCustomer
from billing.core.book import Wallet
from billing.money import MILS_PER_CENT, Mils, dollars
from billing.payments.commands import (
    BACK_OFF_S,
    MAX_DECLINES,
    MAX_OPEN_TOPUPS,
    MAX_TOPUP_CENTS,
    MIN_TOPUP_CENTS,
    REUSE_MARGIN_S,
    ApplyInvoice,
    ApplyPayment,
    AutoTopup,
    AutoTopupHeld,
    AutoTopupSet,
    CursorSet,
    CustomerLinked,
    DisarmAutoTopup,
    EventsMarked,
    EventsReceived,
    FileReport,
    Invoice,
    InvoiceOpened,
    LinkCustomer,
    MarkEvents,
    Movement,
    NoteSession,
    OpenInvoice,
    OpenTopup,
    PaymentApplied,
    PaymentStale,
    ReceiveEvents,
    RenumberAttempt,
    RenumberInvoice,
    ReportFiled,
    SetAutoTopup,
    SetCursor,
    StartAutoTopup,
    TooManyTopups,
    Topup,
    TopupConflict,
    TopupNoted,
    TopupOpened,
)
from billing.payments.tables import (
    auto_topup,
    stripe_cursor,
    stripe_customer,
    stripe_event,
    stripe_invoice,
    stripe_movement,
    stripe_report,
    topup,
)
from billing.tables import payment, statement, wallet

DAY_S = 86_400
MAX_PROBLEM_CHARS = 200

AnyRow = Row[*tuple[Any, ...]]


def carry_out(
    connection: Connection, command: PaymentCommand, ts: float, wallets: Mapping[CustomerId, Wallet]
) -> PaymentOutcome | UnknownCustomer | Rejected:
    """Answer one command. `ts` is the time that the batch's entries bear.

    `wallets` are those that the writer knows: money that the batch has moved is not in the database yet.
    """
    match command:
        case ReceiveEvents():
            return _receive(connection, command, ts)
        case MarkEvents():
            return EventsMarked(_mark(connection, command.event_ids, command.state, command.problem, command.due_at))
        case OpenTopup():
            return _open(connection, command, ts)
        case NoteSession():
            return _note_session(connection, command, ts)
        case RenumberAttempt():
            changed = {"attempt": topup.c.attempt + 1, "updated_at": ts}
            return _note(connection, command.topup_id, changed, topup.c.attempt == command.seen)
        case ApplyPayment():
            return _apply(connection, command, ts)
        case LinkCustomer():
            return _link(connection, command, ts)
        case SetAutoTopup():
            return _set_auto(connection, command, ts)
        case DisarmAutoTopup():
            return _disarm(connection, command)
        case StartAutoTopup():
            return _start_auto(connection, command, ts, wallets)
        case OpenInvoice():
            return _open_invoice(connection, command, ts)
        case RenumberInvoice():
            return _renumber_invoice(connection, command, ts)
        case ApplyInvoice():
            return _apply_invoice(connection, command, ts)
        case SetCursor():
            _put(connection, stripe_cursor, "name", {"name": command.name, "value": command.value})
            return CursorSet(command.value)
        case FileReport():
            row = {
                "day": command.day,
                "body": command.body,
                "signature": command.signature,
                "difference_cents": command.difference_cents,
                "filed_at": ts,
            }
            _put(connection, stripe_report, "day", row)
            return ReportFiled(command.day)
        case _:
            return Rejected(f"{type(command).__name__} is not a command")


def refuse(connection: Connection, command: PaymentCommand) -> PaymentStale | None:
    """Asked before its money is decided: what another observation has overtaken moves none."""
    found: Topup | Invoice | None
    if isinstance(command, ApplyPayment):
        found = find_topup(connection, command.topup_id)
    elif isinstance(command, ApplyInvoice):
        found = find_invoice(connection, command.customer_id, command.period)
    else:
        return None
    if found is None or found.revision != command.revision:
        return PaymentStale(-1 if found is None else found.revision)
    return None


def find_topup(connection: Connection, topup_id: str) -> Topup | None:
    row = connection.execute(select(topup).where(topup.c.topup_id == topup_id)).first()
    return None if row is None else topup_of(row)


def topup_of(row: AnyRow) -> Topup:
    return Topup(**row._mapping)


def find_invoice(connection: Connection, customer_id: CustomerId, period: str) -> Invoice | None:
    mine = select(stripe_invoice).where(stripe_invoice.c.customer_id == customer_id, stripe_invoice.c.period == period)
    row = connection.execute(mine).first()
    return None if row is None else Invoice(**row._mapping)


def auto_topup_of(row: AnyRow) -> AutoTopup:
    values = dict(row._mapping)
    del values["customer_id"]
    return AutoTopup(**values | {"enabled": bool(values["enabled"])})


def _receive(connection: Connection, command: ReceiveEvents, ts: float) -> EventsReceived:
    ids = [event.event_id for event in command.events]
    known = set(connection.scalars(select(stripe_event.c.event_id).where(stripe_event.c.event_id.in_(ids))))
    new = {event.event_id: event for event in command.events if event.event_id not in known}
    for event in new.values():
        connection.execute(
            insert(stripe_event).values(
                event_id=event.event_id,
                type=event.type,
                created=event.created,
                object_id=event.object_id,
                topup_id=event.topup_id,
                session_id=event.session_id,
                payment_intent=event.payment_intent,
                invoice_id=event.invoice_id,
                provider_customer=event.provider_customer,
                via=command.via,
                received_at=ts,
                state="pending",
                attempts=0,
                due_at=ts,
                problem="",
            )
        )
    return EventsReceived(len(new))


def _mark(connection: Connection, event_ids: Iterable[str], state: str, problem: str = "", due_at: float = 0.0) -> int:
    """Only what is pending: what an event came to is final."""
    ids = list(event_ids)
    if not ids:
        return 0
    changed = connection.execute(
        update(stripe_event)
        .where(stripe_event.c.event_id.in_(ids), stripe_event.c.state == "pending")
        .values(
            state=state,
            problem=_short(problem),
            due_at=due_at,
            attempts=stripe_event.c.attempts + 1,
        )
    )
    return changed.rowcount


def _open(
    connection: Connection, command: OpenTopup, ts: float
) -> TopupOpened | TopupConflict | TooManyTopups | UnknownCustomer | Rejected:
    if not MIN_TOPUP_CENTS <= command.amount_cents <= MAX_TOPUP_CENTS:
        return Rejected(f"amount_cents must be from {MIN_TOPUP_CENTS} to {MAX_TOPUP_CENTS}")
    mine = select(topup).where(topup.c.customer_id == command.customer_id)
    same = connection.execute(select(topup).where(topup.c.topup_id == command.topup_id)).first()
    if same is None and command.idempotency_key:
        same = connection.execute(mine.where(topup.c.idempotency_key == command.idempotency_key)).first()
    if same is not None:
        if (same.customer_id, same.amount_cents) != (command.customer_id, command.amount_cents):
            return TopupConflict(same.topup_id, same.amount_cents)
        return TopupOpened(topup_of(same))
    live = [
        row
        for row in connection.execute(mine.where(topup.c.kind == "checkout", topup.c.state.in_(("new", "open"))))
        if row.expires_at > ts
    ]
    if not command.idempotency_key:
        for row in live:
            fresh = row.state == "new" or row.expires_at > ts + REUSE_MARGIN_S
            if row.amount_cents == command.amount_cents and fresh and not row.idempotency_key:
                return TopupOpened(topup_of(row))
    if len(live) >= MAX_OPEN_TOPUPS:
        return TooManyTopups(len(live), min(row.expires_at for row in live))
    if _balance(connection, command.customer_id) is None:
        return UnknownCustomer(command.customer_id)
    return TopupOpened(
        _insert(
            connection,
            command.topup_id,
            command.customer_id,
            "checkout",
            command.amount_cents,
            ts,
            idempotency_key=command.idempotency_key,
        )
    )


def _insert(
    connection: Connection,
    topup_id: str,
    customer_id: CustomerId,
    kind: str,
    amount_cents: int,
    ts: float,
    *,
    idempotency_key: str = "",
    payment_method: str = "",
    reason: str = "",
) -> Topup:
    row = {
        "topup_id": topup_id,
        "customer_id": customer_id,
        "kind": kind,
        "amount_cents": amount_cents,
        "idempotency_key": idempotency_key,
        "state": "new" if kind == "checkout" else "charging",
        "attempt": 0,
        "session_id": "",
        "payment_intent": "",
        "payment_method": payment_method,
        "url": "",
        "expires_at": ts + REUSE_MARGIN_S,
        "revision": 0,
        "reason": reason,
        "problem": "",
        "created_at": ts,
        "updated_at": ts,
    }
    connection.execute(insert(topup).values(**row))
    return Topup(**row)  # type: ignore[arg-type]


def _note_session(connection: Connection, command: NoteSession, ts: float) -> TopupNoted | Rejected:
    found = find_topup(connection, command.topup_id)
    if found is None or found.session_id not in ("", command.session_id):
        return Rejected(f"{command.topup_id} has no session {command.session_id}")
    changed = {
        "session_id": command.session_id,
        "url": command.url,
        "expires_at": command.expires_at,
        "updated_at": ts,
        "state": "open" if found.state == "new" else found.state,
    }
    return _note(connection, command.topup_id, changed)


def _note(connection: Connection, topup_id: str, changed: dict[str, Any], *only: Any) -> TopupNoted | Rejected:
    connection.execute(update(topup).where(topup.c.topup_id == topup_id, *only).values(**changed))
    found = find_topup(connection, topup_id)
    return Rejected(f"there is no top-up {topup_id}") if found is None else TopupNoted(found)


def _apply(connection: Connection, command: ApplyPayment, ts: float) -> PaymentApplied | Rejected:
    before = find_topup(connection, command.topup_id)
    assert before is not None, "refuse was asked first"
    changed: dict[str, Any] = {
        "state": command.state,
        "problem": _short(command.problem),
        "revision": before.revision + 1,
        "updated_at": ts,
    }
    for name in ("session_id", "payment_intent"):
        if getattr(command, name):
            changed[name] = getattr(command, name)
    connection.execute(update(topup).where(topup.c.topup_id == command.topup_id).values(**changed))
    if before.kind == "auto" and before.state == "charging":
        _note_charge(connection, before.customer_id, command, ts)
    if command.payment_method:
        agreed = select(auto_topup.c.customer_id).where(auto_topup.c.enabled == 1)
        connection.execute(
            update(stripe_customer)
            .where(stripe_customer.c.customer_id == before.customer_id, stripe_customer.c.customer_id.in_(agreed))
            .values(payment_method=command.payment_method)
        )
    if command.suspicion:
        _switch_off(connection, before.customer_id, command.suspicion)
    _keep_movements(connection, before.customer_id, f"stripe:{command.payment_intent}", command.movements)
    _mark(connection, command.event_ids, "applied")
    after = find_topup(connection, command.topup_id)
    assert after is not None
    return PaymentApplied(after)


def _keep_movements(
    connection: Connection, customer_id: CustomerId, source: str, movements: Iterable[Movement]
) -> None:
    ids = [each.movement_id for each in movements]
    known = set(connection.scalars(select(stripe_movement.c.movement_id).where(stripe_movement.c.movement_id.in_(ids))))
    for each in movements:
        if each.movement_id not in known:
            connection.execute(
                insert(stripe_movement).values(
                    movement_id=each.movement_id,
                    customer_id=customer_id,
                    source=source,
                    kind=each.kind,
                    amount_cents=each.amount_cents,
                    created=each.created,
                )
            )


def _note_charge(connection: Connection, customer_id: CustomerId, command: ApplyPayment, ts: float) -> None:
    """What an automatic charge came to decides when the next may be tried."""
    terms = _auto(connection, customer_id)
    if terms is None or command.state in ("charging", "processing"):
        return
    if command.state == "paid":
        changed: dict[str, Any] = {"declines": 0, "retry_at": 0.0, "problem": ""}
    else:
        declines = terms.declines + 1
        changed = {"declines": declines, "problem": _short(f"declined: {command.problem}")}
        if declines >= MAX_DECLINES:
            changed |= {"enabled": 0, "problem": _short(f"off after {declines} declines: {command.problem}")}
        else:
            changed["retry_at"] = ts + BACK_OFF_S[declines - 1]
    connection.execute(update(auto_topup).where(auto_topup.c.customer_id == customer_id).values(**changed))


def _open_invoice(connection: Connection, command: OpenInvoice, ts: float) -> InvoiceOpened | Rejected:
    known = find_invoice(connection, command.customer_id, command.period)
    if known is not None:
        return InvoiceOpened(known)
    closed = connection.execute(
        select(statement).where(statement.c.customer_id == command.customer_id, statement.c.period == command.period)
    ).first()
    if closed is None:
        return Rejected(f"{command.period} of {command.customer_id} is not closed")
    owed = -closed.closing_mils - _asked_for(connection, command.customer_id, closed.to_seq)
    if owed < MILS_PER_CENT:
        return InvoiceOpened(None)
    row = {
        "customer_id": command.customer_id,
        "period": command.period,
        "amount_cents": owed // MILS_PER_CENT,
        "carry_mils": owed % MILS_PER_CENT,
        "state": "new",
        "attempt": 0,
        "invoice_id": "",
        "payment_intent": "",
        "url": "",
        "revision": 0,
        "problem": "",
        "created_at": ts,
        "updated_at": ts,
    }
    connection.execute(insert(stripe_invoice).values(**row))
    return InvoiceOpened(Invoice(**row))


def _asked_for(connection: Connection, customer_id: CustomerId, to_seq: int) -> int:
    """Mils of earlier invoices whose payment is not among the entries up to `to_seq`. A void one asks for nothing."""
    earlier = (
        select(stripe_invoice.c.amount_cents, payment.c.credit_seq)
        .join_from(
            stripe_invoice,
            payment,
            payment.c.source.in_(
                ("stripe:" + stripe_invoice.c.payment_intent, "stripe:" + stripe_invoice.c.invoice_id)
            ),
            isouter=True,
        )
        .where(stripe_invoice.c.customer_id == customer_id, stripe_invoice.c.state != "void")
    )
    rows = connection.execute(earlier).all()
    unpaid = [int(row.amount_cents) for row in rows if row.credit_seq is None or row.credit_seq > to_seq]
    return sum(unpaid) * MILS_PER_CENT


def _renumber_invoice(connection: Connection, command: RenumberInvoice, ts: float) -> InvoiceOpened:
    connection.execute(
        update(stripe_invoice)
        .where(
            stripe_invoice.c.customer_id == command.customer_id,
            stripe_invoice.c.period == command.period,
            stripe_invoice.c.attempt == command.seen,
        )
        .values(attempt=command.seen + 1, problem=_short(command.problem), updated_at=ts)
    )
    return InvoiceOpened(find_invoice(connection, command.customer_id, command.period))


def _apply_invoice(connection: Connection, command: ApplyInvoice, ts: float) -> InvoiceOpened:
    changed: dict[str, Any] = {
        "state": command.state,
        "invoice_id": command.invoice_id,
        "revision": command.revision + 1,
        "updated_at": ts,
        "problem": "",
    }
    for name in ("payment_intent", "url"):
        if getattr(command, name):
            changed[name] = getattr(command, name)
    mine = (stripe_invoice.c.customer_id == command.customer_id, stripe_invoice.c.period == command.period)
    connection.execute(update(stripe_invoice).where(*mine).values(**changed))
    source = f"stripe:{command.payment_intent or command.invoice_id}"
    _keep_movements(connection, command.customer_id, source, command.movements)
    _mark(connection, command.event_ids, "applied")
    return InvoiceOpened(find_invoice(connection, command.customer_id, command.period))


def _link(connection: Connection, command: LinkCustomer, ts: float) -> CustomerLinked:
    mine = select(stripe_customer.c.provider_customer).where(stripe_customer.c.customer_id == command.customer_id)
    known = connection.scalar(mine)
    if known is None:
        connection.execute(
            insert(stripe_customer).values(
                customer_id=command.customer_id,
                provider_customer=command.provider_customer,
                payment_method="",
                created_at=ts,
            )
        )
        known = command.provider_customer
    return CustomerLinked(known)


def _set_auto(connection: Connection, command: SetAutoTopup, ts: float) -> AutoTopupSet | UnknownCustomer | Rejected:
    """Being agreed to anew forgets what went wrong before."""
    if _balance(connection, command.customer_id) is None:
        return UnknownCustomer(command.customer_id)
    terms = command.terms
    if terms.enabled and not terms.consent.strip():
        return Rejected("automatic top-ups need consent")
    row = {
        "customer_id": command.customer_id,
        "enabled": int(terms.enabled),
        "threshold_mils": terms.threshold_mils,
        "amount_cents": terms.amount_cents,
        "daily_cap_cents": terms.daily_cap_cents,
        "monthly_cap_cents": terms.monthly_cap_cents,
        "consent": printable(terms.consent) if terms.enabled else "",
        "consent_at": ts if terms.enabled else None,
        "declines": 0,
        "retry_at": 0.0,
        "problem": "",
    }
    _put(connection, auto_topup, "customer_id", row)
    return AutoTopupSet(_auto(connection, command.customer_id))


def _disarm(connection: Connection, command: DisarmAutoTopup) -> AutoTopupSet:
    _switch_off(connection, command.customer_id, command.problem)
    if command.forget_method:
        connection.execute(
            update(stripe_customer)
            .where(stripe_customer.c.customer_id == command.customer_id)
            .values(payment_method="")
        )
    _mark(connection, command.event_ids, "applied")
    return AutoTopupSet(_auto(connection, command.customer_id))


def _switch_off(connection: Connection, customer_id: CustomerId, problem: str) -> None:
    connection.execute(
        update(auto_topup)
        .where(auto_topup.c.customer_id == customer_id, auto_topup.c.enabled == 1)
        .values(enabled=0, problem=_short(problem))
    )


def _start_auto(
    connection: Connection, command: StartAutoTopup, ts: float, wallets: Mapping[CustomerId, Wallet]
) -> TopupOpened | AutoTopupHeld:
    known = find_topup(connection, command.topup_id)
    if known is not None:
        return TopupOpened(known)
    terms = _auto(connection, command.customer_id)
    if terms is None or not terms.enabled:
        return AutoTopupHeld("it is not switched on")
    if ts < terms.retry_at:
        return AutoTopupHeld(f"the last charge was declined; the next is tried at {int(terms.retry_at)}")
    mine = select(topup).where(topup.c.customer_id == command.customer_id, topup.c.kind == "auto")
    running = connection.execute(mine.where(topup.c.state.in_(("charging", "processing")))).first()
    if running is not None:
        return AutoTopupHeld(f"{running.topup_id} is in flight")
    method = connection.scalar(
        select(stripe_customer.c.payment_method).where(stripe_customer.c.customer_id == command.customer_id)
    )
    if not method:
        return AutoTopupHeld("there is no saved card; the next top-up saves one")
    wallet_now = wallets.get(command.customer_id)
    balance = _balance(connection, command.customer_id) if wallet_now is None else wallet_now.balance
    assert balance is not None, "terms belong to a wallet"
    needed = Mils(max(terms.threshold_mils, command.requested_mils))
    if balance >= needed:
        return AutoTopupHeld("the balance is enough")
    unit = Mils(terms.amount_cents * MILS_PER_CENT)
    count = -(-(needed - balance) // unit)
    amount_cents = count * terms.amount_cents
    today, month = _periods(ts)
    for since, cap, period in ((today, terms.daily_cap_cents, "day"), (month, terms.monthly_cap_cents, "month")):
        charged = connection.scalar(
            select(func.coalesce(func.sum(topup.c.amount_cents), 0)).where(
                topup.c.customer_id == command.customer_id,
                topup.c.kind == "auto",
                topup.c.state == "paid",
                topup.c.created_at >= since,
            )
        )
        if int(charged or 0) + amount_cents > cap:
            return AutoTopupHeld(f"${amount_cents / 100:.2f} would exceed the cap of ${cap / 100:.2f} per {period}")
    if amount_cents > MAX_TOPUP_CENTS:
        return AutoTopupHeld(f"${amount_cents / 100:.2f} is more than one charge may be")
    why = f"the balance of {dollars(balance)} is below "
    if command.requested_mils > terms.threshold_mils:
        why += f"the {dollars(command.requested_mils)} that a request needed"
    else:
        why += f"the threshold of {dollars(terms.threshold_mils)}"
    reason = f"{why}; {count} x {dollars(unit)} is the least that clears it"
    begun = _insert(
        connection,
        command.topup_id,
        command.customer_id,
        "auto",
        amount_cents,
        ts,
        payment_method=method,
        reason=reason,
    )
    return TopupOpened(begun)


def _auto(connection: Connection, customer_id: CustomerId) -> AutoTopup | None:
    row = connection.execute(select(auto_topup).where(auto_topup.c.customer_id == customer_id)).first()
    return None if row is None else auto_topup_of(row)


def _balance(connection: Connection, customer_id: CustomerId) -> Mils | None:
    return connection.scalar(select(wallet.c.balance_mils).where(wallet.c.customer_id == customer_id))


def _periods(ts: float) -> tuple[float, float]:
    """When this day and this month of UTC began."""
    date = datetime.fromtimestamp(ts, UTC)
    month = calendar.timegm((date.year, date.month, 1, 0, 0, 0))
    return ts - ts % DAY_S, float(month)


def _put(connection: Connection, table: Any, key: str, row: dict[str, Any]) -> None:
    changed = connection.execute(update(table).where(table.c[key] == row[key]).values(**row))
    if changed.rowcount == 0:
        connection.execute(insert(table).values(**row))


def _short(problem: str) -> str:
    return printable(problem)[:MAX_PROBLEM_CHARS]
