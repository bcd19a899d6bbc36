"""Who may ask: the key decides, before a byte of the body is read, and it is never repeated."""

import logging
from collections.abc import AsyncIterator, MutableMapping
from typing import Any

import pytest
import structlog
from sqlalchemy.exc import OperationalError
from structlog.testing import capture_logs

from billing.commands import KeyId, KeyRevoked, KeyTerms, RevokeKey, SetKeyTerms
from billing.keys import TOKEN_LENGTH, TOKEN_PREFIX, mint_token, token_sha256
from billing.money import Mils
from billing.reader import LedgerReader
from deployments.logs import configure_logs
from tests.support.app import App
from tests.support.hostile import MULTIPART
from tests.support.payloads import actions, npy, png

PAID = ["/v1/rollouts", "/v1/predict", "/v1/predict/batch"]
KEYED = [
    *[("POST", path) for path in PAID],
    *[("POST", f"/models/tiny-pusher{path}") for path in PAID],
    ("GET", "/v1/billing/balance"),
    ("GET", "/v1/billing/transactions"),
    ("GET", "/models/tiny-pusher/v1/billing/balance"),
]
OPEN = ["/healthz", "/v1/models", "/v1/models/tiny-pusher", "/v1/specs", "/v1/status"]


async def unread() -> AsyncIterator[bytes]:
    raise AssertionError("the body was read")
    yield b""


def key_id(app: App, headers: dict[str, str]) -> KeyId:
    record = app.ledger.reader.key_by_token_hash(token_sha256(headers["Authorization"].removeprefix("Bearer ")))
    assert record is not None
    return record.key_id


def revoke(app: App, headers: dict[str, str]) -> None:
    assert isinstance(app.ledger.apply(RevokeKey(key_id(app, headers))), KeyRevoked)


def as_logged(line: MutableMapping[str, Any]) -> str:
    """What the cluster writes of a captured line, its traceback included."""
    configure_logs()
    processors = structlog.get_config()["processors"]
    structlog.reset_defaults()
    written: Any = line
    for processor in processors:
        written = processor(None, line["log_level"], written)
    return str(written)


@pytest.mark.parametrize(("method", "path"), KEYED)
async def test_no_key_is_401_before_the_body_is_read(app: App, method: str, path: str) -> None:
    answer = await app.http.request(method, path, headers=MULTIPART, content=unread())
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "AUTHENTICATION_FAILED"
    assert answer.json()["detail"] == answer.json()["error"]["message"]
    assert "Authorization: Bearer" in answer.json()["detail"]


@pytest.mark.parametrize("path", OPEN)
async def test_the_catalog_and_the_health_need_no_key(app: App, path: str) -> None:
    assert (await app.http.get(path)).status_code == 200
    assert (await app.http.get(path, headers={"Authorization": "Bearer nonsense"})).status_code == 200


TOKEN = TOKEN_PREFIX + ("k7m2" * TOKEN_LENGTH)[:TOKEN_LENGTH]


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ("", "send your API key"),
        ("Bearer", "send your API key"),
        ("Bearer ", "send your API key"),
        (TOKEN, "send your API key"),
        (f"Basic {TOKEN}", "send your API key"),
        (f"Token {TOKEN}", "send your API key"),
        (f"Bearer:{TOKEN}", "send your API key"),
        ("Bearer dre_", "malformed"),
        ("Bearer x", "malformed"),
        (f"Bearer  {TOKEN}", "malformed"),
        (f"Bearer {TOKEN} {TOKEN}", "malformed"),
        (f"Bearer {TOKEN},", "malformed"),
        (f"Bearer {TOKEN[:-1]}", "malformed"),
        (f"Bearer {TOKEN}a", "malformed"),
        (f"Bearer {TOKEN.upper()}", "malformed"),
        (f"Bearer {TOKEN.removeprefix('dre_')}", "malformed"),
        (f"Bearer {TOKEN[:-1]}1", "malformed"),
        (f"Bearer {TOKEN[:-1]}\xb2", "malformed"),
        (f"Bearer {TOKEN[:-1]}\x00", "malformed"),
        ("Bearer " + "a" * 50_000, "malformed"),
        (f"Bearer {TOKEN}", "not known here"),
        (f"bearer {TOKEN}", "not known here"),
        (f"BEARER {TOKEN}", "not known here"),
    ],
    ids=lambda case: repr(case.replace(TOKEN, "KEY"))[:30],
)
async def test_a_key_that_is_not_one_of_ours_is_401_and_says_why(app: App, header: str, why: str) -> None:
    headers = {b"Authorization": header.encode("latin-1"), b"Content-Type": MULTIPART["Content-Type"].encode()}
    answer = await app.http.post("/v1/predict", headers=headers, content=unread())
    assert answer.status_code == 401
    assert why in answer.json()["detail"]
    assert TOKEN not in answer.text


async def test_a_revoked_key_is_401_at_once_and_other_keys_still_work(app: App) -> None:
    headers, _ = app.key()
    other, _ = app.key()
    assert (await app.http.get("/v1/billing/balance", headers=headers)).status_code == 200
    revoke(app, headers)
    for method, path in KEYED:
        answer = await app.http.request(method, path, headers={**headers, **MULTIPART}, content=unread())
        assert answer.status_code == 401
        assert "revoked" in answer.json()["detail"]
    assert (await app.http.get("/v1/billing/balance", headers=other)).status_code == 200


