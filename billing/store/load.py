"""Loads what a batch of commands can see and the book does not know yet."""

import json
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, TypeVar, assert_never

from sqlalchemy import and_, bindparam, case, exists, func, select, text

from billing.commands import (
    AddPrice,
    ChargeUnits,
    CloseStatement,
    Command,
    CreateKey,
    Credit,
    CustomerId,
    ExpireLeases,
    Grant,
    Heartbeat,
    KeyId,
    PaymentCommand,
    Quote,
    RequestId,
    Reserve,
    Reverse,
    RevokeKey,
    RotateKey,
    SetCreditLine,
    SetKeyTerms,
    SetMember,
    Settle,
    SetUnits,
    Transfer,
)
from billing.core.book import (
    Allotment,
    Book,
    Entry,
    Payment,
    PriceRow,
    ProvisionRow,
    QuoteRow,
    StatementRow,
    Submission,
    TransferRow,
    Unbilled,
    Wallet,
)
from billing.core.keys import DAY_S
from billing.core.reservations import KEY_MEMORY_S, MAX_FORGOTTEN_PER_SWEEP
from billing.core.units import period_of
from billing.keys import initial_grant_id
from billing.store.connection import WriterConnection
from billing.store.rows import key_of, reservation_of
from billing.store.sql import Query, by
from billing.tables import (
    api_key,
    budget_use,
    credit_line,
    draw,
    entry,
    key_terms,
    membership,
    payment,
    payment_event,
    price,
    provision,
    quote,
    reservation,
    statement,
    submission,
    transfer,
    unit_charge,
    unit_use,
    wallet,
)

_T = TypeVar("_T")

NEVER = "9999-12"
"""After every month that there is."""

MAX_EXAMINED_PER_PAYLOAD = 100
"""A request without an idempotency key is compared with so many of the newest that had the same payload."""

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
        draw.c.drawn,
        draw.c.day.label("draw_day"),
        unit_use.c.period.label("covered_period"),
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
    .outerjoin(draw, draw.c.request_id == reservation.c.request_id)
    .outerjoin(
        unit_use, and_(unit_use.c.request_id == reservation.c.request_id, unit_use.c.frames == reservation.c.covered)
    )
)

