"""The HTTP side of the fake: authentication, forms, idempotency keys, faults, lists with cursors, hosted pages."""

import asyncio
import copy
import html
import re
from collections.abc import Callable
from typing import Any

import stripe.params
import stripe.params.checkout
import stripe.params.radar
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from tests.fakestripe.faults import ApiFault, Faults
from tests.fakestripe.parameters import Parameters, checked, read_form
from tests.fakestripe.state import CARDS, GOOD, Object, Refused, Stripe, invalid
from tests.fakestripe.webhooks import Webhooks

Answer = tuple[int, Object]
Handler = Callable[[Stripe, str, Parameters], Object]

HANG_S = 30.0
FILTERS = ("customer", "payment_intent", "charge", "status", "type", "invoice", "source")
_p, _c, _r = stripe.params, stripe.params.checkout, stripe.params.radar

# (method, path, parameter type, what it does); `ID` is the object's id.
ENDPOINTS: tuple[tuple[str, str, Any, Handler], ...] = (
    (
        "POST",
        "/v1/customers",
        _p.CustomerCreateParams,
        lambda s, _, p: s.create_customer(p.get("name"), p.get("email"), p.get("metadata") or {}),
    ),
    ("GET", "/v1/customers/ID", _p.CustomerRetrieveParams, lambda s, i, _: s.get("customer", i)),
    ("DELETE", "/v1/customers/ID", _p.CustomerDeleteParams, lambda s, i, _: s.delete_customer(i)),
    ("POST", "/v1/checkout/sessions", _c.SessionCreateParams, lambda s, _, p: s.create_session(p)),
    ("GET", "/v1/checkout/sessions/ID", _c.SessionRetrieveParams, lambda s, i, _: s.get("checkout.session", i)),
    ("POST", "/v1/checkout/sessions/ID/expire", _c.SessionExpireParams, lambda s, i, _: s.expire_session(i)),
    ("POST", "/v1/payment_intents", _p.PaymentIntentCreateParams, lambda s, _, p: s.create_intent(p)),
    ("GET", "/v1/payment_intents/ID", _p.PaymentIntentRetrieveParams, lambda s, i, _: s.get("payment_intent", i)),
    ("GET", "/v1/payment_methods/ID", _p.PaymentMethodRetrieveParams, lambda s, i, _: s.get("payment_method", i)),
    ("POST", "/v1/payment_methods/ID/detach", _p.PaymentMethodDetachParams, lambda s, i, _: s.detach_method(i)),
    ("GET", "/v1/charges/ID", _p.ChargeRetrieveParams, lambda s, i, _: s.get("charge", i)),
    ("POST", "/v1/refunds", _p.RefundCreateParams, lambda s, _, p: s.create_refund(p)),
    ("GET", "/v1/refunds/ID", _p.RefundRetrieveParams, lambda s, i, _: s.get("refund", i)),
    ("GET", "/v1/disputes/ID", _p.DisputeRetrieveParams, lambda s, i, _: s.get("dispute", i)),
    ("POST", "/v1/invoices", _p.InvoiceCreateParams, lambda s, _, p: s.create_invoice(p)),
    ("GET", "/v1/invoices/ID", _p.InvoiceRetrieveParams, lambda s, i, _: s.get("invoice", i)),
    ("DELETE", "/v1/invoices/ID", _p.InvoiceDeleteParams, lambda s, i, _: s.delete_invoice(i)),
    ("POST", "/v1/invoiceitems", _p.InvoiceItemCreateParams, lambda s, _, p: s.create_invoice_item(p)),
    ("POST", "/v1/invoices/ID/finalize", _p.InvoiceFinalizeInvoiceParams, lambda s, i, _: s.finalize_invoice(i)),
    ("POST", "/v1/invoices/ID/pay", _p.InvoicePayParams, lambda s, i, _: s.pay_invoice(i)),
    ("POST", "/v1/invoices/ID/void", _p.InvoiceVoidInvoiceParams, lambda s, i, _: s.void_invoice(i)),
)
LISTS: tuple[tuple[str, str, Any], ...] = (
    ("/v1/customers", "customer", _p.CustomerListParams),
    ("/v1/checkout/sessions", "checkout.session", _c.SessionListParams),
    ("/v1/payment_intents", "payment_intent", _p.PaymentIntentListParams),
    ("/v1/charges", "charge", _p.ChargeListParams),
    ("/v1/refunds", "refund", _p.RefundListParams),
    ("/v1/disputes", "dispute", _p.DisputeListParams),
    ("/v1/invoices", "invoice", _p.InvoiceListParams),
    ("/v1/invoice_payments", "invoice_payment", _p.InvoicePaymentListParams),
    ("/v1/balance_transactions", "balance_transaction", _p.BalanceTransactionListParams),
    ("/v1/radar/early_fraud_warnings", "radar.early_fraud_warning", _r.EarlyFraudWarningListParams),
    ("/v1/events", "event", _p.EventListParams),
)
_PATTERNS = [
    (method, re.compile(path.replace("ID", "([A-Za-z0-9_]+)") + "$"), parameters, handler)
    for method, path, parameters, handler in ENDPOINTS
]


