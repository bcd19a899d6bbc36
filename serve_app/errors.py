"""Errors on the wire: what is refused before the engine sees it, and the one table from error to status.

ApiError                     (status, code, message)
├── NotAuthenticated    401  no key, or one that is malformed, unknown or revoked
├── Forbidden           403  a signature that does not match
├── RateLimited         429  the key's bucket is empty
├── BodyTooSlow         408  the body had not arrived in its time
├── BodyTooLarge        413
├── BadSignature        400  not signed by Stripe, or not one of its events
├── GatewayFull         503  the bodies that are being received are as much as this gateway holds
├── UnsupportedBody     415
├── InvalidRequest      422  names the field, what was wrong and what is accepted
│   └── ModelRefused    422  a model that is not run here, on a route where a 404 would be misread
├── NotFound            404  an unknown id
├── Gone                410  an expired link
└── ModelNotFound       404  not on `POST /v1/rollouts`, which answers 422: the public client takes a 404 there for a
                             missing route and sends the work again without its model
"""

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from billing.money import Mils, cents, cents_rounded_up
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


class ApiError(Exception):
    status = 500
    code = "ENGINE_FAILED"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    @property
    def headers(self) -> Mapping[str, str]:
        return {}


class NotAuthenticated(ApiError):
    status, code = 401, "AUTHENTICATION_FAILED"

    @property
    def headers(self) -> Mapping[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class Forbidden(ApiError):
    status, code = 403, "AUTHENTICATION_FAILED"


class RateLimited(ApiError):
    status, code = 429, "RATE_LIMITED"

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"this key's request rate is used up; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> Mapping[str, str]:
        return {"Retry-After": str(self.retry_after_s)}


class BodyTooSlow(ApiError):
    status, code = 408, "INVALID_REQUEST"

    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"body: had not arrived within the {timeout_s:g} s that are given to it")


class BodyTooLarge(ApiError):
    status, code = 413, "INVALID_REQUEST"

    def __init__(self, max_body_bytes: int) -> None:
        super().__init__(f"body: larger than the {max_body_bytes} bytes that are accepted")


class BadSignature(ApiError):
    status, code = 400, "INVALID_REQUEST"


class GatewayFull(ApiError):
    status, code = 503, "OVERLOADED"
    retry_after_s = 1

    def __init__(self) -> None:
        super().__init__("too many bodies are being received at once; try again shortly. Nothing was charged")

    @property
    def headers(self) -> Mapping[str, str]:
        return {"Retry-After": str(self.retry_after_s)}


class UnsupportedBody(ApiError):
    status, code = 415, "INVALID_REQUEST"


class InvalidRequest(ApiError):
    status, code = 422, "INVALID_REQUEST"

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class ModelRefused(InvalidRequest):
    """A model that this base URL does not run, on a route where a 404 would be misread."""

    code = "MODEL_NOT_FOUND"


class NotFound(ApiError):
    status, code = 404, "INVALID_REQUEST"


class Gone(ApiError):
    status, code = 410, "INVALID_REQUEST"


class ModelNotFound(ApiError):
    status, code = 404, "MODEL_NOT_FOUND"


ROLLOUT_ERRORS: Mapping[type[RolloutError], tuple[int, str]] = {
    CreditsInsufficient: (402, "INSUFFICIENT_BALANCE"),
    KeyNotAccepted: (401, "AUTHENTICATION_FAILED"),
    KeyNotAllowed: (403, "AUTHENTICATION_FAILED"),
    BudgetUsedUp: (402, "INSUFFICIENT_BALANCE"),
    QuoteNotAccepted: (422, "INVALID_REQUEST"),
    IdempotencyKeyReused: (422, "IDEMPOTENCY_CONFLICT"),
    ResultExpired: (410, "INVALID_REQUEST"),
    RolloutCanceled: (409, "INVALID_REQUEST"),
    TooManyJobs: (429, "RATE_LIMITED"),
    ModelOverloaded: (503, "OVERLOADED"),
    LedgerUnavailable: (503, "OVERLOADED"),
    DeadlinePassed: (504, "DEADLINE_EXCEEDED"),
    SessionLimit: (429, "RATE_LIMITED"),
    SessionBudgetSpent: (422, "INVALID_REQUEST"),
    SessionUnknown: (404, "INVALID_REQUEST"),
    SessionBusy: (409, "INVALID_REQUEST"),
    EngineFailed: (500, "ENGINE_FAILED"),
}


