"""What a command must look like before the ledger reads it: whole mils, bounded numbers, ids that can be stored.

Callers are our own processes, so a malformed command is a bug; it is refused alone and its neighbours are served.
"""

import math
import re

from billing.commands import (
    AddPrice,
    ChargeUnits,
    CloseStatement,
    Command,
    CreateKey,
    Credit,
    ExpireLeases,
    Grant,
    Heartbeat,
    KeyTerms,
    PaymentCommand,
    Quote,
    Reserve,
    Reverse,
    RevokeKey,
    RotateKey,
    SetCreditLine,
    SetKeyTerms,
    SetMember,
    Settle,
    SetUnits,
    Transfer,
)
from billing.money import MAX_EXACT, MAX_MILS, part_of_rate
from billing.payments.checks import wrong_value
from billing.price_terms import MAX_TERMS_CHARS, terms_of, version_of

MAX_ID_CHARS = 200
MAX_DETAIL_CHARS = 300
MAX_LEASE_S = 7 * 86_400
MAX_IDEMPOTENCY_KEY_CHARS = 256
MAX_MODELS = 100
MAX_EVENTS = 100
MAX_DEDUPE_WINDOW_S = 86_400
"""As long as payloads are remembered."""


_PERIOD = re.compile(r"[0-9]{4}-(0[1-9]|1[0-2])")


def printable(text: str) -> str:
    """`text` as one bounded line that any database can store.

    Replaced and cut rather than refused: an odd character in a failure's reason must not stop the refund.
    """
    if len(text) <= MAX_DETAIL_CHARS and text.isprintable():
        return text
    return "".join(symbol if symbol.isprintable() else "\ufffd" for symbol in text)[:MAX_DETAIL_CHARS]


def malformed(command: Command) -> str | None:
    """What is wrong with the command, or None. Asked before anything else looks at it, so it must bear any value."""
    match command:
        case Reserve():
            return (
                _not_id("request_id", command.request_id)
                or _not_id("key_id", command.key_id)
                or _not_priced(command)
                or _not_text("detail", command.detail)
                or _not_lease("lease_s", command.lease_s)
                or _not_recognisable(command)
                or (_not_id("model", command.model) if command.model != "" else None)
                or (_not_id("quote_id", command.quote_id) if command.quote_id != "" else None)
            )
        case Quote():
            return (
                _not_id("quote_id", command.quote_id)
                or _not_id("key_id", command.key_id)
                or _not_id("model", command.model)
                or _not_priced(command)
                or _not_whole("price_version", command.price_version, 0)
                or _not_lease("valid_s", command.valid_s)
            )
        case Settle():
            return (
                _not_id("request_id", command.request_id)
                or _not_whole("frames_delivered", command.frames_delivered, 0)
                or _not_text("reason", command.reason)
            )
        case Heartbeat():
            if not isinstance(command.request_ids, tuple):
                return "request_ids must be a tuple"
            wrong_ids = (_not_id("request_ids", request_id) for request_id in command.request_ids)
            return next(filter(None, wrong_ids), None) or _not_lease("lease_s", command.lease_s)
        case Grant():
            return (
                _not_id("customer_id", command.customer_id)
                or _not_id("public_id", command.public_id)
                or _not_whole("amount_mils", command.amount_mils, 1)
                or _not_text("detail", command.detail)
            )
        case Credit():
            return (
                _not_id("customer_id", command.customer_id)
                or _not_whole("amount_mils", command.amount_mils, 1)
                or _not_payment(command)
            )
        case Reverse():
            return _not_whole("target_mils", command.target_mils, 0) or _not_payment(command)
        case CreateKey():
            return (
                _not_id("key_id", command.key_id)
                or _not_id("customer_id", command.customer_id)
                or _not_id("customer_name", command.customer_name)
                or _not_sha256("sha256", command.sha256)
                or _not_last4(command.last4)
                or _not_whole("initial_credits_mils", command.initial_credits_mils, 0)
                or _not_whole("burst", command.burst, 1)
                or _not_positive("refill_per_s", command.refill_per_s)
                or _not_terms(command.terms)
            )
        case SetKeyTerms():
            return _not_id("key_id", command.key_id) or _not_terms(command.terms)
        case RotateKey():
            return (
                _not_id("key_id", command.key_id)
                or _not_id("new_key_id", command.new_key_id)
                or _not_sha256("sha256", command.sha256)
                or _not_last4(command.last4)
            )
        case RevokeKey():
            return _not_id("key_id", command.key_id)
        case SetMember():
            return (
                _not_id("customer_id", command.customer_id)
                or _not_id("name", command.name)
                or _not_id("parent_id", command.parent_id)
                or _not_cap(command)
            )
        case Transfer():
            return (
                _not_id("transfer_id", command.transfer_id)
                or _not_id("from_id", command.from_id)
                or _not_id("to_id", command.to_id)
                or _not_whole("amount_mils", command.amount_mils, 1)
                or _not_text("detail", command.detail)
            )
        case SetCreditLine():
            return (
                _not_id("customer_id", command.customer_id)
                or _not_whole("limit_mils", command.limit_mils, 0)
                or (None if type(command.overdue) is bool else "overdue must be true or false")
            )
        case CloseStatement():
            if not (isinstance(command.period, str) and _PERIOD.fullmatch(command.period)):
                return "period must be a month such as 2027-01"
            return _not_id("customer_id", command.customer_id)
        case AddPrice():
            return _not_price(command)
        case SetUnits():
            return _not_units(command)
        case ExpireLeases() | ChargeUnits():
            return None
        case PaymentCommand():
            return wrong_value("command", command) or next(filter(None, map(malformed, command.money)), None)
        case _:
            return f"{type(command).__name__} is not a command"