async def test_a_key_sees_its_own_customer_only(app: App) -> None:
    (mine, my_id), (_, other_id) = app.key(credits_mils=1000), app.key(credits_mils=2000)
    for path in ("/v1/billing/balance", "/v1/billing/transactions"):
        answer = await app.http.get(path, headers=mine, params={"customer_id": other_id})
        assert answer.json()["customer_id"] == my_id


@pytest.mark.parametrize(("method", "path"), KEYED)
async def test_an_empty_bucket_is_429_before_the_body_is_read(app: App, method: str, path: str) -> None:
    headers, customer = app.key(refill_per_s=0.001, burst=1)
    assert (await app.http.get("/v1/billing/balance", headers=headers)).status_code == 200
    answer = await app.http.request(method, path, headers={**headers, **MULTIPART}, content=unread())
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "RATE_LIMITED"
    assert answer.headers["Retry-After"] == "1000"
    assert "1000 s" in answer.json()["detail"]
    assert app.ledger.rows(customer) == [("credit", 1_000_000)]


async def test_the_catalog_costs_no_token(app: App) -> None:
    headers, _ = app.key(refill_per_s=0.001, burst=1)
    for path in OPEN:
        assert (await app.http.get(path, headers=headers)).status_code == 200
    assert (await app.http.get("/v1/billing/balance", headers=headers)).status_code == 200


@pytest.mark.parametrize("path", PAID)
async def test_a_paid_request_costs_one_token(app: App, path: str) -> None:
    headers, _ = app.key(refill_per_s=0.001, burst=1)
    answer = await app.http.post(path, headers=headers, params={"dryRun": "true"}, files={"frame": b""})
    assert answer.status_code == 422
    answer = await app.http.post(path, headers=headers, params={"dryRun": "true"}, files={"frame": b""})
    assert answer.status_code == 429


@pytest.mark.parametrize("extra", [{"params": {"dryRun": "true"}}, {"headers": {"Idempotency-Key": "1"}}])
async def test_a_stranger_learns_of_no_other_mistake(app: App, extra: dict[str, dict[str, str]]) -> None:
    for path in (*PAID, "/models/unknown/v1/predict"):
        assert (await app.http.post(path, **extra)).status_code == 401  # type: ignore[arg-type]


async def test_the_key_is_never_logged_nor_answered(
    app: App, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    headers, _ = app.key(burst=8, refill_per_s=0.001)
    token = headers["Authorization"].removeprefix("Bearer ")
    unknown = {"Authorization": f"Bearer {mint_token()}"}
    files = {"frame": png(), "actions": npy(actions())}

    async def broken(*_: object) -> None:
        raise RuntimeError("a bug with a request at hand")

    with capture_logs() as logs:
        answers = [
            await app.http.post("/v1/predict", headers=headers, files=files),
            await app.http.post("/v1/predict", headers=headers, files={"frame": b"", "actions": b""}),
            await app.http.post("/v1/predict", headers={**headers, **MULTIPART}, content=b"garbage"),
            await app.http.get("/v1/billing/transactions", headers=headers),
            await app.http.get("/v1/billing/transactions", headers=unknown),
            await app.http.get("/v1/billing/transactions", headers={"Authorization": f"Basic {token}"}),
        ]
        monkeypatch.setattr(type(app.services.ingress), "run", broken)
        files = {"frame": png(seed=1), "actions": npy(actions())}
        answers.append(await app.http.post("/v1/predict", headers=headers, files=files))
        revoke(app, headers)
        answers.append(await app.http.get("/v1/billing/balance", headers=headers))
    assert [answer.status_code for answer in answers] == [200, 422, 422, 200, 401, 401, 500, 401]
    written = [as_logged(line) for line in logs]
    assert any("a bug with a request at hand" in line for line in written)
    said = [*written, caplog.text, *(f"{answer.headers}{answer.content!r}" for answer in answers)]
    for text in said:
        assert token not in text
        assert unknown["Authorization"].removeprefix("Bearer ") not in text
        assert token_sha256(token) not in text


async def test_a_database_that_does_not_answer_is_503_and_says_when_to_come_back(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> None:
        raise OperationalError("SELECT", {}, Exception("connection refused"))

    headers, _ = app.key()
    monkeypatch.setattr(LedgerReader, "key_by_token_hash", gone)
    answer = await app.http.get("/v1/billing/balance", headers=headers)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "OVERLOADED"
    assert int(answer.headers["Retry-After"]) >= 1
    assert "refused" not in answer.text


async def test_an_expired_key_is_401_and_a_budget_that_is_used_up_is_402_by_the_key(app: App) -> None:
    headers, _ = app.key()
    key = app.ledger.reader.key_by_token_hash(token_sha256(headers["Authorization"].split()[1]))
    assert key is not None
    app.ledger.apply(SetKeyTerms(key.key_id, KeyTerms(daily_budget_mils=Mils(100))))
    answer = await app.http.post("/v1/predict", headers=headers, files={"frame": png(), "actions": npy(actions())})
    assert answer.status_code == 402
    detail = answer.json()["detail"]
    assert (detail["balance_mils"], detail["requested_mils"], detail["limit_source"]) == (100, 245, "key")
    app.ledger.apply(SetKeyTerms(key.key_id, KeyTerms(expires_at=1.0)))
    answer = await app.http.get("/v1/billing/balance", headers=headers)
    assert (answer.status_code, answer.json()["detail"]) == (401, "the API key has expired")
