"""What a payment, as it was seen at the provider, means for the balance: a pure function.

Events are hints. Whatever the order in which they come, what counts is the payment as it stands, and the difference
between what it should have moved and what it has moved already.
"""

from dataclasses import dataclass
from typing import Literal

from billing.payments.commands import Movement, Topup, TopupState

SessionStatus = Literal["", "open", "complete", "expired"]
CURRENCY = "usd"


@dataclass(frozen=True, slots=True)
class PaymentSeen:
    """A payment at one moment. Amounts are whole cents."""

    session_id: str = ""
    session_status: SessionStatus = ""
    payment_status: str = ""
    """The session's: `paid`, `unpaid` or `no_payment_required`."""
    payment_intent: str = ""
    intent_status: str = ""
    amount_received: int = 0
    subtotal: int | None = None
    """Before tax, where a session says it."""
    currency: str = CURRENCY
    livemode: bool = False
    refunded: int = 0
    """Of all refunds that have not failed, together."""
    withdrawn: int = 0
    """What disputes took less what they gave back."""
    decline: str = ""
    """Why the last attempt to pay failed."""
    payment_method: str = ""
    movements: tuple[Movement, ...] = ()
    """What it moved in the provider's books."""


@dataclass(frozen=True, slots=True)
class Verdict:
    state: TopupState
    granted_cents: int
    reversed_cents: int
    problem: str


def judge(topup: Topup, seen: PaymentSeen, livemode: bool) -> Verdict:
    """Where the top-up stands. Never more is granted than was asked for, nor more reversed than was granted.

    A payment that succeeded after its page had expired counts all the same: the money has come.
    """
    if seen.intent_status == "succeeded":
        wrong = _wrong_payment(topup, seen, livemode)
        if wrong:
            return Verdict("refused", 0, 0, wrong)
        return Verdict("paid", topup.amount_cents, min(topup.amount_cents, seen.refunded + max(0, seen.withdrawn)), "")
    if seen.payment_status == "no_payment_required":
        return Verdict("refused", 0, 0, "the session asked for no payment")
    if seen.intent_status == "processing":
        return Verdict("processing", 0, 0, "")
    if seen.session_status == "expired":
        return Verdict("expired", 0, 0, "")
    if seen.session_status == "complete" or (topup.kind == "auto" and seen.intent_status):
        return Verdict("failed", 0, 0, seen.decline or seen.intent_status)
    return Verdict(topup.state, 0, 0, seen.decline)


def _wrong_payment(topup: Topup, seen: PaymentSeen, livemode: bool) -> str:
    """Why money that came is not this top-up's; empty when it is. Tax on top of the amount is not ours to credit."""
    if seen.currency != CURRENCY:
        return f"paid in {seen.currency}, not in {CURRENCY}"
    if seen.livemode != livemode:
        return "paid in test mode" if livemode else "paid in live mode"
    before_tax = seen.amount_received if seen.subtotal is None else seen.subtotal
    if before_tax != topup.amount_cents or seen.amount_received < topup.amount_cents:
        return f"{seen.amount_received} cents were paid where {topup.amount_cents} were asked for"
    return ""
