"""What a customer may ask about its rollouts, and about nobody else's."""

import httpx
import pytest

from billing.commands import KeyTerms, KeyTermsSet, SetKeyTerms
from billing.keys import token_sha256
from tests.support.app import App
from tests.support.jobs import ended, get, queue

UNKNOWN = f"rollout_{'0' * 32}"


def read_only(app: App, headers: dict[str, str]) -> None:
    key = app.ledger.reader.key_by_token_hash(token_sha256(headers["Authorization"].removeprefix("Bearer ")))
    assert key is not None
    assert isinstance(app.ledger.apply(SetKeyTerms(key.key_id, KeyTerms(scope="read"))), KeyTermsSet)


async def pages(app: App, headers: dict[str, str], **query: object) -> dict[str, object]:
    answer = await app.http.get("/v1/rollouts", headers=headers, params=query)  # type: ignore[arg-type]
    assert answer.status_code == 200, answer.text
    page: dict[str, object] = answer.json()
    return page


def ids(page: dict[str, object]) -> list[str]:
    return [each["id"] for each in page["data"]]  # type: ignore[attr-defined]


async def test_a_list_can_be_walked_to_its_end_and_back(app: App) -> None:
    headers, _ = app.key()
    newest_first = [(await queue(app, headers, seed=seed)).json()["id"] for seed in range(5)][::-1]
    first = await pages(app, headers, limit=2)
    assert (ids(first), first["has_more"]) == (newest_first[:2], True)
    second = await pages(app, headers, limit=2, after=first["last_id"])
    third = await pages(app, headers, limit=2, after=second["last_id"])
    assert (ids(third), third["has_more"]) == (newest_first[4:], False)
    back = await pages(app, headers, limit=2, before=third["first_id"])
    assert (ids(back), back["has_more"]) == (ids(second), True)
    begin = await pages(app, headers, limit=2, before=back["first_id"])
    assert (ids(begin), begin["has_more"]) == (ids(first), False)
    assert ids(await pages(app, headers, limit=1_000)) == newest_first
    assert await pages(app, headers, after=newest_first[-1]) == {"object": "list", "data": [], "has_more": False}


async def test_a_list_is_narrowed_by_state_model_and_time(app: App) -> None:
    headers, _ = app.key()
    done = await ended(app, headers, (await queue(app, headers)).json()["id"])
    assert ids(await pages(app, headers, status="succeeded", model="tiny-pusher")) == [done["id"]]
    assert ids(await pages(app, headers, created_from=done["created"], created_until=done["created"] + 60)) == [
        done["id"]
    ]
    for narrower in ({"status": "failed"}, {"model": "x"}, {"created_until": done["created"]}):
        assert ids(await pages(app, headers, **narrower)) == []


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ({"limit": "0"}, "limit"),
        ({"status": "done"}, "status"),
        ({"after": "x"}, "after: is not a rollout's id"),
        ({"before": "../../etc"}, "before: is not a rollout's id"),
        ({"after": UNKNOWN, "before": UNKNOWN}, "before: is not taken together with after"),
    ],
)
async def test_a_list_that_makes_no_sense_is_refused(app: App, query: dict[str, str], problem: str) -> None:
    headers, _ = app.key()
    answer = await app.http.get("/v1/rollouts", headers=headers, params=query)
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(problem)


async def test_a_rollout_that_was_answered_at_once_is_found_by_its_id(app: App) -> None:
    headers, _ = app.key()
    delivered = (await queue(app, headers, mode="sync", seed=5)).json()
    found = await get(app, headers, delivered["id"])
    assert delivered["metadata"].pop("start_frame_resized") is False
    assert found == delivered
    assert (await app.http.delete(f"/v1/rollouts/{delivered['id']}", headers=headers)).json() == found


@pytest.mark.parametrize("mode", ["sync", "async"])
async def test_anothers_rollout_is_not_there(app: App, mode: str) -> None:
    headers, customer = app.key()
    stranger, _ = app.key()
    rollout_id = (await queue(app, headers, mode=mode)).json()["id"]
    await ended(app, headers, rollout_id)
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/deliveries")):
        for name in (rollout_id, UNKNOWN, "rollout_x", rollout_id.upper()):
            answer: httpx.Response = await app.http.request(method, f"/v1/rollouts/{name}{path}", headers=stranger)
            assert answer.status_code == 404
    assert ids(await pages(app, stranger)) == []
    assert app.ledger.rows(customer)[-1] == ("debit", -245)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/rollouts"),
        ("GET", f"/v1/rollouts/{UNKNOWN}"),
        ("DELETE", f"/v1/rollouts/{UNKNOWN}"),
        ("GET", f"/v1/rollouts/{UNKNOWN}/deliveries"),
        ("GET", "/v1/webhooks/secret"),
        ("POST", "/v1/webhooks/secret/rotate"),
    ],
)
async def test_nobody_asks_without_a_key(app: App, method: str, path: str) -> None:
    assert (await app.http.request(method, path)).status_code == 401


async def test_a_key_that_may_only_read_looks_and_neither_cancels_nor_sees_secrets(app: App) -> None:
    headers, _ = app.key()
    rollout_id = (await queue(app, headers)).json()["id"]
    await ended(app, headers, rollout_id)
    read_only(app, headers)
    assert (await get(app, headers, rollout_id))["status"] == "succeeded"
    for method, path in (
        ("DELETE", f"/v1/rollouts/{rollout_id}"),
        ("GET", "/v1/webhooks/secret"),
        ("POST", "/v1/webhooks/secret/rotate"),
    ):
        assert (await app.http.request(method, path, headers=headers)).status_code == 403


async def test_secrets_are_each_customers_own_stay_the_same_and_are_not_kept_by_caches(app: App) -> None:
    headers, _ = app.key()
    stranger, _ = app.key()
    first = await app.http.get("/v1/webhooks/secret", headers=headers)
    assert first.headers["Cache-Control"] == "no-store"
    assert (await app.http.get("/v1/webhooks/secret", headers=headers)).json() == first.json()
    assert (await app.http.get("/v1/webhooks/secret", headers=stranger)).json() != first.json()
