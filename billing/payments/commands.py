"""What the ledger can be asked to do about payments. As with every command, sending one again has no second effect.

ReceiveEvents     -> EventsReceived
MarkEvents        -> EventsMarked
OpenTopup         -> TopupOpened | TopupConflict | TooManyTopups | UnknownCustomer
NoteSession       -> TopupNoted
RenumberAttempt   -> TopupNoted
ApplyPayment      -> PaymentApplied | PaymentStale
LinkCustomer      -> CustomerLinked
SetAutoTopup      -> AutoTopupSet | UnknownCustomer
DisarmAutoTopup   -> AutoTopupSet
StartAutoTopup    -> TopupOpened | AutoTopupHeld
SetCursor         -> CursorSet
FileReport        -> ReportFiled
any of them       -> Rejected
"""

from dataclasses import dataclass
from typing import Literal

from billing.commands import Command, Credit, CustomerId, PaymentCommand, PaymentOutcome, Reverse, SetCreditLine
from billing.money import Mils

MIN_TOPUP_CENTS = 500
MAX_TOPUP_CENTS = 1_000_000
MAX_OPEN_TOPUPS = 5
"""Pages that one customer may have open at a time."""
REUSE_MARGIN_S = 600.0
"""A page that is open for less than this is not handed out again."""
MAX_DECLINES = 3
"""In a row; then automatic top-ups are switched off until their owner switches them on again."""
BACK_OFF_S = (3_600.0, 86_400.0)
"""After the first and the second decline."""

TopupKind = Literal["checkout", "auto"]
TopupState = Literal["new", "open", "charging", "processing", "paid", "failed", "expired", "refused"]
"""`new` until a page exists, `charging` while an automatic one is in flight; the last four are final unless money comes
after all."""
EventState = Literal["pending", "applied", "ignored", "unmatched"]


@dataclass(frozen=True, slots=True)
class Topup:
    """One payment that was asked for. The row is there before the provider hears of it."""

    topup_id: str
    customer_id: CustomerId
    kind: TopupKind
    amount_cents: int
    idempotency_key: str
    state: TopupState
    attempt: int
    """Number in the provider's idempotency key; a new one only after the last is known to have come to nothing."""
    session_id: str
    payment_intent: str
    payment_method: str
    """The saved card that an automatic one charges."""
    url: str
    expires_at: float
    revision: int
    """Grows with every observation that is applied; one that was made before another was applied is stale."""
    reason: str
    """Why this amount, of an automatic one."""
    problem: str
    created_at: float
    updated_at: float


@dataclass(frozen=True, slots=True)
class EventHint:
    """What an event says that something happened to. Its payload is not kept: the object is asked for again."""

    event_id: str
    type: str
    created: float
    object_id: str
    topup_id: str = ""
    session_id: str = ""
    payment_intent: str = ""
    invoice_id: str = ""
    provider_customer: str = ""


@dataclass(frozen=True, slots=True)
class ReceiveEvents(PaymentCommand):
    """Put events into the inbox; those that are there already stay as they are."""

    events: tuple[EventHint, ...]
    via: Literal["webhook", "sweep"]


@dataclass(frozen=True, slots=True)
class EventsReceived(PaymentOutcome):
    new: int


@dataclass(frozen=True, slots=True)
class MarkEvents(PaymentCommand):
    """What became of events that have no effect of their own, or when to look at them again."""

    event_ids: tuple[str, ...]
    state: EventState
    problem: str = ""
    due_at: float = 0.0


@dataclass(frozen=True, slots=True)
class EventsMarked(PaymentOutcome):
    marked: int


@dataclass(frozen=True, slots=True)
class OpenTopup(PaymentCommand):
    """A payment page for this amount: a new one, or one of the same amount that is still open."""

    topup_id: str
    customer_id: CustomerId
    amount_cents: int
    idempotency_key: str = ""


@dataclass(frozen=True, slots=True)
class TopupOpened(PaymentOutcome):
    topup: Topup


@dataclass(frozen=True, slots=True)
class TopupConflict(PaymentOutcome):
    """The idempotency key already names a top-up of another amount."""

    topup_id: str
    amount_cents: int


@dataclass(frozen=True, slots=True)
class TooManyTopups(PaymentOutcome):
    open: int
    retry_at: float
    """When the first of them expires."""


@dataclass(frozen=True, slots=True)
class NoteSession(PaymentCommand):
    topup_id: str
    session_id: str
    url: str
    expires_at: float


@dataclass(frozen=True, slots=True)
class RenumberAttempt(PaymentCommand):
    """The attempt `seen` is known to have come to nothing: the next one gets another number."""

    topup_id: str
    seen: int


@dataclass(frozen=True, slots=True)
class TopupNoted(PaymentOutcome):
    topup: Topup


@dataclass(frozen=True, slots=True)
class Movement:
    """Money that moved in the provider's books, fees left out: they are the operator's."""

    movement_id: str
    created: float
    kind: str
    """`charge`, `refund`, `dispute` and so on: its reporting category."""
    amount_cents: int
    """Negative when it left."""


@dataclass(frozen=True, slots=True)
class ApplyPayment(PaymentCommand):
    """Bring the balance to what was seen of a payment, and mark the events that led to it, in one commit."""

    topup_id: str
    revision: int
    """The top-up's when it was read, before the payment was asked for."""
    state: TopupState
    problem: str
    session_id: str = ""
    payment_intent: str = ""
    payment_method: str = ""
    """To charge later, where its owner agreed to that."""
    suspicion: str = ""
    """Why automatic top-ups must stop: a dispute, a warning; empty when there is nothing."""
    event_ids: tuple[str, ...] = ()
    movements: tuple[Movement, ...] = ()
    """In the provider's books: kept beside ours, for the two to be compared day by day."""
    effects: tuple[Credit | Reverse, ...] = ()
    """Both say where the balance should be, so both may be repeated."""

    @property
    def money(self) -> tuple[Command, ...]:
        return self.effects


