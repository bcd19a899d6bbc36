"""The public client of this API (`dream-engine` on PyPI), unmodified, against what `make serve` runs."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import dream
import httpx
import numpy as np
import pytest

from tests.support.cluster import Cluster, eventually
from tests.support.payloads import actions, npy, png
from tests.support.video import decode

WIRE = Path(__file__).resolve().parents[2] / "docs" / "02-wire.md"
FRAME = np.full((64, 64, 3), 128, np.uint8)


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[dream.Client]:
    with cluster.client() as running:
        yield running


@pytest.fixture(scope="module")
def model(client: dream.Client) -> dream.ModelHandle:
    return client.models.get("tiny-pusher")


def test_the_catalog_lists_every_model_and_marks_the_one_that_is_served(client: dream.Client) -> None:
    active = {model.slug: model.active for model in client.models.list()}
    assert active == {
        "tiny-pusher": True,
        "tiny-pusher-student": False,
        "dreamdojo-2b-gr1": False,
        "dreamdojo-2b-g1": False,
        "dreamdojo-2b-agibot": False,
        "dreamdojo-2b-yam": False,
    }


def test_dreamdojo_entries_carry_their_true_figures(client: dream.Client) -> None:
    spec = client.models.get("dreamdojo-2b-gr1").spec
    assert (spec.action_dim, spec.chunk_size, spec.resolution) == (384, 12, (480, 640))
    assert (spec.default_num_steps, spec.price_per_frame_usd, spec.benchmark) == (35, 0.0005, None)


def test_the_catalog_says_what_the_running_replicas_compute_attention_with(cluster: Cluster) -> None:
    def attention(slug: str) -> str | None:
        kernel: str | None = httpx.get(f"{cluster.base_url}/v1/models/{slug}").json()["spec"]["attention"]
        return kernel

    eventually(lambda: attention("tiny-pusher") == "sdpa")
    assert attention("dreamdojo-2b-gr1") is None


def test_a_49_frame_rollout_debits_exactly_245_mils(client: dream.Client, model: dream.ModelHandle) -> None:
    before = client.billing.balance().balance_mils
    rollout = model.predict(start_frame=FRAME, actions=actions(seed=1), seed=1)
    assert before - client.billing.balance().balance_mils == 245
    assert (rollout.frames, rollout.cost_usd, rollout.resolution) == (49, 0.0245, (64, 64))
    assert rollout.model == "tiny-pusher"
    assert len(decode(rollout.mp4_bytes())) == 49


def test_an_idempotency_key_gives_the_first_rollout_again_and_charges_once(
    client: dream.Client, model: dream.ModelHandle
) -> None:
    before = client.billing.balance().balance_mils
    call = {"start_frame": FRAME, "actions": actions(seed=9), "seed": 9, "idempotency_key": "decision-0001"}
    first, again = model.predict(**call), model.predict(**call)
    assert again.id == first.id
    assert again.mp4_bytes() == first.mp4_bytes()
    with pytest.raises(dream.ValidationError, match="another payload"):
        model.predict(**call | {"seed": 10})
    assert before - client.billing.balance().balance_mils == 245


def test_a_batch_of_eight_debits_exactly_1960_mils(client: dream.Client, model: dream.ModelHandle) -> None:
    before = client.billing.balance().balance_mils
    candidates = np.stack([actions(seed=seed) for seed in range(8)])
    batch = model.predict_batch(start_frame=FRAME, actions=candidates, seed=2)
    assert before - client.billing.balance().balance_mils == 1_960
    assert (batch.batch_size, batch.estimated_charge_usd) == (8, 0.196)
    assert [len(decode(rollout.mp4_bytes())) for rollout in batch.rollouts] == [49] * 8


def test_candidates_come_back_in_the_order_they_were_sent(model: dream.ModelHandle) -> None:
    """Each candidate run alone with the same seed and index 0 must be the first of a batch that begins with it."""
    one, other = actions(seed=1), actions(seed=2)
    first = model.predict_batch(start_frame=FRAME, actions=np.stack([one, other]), seed=3).rollouts[0]
    alone = model.predict_batch(start_frame=FRAME, actions=one[None], seed=3).rollouts[0]
    difference = np.abs(np.stack(decode(first.mp4_bytes())).astype(int) - np.stack(decode(alone.mp4_bytes())))
    assert difference.mean() < 1.0


def test_the_same_request_gives_the_same_pixels_and_another_seed_or_action_does_not(model: dream.ModelHandle) -> None:
    def video(**knobs: int) -> bytes:
        return (
            model.predict_batch(start_frame=FRAME, actions=actions(12, seed=knobs["a"])[None], seed=knobs["s"])
            .rollouts[0]
            .mp4_bytes()
        )

    assert video(a=1, s=10) == video(a=1, s=10)
    assert video(a=1, s=10) != video(a=2, s=10)
    assert video(a=1, s=10) != video(a=1, s=11)


def test_the_byte_level_call_returns_the_mp4_and_its_cost(cluster: Cluster, client: dream.Client) -> None:
    response = client.predict(frame_bytes=png(), actions_bytes=npy(actions()), seed=4)
    assert len(decode(response.mp4_bytes)) == 49
    assert response.estimated_charge_usd == 0.0245
    assert response.customer_id == client.billing.balance().customer_id
    assert response.request_id in {row.id for row in client.billing.transactions(limit=1)}


def test_the_sum_of_all_amounts_is_the_balance(client: dream.Client) -> None:
    rows = client.billing.transactions(limit=200)
    assert sum(row.amount_mils for row in rows) == client.billing.balance().balance_mils
    assert rows[0].balance_after_mils == client.billing.balance().balance_mils
    assert rows[-1].kind == "credit"
    assert rows[-1].amount_mils == 250_000


def test_status_reports_latency_of_finished_rollouts(client: dream.Client, model: dream.ModelHandle) -> None:
    model.predict(start_frame=FRAME, actions=actions(12), seed=5)
    status = client.status()["models"]["tiny-pusher"]
    assert status["state"] == "ready"
    assert status["total_ms"]["p99"] >= status["total_ms"]["p50"] >= status["infer_ms"]["p50"] > 0
    assert client.healthz() == {"status": "ok"}


async def test_the_async_client_does_the_same(cluster: Cluster) -> None:
    async with dream.AsyncClient(api_key=cluster.key, base_url=cluster.base_url) as client:
        assert "tiny-pusher" in [model.slug for model in await client.models.list()]
        before = (await client.billing.balance()).balance_mils
        model = await client.models.get("tiny-pusher")
        rollout = await model.predict(start_frame=FRAME, actions=actions(seed=6), seed=6)
        batch = await model.predict_batch(start_frame=FRAME, actions=actions(seed=6)[None].repeat(8, 0), seed=7)
        assert (rollout.frames, batch.batch_size) == (49, 8)
        assert before - (await client.billing.balance()).balance_mils == 245 + 1_960
        assert (await client.billing.transactions(limit=2))[1].amount_mils == -245
        assert (await client.status())["model"] == "tiny-pusher"


def test_too_little_credit_raises_with_balance_and_need(cluster: Cluster) -> None:
    key = cluster.new_key("almost broke", "0.0244")
    with dream.Client(api_key=key, base_url=cluster.base_url) as client:
        model = client.models.get("tiny-pusher")
        for call in (
            lambda: model.predict(start_frame=FRAME, actions=actions()),
            lambda: model.predict_batch(start_frame=FRAME, actions=actions()[None]),
        ):
            with pytest.raises(dream.InsufficientCreditsError) as refusal:
                call()
            assert (refusal.value.balance_mils, refusal.value.requested_mils) == (244, 245)
            assert refusal.value.status_code == 402
            assert refusal.value.request_id.startswith("req_")
        assert [row.kind for row in client.billing.transactions()] == ["credit"]


@pytest.mark.parametrize("key", [None, "dre_wrong", "dre_" + "a" * 43])
def test_a_missing_malformed_or_unknown_key_raises_auth_error(cluster: Cluster, key: str | None) -> None:
    with dream.Client(api_key=key, base_url=cluster.base_url) as client, pytest.raises(dream.AuthError) as refusal:
        client.billing.balance()
    assert refusal.value.status_code == 401


def test_a_revoked_key_raises_auth_error_at_once(cluster: Cluster) -> None:
    key = cluster.new_key("leaving", "1")
    with dream.Client(api_key=key, base_url=cluster.base_url) as client:
        model = client.models.get("tiny-pusher")
        model.predict(start_frame=FRAME, actions=actions(12))
        key_id = next(
            row["key_id"]
            for row in json.loads(cluster.admin("keys", "list", "--json").stdout)
            if row["customer"] == "leaving"
        )
        assert cluster.admin("keys", "revoke", key_id).returncode == 0
        with pytest.raises(dream.AuthError):
            model.predict(start_frame=FRAME, actions=actions(12), seed=1)


def test_an_unknown_model_raises_model_not_found(client: dream.Client) -> None:
    with pytest.raises(dream.ModelNotFoundError) as refusal:
        client.models.get("dreamdojo-99b")
    assert refusal.value.status_code == 404


def test_an_inactive_model_is_refused_by_the_client_itself(client: dream.Client) -> None:
    with pytest.raises(RuntimeError, match="not the active spec"):
        client.models.get("dreamdojo-2b-gr1").predict(start_frame=FRAME, actions=np.zeros((12, 384), np.float32))


def test_an_empty_bucket_raises_rate_limit_with_the_seconds_to_wait(cluster: Cluster) -> None:
    key = cluster.new_key("impatient", "1", "--qps", "0.01", "--burst", "1")
    with dream.Client(api_key=key, base_url=cluster.base_url, retry_policy=dream.RetryPolicy(max_attempts=1)) as client:
        client.billing.balance()
        with pytest.raises(dream.RateLimitError) as refusal:
            client.billing.balance()
    assert refusal.value.status_code == 429
    assert 1 <= refusal.value.retry_after <= 100


def test_input_the_server_refuses_raises_validation_error_naming_the_field(client: dream.Client) -> None:
    with pytest.raises(dream.ValidationError, match=r"frame: .*PNG"):
        client.predict(frame_bytes=b"not an image", actions_bytes=npy(actions()))
    with pytest.raises(dream.ValidationError, match=r"actions: has shape \(48, 7\)"):
        client.predict(frame_bytes=png(), actions_bytes=npy(actions(action_dim=8)[:, :7]))


def test_a_model_has_a_base_url_of_its_own_under_which_it_is_active(cluster: Cluster) -> None:
    with dream.Client(api_key=cluster.key, base_url=f"{cluster.base_url}/models/tiny-pusher") as client:
        rollout = client.models.get("tiny-pusher").predict(start_frame=FRAME, actions=actions(12), seed=8)
        assert len(decode(rollout.mp4_bytes())) == 13
        assert client.billing.balance().balance_mils > 0


def test_the_interactive_documentation_names_every_route(cluster: Cluster) -> None:
    assert httpx.get(f"{cluster.base_url}/docs").status_code == 200
    paths = httpx.get(f"{cluster.base_url}/openapi.json").json()["paths"]
    documented = re.findall(r"`[A-Z]+ (/[^`\s]*)`", WIRE.read_text())
    assert {"/v1/rollouts", "/v1/billing/usage", "/healthz"} <= set(paths) <= set(documented)