_KEYS_BY_ID = by(_KEYS, api_key.c.key_id)
_KEYS_BY_SHA256 = by(_KEYS, api_key.c.sha256)
_RESERVATIONS_BY_ID = by(_RESERVATIONS, reservation.c.request_id)
_RUN_OUT = Query(_RESERVATIONS.where(reservation.c.state == "open", reservation.c.lease_until <= bindparam("now")))
_of_team = membership.alias("of_team")
_WALLETS = select(
    wallet,
    membership.c.parent_id,
    membership.c.cap_mils,
    membership.c.cap_period,
    exists().where(_of_team.c.parent_id == wallet.c.customer_id).label("has_members"),
    select(func.coalesce(func.max(credit_line.c.seq), 0))
    .where(credit_line.c.customer_id == wallet.c.customer_id)
    .scalar_subquery()
    .label("line_seq"),
).outerjoin(membership, membership.c.customer_id == wallet.c.customer_id)
_WALLETS_BY_ID = by(_WALLETS, wallet.c.customer_id)
_WALLETS_BY_NAME = by(_WALLETS, wallet.c.name)
_DRAWN = by(
    select(
        draw.c.customer_id,
        draw.c.day,
        func.sum(
            draw.c.drawn - case((reservation.c.refunded < draw.c.drawn, reservation.c.refunded), else_=draw.c.drawn)
        ).label("drawn"),
    )
    .join(reservation, reservation.c.request_id == draw.c.request_id)
    .where(draw.c.day >= bindparam("since"))
    .group_by(draw.c.customer_id, draw.c.day),
    draw.c.customer_id,
)
_out, _into = entry.alias("out"), entry.alias("into")
_TRANSFERS = by(
    select(transfer, _out.c.balance_after, _into.c.balance_after.label("to_balance_after"))
    .join(_out, and_(_out.c.customer_id == transfer.c.from_id, _out.c.seq == transfer.c.from_seq))
    .join(_into, and_(_into.c.customer_id == transfer.c.to_id, _into.c.seq == transfer.c.to_seq)),
    transfer.c.transfer_id,
)
_STATEMENTS = by(select(statement).order_by(statement.c.number), statement.c.customer_id)
_SUMS = Query(
    select(entry.c.kind, func.sum(entry.c.amount).label("total"))
    .where(entry.c.customer_id == bindparam("customer_id"), entry.c.seq > bindparam("after"))
    .group_by(entry.c.kind)
)
_SPENT = by(
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
_PRICES = by(select(price).order_by(price.c.model, price.c.customer_id, price.c.version), price.c.model)
_last_use = unit_use.alias("last_use")
_ALLOTMENTS = by(
    select(
        unit_charge.c.customer_id,
        unit_charge.c.model,
        unit_charge.c.period,
        unit_charge.c.frames,
        func.coalesce(unit_use.c.used_after, 0).label("used"),
        unit_use.c.seq,
    )
    .select_from(unit_charge)
    .outerjoin(
        unit_use,
        and_(
            *(unit_use.c[name] == unit_charge.c[name] for name in ("customer_id", "model", "period")),
            unit_use.c.seq
            == select(func.max(_last_use.c.seq))
            .where(*(_last_use.c[name] == unit_charge.c[name] for name in ("customer_id", "model", "period")))
            .scalar_subquery(),
        ),
    )
    .where(unit_charge.c.period >= bindparam("since")),
    unit_charge.c.customer_id,
)
_PROVISIONS = by(
    select(provision).order_by(provision.c.customer_id, provision.c.model, provision.c.version),
    provision.c.customer_id,
)
_later = provision.alias("later")
_UNITS_DUE = Query(
    select(provision.c.customer_id)
    .where(provision.c.from_period <= bindparam("period"), provision.c.units > 0)
    .where(
        ~exists().where(
            _later.c.customer_id == provision.c.customer_id,
            _later.c.model == provision.c.model,
            _later.c.version > provision.c.version,
            _later.c.from_period <= bindparam("period"),
        ),
        ~exists().where(
            unit_charge.c.customer_id == provision.c.customer_id,
            unit_charge.c.model == provision.c.model,
            unit_charge.c.period == bindparam("period"),
        ),
    )
    .distinct()
)
_QUOTES = by(select(quote), quote.c.quote_id)
_CREDITS = by(select(entry).where(entry.c.kind == "credit"), entry.c.public_id)
_credit = entry.alias("credit")
_PAYMENTS = by(
    select(payment, _credit.c.balance_after).join(
        _credit, and_(_credit.c.customer_id == payment.c.customer_id, _credit.c.seq == payment.c.credit_seq)
    ),
    payment.c.source,
)
_EVENTS = by(select(payment_event.c.event_id), payment_event.c.event_id)
_SUBMISSIONS_BY_ID = by(select(submission), submission.c.request_id)
_SUBMISSIONS_BY_KEY = by(
    select(submission).where(submission.c.released_at.is_(None), submission.c.idempotency_key != text("''")),
    submission.c.customer_id,
    submission.c.idempotency_key,
)
_SUBMISSION_COLUMNS = ", ".join(map(str, submission.c))
# Of each customer, payload and moment, the newest request that is open, or delivered something and was settled since,
# among the newest of that payload; a scalar subquery, since SQLite knows no LATERAL.
_NEWEST_OF_PAYLOAD = """
    SELECT {columns} FROM (
      SELECT (
        SELECT request_id FROM (
          SELECT submission.request_id, submission.created_at, state, frames_delivered, settled_at, debit_seq
          FROM submission JOIN reservation ON reservation.request_id = submission.request_id
          WHERE submission.customer_id = wanted.customer_id AND payload_sha256 = wanted.payload
          ORDER BY submission.created_at DESC LIMIT :examined
        ) AS newest
        WHERE state = 'open' OR (frames_delivered > 0 AND settled_at >= wanted.since)
        ORDER BY created_at DESC, debit_seq DESC LIMIT 1
      ) AS request_id FROM ({wanted}) AS wanted
    ) AS found JOIN submission ON submission.request_id = found.request_id
"""
_BY_PAYLOAD = Query(
    text(
        _NEWEST_OF_PAYLOAD.format(
            columns=_SUBMISSION_COLUMNS,
            wanted="SELECT value ->> 0 AS customer_id, value ->> 1 AS payload, value ->> 2 AS since"
            " FROM json_each(:wanted)",
        )
    ),
    text(
        _NEWEST_OF_PAYLOAD.format(
            columns=_SUBMISSION_COLUMNS,
            wanted="SELECT value ->> 0 AS customer_id, value ->> 1 AS payload, CAST(value ->> 2 AS float8) AS since"
            " FROM json_array_elements(CAST(:wanted AS json))",
        )
    ),
    submission.c.keys(),
)
_FORGETTABLE = Query(
    select(submission)
    .join(reservation, reservation.c.request_id == submission.c.request_id)
    .where(reservation.c.settled_at <= bindparam("before"), submission.c.created_at <= bindparam("before"))
    .order_by(submission.c.created_at, submission.c.request_id)
    .limit(MAX_FORGOTTEN_PER_SWEEP)
)


def load(connection: WriterConnection, commands: Sequence[Command], book: Book) -> None:
    """Whatever these commands can read or change and the book does not know yet."""
    key_ids: set[str] = set()
    sha256s: set[str] = set()
    request_ids: set[str] = set()
    customer_ids: set[str] = set()
    names: set[str] = set()
    credit_ids: set[str] = set()
    quote_ids: set[str] = set()
    sources: set[str] = set()
    models: set[str] = set()
    parent_ids: set[str] = set()
    transfer_ids: set[str] = set()
    closing: set[str] = set()
    event_ids: set[str] = set()
    provisioned: set[CustomerId] = set()
    recognised: list[Reserve] = []
    expires = changes_budgets = made_members = charges_units = False
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
            case Credit():
                customer_ids.add(command.customer_id)
                credit_ids.add(command.public_id)
                sources.add(command.source)
                event_ids.update(command.events)
            case Reverse():
                sources.add(command.source)
                event_ids.update(command.events)
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
            case SetMember():
                names.add(command.name)
                customer_ids.update((command.customer_id, command.parent_id))
                made_members = True
            case Transfer():
                customer_ids.update((command.from_id, command.to_id))
                transfer_ids.add(command.transfer_id)
            case SetCreditLine():
                customer_ids.add(command.customer_id)
            case CloseStatement():
                customer_ids.add(command.customer_id)
                closing.add(command.customer_id)
            case AddPrice():
                models.add(command.model)
                if command.customer_id:
                    customer_ids.add(command.customer_id)
            case SetUnits():
                customer_ids.add(command.customer_id)
                provisioned.add(command.customer_id)
            case ChargeUnits():
                charges_units = True
            case ExpireLeases():
                expires = True
            case PaymentCommand():
                pass  # what it needs of the ledger is in the commands that come with it
            case _:
                assert_never(command)

    def among(query: Query, wanted: Iterable[Any], add: Callable[[Any], None], **parameters: object) -> None:
        if ids := sorted(wanted):
            for row in query(connection, wanted=json.dumps(ids), **parameters):
                add(row)

    def add_key(row: Any) -> None:
        book.add_key(key_of(row))
        customer_ids.add(row.customer_id)

    def add_wallet(row: Any) -> None:
        book.add_wallet(Wallet(*row))
        if row.parent_id is not None:
            parent_ids.add(row.parent_id)

    def add_reservation(row: Any) -> None:
        if row.request_id not in book.reservations:
            book.reservations[row.request_id] = reservation_of(row)
            if row.state == "settled":
                book.passing.append(row.request_id)
        customer_ids.add(row.customer_id)

    def add_price(row: Any) -> None:
        book.prices.setdefault((row.model, row.customer_id), []).append(PriceRow(*row))

    def add_provision(row: Any) -> None:
        book.provisions.setdefault((row.customer_id, row.model), []).append(ProvisionRow(*row))

    def add_allotment(row: Any) -> None:
        allotment = Allotment(*row)
        book.allotments.setdefault((allotment.customer_id, allotment.model, allotment.period), allotment)

    def add_drawn(row: Any) -> None:
        book.drawn[row.customer_id][row.day] = int(row.drawn)

    def add_statement(row: Any) -> None:
        closed = StatementRow(*row)
        book.statements[closed.customer_id, closed.period] = closed
        book.unbilled[closed.customer_id] = Unbilled(closed, {})

    def add_payment(row: Any) -> None:
        book.payments[row.source] = Payment(*row)
        customer_ids.add(row.customer_id)

    among(_KEYS_BY_ID, _unknown(key_ids, book.keys), add_key)
    among(_KEYS_BY_SHA256, _unknown(sha256s, book.key_by_sha256), add_key)

    keys = [book.keys[KeyId(key_id)] for key_id in key_ids & book.keys.keys()]
    budget_ids = _unknown((key.budget_id for key in keys if key.has_budget or changes_budgets), book.spent)
    if budget_ids:
        for budget_id in budget_ids:
            book.spent[budget_id] = {}
        among(
            _SPENT,
            budget_ids,
            lambda row: book.spent[row.budget_id].update({row.day: int(row.spent)}),
            since=int(book.ts // DAY_S) - 31,
        )

    def add_submission(row: Any) -> None:
        book.add_submission(Submission(*row))
        request_ids.add(row.request_id)

    if recognised:
        among(_WALLETS_BY_NAME, _unknown(names, book.customer_by_name), add_wallet)
        owners = {key_id: book.keys[KeyId(key_id)].customer_id for key_id in key_ids & book.keys.keys()}
        for command in commands:  # a key may be made and used in one batch
            if isinstance(command, CreateKey) and command.customer_name in book.customer_by_name:
                owners.setdefault(command.key_id, book.customer_by_name[command.customer_name])
        _load_submissions(owners, recognised, book.ts, among, add_submission)
    if expires:
        for row in _FORGETTABLE(connection, before=book.now - KEY_MEMORY_S):
            add_submission(row)
    among(_RESERVATIONS_BY_ID, _unknown(request_ids, book.reservations), add_reservation)
    if expires:
        for row in _RUN_OUT(connection, now=book.now):
            add_reservation(row)
    among(_QUOTES, quote_ids, lambda row: book.quotes.update({row.quote_id: QuoteRow(*row)}))
    among(_PRICES, models, add_price)
    if charges_units:
        provisioned.update(row.customer_id for row in _UNITS_DUE(connection, period=period_of(book.ts)))
        customer_ids.update(provisioned)
    among(_PROVISIONS, provisioned, add_provision)
    among(_PAYMENTS, sources, add_payment)
    among(_EVENTS, event_ids, lambda row: book.events.add(row.event_id))
    among(_CREDITS, credit_ids, lambda row: book.credits.update({row.public_id: Entry(*row)}))
    among(_WALLETS_BY_ID, _unknown(customer_ids, book.wallets), add_wallet)
    among(_WALLETS_BY_NAME, _unknown(names, book.customer_by_name), add_wallet)
    among(_WALLETS_BY_ID, _unknown(parent_ids, book.wallets), add_wallet)

    owners_of_keys = {key.customer_id for key in keys}
    owners_of_keys.update(book.customer_by_name[name] for name in names & book.customer_by_name.keys())
    since = dict.fromkeys(owners_of_keys | provisioned, period_of(book.ts))
    for reservation_id in book.reservations if expires else request_ids & book.reservations.keys():
        held = book.reservations[RequestId(reservation_id)]
        if held.covered_period is not None:
            since[held.customer_id] = min(held.covered_period, since.get(held.customer_id, held.covered_period))
    unknown = {each for each, period in since.items() if book.allotments_since.get(each, NEVER) > period}
    if unknown:
        earliest = min(since[each] for each in unknown)
        among(_ALLOTMENTS, unknown, add_allotment, since=earliest)
        book.allotments_since.update(dict.fromkeys(unknown, earliest))
    members = {each for each in owners_of_keys if made_members or book.wallets[each].cap is not None}
    for member in _unknown(members, book.drawn):
        book.drawn[member] = {}
        among(_DRAWN, [member], add_drawn, since=int(book.ts // DAY_S) - 31)
    among(_TRANSFERS, transfer_ids, lambda row: book.transfers.update({row.transfer_id: TransferRow(*row)}))
    if closing:
        among(_STATEMENTS, closing, add_statement)
        for customer_id in closing:
            unbilled = book.unbilled.setdefault(CustomerId(customer_id), Unbilled(None, {}))
            after = 0 if unbilled.last is None else unbilled.last.to_seq
            for row in _SUMS(connection, customer_id=customer_id, after=after):
                unbilled.sums[row.kind] = int(row.total)


def _unknown(wanted: Iterable[_T], known: Container[object]) -> set[_T]:
    """A set less a dictionary's keys would walk through all of the dictionary, which is large where `wanted` is not."""
    return {each for each in wanted if each not in known}


def _load_submissions(
    owners: Mapping[str, CustomerId],
    commands: Sequence[Reserve],
    ts: float,
    among: Callable[..., None],
    add: Callable[[Any], None],
) -> None:
    """Those that the commands may repeat."""
    among(_SUBMISSIONS_BY_ID, {command.request_id for command in commands}, add)
    by_key, by_payload = set(), set()
    for command in commands:
        customer_id = owners.get(command.key_id)
        if customer_id is None:
            continue
        if command.idempotency_key:
            by_key.add((customer_id, command.idempotency_key))
        elif command.dedupe_window_s:
            by_payload.add((customer_id, command.payload_sha256, ts - command.dedupe_window_s))
    among(_SUBMISSIONS_BY_KEY, by_key, add)
    among(_BY_PAYLOAD, by_payload, add, examined=MAX_EXAMINED_PER_PAYLOAD)
