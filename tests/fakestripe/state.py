"""What happens inside Stripe: customers, sessions, payments, refunds, disputes, invoices, and the events they make.

A plain state machine with an injected clock: no HTTP, no waiting. Amounts are whole cents of US dollars.
"""

import copy
import secrets
from collections.abc import Callable, Iterator
from typing import Any

from stripe import api_version as API_VERSION

Object = dict[str, Any]

FEE_CENTS = 30
DISPUTE_FEE_CENTS = 1_500

GOOD = "4242424242424242"
DECLINED = "4000000000000002"
INSUFFICIENT = "4000000000009995"
NEEDS_AUTHENTICATION = "4000002500003155"
"""Pays when its owner is present; off session it asks for authentication."""
DECLINED_LATER = "4000000000000341"
"""Can be saved, and is declined whenever it is charged off session."""
SUSPICIOUS = "4000000000005423"
"""Pays, and an early fraud warning follows."""
BANK = "000123456789"
"""A bank debit: the session completes unpaid, and `settle_bank` decides later."""
CARDS = (GOOD, DECLINED, INSUFFICIENT, NEEDS_AUTHENTICATION, DECLINED_LATER, SUSPICIOUS, BANK)

_DECLINES = {DECLINED: "generic_decline", INSUFFICIENT: "insufficient_funds"}


class Refused(Exception):
    """What Stripe answers with an error: (status, type, code, message), and fields of the error body."""

    def __init__(self, status: int, kind: str, code: str, message: str, extra: Object | None = None) -> None:
        super().__init__(status, kind, code, message)
        self.status, self.kind, self.code, self.message = status, kind, code, message
        self.extra = extra or {}


def invalid(message: str, code: str = "parameter_invalid", status: int = 400) -> Refused:
    return Refused(status, "invalid_request_error", code, message)


