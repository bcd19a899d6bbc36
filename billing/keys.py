"""Secrets and names: how a token looks, what of it is stored, and how ids are made."""

import hashlib
import re
import secrets
import time

from billing.commands import CustomerId, KeyId, RequestId

TOKEN_PREFIX = "dre_"  # noqa: S105 - the public half of every token
TOKEN_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"  # noqa: S105 - base32 in lower case
TOKEN_LENGTH = 43
"""Symbols after the prefix: 215 random bits."""

_TOKEN = re.compile(rf"{TOKEN_PREFIX}[{TOKEN_ALPHABET}]{{{TOKEN_LENGTH}}}", re.ASCII)


def mint_token() -> str:
    """A new secret. Shown to its owner once; the ledger only ever sees its hash."""
    return TOKEN_PREFIX + "".join(secrets.choice(TOKEN_ALPHABET) for _ in range(TOKEN_LENGTH))


def is_token_shaped(text: str) -> bool:
    """Whether `text` could be a token at all: checked before anything is hashed or looked up."""
    return _TOKEN.fullmatch(text) is not None


def token_sha256(token: str) -> str:
    """Hex digest of the whole token, the prefix included. No salt is needed for 215 random bits."""
    return hashlib.sha256(token.encode()).hexdigest()


def mint_key_id() -> KeyId:
    return KeyId(f"key_{secrets.token_hex(16)}")


def mint_customer_id() -> CustomerId:
    return CustomerId(f"cus_{secrets.token_hex(16)}")


def mint_grant_id() -> str:
    return f"adm_{secrets.token_hex(16)}"


def mint_transfer_id() -> str:
    return f"tra_{secrets.token_hex(16)}"


def mint_quote_id() -> str:
    return f"quo_{secrets.token_hex(16)}"


def mint_request_id() -> RequestId:
    """Begins with the time in milliseconds: ids that are made together lie together in the database's indexes.

    The other 80 bits are random, so an id cannot be guessed.
    """
    return RequestId(f"req_{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}")


def initial_grant_id(key_id: KeyId) -> str:
    """The id of the credit that came with a key: the same for the same key, so that a retry cannot grant twice."""
    return f"adm_{hashlib.sha256(f'initial credits of {key_id}'.encode()).hexdigest()[:32]}"


def unit_charge_id(customer_id: CustomerId, model: str, period: str) -> str:
    """The id of a month's charge: the same for the same month, so that it is charged once."""
    return f"uni_{hashlib.sha256(f'{period} of {model} by {customer_id}'.encode()).hexdigest()[:32]}"


def budget_event_id(budget_id: str, period: str, starts_day: int, limit_mils: int, level: int) -> str:
    """The same for the same level of the same budget and period; another limit is another budget to warn of."""
    name = f"{level}% of {limit_mils} mils in the {period} from {starts_day} by {budget_id}"
    return f"evt_{hashlib.sha256(name.encode()).hexdigest()[:32]}"
