"""The request log: what a customer's requests were and cost, newest first, in pages both ways or as CSV."""

from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response
from pydantic import AfterValidator

from billing.commands import CustomerId
from billing.errors import UnknownCursor
from billing.money import usd
from billing.request_log import RequestFilter, RequestPage, RequestRecord, RequestState
from serve_app.context import Caller, Parts, Services
from serve_app.csv_answers import CSV, Cell, WantsCsv, csv_answer
from serve_app.errors import InvalidRequest, NotFound
from serve_app.usage_schemas import LoggedRequest, LoggedRequests

DEFAULT_LIMIT, MAX_LIMIT = 50, 200
MAX_CSV_ROWS = 100_000
CSV_PART = 1_000

router = APIRouter(tags=["usage"])


def _in_utc(moment: datetime) -> datetime:
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


Moment = Annotated[datetime, AfterValidator(_in_utc)]
Since = Annotated[
    Moment | None, Query(description="From then on: POSIX seconds, or ISO 8601, in UTC if it names no zone")
]
Until = Annotated[Moment | None, Query(description="Before then")]


@dataclass(frozen=True, slots=True)
class Where:
    """The filters of the query."""

    since: Since = None
    until: Until = None
    model: str | None = None
    key: Annotated[str | None, Query(description="key_...")] = None
    state: RequestState | None = None
    min_cost_mils: Annotated[int | None, Query(ge=0, lt=2**53)] = None
    max_cost_mils: Annotated[int | None, Query(ge=0, lt=2**53)] = None

    @property
    def filter(self) -> RequestFilter:
        return RequestFilter(
            since=None if self.since is None else self.since.timestamp(),
            until=None if self.until is None else self.until.timestamp(),
            model=self.model,
            key_id=self.key,
            state=self.state,
            min_cost_mils=self.min_cost_mils,
            max_cost_mils=self.max_cost_mils,
        )


@router.get("/v1/requests", response_model=LoggedRequests, responses=CSV)
async def list_requests(
    parts: Parts,
    caller: Caller,
    where: Annotated[Where, Depends()],
    as_csv: WantsCsv,
    limit: Annotated[
        int | None, Query(ge=1, description=f"Rows, {DEFAULT_LIMIT} if not said; above {MAX_LIMIT} means {MAX_LIMIT}")
    ] = None,
    after: Annotated[str | None, Query(description="A request's id: those older than it")] = None,
    before: Annotated[str | None, Query(description="A request's id: those next newer than it")] = None,
) -> LoggedRequests | Response:
    if after is not None and before is not None:
        raise InvalidRequest("before", "is not accepted together with after; send one of them")
    if as_csv:
        rows = min(limit or MAX_CSV_ROWS, MAX_CSV_ROWS)
        if before is not None:
            raise InvalidRequest("before", "is not accepted for CSV, which goes from newer to older; send after")
        first = await _page(parts, caller.customer_id, where.filter, min(rows, CSV_PART), after, None)
        return csv_answer("requests", COLUMNS, _csv_parts(parts, caller.customer_id, where.filter, rows, first))
    page = await _page(parts, caller.customer_id, where.filter, min(limit or DEFAULT_LIMIT, MAX_LIMIT), after, before)
    return LoggedRequests(
        data=[_logged(each) for each in page.requests], next_cursor=page.older, previous_cursor=page.newer
    )


@router.get("/v1/requests/{request_id}")
async def get_request(request_id: str, parts: Parts, caller: Caller) -> LoggedRequest:
    record = await parts.ask(parts.request_log.request, caller.customer_id, request_id)
    if record is None:
        raise NotFound(f"{request_id} is not a request of yours")
    return _logged(record)


async def _page(
    parts: Services, customer_id: CustomerId, where: RequestFilter, limit: int, after: str | None, before: str | None
) -> RequestPage:
    try:
        return await parts.ask(parts.request_log.page, customer_id, where, limit, after=after, before=before)
    except UnknownCursor as error:
        raise InvalidRequest("after" if after is not None else "before", str(error)) from None


async def _csv_parts(
    parts: Services, customer_id: CustomerId, where: RequestFilter, rows: int, page: RequestPage
) -> AsyncIterator[Iterable[Sequence[Cell]]]:
    """Page after page, each asked for once the one before is on its way."""
    while True:
        yield [_row(each) for each in page.requests]
        rows -= len(page.requests)
        if page.older is None or rows <= 0:
            return
        page = await _page(parts, customer_id, where, min(rows, CSV_PART), page.older, None)


COLUMNS = tuple(name for name in LoggedRequest.model_fields if name != "object")


def _row(record: RequestRecord) -> Sequence[Cell]:
    logged = _logged(record)
    return [getattr(logged, name) for name in COLUMNS]


def _logged(record: RequestRecord) -> LoggedRequest:
    return LoggedRequest(
        id=record.request_id,
        model=record.model,
        key_id=record.key_id,
        key_last4=record.key_last4,
        key_label=record.key_label,
        state=record.state,
        frames=record.frames,
        frames_delivered=record.frames_delivered,
        frames_covered=record.frames_covered,
        reserved_mils=record.amount_mils,
        refunded_mils=record.refunded_mils,
        cost_mils=record.cost_mils,
        cost_usd=usd(record.cost_mils),
        reason=record.reason,
        created=record.created_at,
        settled=record.settled_at,
        detail=record.detail,
    )
