"""Paying: a page for a top-up, what Stripe sends, automatic top-ups, and the pages a customer comes back to."""

import asyncio
import contextlib
import html
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Request
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, ConfigDict, Field

from billing.money import MILS_PER_CENT, Mils, dollars
from billing.payments.commands import MAX_TOPUP_CENTS, MIN_TOPUP_CENTS, AutoTopup, Topup
from billing.reader import KeyRecord
from deployments.payments.errors import PaymentError
from deployments.payments.events import MAX_EVENT_BYTES, NotAnEvent
from serve_app.context import Caller, Parts
from serve_app.errors import BadSignature, BodyTooLarge, BodyTooSlow, Forbidden, InvalidRequest, NotFound, RateLimited

MAX_IDEMPOTENCY_KEY = 256
WEBHOOKS_PER_S, WEBHOOK_BURST = 100.0, 1_000
"""Events that Stripe signed."""
FORGERIES_PER_S, FORGERY_BURST = 1.0, 20
"""What a peer may send unsigned before it is told to wait; nothing of it counts against Stripe."""
RETURNS_PER_S, RETURN_BURST = 1.0, 5
"""Looks at Stripe that coming back from one page may cause."""
MAX_CONSENT_CHARS = 500

router = APIRouter(prefix="/v1/billing", tags=["payments"])
public = APIRouter(prefix="/v1/billing", tags=["payments"])


class TopupRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    amount_cents: int = Field(ge=MIN_TOPUP_CENTS, le=MAX_TOPUP_CENTS, description="US cents, 500 to 1,000,000")


class TopupPage(BaseModel):
    session_id: str
    url: str
    amount_cents: int
    customer_id: str
    topup_id: str
    state: str
    expires_at: int


class AutoTopupRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    enabled: bool
    threshold_cents: int = Field(1_000, ge=0, le=MAX_TOPUP_CENTS, description="Charge when the balance is below this")
    amount_cents: int = Field(2_500, ge=MIN_TOPUP_CENTS, le=MAX_TOPUP_CENTS, description="Charge multiples of this")
    daily_cap_cents: int = Field(10_000, ge=MIN_TOPUP_CENTS, le=MAX_TOPUP_CENTS)
    monthly_cap_cents: int = Field(100_000, ge=MIN_TOPUP_CENTS, le=31 * MAX_TOPUP_CENTS)
    consent: Literal[True] | None = Field(None, description="true: charge my saved card without asking, as set here")


class LastAutoTopup(BaseModel):
    topup_id: str
    state: str
    amount_cents: int
    reason: str
    problem: str
    created: float


class AutoTopupTerms(BaseModel):
    customer_id: str
    enabled: bool
    threshold_cents: int
    amount_cents: int
    daily_cap_cents: int
    monthly_cap_cents: int
    consent: str = Field(description="The words that were agreed to")
    consent_at: float | None
    has_card: bool = Field(description="Whether there is a card to charge; the next top-up saves one if not")
    declines: int
    retry_at: float | None
    problem: str
    last: LastAutoTopup | None


@router.post("/topup")
async def create_topup(
    request: Request,
    parts: Parts,
    caller: Caller,
    body: TopupRequest,
    idempotency_key: Annotated[str | None, Header(description="The same key answers with the same page")] = None,
) -> TopupPage:
    _may_pay(caller)
    key = idempotency_key or ""
    if len(key) > MAX_IDEMPOTENCY_KEY or not key.isascii() or not key.isprintable():
        raise InvalidRequest("Idempotency-Key", f"is not 1 to {MAX_IDEMPOTENCY_KEY} printable ASCII characters")
    base = parts.args.public_url.rstrip("/") or str(request.base_url).rstrip("/")
    topup = await parts.payments.topup(caller.customer_id, body.amount_cents, base, key)
    return TopupPage(
        session_id=topup.session_id,
        url=topup.url,
        amount_cents=topup.amount_cents,
        customer_id=topup.customer_id,
        topup_id=topup.topup_id,
        state=topup.state,
        expires_at=int(topup.expires_at),
    )


@router.get("/auto-topup")
async def get_auto_topup(parts: Parts, caller: Caller) -> AutoTopupTerms:
    return await _terms(parts, caller)


@router.put("/auto-topup")
async def put_auto_topup(parts: Parts, caller: Caller, body: AutoTopupRequest) -> AutoTopupTerms:
    """Switched on only with `consent`; whatever went wrong before is then forgotten."""
    _may_pay(caller)
    if body.enabled and body.consent is not True:
        raise InvalidRequest("consent", "must be true to be charged without being asked")
    if not body.amount_cents <= body.daily_cap_cents <= body.monthly_cap_cents:
        raise InvalidRequest("daily_cap_cents", "must be at least amount_cents and at most monthly_cap_cents")
    consent = (
        f"charge multiples of ${body.amount_cents / 100:.2f} when the balance is below"
        f" ${body.threshold_cents / 100:.2f}, at most ${body.daily_cap_cents / 100:.2f} a day and"
        f" ${body.monthly_cap_cents / 100:.2f} a month"
    )
    terms = AutoTopup(
        enabled=body.enabled,
        threshold_mils=Mils(body.threshold_cents * MILS_PER_CENT),
        amount_cents=body.amount_cents,
        daily_cap_cents=body.daily_cap_cents,
        monthly_cap_cents=body.monthly_cap_cents,
        consent=f"{consent} (key {caller.key_id})" if body.enabled else "",
    )
    await parts.payments.set_auto_topup(caller.customer_id, terms)
    return await _terms(parts, caller)


