"""One table from error to status, one body with both shapes, and a docstring that tells all of it."""

import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.exceptions import HTTPException

from billing.money import Mils
from deployments import errors as engine_errors
from deployments.errors import (
    BudgetUsedUp,
    CreditsInsufficient,
    DeadlinePassed,
    EngineFailed,
    IdempotencyKeyReused,
    KeyNotAccepted,
    KeyNotAllowed,
    LedgerUnavailable,
    ModelOverloaded,
    QuoteNotAccepted,
    ResultExpired,
    RolloutCanceled,
    RolloutError,
    SessionBudgetSpent,
    SessionBusy,
    SessionLimit,
    SessionUnknown,
    TooManyJobs,
)
from deployments.payments import errors as payment_errors
from deployments.payments.errors import (
    CardDeclined,
    LedgerRefused,
    PageOver,
    PaymentError,
    PaymentsDisabled,
    StripeFailed,
    StripeRefused,
    StripeUnavailable,
    TooManyPages,
    TopupKeyReused,
)
from serve_app import errors
from serve_app.errors import (
    PAYMENT_ERRORS,
    ROLLOUT_ERRORS,
    ApiError,
    BadSignature,
    BodyTooLarge,
    BodyTooSlow,
    Forbidden,
    GatewayFull,
    Gone,
    InvalidRequest,
    ModelNotFound,
    ModelRefused,
    NotAuthenticated,
    NotFound,
    RateLimited,
    UnsupportedBody,
)
from serve_app.schemas import ErrorBody
from tests.support.app import App
from tests.support.payloads import actions, npy, png

CODES = {
    "AUTHENTICATION_FAILED",
    "INSUFFICIENT_BALANCE",
    "INVALID_REQUEST",
    "MODEL_NOT_FOUND",
    "MODEL_DISABLED",
    "RATE_LIMITED",
    "OVERLOADED",
    "IDEMPOTENCY_CONFLICT",
    "ENGINE_FAILED",
    "DEADLINE_EXCEEDED",
    "PAYMENTS_DISABLED",
    "PAYMENTS_UNAVAILABLE",
    "PAYMENT_REFUSED",
}
"""All that clients know."""