class Stripe:
    """One account in test mode. `on_event` is told of every event as it happens."""

    def __init__(self, clock: Callable[[], float], page_url: str = "") -> None:
        self.clock = clock
        self.page_url = page_url
        """Where the hosted pages are."""
        self.objects: dict[str, dict[str, Object]] = {}
        self.events: list[Object] = []
        self.on_event: Callable[[Object], None] = lambda _: None
        self.cards: dict[str, str] = {}
        """The number behind each payment method."""
        self._serial = 0
        self._account = secrets.token_hex(4)
        """Ids of two runs never collide, as Stripe's never do."""

    # What every kind of object shares.

    def now(self) -> int:
        return int(self.clock())

    def new_id(self, prefix: str) -> str:
        self._serial += 1
        return f"{prefix}_{self._account}{self._serial:08d}"

    def all(self, kind: str) -> Iterator[Object]:
        """Newest first, as Stripe lists."""
        return reversed(list(self.objects.get(kind, {}).values()))

    def get(self, kind: str, object_id: str) -> Object:
        found = self.objects.get(kind, {}).get(object_id)
        if found is None:
            raise invalid(f"No such {kind}: '{object_id}'", "resource_missing", 404)
        return found

    def emit(self, type_: str, subject: Object) -> Object:
        event = {
            "id": self.new_id("evt"),
            "object": "event",
            "api_version": API_VERSION,
            "created": self.now(),
            "data": {"object": copy.deepcopy(subject)},
            "livemode": False,
            "pending_webhooks": 1,
            "request": {"id": None, "idempotency_key": None},
            "type": type_,
        }
        self.events.append(event)
        self.on_event(event)
        return event

    def _new(self, kind: str, prefix: str, **fields: Any) -> Object:
        made = {
            "id": self.new_id(prefix),
            "object": kind,
            "created": self.now(),
            "livemode": False,
            "metadata": {},
            **fields,
        }
        self.objects.setdefault(kind, {})[made["id"]] = made
        return made

    def _money_moves(self, kind: str, category: str, amount: int, fee: int, source: str) -> Object:
        transaction = self._new(
            "balance_transaction",
            "txn",
            amount=amount,
            available_on=self.now(),
            balance_type="payments",
            currency="usd",
            description=None,
            exchange_rate=None,
            fee=fee,
            fee_details=[
                {"amount": fee, "application": None, "currency": "usd", "description": None, "type": "stripe_fee"}
            ]
            if fee
            else [],
            net=amount - fee,
            reporting_category=category,
            source=source,
            status="available",
            type=kind,
        )
        for name in ("livemode", "metadata"):
            del transaction[name]
        return transaction

    def remembered(self) -> Object:
        """All that it knows, as JSON can hold it."""
        return {"objects": self.objects, "events": self.events, "cards": self.cards, "serial": self._serial}

    def restore(self, remembered: Object) -> None:
        self.objects, self.events = remembered["objects"], remembered["events"]
        self.cards, self._serial = remembered["cards"], remembered["serial"]

    # Customers and how they pay.

    def create_customer(self, name: str | None, email: str | None, metadata: Object) -> Object:
        customer = self._new(
            "customer",
            "cus",
            name=name,
            email=email,
            metadata=metadata,
            balance=0,
            currency="usd",
            default_source=None,
            description=None,
            invoice_settings={
                "custom_fields": None,
                "default_payment_method": None,
                "footer": None,
                "rendering_options": None,
            },
        )
        self.emit("customer.created", customer)
        return customer

    def delete_customer(self, customer_id: str) -> Object:
        customer = self.get("customer", customer_id)
        customer["deleted"] = True
        self.emit("customer.deleted", customer)
        return {"id": customer_id, "object": "customer", "deleted": True}

    def _new_method(self, card: str, customer: str | None) -> Object:
        is_bank = card == BANK
        details: Object = {"type": "us_bank_account"} if is_bank else {"type": "card"}
        if not is_bank:
            details["card"] = {
                "brand": "visa",
                "checks": None,
                "country": "US",
                "display_brand": "visa",
                "exp_month": 12,
                "exp_year": 2034,
                "fingerprint": f"fp{card[-4:]}",
                "funding": "credit",
                "generated_from": None,
                "last4": card[-4:],
                "networks": None,
                "three_d_secure_usage": None,
                "wallet": None,
            }
        method = self._new(
            "payment_method",
            "pm",
            billing_details={"address": None, "email": None, "name": None, "phone": None, "tax_id": None},
            customer=customer,
            **details,
        )
        self.cards[method["id"]] = card
        return method

    def detach_method(self, method_id: str) -> Object:
        method = self.get("payment_method", method_id)
        method["customer"] = None
        self.emit("payment_method.detached", method)
        return method

    # Checkout.

    def create_session(self, params: Object) -> Object:
        if params.get("mode") != "payment":
            raise invalid("mode: only payment is offered here")
        lines = params.get("line_items") or []
        if not lines:
            raise invalid("line_items: at least one is needed", "parameter_missing")
        amount = 0
        for line in lines:
            price = line.get("price_data") or {}
            if price.get("currency") != "usd" or "product_data" not in price:
                raise invalid("line_items: price_data needs currency usd and product_data")
            amount += int(price["unit_amount"]) * int(line.get("quantity", 1))
        if amount < 50:
            raise invalid("the total must be at least $0.50 usd", "amount_too_small")
        now = self.now()
        expires_at = int(params.get("expires_at", now + 86_400))
        if not now + 1_790 <= expires_at <= now + 86_410:
            raise invalid("expires_at: must be from 30 minutes to 24 hours from now")
        if params.get("customer"):
            self.get("customer", params["customer"])
        intent_data = params.get("payment_intent_data") or {}
        session = self._new(
            "checkout.session",
            "cs_test",
            amount_subtotal=amount,
            amount_total=amount,
            automatic_tax={"enabled": False, "liability": None, "provider": None, "status": None},
            cancel_url=params.get("cancel_url"),
            client_reference_id=params.get("client_reference_id"),
            currency="usd",
            custom_fields=[],
            custom_text={
                "after_submit": None,
                "shipping_address": None,
                "submit": None,
                "terms_of_service_acceptance": None,
            },
            customer=params.get("customer"),
            expires_at=expires_at,
            metadata=params.get("metadata") or {},
            mode="payment",
            payment_intent=None,
            payment_method_types=params.get("payment_method_types") or ["card", "us_bank_account"],
            payment_status="unpaid",
            shipping_options=[],
            status="open",
            success_url=params.get("success_url"),
            url=None,
        )
        session["url"] = f"{self.page_url}/pay/{session['id']}"
        self.objects.setdefault("_intent_data", {})[session["id"]] = intent_data
        return session

    def expire_session(self, session_id: str) -> Object:
        session = self.get("checkout.session", session_id)
        if session["status"] != "open":
            raise invalid(f"the session is {session['status']}, only an open one can expire", "resource_invalid_state")
        session["status"], session["url"] = "expired", None
        self.emit("checkout.session.expired", session)
        return session

    def pay_session(self, session_id: str, card: str = GOOD) -> Object:
        """As its page does. Raises `Refused` when the card is declined; the session then stays open."""
        session = self.get("checkout.session", session_id)
        if session["status"] != "open" or session["expires_at"] <= self.now():
            raise invalid("this page has expired", "resource_invalid_state")
        data = self.objects["_intent_data"][session_id]
        if session["payment_intent"] is None:
            intent = self._new_intent(session["amount_total"], session["customer"], data)
            intent["metadata"] = data.get("metadata") or {}
            session["payment_intent"] = intent["id"]
        intent = self.get("payment_intent", session["payment_intent"])
        saved = session["customer"] if data.get("setup_future_usage") else None
        method = self._new_method(card, saved)
        intent["payment_method"] = method["id"]
        if card in _DECLINES:
            self._decline(intent, _DECLINES[card])
            raise Refused(402, "card_error", "card_declined", "Your card was declined.")
        session["status"], session["url"] = "complete", None
        if card == BANK:
            intent["status"] = "processing"
            self.emit("payment_intent.processing", intent)
            self.emit("checkout.session.completed", session)
            return session
        self._charge(intent)
        session["payment_status"] = "paid"
        self.emit("checkout.session.completed", session)
        return session

    def settle_bank(self, session_id: str, succeeds: bool) -> Object:
        session = self.get("checkout.session", session_id)
        intent = self.get("payment_intent", session["payment_intent"])
        assert intent["status"] == "processing", intent["status"]
        if succeeds:
            self._charge(intent)
            session["payment_status"] = "paid"
            self.emit("checkout.session.async_payment_succeeded", session)
        else:
            self._decline(intent, "insufficient_funds")
            self.emit("checkout.session.async_payment_failed", session)
        return session

    # Payments.

    def _new_intent(self, amount: int, customer: str | None, params: Object) -> Object:
        return self._new(
            "payment_intent",
            "pi",
            amount=amount,
            amount_capturable=0,
            amount_received=0,
            capture_method="automatic_async",
            client_secret=None,
            confirmation_method="automatic",
            currency="usd",
            customer=customer,
            description=params.get("description"),
            last_payment_error=None,
            latest_charge=None,
            metadata=params.get("metadata") or {},
            next_action=None,
            payment_method=None,
            payment_method_types=["card"],
            setup_future_usage=params.get("setup_future_usage"),
            status="requires_payment_method",
        )

    def create_intent(self, params: Object) -> Object:
        if params.get("currency") != "usd":
            raise invalid("currency: only usd is offered here")
        intent = self._new_intent(int(params["amount"]), params.get("customer"), params)
        if params.get("payment_method"):
            method = self.get("payment_method", params["payment_method"])
            if method["customer"] != params.get("customer"):
                raise invalid("the PaymentMethod does not belong to the Customer", "payment_method_unexpected_state")
            intent["payment_method"] = method["id"]
        self.emit("payment_intent.created", intent)
        if params.get("confirm"):
            card = self.cards[intent["payment_method"]]
            if card == NEEDS_AUTHENTICATION:
                self._decline(intent, "authentication_required")
            elif card in (*_DECLINES, DECLINED_LATER):
                self._decline(intent, _DECLINES.get(card, "generic_decline"))
            else:
                self._charge(intent)
                return intent
            code = intent["last_payment_error"]["code"]
            raise Refused(
                402,
                "card_error",
                code,
                intent["last_payment_error"]["message"],
                {"decline_code": intent["last_payment_error"]["decline_code"], "payment_intent": copy.deepcopy(intent)},
            )
        return intent

    def _charge(self, intent: Object) -> Object:
        charge = self._new(
            "charge",
            "ch",
            amount=intent["amount"],
            amount_captured=intent["amount"],
            amount_refunded=0,
            balance_transaction=None,
            billing_details={"address": None, "email": None, "name": None, "phone": None, "tax_id": None},
            captured=True,
            currency="usd",
            customer=intent["customer"],
            description=intent["description"],
            disputed=False,
            failure_code=None,
            failure_message=None,
            metadata=dict(intent["metadata"]),
            paid=True,
            payment_intent=intent["id"],
            payment_method=intent["payment_method"],
            refunded=False,
            status="succeeded",
        )
        charge["balance_transaction"] = self._money_moves(
            "charge", "charge", charge["amount"], FEE_CENTS, charge["id"]
        )["id"]
        intent.update(status="succeeded", amount_received=intent["amount"], latest_charge=charge["id"])
        intent["last_payment_error"] = None
        self.emit("charge.succeeded", charge)
        self.emit("payment_intent.succeeded", intent)
        if self.cards.get(intent["payment_method"]) == SUSPICIOUS:
            self.warn_of_fraud(charge["id"])
        return charge

    def _decline(self, intent: Object, decline_code: str) -> None:
        needs_owner = decline_code == "authentication_required"
        intent["last_payment_error"] = {
            "type": "card_error",
            "code": "authentication_required" if needs_owner else "card_declined",
            "decline_code": decline_code,
            "message": "This payment requires authentication." if needs_owner else "Your card was declined.",
        }
        intent["status"] = "requires_payment_method"
        self.emit("payment_intent.payment_failed", intent)

    def warn_of_fraud(self, charge_id: str) -> Object:
        charge = self.get("charge", charge_id)
        warning = self._new(
            "radar.early_fraud_warning",
            "issfr",
            actionable=True,
            charge=charge_id,
            fraud_type="made_with_stolen_card",
            payment_intent=charge["payment_intent"],
        )
        del warning["metadata"]
        self.emit("radar.early_fraud_warning.created", warning)
        return warning

    # Money that goes back.

    def create_refund(self, params: Object) -> Object:
        charge = self._charge_of(params)
        left = charge["amount"] - charge["amount_refunded"]
        amount = int(params.get("amount", left))
        if not 1 <= amount <= left:
            raise invalid(f"amount: {amount} is more than the {left} that are left", "charge_already_refunded")
        refund = self._new(
            "refund",
            "re",
            amount=amount,
            balance_transaction=None,
            charge=charge["id"],
            currency="usd",
            customer=charge["customer"],
            failure_balance_transaction=None,
            metadata=params.get("metadata") or {},
            payment_intent=charge["payment_intent"],
            reason=params.get("reason"),
            status="succeeded",
        )
        del refund["livemode"]
        refund["balance_transaction"] = self._money_moves("refund", "refund", -amount, 0, refund["id"])["id"]
        self._count_refunds(charge)
        self.emit("refund.created", refund)
        self.emit("charge.refunded", charge)
        return refund

    def fail_refund(self, refund_id: str) -> Object:
        """The customer's bank sent it back."""
        refund = self.get("refund", refund_id)
        assert refund["status"] == "succeeded", refund["status"]
        refund.update(status="failed", failure_reason="expired_or_canceled_card")
        refund["failure_balance_transaction"] = self._money_moves(
            "refund_failure", "refund_failure", refund["amount"], 0, refund["id"]
        )["id"]
        self._count_refunds(self.get("charge", refund["charge"]))
        self.emit("refund.failed", refund)
        return refund

    def _count_refunds(self, charge: Object) -> None:
        charge["amount_refunded"] = sum(
            each["amount"]
            for each in self.all("refund")
            if each["charge"] == charge["id"] and each["status"] not in ("failed", "canceled")
        )
        charge["refunded"] = charge["amount_refunded"] == charge["amount"]

    def _charge_of(self, params: Object) -> Object:
        if params.get("charge"):
            return self.get("charge", params["charge"])
        intent = self.get("payment_intent", params.get("payment_intent", ""))
        if intent["latest_charge"] is None:
            raise invalid("the payment has no successful charge", "charge_not_refundable")
        return self.get("charge", intent["latest_charge"])

    def open_dispute(self, payment_intent: str, amount: int | None = None) -> Object:
        charge = self._charge_of({"payment_intent": payment_intent})
        dispute = self._new(
            "dispute",
            "dp",
            amount=charge["amount"] if amount is None else amount,
            balance_transactions=[],
            charge=charge["id"],
            currency="usd",
            enhanced_eligibility_types=[],
            evidence={},
            evidence_details={
                "due_by": None,
                "enhanced_eligibility": {},
                "has_evidence": False,
                "past_due": False,
                "submission_count": 0,
            },
            is_charge_refundable=False,
            payment_intent=payment_intent,
            reason="fraudulent",
            status="needs_response",
        )
        charge["disputed"] = True
        self.emit("charge.dispute.created", dispute)
        return dispute

    def withdraw_dispute(self, dispute_id: str) -> Object:
        dispute = self.get("dispute", dispute_id)
        self._move_disputed(dispute, "dispute", -dispute["amount"], DISPUTE_FEE_CENTS)
        self.emit("charge.dispute.funds_withdrawn", dispute)
        return dispute

    def close_dispute(self, dispute_id: str, won: bool) -> Object:
        dispute = self.get("dispute", dispute_id)
        dispute["status"] = "won" if won else "lost"
        if won and dispute["balance_transactions"]:
            self._move_disputed(dispute, "dispute_reversal", dispute["amount"], 0)
            self.emit("charge.dispute.funds_reinstated", dispute)
        self.emit("charge.dispute.closed", dispute)
        return dispute

    def _move_disputed(self, dispute: Object, category: str, amount: int, fee: int) -> None:
        moved = self._money_moves("adjustment", category, amount, fee, dispute["id"])
        dispute["balance_transactions"].append(moved)

    # Invoices.

    def create_invoice(self, params: Object) -> Object:
        self.get("customer", params.get("customer", ""))
        now = self.now()
        due = now + 86_400 * int(params["days_until_due"]) if "days_until_due" in params else None
        return self._new(
            "invoice",
            "in",
            amount_due=0,
            amount_overpaid=0,
            amount_paid=0,
            amount_remaining=0,
            amount_shipping=0,
            attempt_count=0,
            attempted=False,
            auto_advance=bool(params.get("auto_advance", False)),
            automatic_tax={
                "disabled_reason": None,
                "enabled": False,
                "liability": None,
                "provider": None,
                "status": None,
            },
            collection_method=params.get("collection_method", "charge_automatically"),
            currency="usd",
            customer=params["customer"],
            default_tax_rates=[],
            description=params.get("description"),
            discounts=[],
            due_date=due,
            hosted_invoice_url=None,
            issuer={"type": "self"},
            lines={"object": "list", "data": [], "has_more": False, "url": "/v1/invoices/lines"},
            metadata=params.get("metadata") or {},
            number=None,
            payment_settings={"default_mandate": None, "payment_method_options": None, "payment_method_types": None},
            period_end=now,
            period_start=now,
            post_payment_credit_notes_amount=0,
            pre_payment_credit_notes_amount=0,
            starting_balance=0,
            status="draft",
            status_transitions={
                "finalized_at": None,
                "marked_uncollectible_at": None,
                "paid_at": None,
                "voided_at": None,
            },
            subtotal=0,
            total=0,
        )

    def create_invoice_item(self, params: Object) -> Object:
        invoice = self.get("invoice", params.get("invoice", ""))
        if invoice["status"] != "draft":
            raise invalid("items are added to a draft", "invoice_not_editable")
        amount = int(params["amount"])
        period = {"start": self.now(), "end": self.now()}
        item = self._new(
            "invoiceitem",
            "ii",
            amount=amount,
            currency="usd",
            customer=invoice["customer"],
            date=self.now(),
            description=params.get("description"),
            discountable=True,
            invoice=invoice["id"],
            metadata=params.get("metadata") or {},
            period=period,
            proration=False,
            quantity=1,
            quantity_decimal="1",
        )
        del item["created"]
        line = {
            "id": self.new_id("il"),
            "object": "line_item",
            "amount": amount,
            "currency": "usd",
            "description": params.get("description"),
            "discountable": True,
            "discounts": [],
            "invoice": invoice["id"],
            "livemode": False,
            "metadata": params.get("metadata") or {},
            "period": period,
            "quantity": 1,
            "quantity_decimal": "1",
            "subtotal": amount,
        }
        invoice["lines"]["data"].append(line)
        total = sum(each["amount"] for each in invoice["lines"]["data"])
        invoice.update(subtotal=total, total=total, amount_due=total, amount_remaining=total)
        return item

    def finalize_invoice(self, invoice_id: str) -> Object:
        invoice = self._invoice_in(invoice_id, "draft")
        invoice["status"] = "open"
        invoice["number"] = invoice_id[-8:]
        invoice["status_transitions"]["finalized_at"] = self.now()
        invoice["hosted_invoice_url"] = f"{self.page_url}/invoice/{invoice_id}"
        self.emit("invoice.finalized", invoice)
        return invoice

    def pay_invoice(self, invoice_id: str, card: str = GOOD) -> Object:
        invoice = self._invoice_in(invoice_id, "open")
        intent = self._new_intent(invoice["amount_remaining"], invoice["customer"], {"description": "Invoice"})
        intent["payment_method"] = self._new_method(card, None)["id"]
        invoice["attempted"] = True
        invoice["attempt_count"] += 1
        if card in _DECLINES:
            self._decline(intent, _DECLINES[card])
            self.emit("invoice.payment_failed", invoice)
            raise Refused(402, "card_error", "card_declined", "Your card was declined.")
        self._charge(intent)
        invoice.update(status="paid", amount_paid=invoice["amount_due"], amount_remaining=0)
        invoice["status_transitions"]["paid_at"] = self.now()
        self._new(
            "invoice_payment",
            "inpay",
            amount_paid=invoice["amount_paid"],
            amount_requested=invoice["amount_paid"],
            currency="usd",
            invoice=invoice_id,
            is_default=True,
            payment={"type": "payment_intent", "payment_intent": intent["id"]},
            status="paid",
            status_transitions={"canceled_at": None, "paid_at": self.now()},
        ).pop("metadata")
        self.emit("invoice.paid", invoice)
        return invoice

    def void_invoice(self, invoice_id: str) -> Object:
        invoice = self._invoice_in(invoice_id, "open")
        invoice["status"] = "void"
        invoice["status_transitions"]["voided_at"] = self.now()
        self.emit("invoice.voided", invoice)
        return invoice

    def delete_invoice(self, invoice_id: str) -> Object:
        self._invoice_in(invoice_id, "draft")
        del self.objects["invoice"][invoice_id]
        return {"id": invoice_id, "object": "invoice", "deleted": True}

    def _invoice_in(self, invoice_id: str, status: str) -> Object:
        invoice = self.get("invoice", invoice_id)
        if invoice["status"] != status:
            raise invalid(f"the invoice is {invoice['status']}, not {status}", "resource_invalid_state")
        return invoice

    # Time.

    def tick(self) -> None:
        """What time alone brings about: sessions expire, invoices fall overdue."""
        now = self.now()
        for session in self.objects.get("checkout.session", {}).values():
            if session["status"] == "open" and session["expires_at"] <= now:
                self.expire_session(session["id"])
        told = self.objects.setdefault("_overdue", {})
        for invoice in self.objects.get("invoice", {}).values():
            due = invoice["due_date"]
            if invoice["status"] == "open" and due is not None and due <= now and invoice["id"] not in told:
                told[invoice["id"]] = invoice
                self.emit("invoice.overdue", invoice)
