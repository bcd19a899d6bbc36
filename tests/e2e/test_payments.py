"""The public client pays, on a real cluster: the page, a browser's form, the webhook, the balance."""

import json
import time

import dream
import httpx
import psutil
import pytest

from tests.support.cluster import PATIENCE_S, Cluster, eventually


def pay(url: str) -> httpx.Response:
    """What a browser does on the hosted page; `make pay-in-browser` has Chromium do it."""
    page = httpx.get(url)
    assert "name=card" in page.text
    return httpx.post(url, data={"card": "4242424242424242", "action": "pay"}, follow_redirects=True)


def test_the_public_client_tops_up_and_the_balance_rises_once(stand_in_cluster: Cluster) -> None:
    key = stand_in_cluster.new_customer()
    with dream.Client(api_key=key, base_url=stand_in_cluster.base_url) as client:
        before = client.billing.balance().balance_mils
        session = client.billing.topup(amount_usd=25.00)
        assert (session.amount_cents, session.session_id[:3]) == (2_500, "cs_")
        paid_at = time.monotonic()
        done = pay(session.url)
        assert "in your balance" in done.text
        eventually(lambda: client.billing.balance().balance_mils == before + 250_000)
        assert time.monotonic() - paid_at < 10
        kinds = [(row.kind, row.amount_mils) for row in client.billing.transactions(limit=5)]
        assert kinds.count(("credit", 250_000)) == 1
        for dollars in (4.99, 10_000.01):
            with pytest.raises(ValueError, match="must be between"):
                client.billing.topup(amount_usd=dollars)


def test_payments_go_on_after_their_actor_is_killed(stand_in_cluster: Cluster) -> None:
    key = stand_in_cluster.new_customer()
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=stand_in_cluster.base_url, headers=headers, timeout=PATIENCE_S) as http:

        def page() -> httpx.Response:
            return http.post("/v1/billing/topup", json={"amount_cents": 700})

        assert page().status_code == 200
        [actor] = stand_in_cluster.processes("PaymentsActor")
        actor.kill()
        eventually(lambda: page().status_code == 200)
        url = page().json()["url"]
        httpx.post(url, data={"card": "4242424242424242", "action": "pay"})  # and nobody comes back
        eventually(lambda: http.get("/v1/billing/balance").json()["balance_mils"] == 10_000 + 70_000)


def test_an_operator_reconciles_beside_the_running_cluster(stand_in_cluster: Cluster) -> None:
    running = psutil.Process(stand_in_cluster.process.pid).environ()
    given = {name: value for name, value in running.items() if name.startswith("STRIPE_")}
    done = stand_in_cluster.admin("stripe", "reconcile", "--days-ago", "0", "--json", **given)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["difference_cents"] == 0
