"""What the ledger can be asked to do, and what it answers: plain values that cross processes.

Every write is one command; every expected refusal is an answer, not an exception. Each command carries the id that its
caller chose, so the same command again gives the same answer and no second row.

    Reserve       -> Reserved | Repeated | IdempotencyConflict | InsufficientCredits | KeyRefused | ScopeRefused
                     | BudgetExceeded | QuoteRefused
    Quote         -> Quoted | KeyRefused
    Settle        -> Settled | UnknownReservation
    Heartbeat     -> HeartbeatDone
    Grant         -> Granted | UnknownCustomer
    Credit        -> Credited | UnknownCustomer
    Reverse       -> Reversed | UnknownPayment
    CreateKey     -> KeyCreated
    RevokeKey     -> KeyRevoked | UnknownKey
    SetKeyTerms   -> KeyTermsSet | UnknownKey
    RotateKey     -> KeyRotated | UnknownKey | KeyRefused
    SetMember     -> MemberSet | UnknownCustomer
    Transfer      -> Transferred | InsufficientCredits | UnknownCustomer
    SetCreditLine -> CreditLineSet | UnknownCustomer
    CloseStatement -> StatementClosed | UnknownCustomer
    AddPrice      -> PriceAdded | UnknownCustomer
    SetUnits      -> UnitsSet | UnknownCustomer
    ChargeUnits   -> UnitsCharged
    ExpireLeases  -> LeasesExpired
    PaymentCommand -> PaymentOutcome, see billing.payments.commands
    any of them   -> Rejected
"""

from dataclasses import dataclass
from typing import Literal, NewType

from billing.money import Mils

RequestId = NewType("RequestId", str)
CustomerId = NewType("CustomerId", str)
KeyId = NewType("KeyId", str)
NOTHING = Mils(0)


@dataclass(frozen=True, slots=True)
class Reserve:
    """Debit the price of `frames` before any work, and hold it against `request_id` until it is settled.

    The price is `mils_per_frame` for every `per_frames` frames: exact, then rounded up once.
    """

    request_id: RequestId
    key_id: KeyId
    frames: int
    mils_per_frame: Mils
    detail: str
    """What the customer reads in the transaction list, such as `predict · tiny-pusher · 49 frames`."""
    lease_s: float
    """An open reservation whose lease runs out is refunded by the sweeper; `Heartbeat` renews it."""
    idempotency_key: str = ""
    """What the customer calls this request, 1 to 256 printable characters; empty when it has no name for it."""
    payload_sha256: str = ""
    """Hex digest of all that makes two requests the same work; needed with a key or a window, else optional."""
    dedupe_window_s: float = 0.0
    """Without a key, for how long after its settlement the same payload of the same customer is the same request.

    While that is open it always is, if a window is given at all.
    """
    model: str = ""
    """Compared with the models that the key may use."""
    quote_id: str = ""
    """A quote of this customer for this model and these frames, which has not expired: its rate is charged instead."""
    per_frames: int = 1


@dataclass(frozen=True, slots=True)
class Reserved:
    request_id: RequestId
    customer_id: CustomerId
    amount_mils: Mils
    balance_after_mils: Mils


@dataclass(frozen=True, slots=True)
class Repeated:
    """The customer sent this before, under another request id. Nothing was reserved; the first request stands."""

    request_id: RequestId
    """The first one's."""
    state: Literal["open", "settled"]
    captured_mils: Mils
    created_at: float


@dataclass(frozen=True, slots=True)
class IdempotencyConflict:
    """The key already names other work. Nothing was reserved; the first request is untouched."""

    request_id: RequestId
    """The first one's."""


@dataclass(frozen=True, slots=True)
class InsufficientCredits:
    balance_mils: Mils
    requested_mils: Mils
    debt_mils: Mils = NOTHING
    """What has to be repaid before anything can be spent."""


@dataclass(frozen=True, slots=True)
class KeyRefused:
    """The key is unknown, has expired, or was revoked before this reservation reached the ledger."""


@dataclass(frozen=True, slots=True)
class ScopeRefused:
    """The key is good, but not for this."""

    reason: str


