"""Rollouts after their request: ask about one, list those that were queued, cancel one, read its delivery log."""

import asyncio
import re
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request

from billing.commands import RequestId
from billing.reader import KeyRecord
from deployments.errors import KeyNotAllowed
from deployments.job_store import Filters, Job
from serve_app.context import Caller, Parts, Services, authenticate, base_url
from serve_app.envelopes import PREFIX, rollout_id
from serve_app.errors import InvalidRequest, NotFound
from serve_app.schemas import Deliveries, DeliveryAttempt, RolloutEnvelope, RolloutList, WebhookDelivery

MAX_PAGE = 100
_ROLLOUT_ID = re.compile(rf"{PREFIX}[0-9a-f]{{32}}")

router = APIRouter(tags=["rollouts"], dependencies=[Depends(authenticate)])


@router.get("/v1/rollouts", response_model_exclude_none=True)
async def list_rollouts(
    parts: Parts,
    caller: Caller,
    limit: Annotated[int, Query(ge=1, description=f"At most {MAX_PAGE}; more means {MAX_PAGE}")] = 20,
    after: Annotated[str | None, Query(description="The rollout that the page follows: older ones")] = None,
    before: Annotated[str | None, Query(description="The rollout that the page precedes: newer ones")] = None,
    status: Literal["queued", "running", "succeeded", "failed", "canceled"] | None = None,
    model: str | None = None,
    created_from: Annotated[float | None, Query(description="POSIX seconds, included")] = None,
    created_until: Annotated[float | None, Query(description="POSIX seconds, not included")] = None,
) -> RolloutList:
    """The caller's rollouts of mode=async, newest first."""
    if after is not None and before is not None:
        raise InvalidRequest("before", "is not taken together with after; one of the two is accepted")
    limit = min(limit, MAX_PAGE)
    found = await parts.ask(
        parts.jobs.jobs.store.page,
        caller.customer_id,
        Filters(status, model, created_from, created_until),
        limit + 1,
        older_than=None if after is None else _cursor("after", after),
        newer_than=None if before is None else _cursor("before", before),
    )
    page = found[:limit] if before is None else found[-limit:]
    return RolloutList(
        data=[parts.envelopes.of_job(job) for job in page],
        first_id=rollout_id(page[0].request_id) if page else None,
        last_id=rollout_id(page[-1].request_id) if page else None,
        has_more=len(found) > limit,
    )


@router.get("/v1/rollouts/{rollout_id}", response_model_exclude_none=True)
async def get_rollout(rollout_id: str, request: Request, parts: Parts, caller: Caller) -> RolloutEnvelope:
    """A rollout of the caller's, in whatever state it is."""
    return await _find(rollout_id, request, parts, caller)


@router.delete("/v1/rollouts/{rollout_id}", response_model_exclude_none=True)
async def cancel_rollout(rollout_id: str, request: Request, parts: Parts, caller: Caller) -> RolloutEnvelope:
    """Cancel a rollout that has not ended, and refund what had not run. One that has ended stays as it is."""
    if caller.terms.scope != "spend":
        raise KeyNotAllowed("this key may read and not cancel")
    job = await _job(rollout_id, parts, caller)
    if job is None:
        return await _find(rollout_id, request, parts, caller)
    return parts.envelopes.of_job(await parts.jobs.jobs.cancel(job))


@router.get("/v1/rollouts/{rollout_id}/deliveries", response_model_exclude_none=True)
async def list_deliveries(rollout_id: str, parts: Parts, caller: Caller) -> Deliveries:
    """What became of the webhook that was asked for, attempt by attempt."""
    job = await _job(rollout_id, parts, caller)
    if job is None:
        raise NotFound(f"rollout_id: you have no rollout {rollout_id} of mode=async")
    return Deliveries(
        data=[
            WebhookDelivery(
                id=delivery.delivery_id,
                url=delivery.url,
                state=delivery.state,
                created=delivery.created_at,
                next_attempt_at=delivery.next_attempt_at if delivery.state == "pending" else None,
                attempts=[
                    DeliveryAttempt(
                        attempt=attempt.attempt,
                        ts=attempt.at,
                        took_ms=round(attempt.took_ms, 1),
                        status=attempt.status,
                        problem=attempt.problem or None,
                    )
                    for attempt in attempts
                ],
            )
            for delivery, attempts in await parts.ask(parts.jobs.outbox.log, job.request_id)
        ]
    )


async def _find(name: str, request: Request, parts: Services, caller: KeyRecord) -> RolloutEnvelope:
    job = await _job(name, parts, caller)
    if job is not None:
        return parts.envelopes.of_job(job)
    request_id = _request_id(name)
    reservation = None if request_id is None else await parts.ask(parts.reader.reservation, request_id)
    if request_id is not None and reservation is not None and reservation.customer_id == caller.customer_id:
        result = await asyncio.to_thread(parts.results.linked, request_id)
        if result is not None:
            return parts.envelopes.of_result(result, result.seed, None, base_url(request, parts))
    raise NotFound(f"rollout_id: you have no rollout {name}, or it is no longer stored")


async def _job(name: str, parts: Services, caller: KeyRecord) -> Job | None:
    request_id = _request_id(name)
    job = None if request_id is None else await parts.ask(parts.jobs.jobs.store.get, request_id)
    return job if job is not None and job.customer_id == caller.customer_id else None


def _request_id(name: str) -> RequestId | None:
    return RequestId(f"req_{name.removeprefix(PREFIX)}") if _ROLLOUT_ID.fullmatch(name) else None


def _cursor(field: str, name: str) -> RequestId:
    request_id = _request_id(name)
    if request_id is None:
        raise InvalidRequest(field, "is not a rollout's id; rollout_ and 32 hex digits are accepted")
    return request_id
