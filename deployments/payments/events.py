"""What a verified webhook says: its signature checked against every secret, and the few names taken out of it."""

import json
from typing import Any

import stripe

from billing.payments.commands import EventHint

MAX_EVENT_BYTES = 512 * 1024
"""Stripe's own are tens of kilobytes."""
TOLERANCE_S = 300
MAX_NAME_CHARS = 255

TOPUP_TYPES = (
    "checkout.session.completed",
    "checkout.session.async_payment_succeeded",
    "checkout.session.async_payment_failed",
    "checkout.session.expired",
    "payment_intent.succeeded",
    "payment_intent.payment_failed",
    "payment_intent.requires_action",
    "payment_intent.processing",
    "charge.refunded",
    "refund.created",
    "refund.updated",
    "refund.failed",
    "charge.dispute.created",
    "charge.dispute.funds_withdrawn",
    "charge.dispute.updated",
    "charge.dispute.closed",
    "charge.dispute.funds_reinstated",
    "radar.early_fraud_warning.created",
)
CUSTOMER_TYPES = ("payment_method.detached", "payment_method.automatically_updated", "customer.deleted")
INVOICE_TYPES = (
    "invoice.finalized",
    "invoice.paid",
    "invoice.payment_failed",
    "invoice.overdue",
    "invoice.voided",
    "invoice.marked_uncollectible",
)


class NotAnEvent(Exception):
    """Why the body is no event of Stripe's, for whoever sent it."""


def verified(body: bytes, signature: str, secrets: tuple[str, ...], now: float) -> EventHint:
    """The event, if one of the secrets signed it and its time is within the tolerance on both sides.

    Raises:
        NotAnEvent: anything else, whatever the bytes are.
    """
    if len(body) > MAX_EVENT_BYTES:
        raise NotAnEvent(f"the body is larger than {MAX_EVENT_BYTES} bytes")
    try:
        text = body.decode()
    except UnicodeDecodeError:
        raise NotAnEvent("the body is not UTF-8") from None
    if not any(_signed(text, signature, secret) for secret in secrets):
        raise NotAnEvent("Stripe-Signature: no signature matches")
    skew_s = now - _timestamp(signature)
    if abs(skew_s) > TOLERANCE_S:
        raise NotAnEvent(f"Stripe-Signature: its time is {skew_s:.0f} s off, at most {TOLERANCE_S} are accepted")
    try:
        event = json.loads(text)
    except (ValueError, RecursionError):
        raise NotAnEvent("the body is not JSON") from None
    return hint_of(event)


def hint_of(event: Any) -> EventHint:
    """What an event is about, whichever API version shaped it.

    Raises:
        NotAnEvent: it is not an event with an id, a type, a time and an object.
    """
    subject = _object(_object(event, "the body").get("data"), "data").get("object")
    subject = _object(subject, "data.object")
    kind = _name(subject.get("object"))
    object_id = _name(subject.get("id"))
    created = event.get("created")
    if type(created) not in (int, float) or not 0 <= created < 2**40:
        raise NotAnEvent("created: must be a time")
    hint = EventHint(
        event_id=_name(event.get("id")),
        type=_name(event.get("type")),
        created=float(created),
        object_id=object_id,
        topup_id=_name(_metadata(subject).get("topup_id")),
        session_id=object_id if kind == "checkout.session" else "",
        payment_intent=object_id if kind == "payment_intent" else _name(subject.get("payment_intent")),
        invoice_id=object_id if kind == "invoice" else "",
        provider_customer=object_id if kind == "customer" else _name(subject.get("customer")),
    )
    if not hint.event_id or not hint.type:
        raise NotAnEvent("id and type: must be names")
    return hint


def _signed(text: str, signature: str, secret: str) -> bool:
    try:
        return bool(stripe.WebhookSignature.verify_header(text, signature, secret, tolerance=None))
    except (stripe.SignatureVerificationError, ValueError, TypeError):
        return False


def _timestamp(signature: str) -> int:
    """Of a header that was verified."""
    return int(next(part[2:] for part in signature.split(",") if part.startswith("t=")))


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise NotAnEvent(f"{name}: must be an object")
    return value


def _metadata(subject: dict[str, Any]) -> dict[str, Any]:
    metadata = subject.get("metadata")
    return metadata if isinstance(metadata, dict) else {}


def _name(value: Any) -> str:
    """An id, or an expanded object's; empty for anything else."""
    if isinstance(value, dict):
        value = value.get("id")
    if isinstance(value, str) and len(value) <= MAX_NAME_CHARS and value.isascii() and value.isprintable():
        return value
    return ""