@dataclass(frozen=True, slots=True)
class BudgetExceeded:
    """The key's own budget, or its customer's share of the team's, would not cover it, whatever the wallet holds."""

    limit_mils: Mils
    spent_mils: Mils
    period: Literal["day", "month"]
    resets_at: float
    requested_mils: Mils
    """Of it the team's share is only what the member's own balance lacks."""
    source: Literal["key", "team"] = "key"
    """Whose limit it is."""


@dataclass(frozen=True, slots=True)
class QuoteRefused:
    """The request is not what was quoted, or the quote has expired. Nothing was reserved."""

    reason: str


@dataclass(frozen=True, slots=True)
class Quote:
    """Promise a price for a while. Moves no money; reservations that name the quote until then pay its rate."""

    quote_id: str
    key_id: KeyId
    model: str
    frames: int
    mils_per_frame: Mils
    price_version: int
    """Of the price book, for the record; 0 for the default price."""
    valid_s: float
    per_frames: int = 1
    """The rate is `mils_per_frame` for so many frames."""


@dataclass(frozen=True, slots=True)
class Quoted:
    quote_id: str
    amount_mils: Mils
    balance_mils: Mils
    """What the customer could spend when it asked."""
    expires_at: float


@dataclass(frozen=True, slots=True)
class KeyTerms:
    """What a key may do. Days and months are UTC's; a budget counts what was reserved less what was refunded."""

    label: str = ""
    scope: Literal["spend", "read"] = "spend"
    models: tuple[str, ...] = ()
    """The models that it may use; empty for all."""
    expires_at: float | None = None
    daily_budget_mils: Mils | None = None
    monthly_budget_mils: Mils | None = None


NO_TERMS = KeyTerms()
"""A key that may do everything."""


@dataclass(frozen=True, slots=True)
class SetKeyTerms:
    """Replace a key's terms. What it has spent stays counted, from when it first had a budget."""

    key_id: KeyId
    terms: KeyTerms


@dataclass(frozen=True, slots=True)
class KeyTermsSet:
    key_id: KeyId


@dataclass(frozen=True, slots=True)
class RotateKey:
    """A new secret in place of an old one: same wallet, limits, terms and spending; the old key is revoked with it."""

    key_id: KeyId
    new_key_id: KeyId
    sha256: str
    last4: str


@dataclass(frozen=True, slots=True)
class KeyRotated:
    key_id: KeyId
    """The new one."""
    customer_id: CustomerId
    revoked_at: float
    """Since when the old one is refused."""


@dataclass(frozen=True, slots=True)
class Settle:
    """Close a reservation: keep the price of `frames_delivered`, refund the rest in the same commit.

    The first settlement of a reservation is final; a later one, equal or not, changes nothing and is answered with what
    was settled first (work that finishes after its lease was refunded is delivered free).
    """

    request_id: RequestId
    frames_delivered: int
    reason: str
    """Why frames were not delivered, for the refund's detail; empty when all were."""


@dataclass(frozen=True, slots=True)
class Settled:
    request_id: RequestId
    captured_mils: Mils
    refunded_mils: Mils
    balance_after_mils: Mils


@dataclass(frozen=True, slots=True)
class UnknownReservation:
    request_id: RequestId


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Renew the leases of reservations whose work is still running."""

    request_ids: tuple[RequestId, ...]
    lease_s: float


@dataclass(frozen=True, slots=True)
class HeartbeatDone:
    renewed: int


@dataclass(frozen=True, slots=True)
class Grant:
    """Credit a customer by an operator's decision. `public_id` is the row's id (`adm_...`) and makes it idempotent."""

    customer_id: CustomerId
    amount_mils: Mils
    public_id: str
    detail: str


@dataclass(frozen=True, slots=True)
class Granted:
    public_id: str
    amount_mils: Mils
    balance_after_mils: Mils


@dataclass(frozen=True, slots=True)
class UnknownCustomer:
    customer: str


@dataclass(frozen=True, slots=True)
class Credit:
    """Credit a customer for what was paid outside, once for each `source`. It repays the customer's debt first."""

    customer_id: CustomerId
    amount_mils: Mils
    source: str
    """What was paid, by its own name, such as `stripe:cs_...`: a second credit for it is answered with the first."""
    public_id: str
    """The row's id, unique too: Stripe's `event.id`."""
    detail: str
    events: tuple[str, ...] = ()
    """The provider's messages that this takes into account: marked in the same commit."""


