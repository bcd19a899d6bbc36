"""What a customer used, month by month and day by day, and what its keys' budgets warn of."""

import time
from collections.abc import AsyncIterator, Iterable, Sequence
from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Query, Response

from billing.commands import CustomerId
from billing.errors import TooManyRows, UnknownCursor
from billing.money import Mils, dollars, usd
from billing.statements import Month, Statement
from billing.usage import BudgetWarning, Dimension, UsageRow
from serve_app.context import Caller, Parts, Services
from serve_app.csv_answers import CSV, Cell, WantsCsv, csv_answer, one_part
from serve_app.errors import InvalidRequest, NotFound
from serve_app.routes.requests import CSV_PART, Since, Until
from serve_app.usage_schemas import (
    BudgetEvent,
    BudgetEvents,
    ModelUnits,
    MonthStatement,
    MonthStatements,
    ProvisionedUnits,
    Usage,
    UsageLine,
)

DAY_S = 86_400
DEFAULT_USAGE_S = 30 * DAY_S
MAX_USAGE_S = 366 * DAY_S
MAX_MONTHS = 120
MAX_EVENTS = 200
EVERY_DIMENSION: tuple[Dimension, ...] = ("day", "model", "key")
ENTRY_COLUMNS = ("seq", "id", "ts", "kind", "amount_mils", "balance_after_mils", "detail")

router = APIRouter(prefix="/v1/billing", tags=["usage"])


@router.get("/usage", response_model=Usage, responses=CSV)
async def get_usage(
    parts: Parts,
    caller: Caller,
    as_csv: WantsCsv,
    since: Since = None,
    until: Until = None,
    group_by: Annotated[
        list[Dimension], Query(description="What is told apart; repeat the name for more than one")
    ] = list(EVERY_DIMENSION),  # noqa: B006 - FastAPI copies it
) -> Usage | Response:
    """Requests made in that time, 30 days back from now if not said, and what they cost as things stand."""
    to = time.time() if until is None else until.timestamp()
    start = to - DEFAULT_USAGE_S if since is None else since.timestamp()
    if not 0 <= to - start <= MAX_USAGE_S:
        raise InvalidRequest("since", "is not 0 to 366 days before until")
    try:
        rows = await parts.ask(parts.usage.usage, caller.customer_id, start, to, group_by)
    except TooManyRows as error:
        raise InvalidRequest("group_by", f"{error}; choose fewer dimensions or a shorter time") from None
    lines = [_usage_line(row) for row in rows]
    if as_csv:
        columns = tuple(UsageLine.model_fields)
        return csv_answer("usage", columns, one_part([getattr(line, name) for name in columns] for line in lines))
    cost = Mils(sum(row.cost_mils for row in rows))
    return Usage(
        customer_id=caller.customer_id,
        since=start,
        until=to,
        group_by=[each for each in EVERY_DIMENSION if each in group_by],
        data=lines,
        requests=sum(row.requests for row in rows),
        frames=sum(row.frames for row in rows),
        frames_delivered=sum(row.frames_delivered for row in rows),
        cost_mils=cost,
        cost_usd=usd(cost),
    )


@router.get("/statements", response_model=MonthStatements, responses=CSV)
async def list_statements(
    parts: Parts,
    caller: Caller,
    as_csv: WantsCsv,
    limit: Annotated[int, Query(ge=1, description=f"Months; above {MAX_MONTHS} means {MAX_MONTHS}")] = 12,
    before: Annotated[str | None, Query(description="A month such as 2027-01: those before it")] = None,
) -> MonthStatements | Response:
    """Months of UTC, newest first; the current one as it stands."""
    now = time.time()
    newest = Month.of(now) if before is None else min(Month.of(now), _month(before, "before").previous)
    months = min(limit, MAX_MONTHS)
    found = await parts.ask(parts.statements.statements, caller.customer_id, newest, months + 1)
    data = [_month_statement(each, now) for each in found[:months]]
    if as_csv:
        columns = tuple(MonthStatement.model_fields)
        return csv_answer("statements", columns, one_part([getattr(each, name) for name in columns] for each in data))
    return MonthStatements(
        customer_id=caller.customer_id, data=data, next_cursor=data[-1].month if len(found) > months else None
    )


@router.get("/statements/{month}", response_model=MonthStatement, responses=CSV)
async def get_statement(month: str, parts: Parts, caller: Caller, as_csv: WantsCsv) -> MonthStatement | Response:
    """One month; as CSV its entries, oldest first."""
    now, wanted = time.time(), _month(month, "month")
    found = []
    if wanted <= Month.of(now):
        found = await parts.ask(parts.statements.statements, caller.customer_id, wanted, 1)
    if not found:
        raise NotFound(f"there is no statement of {wanted}: the wallet was opened later, or it is yet to come")
    if as_csv:
        return csv_answer(f"statement-{wanted}", ENTRY_COLUMNS, _entries(parts, caller.customer_id, found[0]))
    return _month_statement(found[0], now)