def _not_id(name: str, value: object) -> str | None:
    if isinstance(value, str) and 1 <= len(value) <= MAX_ID_CHARS and value.isprintable() and value == value.strip():
        return None
    return f"{name} must be 1 to {MAX_ID_CHARS} printable characters without surrounding spaces"


def _not_payment(command: Credit | Reverse) -> str | None:
    if not isinstance(command.events, tuple) or len(command.events) > MAX_EVENTS:
        return f"events must be a tuple of at most {MAX_EVENTS}"
    return (
        _not_id("source", command.source)
        or _not_id("public_id", command.public_id)
        or _not_text("detail", command.detail)
        or next(filter(None, (_not_id("events", event_id) for event_id in command.events)), None)
    )


def _not_priced(command: Reserve | Quote) -> str | None:
    wrong = (
        _not_whole("frames", command.frames, 1)
        or _not_whole("mils_per_frame", command.mils_per_frame, 1)
        or _not_whole("per_frames", command.per_frames, 1)
    )
    if wrong is not None:
        return wrong
    if command.frames * command.mils_per_frame + command.per_frames > MAX_EXACT:
        return f"frames x mils_per_frame must be at most {MAX_EXACT}, or a database could not compute it"
    return _not_whole("the price", part_of_rate(command.frames, command.mils_per_frame, command.per_frames), 1)


def _not_cap(command: SetMember) -> str | None:
    if command.cap_mils is None and command.cap_period is None:
        return None
    if command.cap_period not in ("day", "month"):
        return "cap_period must be 'day' or 'month', with a cap"
    return _not_whole("cap_mils", command.cap_mils, 0)


def _not_price(command: AddPrice) -> str | None:
    wrong = (
        _not_id("model", command.model)
        or (_not_id("customer_id", command.customer_id) if command.customer_id != "" else None)
        or _not_whole("version", command.version, 1)
    )
    if wrong is not None:
        return wrong
    if not (type(command.effective_from) is float and math.isfinite(command.effective_from)):
        return "effective_from must be a time, as a float"
    if not isinstance(command.terms, str) or len(command.terms) > MAX_TERMS_CHARS:
        return f"terms must be text of at most {MAX_TERMS_CHARS} characters"
    try:
        version = version_of(command.model, command.customer_id, command.version, command.effective_from, command.terms)
    except ValueError as error:
        return str(error)
    return None if terms_of(version) == command.terms else "terms must be as `terms_of` writes them"