@dataclass(frozen=True, slots=True)
class Credited:
    source: str
    public_id: str
    """The first one's."""
    amount_mils: Mils
    balance_after_mils: Mils
    """Of the credit's own row: a debt that it repaid is a row after it."""


@dataclass(frozen=True, slots=True)
class Reverse:
    """Have `target_mils` of a payment taken back, all in all: books what is missing to that, in either direction.

    So any order and any repetition of a payment's refunds and disputes ends the same. More than was granted counts as
    all of it. What the balance does not cover becomes a debt, which blocks spending and which every mil that comes in
    repays first.
    """

    source: str
    target_mils: Mils
    public_id: str
    """The rows' id, if any are written; it need not be unique."""
    detail: str
    events: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Reversed:
    """How things stand now; not remembered, so a repetition may be answered with another balance."""

    source: str
    customer_id: CustomerId
    reversed_mils: Mils
    """Of this payment, all in all."""
    balance_mils: Mils
    debt_mils: Mils


@dataclass(frozen=True, slots=True)
class UnknownPayment:
    source: str


@dataclass(frozen=True, slots=True)
class CreateKey:
    """Register a key by its hash. A customer of that name is created if there is none; many keys share its wallet."""

    key_id: KeyId
    sha256: str
    """Hex digest of the whole token; the token itself never reaches the ledger."""
    last4: str
    customer_name: str
    customer_id: CustomerId
    """The id to use if the customer has to be created."""
    initial_credits_mils: Mils
    refill_per_s: float
    burst: int
    terms: KeyTerms = NO_TERMS


@dataclass(frozen=True, slots=True)
class KeyCreated:
    key_id: KeyId
    customer_id: CustomerId
    balance_after_mils: Mils


@dataclass(frozen=True, slots=True)
class RevokeKey:
    key_id: KeyId


@dataclass(frozen=True, slots=True)
class KeyRevoked:
    key_id: KeyId
    revoked_at: float


@dataclass(frozen=True, slots=True)
class UnknownKey:
    key_id: KeyId


@dataclass(frozen=True, slots=True)
class ExpireLeases:
    """Refund every open reservation whose lease has run out, and forget idempotency keys that are older than a day.

    A sweep forgets a bounded number of keys; the next one goes on.
    """


@dataclass(frozen=True, slots=True)
class LeasesExpired:
    request_ids: tuple[RequestId, ...]


@dataclass(frozen=True, slots=True)
class SetMember:
    """Put a customer into another one's team, or change its terms there; it is made if there is none of that name.

    Without a cap it spends what is transferred to it. With one it spends its parent's money, up to the cap in each
    period, once its own is used up; what is refunded goes back to the parent.
    """

    customer_id: CustomerId
    """The id to use if the customer has to be created."""
    name: str
    parent_id: CustomerId
    cap_mils: Mils | None = None
    cap_period: Literal["day", "month"] | None = None
    """Of UTC; given with a cap."""


@dataclass(frozen=True, slots=True)
class MemberSet:
    customer_id: CustomerId
    parent_id: CustomerId


@dataclass(frozen=True, slots=True)
class Transfer:
    """Move money between a parent and one of its members, in either direction: both entries in one commit."""

    transfer_id: str
    """The id of both rows; makes it idempotent."""
    from_id: CustomerId
    to_id: CustomerId
    amount_mils: Mils
    detail: str


@dataclass(frozen=True, slots=True)
class Transferred:
    transfer_id: str
    amount_mils: Mils
    from_balance_after_mils: Mils
    to_balance_after_mils: Mils


@dataclass(frozen=True, slots=True)
class SetCreditLine:
    """Let a customer spend down to minus `limit_mils`, or not below zero while an invoice is overdue."""

    customer_id: CustomerId
    limit_mils: Mils
    """At least what is owed already: to end the spending of a customer that owes, say that it is overdue."""
    overdue: bool = False


@dataclass(frozen=True, slots=True)
class CreditLineSet:
    customer_id: CustomerId
    limit_mils: Mils
    floor_mils: Mils


