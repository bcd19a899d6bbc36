"""Stripe, as plain typed values: the only module that knows its library.

Every call has a time-out and bounded attempts; each POST carries an idempotency key that its caller chose, so an
attempt may be repeated. What Stripe answers is turned into our own records here, once.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar, cast

import stripe
from stripe import HTTPXClient, StripeClient

from billing.payments.commands import Movement
from billing.payments.verdict import CURRENCY, PaymentSeen, SessionStatus
from deployments.payments.config import PaymentsConfig
from deployments.payments.errors import CardDeclined, StripeFailed, StripeRefused, StripeUnavailable

MAX_LISTED = 10_000
"""Rows of one list of a customer's or a payment's. Lists by time are read to their end: they are swept once."""
PAGE = 100
DAYS_UNTIL_DUE = 14
"""After which an unpaid invoice stops its customer's spending on credit."""

Answer = TypeVar("Answer")
Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Page:
    """An open payment page."""

    session_id: str
    url: str
    expires_at: float


@dataclass(frozen=True, slots=True)
class BookedMovement:
    """One row of Stripe's books, and whose payment it is of."""

    movement: Movement
    provider_customer: str
    payment_intent: str


@dataclass(frozen=True, slots=True)
class InvoiceLine:
    description: str
    amount_cents: int
    """May be negative."""


@dataclass(frozen=True, slots=True)
class InvoiceSeen:
    """An invoice at one moment, and the payment behind it if there is one."""

    invoice_id: str
    status: str
    total: int
    due_at: float | None
    url: str
    payment: PaymentSeen = PaymentSeen()  # noqa: RUF009 - frozen


