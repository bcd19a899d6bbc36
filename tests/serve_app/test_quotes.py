"""`dryRun=true`: the price of a request, binding until it expires, with nothing run and nothing reserved."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
import pytest_asyncio

from billing.commands import KeyTerms, SetKeyTerms
from billing.money import Mils
from deployments import ingress
from deployments.scheduler import SchedulerStatus
from serve_app.routes.quotes import expected_wait_s
from tests.support.app import App, running_app
from tests.support.payloads import actions, npy, png

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAID = ["/v1/rollouts", "/v1/predict", "/v1/predict/batch"]
FREE = ["/v1/frames"]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def app(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[App]:
    async with running_app(tmp_path_factory.mktemp("quotes")) as running:
        yield running


async def send(
    app: App, path: str, headers: dict[str, str], dry: bool = False, lengths: tuple[int, ...] = (48,)
) -> Any:
    frame = "start_frame" if path == "/v1/rollouts" else "frame"
    data = {"params": json.dumps({"model": "tiny-pusher"})} if path == "/v1/rollouts" else {}
    files = [(frame, png()), *[("actions", npy(actions(length))) for length in lengths]]
    return await app.http.post(path, headers=headers, params={"dryRun": "true"} if dry else {}, files=files, data=data)


async def quote(app: App, headers: dict[str, str], path: str = "/v1/predict", **more: Any) -> dict[str, Any]:
    answer: httpx.Response = await send(app, path, headers, dry=True, **more)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


@pytest.mark.parametrize("path", PAID)
async def test_a_dry_run_says_what_the_real_run_then_costs(app: App, path: str) -> None:
    headers, customer = app.key(credits_mils=1000)
    said = await quote(app, headers, path)
    assert said.pop("quote_id").startswith("quo_")
    assert said.pop("expires_at") > 1_700_000_000
    assert said == {
        "estimated": True,
        "model": "tiny-pusher",
        "provider": "dream-engine-cluster",
        "cost_mils": 245,
        "total_cost_micros": 24_500,
        "cost_usd": 0.0245,
        "currency": "USD",
        "components": [
            {
                "type": "video",
                "metric": "frame",
                "quantity": 49.0,
                "billable_quantity": 49.0,
                "unit_price": 0.0005,
                "total_cost": 0.0245,
            }
        ],
        "affordable_rollouts": 4,
        "expected_wait_s": 0.0,
    }
    assert app.ledger.rows(customer) == [("credit", 1000)]
    assert (await send(app, path, headers)).status_code == 200
    assert app.ledger.rows(customer) == [("credit", 1000), ("debit", -245)]


async def test_a_batch_is_quoted_whole(app: App) -> None:
    headers, _ = app.key(credits_mils=245 * 3 + 60)
    said = await quote(app, headers, "/v1/predict/batch", lengths=(48, 11))
    assert (said["cost_mils"], said["affordable_rollouts"]) == (245 + 60, 2)


async def test_nothing_runs_and_a_balance_that_does_not_cover_it_is_said_not_refused(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ran(*_: object) -> None:
        raise AssertionError("a dry run ran")

    monkeypatch.setattr(app.model, "run_chunk", ran)
    headers, customer = app.key(credits_mils=244)
    assert (await quote(app, headers))["affordable_rollouts"] == 0
    assert app.ledger.rows(customer) == [("credit", 244)]


@pytest.mark.parametrize("path", PAID)
async def test_a_quoted_price_is_charged_though_it_has_risen(
    app: App, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers, customer = app.key(credits_mils=1000)
    said = await quote(app, headers, path)
    raise_price(app, monkeypatch)
    presented = headers | {"X-DreamEngine-Quote-Id": said["quote_id"]}
    answer = await send(app, path, presented)
    assert answer.status_code == 200, answer.text
    assert answer.headers["X-DreamEngine-Estimated-Charge-USD"] == "0.0245"
    assert app.ledger.rows(customer) == [("credit", 1000), ("debit", -245)]
    assert (await quote(app, headers, path))["cost_mils"] == 49 * 7


async def test_a_quote_for_other_work_is_refused_with_what_it_is_for(app: App) -> None:
    headers, customer = app.key(credits_mils=1000)
    said = await quote(app, headers)
    answer = await send(app, "/v1/predict", headers | {"X-DreamEngine-Quote-Id": said["quote_id"]}, lengths=(36,))
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "INVALID_REQUEST"
    assert answer.json()["detail"] == (
        "X-DreamEngine-Quote-Id: the quote is for 49 frames of tiny-pusher; ask for a new quote with dryRun=true."
        " Nothing was charged"
    )
    assert app.ledger.rows(customer) == [("credit", 1000)]


async def test_a_quote_that_has_expired_is_refused_and_nothing_is_charged(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingress, "QUOTE_VALID_S", 1e-6)
    headers, customer = app.key(credits_mils=1000)
    said = await quote(app, headers)
    answer = await send(app, "/v1/predict", headers | {"X-DreamEngine-Quote-Id": said["quote_id"]})
    assert answer.status_code == 422
    assert "the quote has expired" in answer.json()["detail"]
    assert app.ledger.rows(customer) == [("credit", 1000)]


async def test_anothers_quote_does_not_exist(app: App) -> None:
    headers, _ = app.key()
    other, _ = app.key()
    said = await quote(app, other)
    answer = await send(app, "/v1/predict", headers | {"X-DreamEngine-Quote-Id": said["quote_id"]})
    assert answer.status_code == 422
    assert "there is no such quote" in answer.json()["detail"]


async def test_a_dry_run_takes_no_quote(app: App) -> None:
    headers, _ = app.key()
    answer = await send(app, "/v1/predict", headers | {"X-DreamEngine-Quote-Id": "quo_" + "0" * 32}, dry=True)
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith("X-DreamEngine-Quote-Id: is not taken with dryRun=true")


async def test_a_key_may_ask_for_what_it_may_run_and_a_reading_key_too(app: App) -> None:
    headers, customer = app.key()
    key = next(each for each in app.ledger.reader.keys() if each.customer_id == customer)  # noqa: SIM118 - no dict
    app.ledger.apply(SetKeyTerms(key.key_id, KeyTerms(scope="read")))
    assert (await send(app, "/v1/predict", headers, dry=True)).status_code == 200
    app.ledger.apply(SetKeyTerms(key.key_id, KeyTerms(models=("another",))))
    refused = await send(app, "/v1/predict", headers, dry=True)
    assert refused.status_code == 403
    assert "tiny-pusher" in refused.json()["detail"]


async def test_every_paid_route_takes_a_dry_run(app: App) -> None:
    """A route that did not would run, and charge, what was only asked about."""
    paths = app.api.openapi()["paths"]
    forms = {path: methods["post"] for path, methods in paths.items() if "multipart/form-data" in str(methods)}
    billable = {path: operation for path, operation in forms.items() if path not in FREE}
    assert set(PAID) <= set(billable)
    for path, operation in billable.items():
        assert "dryRun" in {parameter["name"] for parameter in operation["parameters"]}, path


@pytest.mark.parametrize(
    ("queue", "wait_s"),
    [
        (None, None),
        (SchedulerStatus(0, 0, 0, 0), None),
        (SchedulerStatus(1, 16, 0, 0), 0.0),
        (SchedulerStatus(1, 16, 8, 0), 0.0),
        (SchedulerStatus(1, 16, 9, 0), None),
        (SchedulerStatus(1, 16, 9, 0, wait_s=0.25), 0.25),
        (SchedulerStatus(1, 16, 16, 32, wait_s=10.0004), 10.0),
    ],
    ids=["unreachable", "starting", "idle", "just room", "no rate yet", "one too many", "a queue"],
)
async def test_the_wait_is_zero_with_room_and_null_when_nothing_is_known(
    queue: SchedulerStatus | None, wait_s: float | None
) -> None:
    assert expected_wait_s(queue, num_rows=8) == wait_s


def raise_price(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.model, "spec", replace(app.model.spec, mils_per_frame=Mils(7)))
