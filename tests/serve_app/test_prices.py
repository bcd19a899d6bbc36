"""One price book: the catalog, quotes, the balance's units, reservations and answers never say two prices."""

import json
import time
from collections.abc import AsyncIterator
from fractions import Fraction
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy.exc import OperationalError

from billing.commands import AddPrice, CustomerId, PriceAdded, RequestId
from billing.money import cents
from billing.price_terms import terms_of
from billing.prices import NANO_PER_USD, PriceVersion, Rate, Tier
from deployments import pricing
from serve_app.catalog import CATALOG, model_spec
from tests.support.app import App, running_app
from tests.support.payloads import actions, npy, png

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = "tiny-pusher"


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def app(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[App]:
    async with running_app(tmp_path_factory.mktemp("prices")) as running:
        yield running


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A price that was added is read by the next request."""
    monkeypatch.setattr(pricing, "REREAD_EVERY_S", 0.0)


def add(app: App, rate: Rate, customer_id: str = "", **more: Any) -> None:
    """The model's next price, from now on."""
    own = [each for each in app.ledger.reader.prices() if (each.model, each.customer_id) == (MODEL, customer_id)]
    version = PriceVersion(MODEL, len(own) + 1, time.time(), (rate,), customer_id, **more)
    command = AddPrice(MODEL, customer_id, version.version, version.effective_from, terms_of(version))
    assert isinstance(app.ledger.apply(command), PriceAdded)


def per_frame(usd: str) -> Rate:
    return Rate("frame", int(Fraction(usd) * NANO_PER_USD))


async def post(app: App, headers: dict[str, str], num_actions: int = 48, **query: str) -> Any:
    files = {"start_frame": png(), "actions": npy(actions(num_actions))}
    params = json.dumps({"model": MODEL, "seed": time.time_ns()})
    answer = await app.http.post("/v1/rollouts", headers=headers, params=query, files=files, data={"params": params})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def everywhere(app: App, headers: dict[str, str], customer_id: CustomerId) -> tuple[int, ...]:
    """Mils of a standard rollout, by each who says it; the last is what was charged."""
    quote = await post(app, headers, dryRun="true")
    before = (await app.http.get("/v1/billing/balance", headers=headers)).json()
    done = await post(app, headers)
    charged = -app.ledger.rows(customer_id)[-1][1]
    assert before["rollouts_left"] == before["balance_mils"] // charged == quote["affordable_rollouts"]
    said = (quote["cost_usd"], quote["components"][0]["total_cost"], done["cost_usd"], done["metadata"]["cost"])
    return (quote["cost_mils"], *(round(each * 10_000) for each in said), charged)


async def test_a_price_is_the_same_wherever_it_is_said(app: App) -> None:
    headers, customer = app.key(100_000)
    assert set(await everywhere(app, headers, customer)) == {245}
    add(app, per_frame("0.0007"))
    assert set(await everywhere(app, headers, customer)) == {343}
    listed = (await app.http.get(f"/v1/models/{MODEL}")).json()["price_per_frame_usd"]
    specs = (await app.http.get("/v1/specs")).json()
    prices = {each["slug"]: each["price_per_frame_usd"] for each in specs["specs"]}
    assert listed == prices[MODEL] == 0.0007
    assert prices["dreamdojo-2b-gr1"] == specs["default_price_usd_per_frame"] == 0.0005


async def test_a_rate_below_a_mil_is_rounded_up_once_for_the_request(app: App) -> None:
    headers, customer = app.key(100_000)
    add(app, per_frame("0.000011"))
    assert set(await everywhere(app, headers, customer)) == {6}  # 49 frames at 0.11 mils are 5.39
    quote = await post(app, headers, dryRun="true")
    assert quote["components"][0]["unit_price"] == 0.000011
    assert (await app.http.get(f"/v1/models/{MODEL}")).json()["price_per_frame_usd"] == 0.000011


async def test_what_was_not_made_is_not_charged_below_a_mil_either(app: App) -> None:
    """A pruned batch says what the ledger then keeps."""
    headers, _ = app.key(100_000)
    add(app, per_frame("0.000011"))
    parts = [("frame", png()), ("goal_frame", png(seed=5)), *[("actions", npy(actions(24, seed=k))) for k in range(4)]]
    answer = await app.http.post(
        "/v1/predict/batch", headers=headers, files=parts, data={"prune": "0.5", "seed": "3", "return": "scores"}
    )
    assert answer.status_code == 200, answer.text
    frames = int(answer.headers["X-DreamEngine-Frames"])
    assert frames < 100
    await app.services.ingress._reservations.settled()
    kept = 100_000 - (await app.http.get("/v1/billing/balance", headers=headers)).json()["balance_mils"]
    assert kept == -(-frames * 11 // 100)
    assert answer.headers["X-DreamEngine-Estimated-Charge-USD"] == f"{kept / 10_000:.4f}"


async def test_a_sessions_budget_and_what_it_costs_are_at_the_books_price_or_the_quotes(app: App) -> None:
    headers, customer = app.key(100_000)
    add(app, per_frame("0.000011"))
    form = {"model": (None, MODEL), "max_frames": (None, "40"), "initial_frame": png()}
    quote = (await app.http.post("/v1/sessions", headers=headers, params={"dryRun": "true"}, files=form)).json()
    assert quote["cost_mils"] == 5  # 4.4
    add(app, per_frame("0.0009"))
    dear = (await app.http.post("/v1/sessions", headers=headers, files=form)).json()
    quoted = headers | {"X-DreamEngine-Quote-Id": quote["quote_id"]}
    cheap = (await app.http.post("/v1/sessions", headers=quoted, files=form)).json()
    assert (dear["reserved_mils"], cheap["reserved_mils"]) == (360, 5)
    session = await app.services.sessions.connect(RequestId(f"req_{cheap['id'].removeprefix('session_')}"), customer)
    assert session.record.cost(40) == 5
    assert await app.services.sessions.finish(session, "closed") == 0


async def test_a_customers_own_price_is_its_own(app: App) -> None:
    headers, customer = app.key(100_000)
    other, another = app.key(100_000)
    add(app, per_frame("0.0005"))
    add(app, per_frame("0.0002"), customer)
    assert set(await everywhere(app, headers, customer)) == {98}
    assert set(await everywhere(app, other, another)) == {245}
    assert (await app.http.get(f"/v1/models/{MODEL}")).json()["price_per_frame_usd"] == 0.0005


async def test_a_quote_keeps_its_price_though_the_book_has_another(app: App) -> None:
    headers, customer = app.key(100_000)
    add(app, per_frame("0.0005"))
    quote = await post(app, headers, dryRun="true")
    add(app, per_frame("0.0009"))
    done = await post(app, headers | {"X-DreamEngine-Quote-Id": quote["quote_id"]})
    assert done["metadata"]["cost"] == quote["cost_usd"] == 0.0245
    assert app.ledger.rows(customer)[-1] == ("debit", -245)


async def test_volume_counts_from_the_customers_own_month_and_a_boundary_is_a_line(app: App) -> None:
    headers, customer = app.key(100_000)
    add(app, per_frame("0.001"), customer, tiers=(Tier(60, Fraction(1, 2)),))
    first = await post(app, headers, dryRun="true")
    assert [line["quantity"] for line in first["components"]] == [49]
    assert (await post(app, headers))["metadata"]["cost"] == 0.049
    second = await post(app, headers, dryRun="true")
    assert [(line["quantity"], line["unit_price"]) for line in second["components"]] == [(11, 0.001), (38, 0.0005)]
    assert (await post(app, headers))["metadata"]["cost"] == second["cost_usd"] == 0.03
    assert (await post(app, headers, dryRun="true"))["cost_usd"] == 0.0245


async def test_work_that_nobody_waits_for_is_priced_as_its_class(app: App) -> None:
    headers, customer = app.key(100_000)
    add(app, per_frame("0.001"), customer, latency_classes=(("batch", Fraction(1, 2)),))
    assert (await post(app, headers, dryRun="true"))["cost_mils"] == 490
    files = {"start_frame": png(), "actions": npy(actions(48))}
    params = {"params": json.dumps({"model": MODEL, "mode": "async"})}
    query = {"dryRun": "true"}
    said = (await app.http.post("/v1/rollouts", headers=headers, params=query, files=files, data=params)).json()
    assert (said["cost_mils"], said["components"][0]["unit_price"]) == (245, 0.0005)
    queued = await app.http.post("/v1/rollouts", headers=headers, files=files, data=params)
    assert queued.status_code == 202
    assert queued.json()["metadata"]["cost_estimate"] == 0.0245
    assert app.ledger.rows(customer)[-1] == ("debit", -245)


async def test_any_key_may_ask_to_wait_longer_for_less_and_none_to_go_first(app: App) -> None:
    headers, customer = app.key(100_000)
    add(app, per_frame("0.001"), customer, latency_classes=(("batch", Fraction(1, 2)),))
    files = {"frame": png(), "actions": npy(actions(48))}
    for path in ("/v1/predict", "/v1/predict/batch"):
        fields = {"service_class": "batch", "seed": str(time.time_ns())}
        query = {"dryRun": "true"}
        said = (await app.http.post(path, headers=headers, params=query, files=files, data=fields)).json()
        assert said["cost_mils"] == 245, path
        answer = await app.http.post(path, headers=headers, files=files, data=fields)
        assert answer.headers["X-DreamEngine-Estimated-Charge-USD"] == "0.0245", path
        assert app.ledger.rows(customer)[-1] == ("debit", -245)
        refused = await app.http.post(path, headers=headers, files=files, data={"service_class": "interactive"})
        assert (refused.status_code, "'standard' or 'batch'" in refused.json()["detail"]) == (422, True), path


async def test_a_quote_for_work_of_a_cheaper_class_is_refused(app: App) -> None:
    headers, customer = app.key(100_000)
    add(app, per_frame("0.001"), customer, latency_classes=(("batch", Fraction(1, 2)),))
    files = {"start_frame": png(), "actions": npy(actions(48))}
    queued = {"params": json.dumps({"model": MODEL, "mode": "async"})}
    query = {"dryRun": "true"}
    said = (await app.http.post("/v1/rollouts", headers=headers, params=query, files=files, data=queued)).json()
    presented = headers | {"X-DreamEngine-Quote-Id": said["quote_id"]}
    at_once = {"frame": png(), "actions": npy(actions(48))}
    session = {"model": (None, MODEL), "max_frames": (None, "49"), "initial_frame": png()}
    for path, form in (("/v1/predict", at_once), ("/v1/sessions", session)):
        refused = await app.http.post(path, headers=presented, files=form)
        assert (refused.status_code, "of class batch" in refused.json()["detail"]) == (422, True), path
    assert app.ledger.rows(customer) == [("credit", 100_000)]
    taken = await app.http.post("/v1/rollouts", headers=presented, files=files, data=queued)
    assert taken.status_code == 202, taken.text


async def test_the_last_book_stands_while_the_database_is_away(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    add(app, per_frame("0.0006"))
    spec = model_spec(CATALOG[MODEL])
    assert (await app.services.prices.price(spec, 49)).total_mils == 294

    def away(*_: object) -> None:
        raise OperationalError("SELECT", {}, Exception("gone"))

    monkeypatch.setattr(app.services.prices, "_read", away)
    assert (await app.services.prices.price(spec, 49)).total_mils == 294
    assert (await app.http.get(f"/v1/models/{MODEL}")).json()["price_per_frame_usd"] == 0.0006


async def test_a_new_price_is_read_in_time_and_not_with_every_request(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pricing, "REREAD_EVERY_S", 1000.0)
    reads = []
    prices = pricing.Prices(lambda: reads.append(1) or [], lambda *_: 0)  # type: ignore[func-returns-value]
    spec = model_spec(CATALOG[MODEL])
    for _ in range(3):
        assert cents((await prices.price(spec, 49)).total_mils) == 2
    assert len(reads) == 1
