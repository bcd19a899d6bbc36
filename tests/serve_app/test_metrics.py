"""One page says how the whole cluster does, to who may know it."""

import json

import pytest
from prometheus_client.parser import text_string_to_metric_families

from billing.auditor import AuditReport
from deployments.ledger_audits import measure_audits
from tests.support.app import METRICS_SECRET, SLUG, App
from tests.support.payloads import actions, npy, png

PARAMS = json.dumps({"model": SLUG})
SCRAPER = {"Authorization": f"Bearer {METRICS_SECRET}"}


async def scrape(app: App) -> dict[str, float]:
    answer = await app.http.get("/metrics", headers=SCRAPER)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    page = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            page[f"{sample.name}{{{labels}}}"] = sample.value
    return page


async def rollout(app: App, headers: dict[str, str], params: str = PARAMS) -> int:
    files = {"start_frame": png(), "actions": npy(actions())}
    answer = await app.http.post("/v1/rollouts", headers=headers, files=files, data={"params": params})
    return answer.status_code


@pytest.mark.parametrize("sent", [{}, {"Authorization": "Bearer "}, {"Authorization": "Bearer 5ed"}])
async def test_the_metrics_are_for_the_holder_of_their_secret(app: App, sent: dict[str, str]) -> None:
    answer = await app.http.get("/metrics", headers=sent)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "AUTHENTICATION_FAILED")


async def test_a_customers_key_opens_no_metrics(app: App) -> None:
    headers, _ = app.key()
    assert (await app.http.get("/metrics", headers=headers)).status_code == 401


async def test_a_paid_rollout_is_on_the_page_from_its_request_to_its_money(app: App) -> None:
    headers, _ = app.key()
    assert await rollout(app, headers) == 200
    await app.services.ingress.drain(1.0)  # its settlement is written
    page = await scrape(app)
    model = f"model={SLUG}"
    assert page["dream_http_requests_total{method=POST,route=/v1/rollouts,status=200}"] == 1
    assert page["dream_http_request_seconds_count{route=/v1/rollouts}"] == 1
    assert page[f"dream_rollouts_total{{{model},outcome=succeeded}}"] == 1
    assert page[f"dream_rollout_seconds_count{{{model}}}"] == 1
    assert page[f"dream_engine_step_rows_sum{{{model}}}"] == page[f"dream_engine_step_seconds_count{{{model}}}"] > 0
    assert page[f"dream_engine_places_total{{{model}}}"] == 16 * page[f"dream_engine_step_rows_count{{{model}}}"]
    assert page[f"dream_ledger_frames_billed_total{{{model}}}"] == 49
    assert page[f"dream_ledger_captured_mils_total{{{model}}}"] == 245
    assert page[f"dream_ledger_refunded_mils_total{{{model}}}"] == 0
    assert page["dream_ledger_entries_total{kind=debit}"] == 1
    assert page["dream_ledger_commit_commands_count{}"] == page["dream_ledger_commit_seconds_count{}"] >= 2


async def test_a_refused_and_a_failed_rollout_are_counted_as_such(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    poor, _ = app.key(credits_mils=100)
    rich, _ = app.key()
    assert await rollout(app, poor) == 402
    monkeypatch.setattr(app.model.model, "step", lambda rows: 1 / 0)
    assert await rollout(app, rich) == 500
    await app.services.ingress.drain(1.0)
    page = await scrape(app)
    assert page[f"dream_rollouts_total{{model={SLUG},outcome=refused}}"] == 1
    assert page[f"dream_rollouts_total{{model={SLUG},outcome=failed}}"] == 1
    assert page[f"dream_engine_rows_failed_total{{model={SLUG}}}"] == 1
    assert page[f"dream_ledger_refunded_mils_total{{model={SLUG}}}"] == 245
    assert page["dream_http_requests_total{method=POST,route=/v1/rollouts,status=402}"] == 1


async def test_a_settlement_that_is_asked_for_twice_is_earned_once(app: App) -> None:
    headers, _ = app.key()
    params = json.dumps({"model": SLUG, "seed": 7})
    assert [await rollout(app, headers, params) for _ in range(2)] == [200, 200]
    await app.services.ingress.drain(1.0)
    assert (await scrape(app))[f"dream_ledger_captured_mils_total{{model={SLUG}}}"] == 245


async def test_nobody_can_make_up_series(app: App) -> None:
    for path in (
        "/made-up",
        "/models/tiny-pusher/made-up",
        "/v1/rollouts/rollout_of_mine",
        "/models/tiny-pusher/v1/models",
    ):
        await app.http.get(path)
    await app.http.request("BREW", "/v1/models")
    routes = {key for key in await scrape(app) if key.startswith("dream_http_requests_total")}
    assert not any("made-up" in key or "of_mine" in key or "BREW" in key for key in routes), routes
    assert "dream_http_requests_total{method=GET,route=/v1/models,status=200}" in routes


async def test_a_part_that_does_not_answer_is_down_and_the_others_are_shown(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_audits(app.ledger.meter, AuditReport(1_800_000_000.0, 0.5, (), ()))
    assert (await scrape(app))["dream_ledger_audit_timestamp_seconds{}"] == 1_800_000_000

    async def away() -> None:
        raise ConnectionError("the actor died")

    monkeypatch.setattr(app.ledger_call, "metrics", away)
    page = await scrape(app)
    assert page["dream_part_up{model=,part=ledger}"] == 0
    assert page[f"dream_part_up{{model={SLUG},part=scheduler}}"] == 1
    assert "dream_ledger_audit_timestamp_seconds{}" not in page


async def test_capacity_and_headroom_are_in_rollouts_of_the_standard_length(app: App) -> None:
    page = await scrape(app)  # 160 row-steps a second; 4 chunks of 4 steps
    assert page[f"dream_capacity_rollouts_per_second{{model={SLUG}}}"] == 10
    assert page[f"dream_headroom_rollouts_per_second{{model={SLUG}}}"] == 10
    assert page[f"dream_replicas{{model={SLUG},state=booting}}"] == 0