EXAMPLES: list[tuple[Exception, int, str, str]] = [
    (NotAuthenticated("who?"), 401, "AUTHENTICATION_FAILED", "who?"),
    (Forbidden("not you"), 403, "AUTHENTICATION_FAILED", "not you"),
    (RateLimited(7), 429, "RATE_LIMITED", "this key's request rate is used up; try again in 7 s"),
    (BodyTooSlow(120.0), 408, "INVALID_REQUEST", "body: had not arrived within the 120 s that are given to it"),
    (BodyTooLarge(10), 413, "INVALID_REQUEST", "body: larger than the 10 bytes that are accepted"),
    (UnsupportedBody("only forms"), 415, "INVALID_REQUEST", "only forms"),
    (InvalidRequest("frame", "is empty"), 422, "INVALID_REQUEST", "frame: is empty"),
    (ModelRefused("params.model", "is not run"), 422, "MODEL_NOT_FOUND", "params.model: is not run"),
    (NotFound("no video"), 404, "INVALID_REQUEST", "no video"),
    (Gone("too late"), 410, "INVALID_REQUEST", "too late"),
    (ModelNotFound("no model"), 404, "MODEL_NOT_FOUND", "no model"),
    (
        CreditsInsufficient(Mils(244), Mils(245)),
        402,
        "INSUFFICIENT_BALANCE",
        "the balance is 244 mils and this request needs 245; add credits",
    ),
    (
        QuoteNotAccepted("the quote has expired"),
        422,
        "INVALID_REQUEST",
        "X-DreamEngine-Quote-Id: the quote has expired; ask for a new quote with dryRun=true. Nothing was charged",
    ),
    (
        IdempotencyKeyReused(),
        422,
        "IDEMPOTENCY_CONFLICT",
        "Idempotency-Key: was used before with another payload; use a new key for new work",
    ),
    (
        ResultExpired(),
        410,
        "INVALID_REQUEST",
        "this was delivered before, and its video has expired; send it as new work to run it again",
    ),
    (KeyNotAccepted(), 401, "AUTHENTICATION_FAILED", "the API key was revoked or has expired"),
    (KeyNotAllowed("read only"), 403, "AUTHENTICATION_FAILED", "the API key may not do this: read only"),
    (
        BudgetUsedUp(Mils(500), Mils(300), Mils(245), "day", 1_800_000_000.0),
        402,
        "INSUFFICIENT_BALANCE",
        "the API key's budget is 500 mils per day and 200 are left; this request needs 245. It starts anew at"
        " 1800000000 (POSIX seconds)",
    ),
    (
        BudgetUsedUp(Mils(500), Mils(300), Mils(245), "month", 1_800_000_000.0, "team"),
        402,
        "INSUFFICIENT_BALANCE",
        "this member's cap on its team's money is 500 mils per month and 200 are left; this request needs 245. It"
        " starts anew at 1800000000 (POSIX seconds)",
    ),
    (
        RolloutCanceled(),
        409,
        "INVALID_REQUEST",
        "this was sent before and then canceled; use a new Idempotency-Key, or send it again in a minute",
    ),
    (
        TooManyJobs(1_000, 9),
        429,
        "RATE_LIMITED",
        "1000 of your jobs are waiting or running, and no more may; try again in 9 s",
    ),
    (
        ModelOverloaded("tiny-pusher", 3),
        503,
        "OVERLOADED",
        "tiny-pusher has no room right now; try again in 3 s. Nothing was charged",
    ),
    (
        LedgerUnavailable(),
        503,
        "OVERLOADED",
        "the ledger cannot be reached; nothing runs that is not paid for. Try again shortly",
    ),
    (
        GatewayFull(),
        503,
        "OVERLOADED",
        "too many bodies are being received at once; try again shortly. Nothing was charged",
    ),
    (
        SessionLimit(),
        429,
        "RATE_LIMITED",
        "too many sessions are open; close one, or wait for one to end. Nothing was charged",
    ),
    (
        SessionBudgetSpent(5, 12),
        422,
        "INVALID_REQUEST",
        "actions: the session has 5 frames of its budget left and this needs 12; send fewer actions, or create another"
        " session",
    ),
    (
        SessionUnknown(),
        404,
        "INVALID_REQUEST",
        "there is no such session, or it has ended; create one with POST /v1/sessions",
    ),
    (
        SessionBusy(),
        409,
        "INVALID_REQUEST",
        "somebody is connected to this session already; each has one connection",
    ),
    (
        EngineFailed("tiny-pusher", "it raised"),
        500,
        "ENGINE_FAILED",
        "tiny-pusher failed: it raised. Nothing is charged for it",
    ),
    (
        DeadlinePassed("tiny-pusher"),
        504,
        "DEADLINE_EXCEEDED",
        "tiny-pusher cannot finish this by its deadline; allow more time or send less. Nothing was charged",
    ),
    (BadSignature("not Stripe"), 400, "INVALID_REQUEST", "not Stripe"),
    (
        PaymentsDisabled(),
        503,
        "PAYMENTS_DISABLED",
        "payments are switched off here: the operator has set no STRIPE_SECRET_KEY; credits are granted by hand",
    ),
    *(
        (error, 503, "PAYMENTS_UNAVAILABLE", "Stripe does not answer (gone); nothing is lost, try again shortly")
        for error in (StripeUnavailable("gone"), StripeFailed("gone"))
    ),
    (StripeRefused("no_such_card", "No."), 502, "PAYMENT_REFUSED", "Stripe refused: no_such_card"),
    (CardDeclined("insufficient_funds", "No.", "pi_1"), 502, "PAYMENT_REFUSED", "Stripe refused: insufficient_funds"),
    (LedgerRefused("bug"), 500, "ENGINE_FAILED", "bug"),
    (
        PageOver("expired"),
        422,
        "IDEMPOTENCY_CONFLICT",
        "Idempotency-Key: its payment page is over (expired); use a new key for a new page",
    ),
    (
        TopupKeyReused(500),
        422,
        "IDEMPOTENCY_CONFLICT",
        "Idempotency-Key: was used before for 500 cents; use a new key for another amount",
    ),
    (
        TooManyPages(5, 60),
        429,
        "RATE_LIMITED",
        "5 payment pages are open already; pay on one of them, or wait until one expires",
    ),
    (HTTPException(418, "teapot"), 418, "INVALID_REQUEST", "teapot"),
]
RETRY_AFTER = {
    RateLimited: "7",
    TooManyJobs: "9",
    ModelOverloaded: "3",
    LedgerUnavailable: "2",
    SessionLimit: "10",
    GatewayFull: "1",
    PaymentsDisabled: "3600",
    StripeUnavailable: "5",
    StripeFailed: "5",
    TooManyPages: "60",
}


def descendants(root: type[Exception]) -> Iterator[type[Exception]]:
    for child in root.__subclasses__():
        yield child
        yield from descendants(child)


def documented(docstring: str | None) -> dict[str, str]:
    """Name -> what stands beside it, in the tree that a docstring draws."""
    assert docstring is not None
    return dict(re.findall(r"^[│ ]*[├└]── (\w+) *(.*)$", docstring, re.MULTILINE))


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    """An application with one route that raises `EXAMPLES[index]`."""
    api = FastAPI()
    errors.install(api, lambda request, refused: None)

    @api.get("/{index}")
    async def fail(index: int) -> None:
        raise EXAMPLES[index][0]

    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://cluster.test") as client:
        yield client


