"""`dryRun=true` on a paid route: what the request would cost, promised for a while. Nothing runs or is reserved."""

import re
from typing import Annotated

from fastapi import Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from billing.money import usd
from billing.prices import NANO_PER_USD, Line
from billing.reader import KeyRecord
from deployments.errors import KeyNotAllowed
from deployments.messages import RolloutRequest
from deployments.scheduler import SchedulerStatus
from serve_app.context import Services
from serve_app.envelopes import PROVIDER
from serve_app.errors import InvalidRequest
from serve_app.routes.status import queue_status
from serve_app.schemas import Estimate, EstimateComponent

QUOTE_HEADER = "X-DreamEngine-Quote-Id"
MICROS_PER_MIL = 100

_QUOTE_ID = re.compile(r"quo_[0-9a-f]{32}")

DryRun = Annotated[
    bool,
    Query(alias="dryRun", description="Answer with a binding quote instead: validates, runs and reserves nothing"),
]


def presented_quote(request: Request) -> str:
    """The quote that a paid request names in `X-DreamEngine-Quote-Id`, or empty."""
    quote_id = request.headers.get(QUOTE_HEADER, "")
    if quote_id and _QUOTE_ID.fullmatch(quote_id) is None:
        raise InvalidRequest(
            QUOTE_HEADER, "is not a quote's id; send the quote_id of a dry run, quo_ and 32 hex digits"
        )
    return quote_id


async def estimate(parts: Services, caller: KeyRecord, rollout: RolloutRequest) -> Estimate:
    """The price of a request that has passed every check of the real one, quoted. A key that may only read may ask."""
    if rollout.quote_id:
        raise InvalidRequest(QUOTE_HEADER, "is not taken with dryRun=true, which asks for a new quote")
    if caller.terms.models and rollout.model not in caller.terms.models:
        raise KeyNotAllowed(f"this key may not use {rollout.model}")
    model = parts.models[rollout.model]
    assert rollout.price is not None
    quoted = await parts.ingress.quote(rollout)
    assert quoted.amount_mils == rollout.price.total_mils
    return Estimate(
        model=rollout.model,
        provider=PROVIDER,
        cost_mils=quoted.amount_mils,
        total_cost_micros=quoted.amount_mils * MICROS_PER_MIL,
        cost_usd=usd(quoted.amount_mils),
        components=[_component(line) for line in rollout.price.lines],
        affordable_rollouts=max(0, quoted.balance_mils) // quoted.amount_mils,
        expected_wait_s=expected_wait_s(await queue_status(model), len(rollout.candidates)),
        quote_id=quoted.quote_id,
        expires_at=quoted.expires_at,
    )


def expected_wait_s(queue: SchedulerStatus | None, num_rows: int) -> float | None:
    """Until `num_rows` more of a customer who has nothing waiting would begin; None while no rate is known."""
    if queue is None or not queue.replicas:
        return None
    if not queue.queued_rows and (not queue.running_rows or queue.running_rows + num_rows <= queue.capacity_rows):
        return 0.0
    return None if queue.wait_s is None else round(queue.wait_s, 3)


def as_json(answer: BaseModel) -> JSONResponse:
    """For a route whose other answers are not JSON."""
    return JSONResponse(answer.model_dump(mode="json"))


def _component(line: Line) -> EstimateComponent:
    quantity = float(line.quantity)
    return EstimateComponent(
        metric=line.rate.metric,
        quantity=quantity,
        billable_quantity=quantity,
        unit_price=float(line.rate.nano_usd * line.factor / (line.rate.per * NANO_PER_USD)),
        total_cost=usd(line.mils),
    )