@dataclass(frozen=True, slots=True)
class CloseStatement:
    """Close a month of a wallet with its newest entry: once, and after the months before it."""

    customer_id: CustomerId
    period: str
    """`YYYY-MM`, this month or one before it. Entries that come later belong to the next statement."""


@dataclass(frozen=True, slots=True)
class StatementClosed:
    """The entries after `from_seq` up to `to_seq`; the next statement begins there.

    `opening + usage + payments + transfers == closing`, all in mils.
    """

    customer_id: CustomerId
    number: int
    period: str
    from_seq: int
    to_seq: int
    opening_mils: Mils
    usage_mils: Mils
    """Debits less refunds: negative."""
    payments_mils: Mils
    """Credits less what was taken back of them."""
    transfers_mils: Mils
    """Within the team."""
    closing_mils: Mils
    """What is owed, if negative."""
    closed_at: float


@dataclass(frozen=True, slots=True)
class AddPrice:
    """Add the next version of a model's price. What was reserved or quoted keeps its own."""

    model: str
    customer_id: str
    """Whose price it is; empty for the list price."""
    version: int
    """One more than the newest, or 1."""
    effective_from: float
    """POSIX seconds, later than the version before."""
    terms: str
    """As `billing.price_terms` writes them."""


@dataclass(frozen=True, slots=True)
class PriceAdded:
    model: str
    customer_id: str
    version: int


@dataclass(frozen=True, slots=True)
class SetUnits:
    """Sell a customer so many units of a model a month, from that month on: the next version of its commitment."""

    customer_id: CustomerId
    model: str
    version: int
    """One more than the newest, or 1."""
    from_period: str
    """`YYYY-MM`: this month or a later one, after the version before and not charged yet."""
    units: int
    """0 ends it."""
    unit_mils: Mils
    """What a unit costs a month."""
    unit_frames: int
    """Frames a month that a unit pays for; those after them cost what the price book says."""
    units_per_replica: int
    """So many units are a replica that is always there; 0 when no capacity is promised."""


@dataclass(frozen=True, slots=True)
class UnitsSet:
    customer_id: CustomerId
    model: str
    version: int


@dataclass(frozen=True, slots=True)
class ChargeUnits:
    """Charge this month's units of every customer that has not been charged for them and can pay."""


@dataclass(frozen=True, slots=True)
class UnitsCharged:
    charged: tuple[str, ...]
    """Ids of the entries."""
    unpaid: tuple[CustomerId, ...]
    """Those whose units wait for credit, and pay for nothing until then."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """The command is malformed, or its id already names something else: a bug in the caller. Nothing was written."""

    reason: str


@dataclass(frozen=True, slots=True)
class PaymentCommand:
    """Base of what `billing.payments.commands` lists."""

    @property
    def money(self) -> "tuple[Command, ...]":
        """The ledger's own commands that are part of it: all are carried out, or none and nothing else of it."""
        return ()


@dataclass(frozen=True, slots=True)
class PaymentOutcome:
    """Base of what they are answered."""


Command = (
    Reserve
    | Quote
    | Settle
    | Heartbeat
    | Grant
    | Credit
    | Reverse
    | CreateKey
    | RevokeKey
    | SetKeyTerms
    | RotateKey
    | SetMember
    | Transfer
    | SetCreditLine
    | CloseStatement
    | AddPrice
    | SetUnits
    | ChargeUnits
    | ExpireLeases
    | PaymentCommand
)
Outcome = (
    Reserved
    | Repeated
    | IdempotencyConflict
    | InsufficientCredits
    | KeyRefused
    | ScopeRefused
    | BudgetExceeded
    | QuoteRefused
    | Quoted
    | Settled
    | UnknownReservation
    | HeartbeatDone
    | Granted
    | Credited
    | Reversed
    | UnknownPayment
    | UnknownCustomer
    | KeyCreated
    | KeyRevoked
    | KeyTermsSet
    | KeyRotated
    | UnknownKey
    | MemberSet
    | Transferred
    | CreditLineSet
    | StatementClosed
    | PriceAdded
    | UnitsSet
    | UnitsCharged
    | LeasesExpired
    | PaymentOutcome
    | Rejected
)