@public.post("/webhook")
async def webhook(request: Request, parts: Parts) -> dict[str, bool]:
    """For Stripe alone: its signature is the authentication. What it sends twice counts once."""
    body = await _body(request, parts.args.limits.body_timeout_s)
    try:
        hint = parts.payments.verified(body, request.headers.get("stripe-signature", ""))
    except NotAnEvent as error:
        peer = request.client.host if request.client is not None else ""
        retry_after_s = parts.buckets.take(f"forged webhooks of {peer}", FORGERIES_PER_S, FORGERY_BURST)
        if retry_after_s is not None:
            raise RateLimited(retry_after_s) from None
        raise BadSignature(str(error)) from None
    retry_after_s = parts.buckets.take("stripe webhook", WEBHOOKS_PER_S, WEBHOOK_BURST)
    if retry_after_s is not None:
        raise RateLimited(retry_after_s)
    await parts.payments.receive([hint])
    return {"received": True}


@public.get("/topup/{topup_id}/done", response_class=HTMLResponse)
async def topup_done(parts: Parts, topup_id: str) -> HTMLResponse:
    """Where the payment page sends its customer: says how the payment stands, and does not wait for the webhook."""
    topup = await _known(parts, topup_id)
    if topup.state not in ("paid", "failed", "expired", "refused") and (
        parts.buckets.take(f"return {topup_id}", RETURNS_PER_S, RETURN_BURST) is None
    ):
        with contextlib.suppress(PaymentError):  # the page says that it is not known yet; webhook and sweeps go on
            topup = await parts.payments.look(topup_id)
    amount = dollars(Mils(topup.amount_cents * MILS_PER_CENT))
    text = {
        "paid": f"Thank you: {amount} of credit is in your balance.",
        "processing": f"Your bank is working on it; {amount} of credit follows when it has paid.",
        "failed": "The payment failed; nothing was charged.",
        "expired": "The page expired; nothing was charged.",
        "refused": "The payment is not what was asked for; write to the operator, who sees it too.",
    }.get(topup.state, "The payment is not known yet; your balance shows it as soon as it is.")
    return _page(text)


@public.get("/topup/{topup_id}/canceled", response_class=HTMLResponse)
async def topup_canceled(parts: Parts, topup_id: str) -> HTMLResponse:
    await _known(parts, topup_id)
    return _page("Nothing was charged. The payment page stays open for a while, should you change your mind.")


async def _known(parts: Parts, topup_id: str) -> Topup:
    topup = await parts.ask(parts.payments.reader.topup, topup_id)
    if topup is None:
        raise NotFound("there is no such top-up")
    return topup


async def _body(request: Request, timeout_s: float) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                body += part
                if len(body) > MAX_EVENT_BYTES:
                    raise BodyTooLarge(MAX_EVENT_BYTES)
    except TimeoutError:
        raise BodyTooSlow(timeout_s) from None
    return bytes(body)


def _may_pay(caller: KeyRecord) -> None:
    if caller.terms.scope != "spend":
        raise Forbidden("this key may read and not spend")


async def _terms(parts: Parts, caller: KeyRecord) -> AutoTopupTerms:
    reader = parts.payments.reader
    terms = await parts.ask(reader.auto_topup, caller.customer_id)
    customer = await parts.ask(reader.customer, caller.customer_id)
    last = await parts.ask(reader.last_auto_topup, caller.customer_id)
    shown = terms or AutoTopup(False, Mils(0), MIN_TOPUP_CENTS, MIN_TOPUP_CENTS, MIN_TOPUP_CENTS)
    return AutoTopupTerms(
        customer_id=caller.customer_id,
        enabled=shown.enabled,
        threshold_cents=shown.threshold_mils // MILS_PER_CENT,
        amount_cents=shown.amount_cents,
        daily_cap_cents=shown.daily_cap_cents,
        monthly_cap_cents=shown.monthly_cap_cents,
        consent=shown.consent,
        consent_at=shown.consent_at,
        has_card=customer is not None and customer.payment_method != "",
        declines=shown.declines,
        retry_at=shown.retry_at or None,
        problem=shown.problem,
        last=None
        if last is None
        else LastAutoTopup(
            topup_id=last.topup_id,
            state=last.state,
            amount_cents=last.amount_cents,
            reason=last.reason,
            problem=last.problem,
            created=last.created_at,
        ),
    )


def _page(text: str) -> HTMLResponse:
    return HTMLResponse(
        "<!doctype html><meta charset=utf-8><title>Top-up</title>"
        f"<p style='font-family:system-ui;max-width:32rem;margin:4rem auto'>{html.escape(text)}</p>",
        headers={
            "Cache-Control": "no-store",
            "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
        },
    )