@dataclass(frozen=True, slots=True)
class PaymentApplied(PaymentOutcome):
    topup: Topup


@dataclass(frozen=True, slots=True)
class PaymentStale(PaymentOutcome):
    """Another observation was applied meanwhile: look again."""

    revision: int


@dataclass(frozen=True, slots=True)
class LinkCustomer(PaymentCommand):
    """The provider's name for a customer; the first one stays."""

    customer_id: CustomerId
    provider_customer: str


@dataclass(frozen=True, slots=True)
class CustomerLinked(PaymentOutcome):
    provider_customer: str


@dataclass(frozen=True, slots=True)
class AutoTopup:
    """What its owner agreed to: below `threshold_mils`, charge multiples of `amount_cents`, at most so much."""

    enabled: bool
    threshold_mils: Mils
    amount_cents: int
    daily_cap_cents: int
    monthly_cap_cents: int
    consent: str = ""
    """The words that were agreed to."""
    consent_at: float | None = None
    declines: int = 0
    retry_at: float = 0.0
    problem: str = ""
    """Why it is off or waits, when that was not its owner's wish."""


@dataclass(frozen=True, slots=True)
class SetAutoTopup(PaymentCommand):
    customer_id: CustomerId
    terms: AutoTopup


@dataclass(frozen=True, slots=True)
class DisarmAutoTopup(PaymentCommand):
    """Off until its owner agrees again. Only `SetAutoTopup` ever switches it on."""

    customer_id: CustomerId
    problem: str
    event_ids: tuple[str, ...] = ()
    forget_method: bool = False


@dataclass(frozen=True, slots=True)
class AutoTopupSet(PaymentOutcome):
    terms: AutoTopup | None


@dataclass(frozen=True, slots=True)
class StartAutoTopup(PaymentCommand):
    """Decide whether to charge now, and how much. `requested_mils` is what was refused for want of credits, or 0."""

    topup_id: str
    customer_id: CustomerId
    requested_mils: Mils


@dataclass(frozen=True, slots=True)
class AutoTopupHeld(PaymentOutcome):
    reason: str


@dataclass(frozen=True, slots=True)
class SetCursor(PaymentCommand):
    name: str
    value: float


@dataclass(frozen=True, slots=True)
class CursorSet(PaymentOutcome):
    value: float


@dataclass(frozen=True, slots=True)
class FileReport(PaymentCommand):
    """A day's comparison with the provider. A day may be filed again; the last one counts."""

    day: int
    """In days of UTC since 1970."""
    body: str
    signature: str
    difference_cents: int


@dataclass(frozen=True, slots=True)
class ReportFiled(PaymentOutcome):
    day: int


InvoiceState = Literal["new", "open", "paid", "overdue", "void", "uncollectible"]


@dataclass(frozen=True, slots=True)
class Invoice:
    """What a postpaid customer is asked to pay for a closed month. The row is there before the provider hears of it."""

    customer_id: CustomerId
    period: str
    amount_cents: int
    """All that the month's statement leaves owed and no earlier invoice asks for, in whole cents."""
    carry_mils: Mils
    """The fraction of a cent that stays in the balance, and so in the next statement."""
    state: InvoiceState
    attempt: int
    invoice_id: str
    payment_intent: str
    url: str
    revision: int
    problem: str
    created_at: float
    updated_at: float


@dataclass(frozen=True, slots=True)
class OpenInvoice(PaymentCommand):
    """Ask for what a closed month left owed. Nothing owed is no invoice."""

    customer_id: CustomerId
    period: str


@dataclass(frozen=True, slots=True)
class InvoiceOpened(PaymentOutcome):
    invoice: Invoice | None


@dataclass(frozen=True, slots=True)
class RenumberInvoice(PaymentCommand):
    """The attempt `seen` is known to have come to nothing."""

    customer_id: CustomerId
    period: str
    seen: int
    problem: str = ""


@dataclass(frozen=True, slots=True)
class ApplyInvoice(PaymentCommand):
    """Bring the balance and the credit line to what was seen of an invoice, and mark the events, in one commit."""

    customer_id: CustomerId
    period: str
    revision: int
    state: InvoiceState
    invoice_id: str
    payment_intent: str = ""
    url: str = ""
    event_ids: tuple[str, ...] = ()
    movements: tuple[Movement, ...] = ()
    effects: tuple[Credit | Reverse | SetCreditLine, ...] = ()

    @property
    def money(self) -> tuple[Command, ...]:
        return self.effects


COMMANDS: tuple[type[PaymentCommand], ...] = (
    ReceiveEvents,
    MarkEvents,
    OpenTopup,
    NoteSession,
    RenumberAttempt,
    ApplyPayment,
    LinkCustomer,
    SetAutoTopup,
    DisarmAutoTopup,
    StartAutoTopup,
    SetCursor,
    FileReport,
    OpenInvoice,
    RenumberInvoice,
    ApplyInvoice,
)
OUTCOMES: tuple[type[PaymentOutcome], ...] = (
    EventsReceived,
    EventsMarked,
    TopupOpened,
    TopupConflict,
    TooManyTopups,
    TopupNoted,
    PaymentApplied,
    PaymentStale,
    CustomerLinked,
    AutoTopupSet,
    AutoTopupHeld,
    CursorSet,
    ReportFiled,
    InvoiceOpened,
)
