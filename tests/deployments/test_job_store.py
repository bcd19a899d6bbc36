"""The rows of jobs on both databases: one owner at a time, one end, and a webhook exactly when it ends."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from billing.commands import RequestId
from billing.database import writer
from billing.money import Mils
from deployments.job_store import Ending, Filters, Job, JobStore
from deployments.webhook_store import Attempt, WebhookStore
from tests.billing.conftest import (  # noqa: F401 - fixtures
    Account,
    Clock,
    Desk,
    clock,
    desk,
    engine,
)

HOOK = "https://example.com/hook"


@pytest.fixture
def store(engine: Engine, clock: Clock) -> JobStore:  # noqa: F811
    return JobStore(engine, clock)


def queued(desk: Desk, store: JobStore, account: Account, webhook_url: str = HOOK) -> RequestId:  # noqa: F811
    request_id = desk.reserved(account)
    store.add(
        Job(
            request_id=request_id,
            customer_id=account.customer_id,
            key_id=account.key.key_id,
            model="tiny-pusher",
            seed=2**63 - 1,
            num_steps=4,
            guidance=1.5,
            frames=49,
            amount=Mils(245),
            payload_sha256="0" * 64,
            start_frame_resized=True,
            score=False,
            base_url="https://api.example.com",
            webhook_url=webhook_url,
            created_at=desk.clock(),
        )
    )
    return request_id


def test_twenty_processes_that_claim_at_once_share_the_jobs_out(desk: Desk, store: JobStore) -> None:  # noqa: F811
    account = desk.account(10_000)
    waiting = {queued(desk, store, account) for _ in range(5)}
    with ThreadPoolExecutor(20) as pool:
        claimed = list(pool.map(lambda index: store.claim(f"own_{index}", 60), range(20)))
    got = [job.request_id for job in claimed if job is not None]
    while (job := store.claim("own_last", 60)) is not None:  # who lost a race asks again
        got.append(job.request_id)
    assert sorted(got) == sorted(waiting)


def test_a_job_is_taken_over_when_its_lease_has_run_out_and_not_before(
    desk: Desk,  # noqa: F811
    store: JobStore,
    clock: Clock,  # noqa: F811
) -> None:
    request_id = queued(desk, store, desk.account(1_000))
    assert store.claim("own_a", 15) is not None
    clock.advance(14)
    assert store.claim("own_b", 15) is None
    assert [held.request_id for held in store.renew("own_a", [request_id], 15)] == [request_id]
    clock.advance(14)
    assert store.claim("own_b", 15) is None
    clock.advance(1)
    taken = store.claim("own_b", 15)
    assert taken is not None
    assert (taken.owner, taken.attempts) == ("own_b", 2)
    assert store.renew("own_a", [request_id], 15) == []
    assert not store.finish(request_id, "own_a", Ending("succeeded", 49, Mils(245)))
    assert not store.release(request_id, "own_a", 0.0)
    assert store.finish(request_id, "own_b", Ending("succeeded", 49, Mils(245)))


def test_the_webhook_is_there_exactly_when_the_job_has_ended_and_once(desk: Desk, store: JobStore) -> None:  # noqa: F811
    outbox = WebhookStore(desk.engine, desk.clock)
    account = desk.account(1_000)
    request_id = queued(desk, store, account)
    store.claim("own_a", 15)
    assert outbox.log(request_id) == []
    assert store.finish(request_id, "own_a", Ending("failed", error_code="ENGINE_FAILED", error="it broke"))
    assert not store.finish(request_id, "own_a", Ending("canceled"))
    assert store.cancel(request_id) == replace(store.get(request_id))  # type: ignore[type-var]
    (((delivery), attempts),) = outbox.log(request_id)
    assert (delivery.url, delivery.state, attempts) == (HOOK, "pending", [])
    claimed = outbox.claim({}, 1, hold_s=60)
    assert claimed is not None
    assert outbox.claim({}, 1, hold_s=60) is None
    outbox.record(Attempt(claimed.delivery_id, 1, 5.0, 1.0, 200, ""), "delivered")
    (((delivery), attempts),) = outbox.log(request_id)
    assert (delivery.state, [attempt.status for attempt in attempts]) == ("delivered", [200])
    quiet = queued(desk, store, account, webhook_url="")
    assert store.cancel(quiet) is not None
    assert outbox.log(quiet) == []


def test_the_database_lets_a_job_end_once_and_keeps_its_terms(desk: Desk, store: JobStore) -> None:  # noqa: F811
    request_id = queued(desk, store, desk.account(1_000))
    for change in ("frames = 50", "amount = 1", "state = 'running'", "state = 'succeeded'", "state = 'lost'"):
        with pytest.raises(DBAPIError), writer(desk.engine).begin() as connection:
            connection.execute(text(f"UPDATE rollout_job SET {change}"))
    store.cancel(request_id)
    with pytest.raises(DBAPIError, match="a job ends once"), writer(desk.engine).begin() as connection:
        connection.execute(text("UPDATE rollout_job SET state = 'queued', finished_at = NULL"))


def test_what_was_written_is_what_is_read_and_forgotten_whole(desk: Desk, store: JobStore, clock: Clock) -> None:  # noqa: F811
    account, other = desk.account(1_000), desk.account(1_000)
    request_id, others = queued(desk, store, account), queued(desk, store, other)
    job = store.get(request_id)
    assert job is not None
    assert (job.seed, job.guidance, job.start_frame_resized, job.state) == (2**63 - 1, 1.5, True, "queued")
    assert store.live(account.customer_id) == (1, 2)
    assert store.page(account.customer_id, Filters(), 10) == [job]
    assert {each.request_id for each in store.open_reservations()} == {request_id, others}
    store.cancel(request_id)
    clock.advance(100)
    assert store.forget(clock()) == 1
    assert store.get(request_id) is None
    assert store.live(account.customer_id) == (0, 1)


def test_fifty_processes_that_ask_for_a_first_secret_get_one(desk: Desk) -> None:  # noqa: F811
    outbox, account = WebhookStore(desk.engine, desk.clock), desk.account()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: outbox.secrets(account.customer_id)[-1].secret, range(50)))
    assert set(answers) == {each.secret for each in outbox.secrets(account.customer_id)}
    assert len(set(answers)) == 1