class Api:
    """Answers requests on `state`, with `faults`."""

    def __init__(self, state: Stripe, faults: Faults, webhooks: Webhooks, secret_key: str) -> None:
        self.state, self.faults, self.webhooks = state, faults, webhooks
        self.secret_key = secret_key
        self.calls: list[str] = []
        """`METHOD /path` of each request that was executed."""
        self._answers: dict[str, tuple[str, Answer]] = {}
        """By idempotency key: what was asked, and what was answered."""
        self._in_flight: set[str] = set()
        self.app = Starlette(
            routes=[
                Route("/pay/{id}", self.show_page, methods=["GET"]),
                Route("/pay/{id}", self.submit_page, methods=["POST"]),
                Route("/invoice/{id}", self.submit_invoice, methods=["POST"]),
                Route("/{path:path}", self.serve, methods=["GET", "POST", "DELETE"]),
            ]
        )

    async def serve(self, request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {self.secret_key}":
            return _error(Refused(401, "invalid_request_error", "", "Invalid API Key provided"))
        body = (await request.body()).decode() if request.method == "POST" else request.url.query
        key = request.headers.get("idempotency-key", "") if request.method == "POST" else ""
        asked = f"{request.method} {request.url.path}\n{body}"
        fault = self.faults.of_request(f"{request.method} {request.url.path}")
        if fault in ("409", "429"):
            kind = "rate_limit" if fault == "429" else "lock_timeout"
            return _error(Refused(int(fault), "invalid_request_error", kind, "Not right now"))
        if key in self._in_flight:
            return _error(Refused(409, "idempotency_error", "idempotency_key_in_use", f"{key} is being used"))
        if key and key in self._answers:
            before, (status, answer) = self._answers[key]
            if before != asked:
                message = "Keys for idempotent requests can only be used with the parameters they were first used with."
                return _error(Refused(400, "idempotency_error", "", message))
            return JSONResponse(answer, status, {"Idempotent-Replayed": "true"})
        if key:
            self._in_flight.add(key)
        try:
            status, answer, executed = await self._execute(request.method, request.url.path, body, fault)
        finally:
            self._in_flight.discard(key)
        if key and executed:
            self._answers[key] = (asked, (status, answer))
        if fault == "timeout":
            await asyncio.sleep(HANG_S)
        return JSONResponse(answer, status)

    async def _execute(self, method: str, path: str, body: str, fault: ApiFault | None) -> tuple[int, Object, bool]:
        if fault == "500_before":
            return 500, _body(Refused(500, "api_error", "", "Stripe failed")), True
        await asyncio.sleep(0)
        self.calls.append(f"{method} {path}")
        try:
            status, answer, executed = 200, self.answer(method, path, body), True
        except Refused as refused:
            status, answer, executed = refused.status, _body(refused), refused.status != 400
        if fault == "500_after":
            return 500, _body(Refused(500, "api_error", "", "Stripe failed")), True
        return status, answer, executed

    def answer(self, method: str, path: str, body: str) -> Object:
        if method == "GET":
            for address, kind, parameters in LISTS:
                if path == address:
                    return self._list(address, kind, checked(read_form(body), parameters))
        for verb, pattern, parameters, handler in _PATTERNS:
            found = pattern.match(path)
            if verb == method and found:
                params = checked(read_form(body), parameters)
                expand = params.pop("expand", [])
                answer = copy.deepcopy(handler(self.state, found.groups()[0] if found.groups() else "", params))
                for each in expand:
                    self._expand(answer, each.split("."))
                return answer
        raise invalid(f"Unrecognized request URL ({method}: {path})", "", 404)

    def _list(self, url: str, kind: str, params: Parameters) -> Object:
        rows = list(reversed(self.state.events)) if kind == "event" else list(self.state.all(kind))
        expand = params.pop("expand", [])
        limit = params.pop("limit", 10)
        if not 1 <= limit <= 100:
            raise invalid("limit: must be from 1 to 100")
        after, before = params.pop("starting_after", None), params.pop("ending_before", None)
        types = params.pop("types", None)
        if types is not None:
            if len(types) > 20:
                raise invalid("types: at most 20")
            rows = [row for row in rows if row["type"] in types]
        delivered = params.pop("delivery_success", None)
        if delivered is not None:
            rows = [row for row in rows if (row["id"] not in self.webhooks.failed) == delivered]
        created = params.pop("created", {})
        for name, bound in created.items() if isinstance(created, dict) else ():
            compare = {"gte": int.__ge__, "gt": int.__gt__, "lte": int.__le__, "lt": int.__lt__}[name]
            rows = [row for row in rows if compare(row["created"], int(bound))]
        payment = params.pop("payment", None)
        if payment is not None:
            rows = [row for row in rows if row["payment"].get("payment_intent") == payment.get("payment_intent")]
        for name, value in params.items():
            if name not in FILTERS:
                raise invalid(f"{name}: this filter is not offered here")
            rows = [row for row in rows if row.get(name) == value]
        ids = [row["id"] for row in rows]
        if after is not None:
            rows = rows[ids.index(after) + 1 :] if after in ids else []
        if before is not None:
            rows = rows[max(0, ids.index(before) - limit) : ids.index(before)] if before in ids else []
        page = copy.deepcopy(rows[:limit])
        for each in expand:
            for row in page:
                self._expand(row, each.removeprefix("data.").split("."))
        return {"object": "list", "url": url, "has_more": len(rows) > limit, "data": page}

    def _expand(self, node: Any, path: list[str]) -> None:
        if not path or not isinstance(node, dict):
            return
        if path[0] not in node:
            raise invalid(f"This property cannot be expanded ({path[0]}).")
        if isinstance(node[path[0]], str):
            node[path[0]] = copy.deepcopy(self._find(node[path[0]]))
        self._expand(node[path[0]], path[1:])

    def _find(self, object_id: str) -> Object:
        for kind, of_kind in self.state.objects.items():
            if object_id in of_kind and not kind.startswith("_"):
                return of_kind[object_id]
        raise invalid(f"No such object: {object_id}", "resource_missing", 404)

    # The hosted pages.

    async def show_page(self, request: Request) -> Response:
        session = self.state.objects.get("checkout.session", {}).get(request.path_params["id"])
        if session is None:
            return HTMLResponse("<h1>There is no such payment</h1>", 404)
        if session["status"] != "open":
            return HTMLResponse(f"<h1>This payment is {html.escape(session['status'])}</h1>", 410)
        return HTMLResponse(_page(session, ""))

    async def submit_page(self, request: Request) -> Response:
        session = self.state.objects.get("checkout.session", {}).get(request.path_params["id"])
        form = read_form((await request.body()).decode())
        if session is None:
            return HTMLResponse("<h1>There is no such payment</h1>", 404)
        if form.get("action") == "cancel":
            return RedirectResponse(session["cancel_url"], 303)
        try:
            self.state.pay_session(session["id"], form.get("card", GOOD).replace(" ", ""))
        except Refused as refused:
            return HTMLResponse(_page(session, refused.message), refused.status)
        return RedirectResponse(session["success_url"].replace("{CHECKOUT_SESSION_ID}", session["id"]), 303)

    async def submit_invoice(self, request: Request) -> Response:
        try:
            self.state.pay_invoice(request.path_params["id"])
        except Refused as refused:
            return HTMLResponse(f"<h1>{html.escape(refused.message)}</h1>", refused.status)
        return HTMLResponse("<h1>Paid</h1>")


def _page(session: Object, problem: str) -> str:
    cards = "".join(f"<option value='{card}'>{card}</option>" for card in CARDS)
    return f"""<!doctype html><meta charset=utf-8><title>Pay (test)</title>
<body style="font-family:system-ui;max-width:26rem;margin:4rem auto">
<p>No real money moves here: this is the fake Stripe of the tests.</p>
<h1>${session["amount_total"] / 100:.2f}</h1>
<p role=alert style="color:#b00">{html.escape(problem)}</p>
<form method=post>
<label>Card number <input name=card list=cards value="{GOOD}" autocomplete=off></label>
<datalist id=cards>{cards}</datalist>
<p><button id=pay name=action value=pay>Pay</button> <button id=cancel name=action value=cancel>Cancel</button></p>
</form>"""


def _body(refused: Refused) -> Object:
    return {"error": {"type": refused.kind, "code": refused.code, "message": refused.message, **refused.extra}}


def _error(refused: Refused) -> Response:
    return JSONResponse(_body(refused), refused.status)