def _not_units(command: SetUnits) -> str | None:
    wrong = (
        _not_id("customer_id", command.customer_id)
        or _not_id("model", command.model)
        or _not_whole("version", command.version, 1)
        or _not_whole("units", command.units, 0)
        or _not_whole("unit_mils", command.unit_mils, 1)
        or _not_whole("unit_frames", command.unit_frames, 0)
        or _not_whole("units_per_replica", command.units_per_replica, 0)
        or _not_whole("units x unit_mils", command.units * command.unit_mils, 0)
        or _not_whole("units x unit_frames", command.units * command.unit_frames, 0)
    )
    if wrong is not None:
        return wrong
    if not (isinstance(command.from_period, str) and _PERIOD.fullmatch(command.from_period)):
        return "from_period must be a month such as 2027-01"
    if command.unit_frames == command.units_per_replica == 0:
        return "a unit must pay for frames or be part of a replica"
    return None


def _not_text(name: str, value: object) -> str | None:
    return None if isinstance(value, str) else f"{name} must be text"


def _not_whole(name: str, value: object, least: int) -> str | None:
    # `type`, not `isinstance`: True is an int, and 245.0 == 245.
    if type(value) is int and least <= value <= MAX_MILS:
        return None
    return f"{name} must be a whole number from {least} to {MAX_MILS}"


def _not_positive(name: str, value: object) -> str | None:
    if type(value) in (int, float) and math.isfinite(value) and value > 0:  # type: ignore[arg-type, operator]
        return None
    return f"{name} must be a positive number"


def _not_lease(name: str, value: object) -> str | None:
    if type(value) in (int, float) and 0 < value <= MAX_LEASE_S:  # type: ignore[operator]
        return None
    return f"{name} must be more than 0 and at most {MAX_LEASE_S} seconds"


def _not_recognisable(command: Reserve) -> str | None:
    """What is wrong with the fields that tell a repeated request from a new one."""
    key, payload, window = command.idempotency_key, command.payload_sha256, command.dedupe_window_s
    if key == "" and payload == "" and type(window) is float and window == 0.0:
        return None
    if not (isinstance(key, str) and len(key) <= MAX_IDEMPOTENCY_KEY_CHARS and key.isprintable()):
        return f"idempotency_key must be at most {MAX_IDEMPOTENCY_KEY_CHARS} printable characters"
    if type(window) not in (int, float) or not 0 <= window <= MAX_DEDUPE_WINDOW_S:
        return f"dedupe_window_s must be from 0 to {MAX_DEDUPE_WINDOW_S} seconds"
    if payload == "" and (key or window):
        return "payload_sha256 must be given with a key or a window, or other work could not be told apart"
    return None if payload == "" else _not_sha256("payload_sha256", payload)


def _not_terms(terms: object) -> str | None:
    if not isinstance(terms, KeyTerms):
        return "terms must be KeyTerms"
    if not (isinstance(terms.label, str) and len(terms.label) <= MAX_ID_CHARS and terms.label.isprintable()):
        return f"label must be at most {MAX_ID_CHARS} printable characters"
    if terms.scope not in ("spend", "read"):
        return "scope must be 'spend' or 'read'"
    if not isinstance(terms.models, tuple) or len(terms.models) > MAX_MODELS:
        return f"models must be a tuple of at most {MAX_MODELS}"
    for model in terms.models:
        if _not_id("models", model) or " " in model:
            return f"models must be names of 1 to {MAX_ID_CHARS} printable characters without spaces"
    expires = terms.expires_at
    if expires is not None and not (type(expires) in (int, float) and math.isfinite(expires)):
        return "expires_at must be a time or None"
    budgets = (("daily_budget_mils", terms.daily_budget_mils), ("monthly_budget_mils", terms.monthly_budget_mils))
    wrong = (_not_whole(name, budget, 0) for name, budget in budgets if budget is not None)
    return next(filter(None, wrong), None)


def _not_sha256(name: str, value: object) -> str | None:
    if isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef"):
        return None
    return f"{name} must be 64 lower-case hex digits"


def _not_last4(value: object) -> str | None:
    if isinstance(value, str) and len(value) == 4 and value.isascii() and value.isprintable():
        return None
    return "last4 must be 4 printable characters"