PAYMENT_ERRORS: Mapping[type[PaymentError], tuple[int, str]] = {
    PaymentsDisabled: (503, "PAYMENTS_DISABLED"),
    StripeUnavailable: (503, "PAYMENTS_UNAVAILABLE"),
    StripeFailed: (503, "PAYMENTS_UNAVAILABLE"),
    StripeRefused: (502, "PAYMENT_REFUSED"),
    CardDeclined: (502, "PAYMENT_REFUSED"),
    TopupKeyReused: (422, "IDEMPOTENCY_CONFLICT"),
    PageOver: (422, "IDEMPOTENCY_CONFLICT"),
    TooManyPages: (429, "RATE_LIMITED"),
    LedgerRefused: (500, "ENGINE_FAILED"),
}
PAYMENTS_DISABLED_FOR_S = 3600
"""What a client is told to wait while an operator has to act."""


def error_response(
    status: int, code: str, message: str, *, detail: Any = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """One body with both shapes clients know; `detail` is the message unless a status needs an object there."""
    kind = "invalid_request_error" if status < 500 else "api_error"
    body = {
        "detail": message if detail is None else detail,
        "error": {"message": message, "type": kind, "code": code},
    }
    return JSONResponse(body, status_code=status, headers=dict(headers or {}))


def insufficient_detail(balance: Mils, requested: Mils, message: str) -> dict[str, int | str]:
    return {
        "balance_mils": balance,
        "requested_mils": requested,
        "balance_cents": cents(balance),
        "requested_cents": cents_rounded_up(requested),
        "message": message,
    }


def install(app: FastAPI, on_shortage: Callable[[Request, CreditsInsufficient], None]) -> None:
    """Make every error that a route raises on purpose take the one shape; any other is the middleware's."""

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> JSONResponse:
        return error_response(error.status, error.code, error.message, headers=error.headers)

    @app.exception_handler(RolloutError)
    async def rollout_error(request: Request, error: RolloutError) -> JSONResponse:
        status, code = ROLLOUT_ERRORS[type(error)]
        headers = {}
        if isinstance(error, ModelOverloaded | TooManyJobs | LedgerUnavailable | SessionLimit):
            headers["Retry-After"] = str(error.retry_after_s)
        detail = None
        if isinstance(error, CreditsInsufficient):
            on_shortage(request, error)
            detail = insufficient_detail(error.balance_mils, error.requested_mils, str(error))
        if isinstance(error, BudgetUsedUp):
            left = Mils(max(0, error.limit_mils - error.spent_mils))
            detail = insufficient_detail(left, error.requested_mils, str(error)) | {"limit_source": error.source}
        return error_response(status, code, str(error), detail=detail, headers=headers)

    @app.exception_handler(PaymentError)
    async def payment_error(_: Request, error: PaymentError) -> JSONResponse:
        status, code = PAYMENT_ERRORS[type(error)]
        headers = {}
        if isinstance(error, StripeUnavailable | TooManyPages):
            headers["Retry-After"] = str(error.retry_after_s)
        if isinstance(error, PaymentsDisabled):
            headers["Retry-After"] = str(PAYMENTS_DISABLED_FOR_S)
        return error_response(status, code, str(error), headers=headers)

    @app.exception_handler(RequestValidationError)
    async def validation_error(_: Request, error: RequestValidationError) -> JSONResponse:
        problems = "; ".join(f"{'.'.join(map(str, each['loc'][1:]))}: {each['msg']}" for each in error.errors())
        return error_response(422, "INVALID_REQUEST", problems)

    @app.exception_handler(HTTPException)
    async def http_exception(_: Request, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, "INVALID_REQUEST", str(error.detail), headers=error.headers)