@router.get("/units")
async def list_units(parts: Parts, caller: Caller) -> ProvisionedUnits:
    """This month's provisioned units, by model, and how many of the frames that they pay for are left."""
    found = await parts.ask(parts.units.now, time.time(), caller.customer_id)
    return ProvisionedUnits(
        customer_id=caller.customer_id,
        data=[
            ModelUnits(
                model=each.terms.model,
                month=each.period,
                units=each.terms.units,
                unit_mils=each.terms.unit_mils,
                unit_frames=each.terms.unit_frames,
                charged=each.charged_at,
                frames=each.frames,
                frames_used=each.frames_used,
                frames_left=each.frames_left,
            )
            for each in found
        ],
    )


@router.get("/events")
async def list_events(
    parts: Parts,
    caller: Caller,
    limit: Annotated[int, Query(ge=1, description=f"Rows, newest first; above {MAX_EVENTS} means {MAX_EVENTS}")] = 50,
    after: Annotated[str | None, Query(description="An event's id: those older than it")] = None,
) -> BudgetEvents:
    """A key's budget has come to 75 or 90 per cent: one event for each budget, period, limit and level."""
    rows = min(limit, MAX_EVENTS)
    try:
        found = await parts.ask(parts.usage.warnings, caller.customer_id, rows + 1, after)
    except UnknownCursor as error:
        raise InvalidRequest("after", str(error)) from None
    data = [_budget_event(each) for each in found[:rows]]
    return BudgetEvents(
        customer_id=caller.customer_id, data=data, next_cursor=data[-1].id if len(found) > rows else None
    )


async def _entries(
    parts: Services, customer_id: CustomerId, statement: Statement
) -> AsyncIterator[Iterable[Sequence[Cell]]]:
    seq = statement.from_seq
    while seq < statement.to_seq:
        entries = await parts.ask(parts.statements.entries, customer_id, seq, statement.to_seq, CSV_PART)
        yield [
            (each.seq, each.public_id, each.ts, each.kind, each.amount_mils, each.balance_after_mils, each.detail)
            for each in entries
        ]
        seq = entries[-1].seq


def _month(text: str, field: str) -> Month:
    try:
        return Month.parse(text)
    except ValueError as error:
        raise InvalidRequest(field, str(error)) from None


def _usage_line(row: UsageRow) -> UsageLine:
    return UsageLine(
        day=None if row.day is None else datetime.fromtimestamp(row.day * DAY_S, UTC).date().isoformat(),
        model=row.model,
        key_id=row.key_id,
        requests=row.requests,
        frames=row.frames,
        frames_delivered=row.frames_delivered,
        reserved_mils=row.reserved_mils,
        refunded_mils=row.refunded_mils,
        cost_mils=row.cost_mils,
        cost_usd=usd(row.cost_mils),
    )


def _month_statement(statement: Statement, now: float) -> MonthStatement:
    ends_at = statement.month.following.starts_at
    return MonthStatement(
        month=str(statement.month),
        period_start=statement.month.starts_at,
        period_end=ends_at,
        closed=now >= ends_at,
        from_seq=statement.from_seq,
        to_seq=statement.to_seq,
        entries=statement.num_entries,
        opening_balance_mils=statement.opening_mils,
        credits_mils=statement.credits_mils,
        debits_mils=statement.debits_mils,
        refunds_mils=statement.refunds_mils,
        reversals_mils=statement.reversals_mils,
        transfers_mils=statement.transfers_mils,
        closing_balance_mils=statement.closing_mils,
        opening_balance_usd=usd(statement.opening_mils),
        spent_usd=usd(Mils(-statement.debits_mils - statement.refunds_mils)),
        closing_balance_usd=usd(statement.closing_mils),
    )


def _budget_event(warning: BudgetWarning) -> BudgetEvent:
    return BudgetEvent(
        id=warning.event_id,
        ts=warning.created_at,
        key_id=warning.key_id,
        period=warning.period,
        period_start=warning.starts_day * DAY_S,
        level_percent=warning.level,
        limit_mils=warning.limit_mils,
        spent_mils=warning.spent_mils,
        message=(
            f"{dollars(warning.spent_mils)} of this key's {dollars(warning.limit_mils)} per {warning.period} are spent"
        ),
    )
