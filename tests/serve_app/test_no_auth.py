"""The development mode without keys: must be asked for, is one customer's, and only this machine may ask."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from billing.commands import CreateKey, CustomerId, KeyCreated, KeyId, RevokeKey
from billing.keys import mint_customer_id, mint_key_id, mint_token, token_sha256
from billing.money import Mils
from serve_app.launch import CannotStart, run
from serve_app.no_auth import is_loopback
from serve_app.settings import Settings
from tests.support.app import App, running_app
from tests.support.payloads import actions, npy, png

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOKEN = mint_token()
LOCAL = {"Host": "127.0.0.1:8000"}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def app(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[App]:
    async with running_app(tmp_path_factory.mktemp("no_auth"), open_to=token_sha256(TOKEN)) as running:
        yield running


@pytest.fixture(scope="module")
def development(app: App) -> tuple[KeyId, CustomerId]:
    key_id = mint_key_id()
    credit, limits = Mils(1_000_000), {"refill_per_s": 1000.0, "burst": 1000}
    made = app.ledger.apply(
        CreateKey(key_id, token_sha256(TOKEN), TOKEN[-4:], "development", mint_customer_id(), credit, **limits)  # type: ignore[arg-type]
    )
    assert isinstance(made, KeyCreated)
    return key_id, made.customer_id


@pytest.mark.parametrize("authorization", [None, "Bearer dre_x", "Basic eA==", "Bearer dre_" + "k7m2" * 10 + "k7m"])
async def test_every_request_is_the_development_customers_and_is_debited(
    app: App, development: tuple[KeyId, CustomerId], authorization: str | None
) -> None:
    headers = LOCAL | ({} if authorization is None else {"Authorization": authorization})
    before = (await app.http.get("/v1/billing/balance", headers=headers)).json()
    assert before["customer_id"] == development[1]
    files = {"frame": png(), "actions": npy(actions(12, seed=len(authorization or "")))}
    answer = await app.http.post("/v1/predict", headers=headers, files=files)
    assert answer.status_code == 200, answer.text
    assert answer.headers["X-DreamEngine-Customer-Id"] == development[1]
    after = (await app.http.get("/v1/billing/balance", headers=headers)).json()
    assert after["balance_mils"] == before["balance_mils"] - 65


async def test_anothers_key_is_not_taken_for_its_own(app: App, development: tuple[KeyId, CustomerId]) -> None:
    headers, customer = app.key()
    said = (await app.http.get("/v1/billing/balance", headers=headers | LOCAL)).json()
    assert said["customer_id"] == development[1] != customer


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "127.0.0.1", "Origin": "http://localhost:8000"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "192.168.1.7:8000"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "[:::1"}, 403),
        ({"Host": "127.0.0.1", "Origin": "https://evil.example"}, 403),
        ({"Host": "127.0.0.1", "Origin": "null"}, 403),
    ],
    ids=str,
)
async def test_only_this_machine_may_ask_and_no_other_sites_page(
    app: App, development: tuple[KeyId, CustomerId], headers: dict[str, str], status: int
) -> None:
    answer = await app.http.get("/v1/billing/balance", headers=headers)
    assert answer.status_code == status
    if status == 403:
        assert "asks for no keys" in answer.json()["detail"]


async def test_a_development_key_that_was_revoked_opens_nothing(tmp_path: Path) -> None:
    async with running_app(tmp_path, open_to=token_sha256(TOKEN)) as app:
        key_id, sha256 = mint_key_id(), token_sha256(TOKEN)
        assert (await app.http.get("/v1/billing/balance", headers=LOCAL)).status_code == 401
        app.ledger.apply(CreateKey(key_id, sha256, TOKEN[-4:], "d", mint_customer_id(), Mils(5), 1.0, 10))
        assert (await app.http.get("/v1/billing/balance", headers=LOCAL)).status_code == 200
        app.ledger.apply(RevokeKey(key_id))
        assert (await app.http.get("/v1/billing/balance", headers=LOCAL)).status_code == 401


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.com"])
async def test_it_does_not_start_where_others_could_reach_it(tmp_path: Path, host: str) -> None:
    settings = Settings(no_auth=True, host=host, data_dir=tmp_path / "data")
    with pytest.raises(CannotStart, match="NO_AUTH asks nobody for a key, so it listens on loopback only"):
        run(settings, settings.cluster_args())
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(("value", "on"), [("1", True), ("true", True), ("0", False)])
async def test_it_must_be_asked_for(monkeypatch: pytest.MonkeyPatch, value: str, on: bool) -> None:
    assert Settings().no_auth is False
    monkeypatch.setenv("NO_AUTH", value)
    assert Settings().no_auth is on


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost", "LOCALHOST"])
async def test_loopback_is_loopback(host: str) -> None:
    assert is_loopback(host)
