"""What can go wrong with a payment; HTTP gives each its status in one table.

PaymentError
├── PaymentsDisabled     no secret key is configured
├── StripeUnavailable    Stripe does not answer, or not now; what was asked may or may not have happened
│   └── StripeFailed     it answered 500, and will answer so again under the same idempotency key
├── StripeRefused        Stripe will not do this, however often it is asked
│   └── CardDeclined     the card's bank will not
├── LedgerRefused        a bug of ours, or the ledger and this process disagree; nothing was written
├── TopupKeyReused       the idempotency key already names a top-up of another amount
├── PageOver             the idempotency key's page can no longer be paid on
└── TooManyPages         the customer has as many open payment pages as it may
"""


class PaymentError(Exception):
    """Base of everything that this package raises on purpose."""


class PaymentsDisabled(PaymentError):
    def __str__(self) -> str:
        return "payments are switched off here: the operator has set no STRIPE_SECRET_KEY; credits are granted by hand"


class StripeUnavailable(PaymentError):
    retry_after_s = 5

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return f"Stripe does not answer ({self.problem}); nothing is lost, try again shortly"


class StripeFailed(StripeUnavailable):
    """A new idempotency key is needed, once it is known that nothing was done under the old one."""


class StripeRefused(PaymentError):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"Stripe refused: {self.code or self.message}"


class CardDeclined(StripeRefused):
    def __init__(self, code: str, message: str, payment_intent: str) -> None:
        super().__init__(code, message)
        self.args = (code, message, payment_intent)
        self.payment_intent = payment_intent


class LedgerRefused(PaymentError):
    """Nothing that a customer can do anything about: it is looked at again, and the logs say what was refused."""


class TopupKeyReused(PaymentError):
    def __init__(self, amount_cents: int) -> None:
        super().__init__(amount_cents)
        self.amount_cents = amount_cents

    def __str__(self) -> str:
        return f"Idempotency-Key: was used before for {self.amount_cents} cents; use a new key for another amount"


class PageOver(PaymentError):
    def __init__(self, state: str) -> None:
        super().__init__(state)
        self.state = state

    def __str__(self) -> str:
        return f"Idempotency-Key: its payment page is over ({self.state}); use a new key for a new page"


class TooManyPages(PaymentError):
    def __init__(self, open_pages: int, retry_after_s: int) -> None:
        super().__init__(open_pages, retry_after_s)
        self.open_pages = open_pages
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.open_pages} payment pages are open already; pay on one of them, or wait until one expires"