@pytest.mark.parametrize("index", range(len(EXAMPLES)), ids=[type(example[0]).__name__ for example in EXAMPLES])
async def test_every_error_has_its_status_its_code_and_both_shapes(http: httpx.AsyncClient, index: int) -> None:
    error, status, code, message = EXAMPLES[index]
    answer = await http.get(f"/{index}")
    body = answer.json()
    assert answer.status_code == status
    assert body["error"] == {
        "message": message,
        "type": "invalid_request_error" if status < 500 else "api_error",
        "code": code,
    }
    assert set(body) == {"detail", "error"}
    if isinstance(error, BudgetUsedUp):
        assert body["detail"]["balance_mils"] == 200  # what is left of the budget
        assert body["detail"]["limit_source"] == error.source
    elif status == 402:
        assert body["detail"] == {
            "balance_mils": 244,
            "requested_mils": 245,
            "balance_cents": 2,
            "requested_cents": 3,
            "message": message,
        }
    else:
        assert body["detail"] == message
    assert answer.headers.get("Retry-After") == RETRY_AFTER.get(type(error))
    assert code in CODES
    ErrorBody.model_validate(body)


def test_there_is_an_example_of_every_error() -> None:
    shown = {type(example[0]) for example in EXAMPLES}
    assert {*descendants(ApiError), *descendants(RolloutError), *descendants(PaymentError)} <= shown


def test_every_error_of_the_engine_and_of_payments_is_in_its_table() -> None:
    assert set(ROLLOUT_ERRORS) == set(descendants(RolloutError))
    assert set(PAYMENT_ERRORS) == set(descendants(PaymentError))


def test_every_429_and_503_says_when_to_come_again() -> None:
    busy = {type(error) for error, status, *_ in EXAMPLES if status in (429, 503)}
    assert busy == set(RETRY_AFTER)


def test_the_tree_of_http_errors_is_complete_and_tells_their_statuses() -> None:
    tree = documented(errors.__doc__)
    classes: dict[str, Any] = {error.__name__: error for error in descendants(ApiError)}
    assert set(tree) == set(classes)
    assert {name: int(beside.split()[0]) for name, beside in tree.items()} == {
        name: error.status for name, error in classes.items()
    }


def test_the_trees_of_rollout_and_payment_errors_are_complete() -> None:
    assert set(documented(engine_errors.__doc__)) == {error.__name__ for error in descendants(RolloutError)}
    assert set(documented(payment_errors.__doc__)) == {error.__name__ for error in descendants(PaymentError)}


async def test_a_401_says_how_to_authenticate(http: httpx.AsyncClient) -> None:
    assert (await http.get("/0")).headers["WWW-Authenticate"] == "Bearer"


async def test_a_parameter_of_the_wrong_type_is_422_in_both_shapes(http: httpx.AsyncClient) -> None:
    answer = await http.get("/none")
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "INVALID_REQUEST"
    assert answer.json()["detail"] == answer.json()["error"]["message"]
    assert answer.json()["detail"].startswith("index: ")


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nothing", 404), ("DELETE", "/v1/models", 405), ("GET", "/v1/predict", 405)]
)
async def test_a_route_that_is_not_there_is_refused_in_both_shapes(
    app: App, method: str, path: str, status: int
) -> None:
    answer = await app.http.request(method, path)
    assert answer.status_code == status
    assert answer.json()["detail"] == answer.json()["error"]["message"]
    assert answer.json()["error"]["code"] == "INVALID_REQUEST"
    assert ("allow" in answer.headers) == (status == 405)


@pytest.mark.parametrize(("path", "num_candidates"), [("/v1/predict", 1), ("/v1/predict/batch", 3)])
async def test_a_balance_one_mil_short_is_402_and_the_exact_balance_is_spent(
    app: App, path: str, num_candidates: int
) -> None:
    price = 245 * num_candidates
    files = [("frame", png()), *[("actions", npy(actions(seed=index))) for index in range(num_candidates)]]
    short, short_id = app.key(credits_mils=price - 1)
    answer = await app.http.post(path, headers=short, files=files)
    assert answer.status_code == 402
    detail = answer.json()["detail"]
    assert (detail["balance_mils"], detail["requested_mils"]) == (price - 1, price)
    assert detail["requested_cents"] * 100 >= price
    assert app.ledger.rows(short_id) == [("credit", price - 1)]
    exact, exact_id = app.key(credits_mils=price)
    assert (await app.http.post(path, headers=exact, files=files)).status_code == 200
    assert app.ledger.rows(exact_id) == [("credit", price), ("debit", -price)]