class StripeGateway:
    """`sleep` waits between attempts; tests hand in one that does not."""

    def __init__(self, config: PaymentsConfig, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        self._config = config
        self._sleep = sleep
        self._http = HTTPXClient(timeout=config.request_timeout_s)
        self._stripe = StripeClient(
            config.secret_key,
            base_addresses={"api": config.api_base} if config.api_base else {},
            max_network_retries=0,  # ours, which also wait after a 429
            http_client=self._http,
        )

    async def close(self) -> None:
        await self._http.close_async()  # type: ignore[no-untyped-call]

    async def create_customer(self, customer_id: str, idempotency_key: str) -> str:
        made = await self._ask(
            lambda: self._stripe.v1.customers.create_async(
                {"metadata": {"customer_id": customer_id}}, {"idempotency_key": idempotency_key}
            )
        )
        return str(made["id"])

    async def open_page(
        self,
        *,
        topup_id: str,
        customer_id: str,
        provider_customer: str,
        amount_cents: int,
        expires_at: int,
        success_url: str,
        cancel_url: str,
        save_card: bool,
        idempotency_key: str,
    ) -> Page:
        metadata = {"topup_id": topup_id, "customer_id": customer_id}
        intent: Any = {"metadata": metadata, "description": f"Credits · ${amount_cents / 100:.2f}"}
        if save_card:
            intent["setup_future_usage"] = "off_session"
        session = await self._ask(
            lambda: self._stripe.v1.checkout.sessions.create_async(
                {
                    "mode": "payment",
                    "customer": provider_customer,
                    "client_reference_id": topup_id,
                    "metadata": metadata,
                    "payment_intent_data": intent,
                    "line_items": [
                        {
                            "quantity": 1,
                            "price_data": {
                                "currency": CURRENCY,
                                "unit_amount": amount_cents,
                                "product_data": {"name": "Prepaid credits"},
                            },
                        }
                    ],
                    "success_url": success_url,
                    "cancel_url": cancel_url,
                    "expires_at": expires_at,
                },
                {"idempotency_key": idempotency_key},
            )
        )
        return _page(session)

    async def find_page(self, topup_id: str, provider_customer: str, since: float) -> Page | None:
        """The page that was made for this top-up, though its answer never came."""
        listed = self._list(
            self._stripe.v1.checkout.sessions.list_async,
            {"customer": provider_customer, "created": {"gte": int(since) - 60}},
        )
        async for session in listed:
            if (session.get("metadata") or {}).get("topup_id") == topup_id:
                return _page(session)
        return None

    async def charge(
        self,
        *,
        topup_id: str,
        customer_id: str,
        provider_customer: str,
        payment_method: str,
        amount_cents: int,
        description: str,
        idempotency_key: str,
    ) -> str:
        """Charge a saved card now; the payment intent that it became.

        Raises:
            CardDeclined: with the payment intent that failed.
        """
        intent = await self._ask(
            lambda: self._stripe.v1.payment_intents.create_async(
                {
                    "amount": amount_cents,
                    "currency": CURRENCY,
                    "customer": provider_customer,
                    "payment_method": payment_method,
                    "off_session": True,
                    "confirm": True,
                    "description": description,
                    "metadata": {"topup_id": topup_id, "customer_id": customer_id},
                },
                {"idempotency_key": idempotency_key},
            )
        )
        return str(intent["id"])

    async def find_charge(self, topup_id: str, provider_customer: str, since: float) -> str | None:
        """The payment intent that was made for this top-up, though its answer never came."""
        listed = self._list(
            self._stripe.v1.payment_intents.list_async,
            {"customer": provider_customer, "created": {"gte": int(since) - 60}},
        )
        async for intent in listed:
            if (intent.get("metadata") or {}).get("topup_id") == topup_id:
                return str(intent["id"])
        return None

    async def topup_of(self, payment_intent: str) -> tuple[str, str]:
        """The top-up that a payment names, and the customer it is of; empty where it names none."""
        intent = await self._ask(lambda: self._stripe.v1.payment_intents.retrieve_async(payment_intent))
        return str((intent.get("metadata") or {}).get("topup_id") or ""), str(intent.get("customer") or "")

    async def see(self, session_id: str, payment_intent: str) -> PaymentSeen:
        """A payment as it stands now, by its page or by itself."""
        session: Object = {}
        if session_id:
            session = await self._ask(lambda: self._stripe.v1.checkout.sessions.retrieve_async(session_id))
            payment_intent = str(session.get("payment_intent") or "") or payment_intent
        if not payment_intent:
            return _seen(session, None, [], [])
        of_payment: Object = {"payment_intent": payment_intent}
        moved = ["data.balance_transaction", "data.failure_balance_transaction"]
        charged: Any = {"expand": ["latest_charge.balance_transaction"]}
        intent, refunds, disputes = await asyncio.gather(
            self._ask(lambda: self._stripe.v1.payment_intents.retrieve_async(payment_intent, charged)),
            self._all(self._stripe.v1.refunds.list_async, of_payment | {"expand": moved}),
            self._all(self._stripe.v1.disputes.list_async, of_payment),
        )
        return _seen(session, intent, refunds, disputes)

    async def draft_invoice(
        self,
        *,
        customer_id: str,
        provider_customer: str,
        period: str,
        lines: Sequence[InvoiceLine],
        idempotency_key: str,
    ) -> InvoiceSeen:
        """A draft with these lines, which Stripe neither sends nor finalises by itself, as Stripe adds it up."""
        made = await self._ask(
            lambda: self._stripe.v1.invoices.create_async(
                {
                    "customer": provider_customer,
                    "collection_method": "send_invoice",
                    "days_until_due": DAYS_UNTIL_DUE,
                    "auto_advance": False,
                    "currency": CURRENCY,
                    "pending_invoice_items_behavior": "exclude",
                    "description": f"Usage until the end of {period}",
                    "metadata": {"customer_id": customer_id, "period": period},
                },
                {"idempotency_key": idempotency_key},
            )
        )
        for number, line in enumerate(lines):
            item: Any = {
                "customer": provider_customer,
                "invoice": made["id"],
                "currency": CURRENCY,
                "amount": line.amount_cents,
                "description": line.description,
            }
            key = f"{idempotency_key}:{number}"
            await self._ask(
                lambda item=item, key=key: self._stripe.v1.invoice_items.create_async(  # type: ignore[misc]
                    item, {"idempotency_key": key}
                )
            )
        return _invoice(await self._ask(lambda: self._stripe.v1.invoices.retrieve_async(made["id"])))

    async def find_invoice(self, period: str, provider_customer: str, since: float) -> InvoiceSeen | None:
        """The invoice that was made for this month, though its answer never came."""
        filters = {"customer": provider_customer, "created": {"gte": int(since) - 60}}
        async for invoice in self._list(self._stripe.v1.invoices.list_async, filters):
            if (invoice.get("metadata") or {}).get("period") == period:
                return _invoice(invoice)
        return None

    async def finalize_invoice(self, invoice_id: str) -> str:
        """From here on it is asked for. Its id."""
        done = await self._ask(
            lambda: self._stripe.v1.invoices.finalize_invoice_async(
                invoice_id, {"auto_advance": True}, {"idempotency_key": f"finalize:{invoice_id}"}
            )
        )
        return str(done["id"])

    async def delete_invoice(self, invoice_id: str) -> None:
        """Of a draft."""
        await self._ask(lambda: self._stripe.v1.invoices.delete_async(invoice_id))

    async def see_invoice(self, invoice_id: str) -> InvoiceSeen:
        """An invoice as it stands now, and its payment."""
        invoice = await self._ask(lambda: self._stripe.v1.invoices.retrieve_async(invoice_id))
        paid = await self._all(self._stripe.v1.invoice_payments.list_async, {"invoice": invoice_id})
        paid.sort(key=lambda each: each.get("status") != "paid")  # others were given up, or are still tried
        intents = [str((each.get("payment") or {}).get("payment_intent") or "") for each in paid]
        payment_intent = next(filter(None, intents), "")
        return _invoice(invoice, await self.see("", payment_intent) if payment_intent else PaymentSeen())

    async def events(self, types: tuple[str, ...], since: float) -> AsyncIterator[Object]:
        """Newest first, of at most 20 types."""
        filters = {"types": list(types), "created": {"gte": int(since)}}
        async for event in self._list(self._stripe.v1.events.list_async, filters, count()):
            yield event

    async def payments_since(self, since: float) -> AsyncIterator[tuple[str, str, str]]:
        """(payment intent, the top-up that it names, the customer) of each, newest first."""
        filters = {"created": {"gte": int(since)}}
        async for intent in self._list(self._stripe.v1.payment_intents.list_async, filters, count()):
            metadata = intent.get("metadata") or {}
            yield str(intent["id"]), str(metadata.get("topup_id") or ""), str(intent.get("customer") or "")

    async def movements(self, since: float, until: float) -> AsyncIterator[BookedMovement]:
        """What moved in [since, until)."""
        filters = {"created": {"gte": int(since), "lt": int(until)}, "expand": ["data.source"]}
        async for moved in self._list(self._stripe.v1.balance_transactions.list_async, filters, count()):
            source = moved.get("source")
            source = source if isinstance(source, dict) else {}
            yield BookedMovement(
                _movement(moved), str(source.get("customer") or ""), str(source.get("payment_intent") or "")
            )

    async def _all(self, method: Callable[[Any], Awaitable[Any]], filters: Object) -> list[Object]:
        return [each async for each in self._list(method, filters)]

    async def _list(
        self, method: Callable[[Any], Awaitable[Any]], filters: Object, pages: Iterable[int] | None = None
    ) -> AsyncIterator[Object]:
        """Every row, page by page, each page with attempts of its own."""
        after: Object = {}
        for _ in range(MAX_LISTED // PAGE) if pages is None else pages:
            query = {"limit": PAGE, **filters, **after}
            page = await self._ask(lambda query=query: method(query))  # type: ignore[misc]
            for row in page["data"]:
                yield row
            if not page["has_more"]:
                return
            after = {"starting_after": page["data"][-1]["id"]}

    async def _ask(self, request: Callable[[], Awaitable[Any]]) -> Object:
        """One request and its attempts; the same key each time makes that safe.

        Raises:
            StripeUnavailable, StripeFailed: after the last attempt.
            StripeRefused, CardDeclined: at once.
        """
        wait_s = self._config.first_wait_s
        attempt = 1
        while True:
            factor = 1.0
            try:
                return _plain(await request())
            except stripe.CardError as error:
                failed = cast(Object, error.json_body or {})
                intent = (failed.get("error") or {}).get("payment_intent") or {}
                code = str(error.code or "card_declined")
                decline = str((failed.get("error") or {}).get("decline_code") or code)
                raise CardDeclined(decline, str(error.user_message or ""), str(intent.get("id") or "")) from None
            except stripe.IdempotencyError:
                # The first request under this key was another one, and may be running: what it did will be found.
                raise StripeUnavailable("an earlier request stands") from None
            except stripe.RateLimitError:
                problem: StripeUnavailable = StripeUnavailable("it asks us to slow down")
                factor = 4.0
            except stripe.APIConnectionError as error:
                problem = StripeUnavailable(type(error.__cause__ or error).__name__)
            except stripe.StripeError as error:
                status = error.http_status or 0
                if status == 409:
                    problem = StripeUnavailable("the object is locked")
                elif status >= 500:
                    problem = StripeFailed(f"status {status}")
                else:
                    raise StripeRefused(
                        str(error.code or type(error).__name__), str(error.user_message or "")
                    ) from None
            if attempt >= self._config.max_attempts:
                raise problem
            await self._sleep(wait_s * factor)
            wait_s *= 2
            attempt += 1


def _plain(answer: Any) -> Object:
    """Dictionaries all the way down: the library's objects are neither dictionaries nor typed."""
    return cast(Object, answer.to_dict() if hasattr(answer, "to_dict") else json.loads(str(answer)))


def _invoice(invoice: Object, payment: PaymentSeen = PaymentSeen()) -> InvoiceSeen:
    due = invoice.get("due_date")
    return InvoiceSeen(
        str(invoice["id"]),
        str(invoice["status"]),
        int(invoice["total"]),
        None if due is None else float(due),
        str(invoice.get("hosted_invoice_url") or ""),
        payment,
    )


def _page(session: Object) -> Page:
    return Page(str(session["id"]), str(session.get("url") or ""), float(session["expires_at"]))


def _seen(session: Object, intent: Object | None, refunds: list[Object], disputes: list[Object]) -> PaymentSeen:
    payment = intent or {}
    error = payment.get("last_payment_error") or {}
    disputed = [moved for dispute in disputes for moved in dispute.get("balance_transactions") or []]
    charge = payment.get("latest_charge") or {}
    booked = [
        charge.get("balance_transaction"),
        *(refund.get(name) for refund in refunds for name in ("balance_transaction", "failure_balance_transaction")),
        *disputed,
    ]
    currency = payment.get("currency") or session.get("currency") or CURRENCY
    subtotal = session.get("amount_subtotal")
    return PaymentSeen(
        session_id=str(session.get("id") or ""),
        session_status=cast(SessionStatus, session.get("status") or ""),
        payment_status=str(session.get("payment_status") or ""),
        payment_intent=str(payment.get("id") or ""),
        intent_status=str(payment.get("status") or ""),
        amount_received=int(payment.get("amount_received") or 0),
        subtotal=None if subtotal is None else int(subtotal),
        currency=str(currency),
        livemode=bool(payment.get("livemode", session.get("livemode", False))),
        refunded=sum(int(each["amount"]) for each in refunds if each.get("status") not in ("failed", "canceled")),
        withdrawn=-sum(int(moved["amount"]) for moved in disputed if moved.get("currency") == currency),
        decline=str(error.get("decline_code") or error.get("code") or ""),
        payment_method=str(payment.get("payment_method") or ""),
        movements=tuple(_movement(moved) for moved in booked if isinstance(moved, dict)),
    )


def _movement(moved: Object) -> Movement:
    return Movement(str(moved["id"]), float(moved["created"]), str(moved["reporting_category"]), int(moved["amount"]))
