"""A job is run and charged once, whatever ends in the middle of it."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

import deployments.rollout_jobs
from billing.commands import RequestId, Settle
from billing.money import Mils
from billing.reader import LedgerReader
from deployments.messages import RolloutResult
from deployments.rollout_jobs import RolloutJobs
from serve_app.settings import Limits
from tests.support.app import App, running_app
from tests.support.jobs import PRICE, PacedModel, ended, get, queue, reaches
from tests.support.models import RAISE
from tests.support.payloads import actions, npy, png
from tests.support.video import decode

CREDIT = ("credit", 1_000_000)
DEBIT, REFUND = ("debit", -PRICE), ("refund", PRICE)
ONE_AT_A_TIME = Limits(running_jobs=1)


@pytest.fixture
async def paced(tmp_path: Path) -> AsyncIterator[App]:
    """One job at a time, each step of which waits for the test."""
    async with running_app(tmp_path, PacedModel(), ONE_AT_A_TIME) as app:
        yield app
        app.model.model.allow()


def jobs(app: App) -> RolloutJobs:
    return app.services.jobs.jobs


def request_id(rollout_id: str) -> RequestId:
    return RequestId(rollout_id.replace("rollout_", "req_"))


def kept_inputs(directory: Path) -> list[str]:
    return [path.name for path in (directory / "results" / "inputs").glob("*")]


async def test_a_job_is_paid_for_when_it_is_queued_and_delivered_later(app: App) -> None:
    headers, customer = app.key()
    queued = await queue(app, headers, seed=7)
    assert queued.status_code == 202
    first = queued.json()
    assert (first["status"], first["frames"], first["seed"]) == ("queued", 0, 7)
    assert (first["metadata"]["cost_estimate"], first["metadata"]["frames_requested"]) == (0.0245, 49)
    assert not {"video_url", "error"} & set(first)
    assert queued.headers["Location"].endswith(f"/v1/rollouts/{first['id']}")
    done = await ended(app, headers, first["id"])
    assert (done["status"], done["frames"], done["created"]) == ("succeeded", 49, first["created"])
    assert done["cost_usd"] == done["metadata"]["cost"] == 0.0245
    assert "cost_estimate" not in done["metadata"]
    assert len(decode((await app.http.get(done["video_url"])).content)) == 49
    assert app.ledger.rows(customer) == [CREDIT, DEBIT]


async def test_a_score_that_was_asked_for_comes_with_the_job(app: App) -> None:
    headers, _ = app.key()
    queued = (await queue(app, headers, score=True)).json()
    assert "ssim" not in queued
    done = await ended(app, headers, queued["id"])
    assert (done["ssim"], done["psnr_db"]) == (1.0, 100.0)  # the stand-in does the same at every number of steps


async def test_what_cannot_be_paid_for_is_refused_before_anything_is_stored(app: App, tmp_path: Path) -> None:
    headers, customer = app.key(credits_mils=PRICE - 1)
    refused = await queue(app, headers)
    assert refused.status_code == 402
    assert refused.json()["detail"]["requested_mils"] == PRICE
    assert (await app.http.get("/v1/rollouts", headers=headers)).json()["data"] == []
    assert kept_inputs(tmp_path) == []
    assert app.ledger.rows(customer) == [("credit", PRICE - 1)]


async def test_a_job_whose_inputs_cannot_be_stored_is_refunded(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(jobs(app)._inputs, "put", disk_full)
    headers, customer = app.key()
    answer = await queue(app, headers)
    assert answer.status_code == 500
    assert "space" not in answer.text
    assert app.ledger.rows(customer) == [CREDIT, DEBIT, REFUND]


async def test_a_restart_of_the_whole_cluster_resumes_what_ran_and_what_was_queued(tmp_path: Path) -> None:
    model = PacedModel()
    async with running_app(tmp_path, model, ONE_AT_A_TIME) as app:
        token, customer = app.ledger.create_key(1_000_000)
        headers = {"Authorization": f"Bearer {token}"}
        ids = [(await queue(app, headers, seed=seed)).json()["id"] for seed in range(2)]
        await asyncio.to_thread(model.entered.acquire)
        assert [(await get(app, headers, each))["status"] for each in ids] == ["running", "queued"]
        await jobs(app).stop()
        model.allow()
    async with running_app(tmp_path) as app:
        assert [(await ended(app, headers, each))["status"] for each in ids] == ["succeeded", "succeeded"]
        assert app.ledger.rows(customer) == [CREDIT, DEBIT, DEBIT]
    assert kept_inputs(tmp_path) == []


async def test_the_job_of_a_process_that_vanished_is_run_by_another_and_charged_once(paced: App) -> None:
    headers, customer = paced.key()
    first = (await queue(paced, headers, seed=1)).json()["id"]
    await reaches(paced, headers, first, "running")
    orphan = (await queue(paced, headers, seed=2)).json()["id"]
    taken = jobs(paced).store.claim("own_that_dies", lease_s=0)
    assert taken is not None
    assert taken.request_id == request_id(orphan)
    paced.model.model.allow()
    assert (await ended(paced, headers, orphan))["status"] == "succeeded"
    assert paced.ledger.rows(customer) == [CREDIT, DEBIT, DEBIT]


def result_of(rollout_id: str) -> RolloutResult:
    """What a process that vanished had stored."""
    return RolloutResult(request_id(rollout_id), "tiny-pusher", (b"....ftyp",), time.time(), 49, PRICE, 0, 1, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("settled", [False, True])
async def test_a_result_that_was_stored_before_its_process_vanished_is_not_made_again(
    paced: App, settled: bool
) -> None:
    headers, customer = paced.key()
    first = (await queue(paced, headers, seed=1)).json()["id"]
    await reaches(paced, headers, first, "running")
    orphan = (await queue(paced, headers, seed=2)).json()["id"]
    paced.services.results.put(result_of(orphan), lasting=True)
    if settled:
        paced.ledger.apply(Settle(request_id(orphan), 49, ""))
    jobs(paced).store.claim("own_that_dies", lease_s=0)
    paced.model.model.allow(4)  # as many chunks as the first one has
    done = await ended(paced, headers, orphan)
    assert (done["status"], done["frames"], done["metadata"]["cost"]) == ("succeeded", 49, 0.0245)
    assert (await paced.http.get(done["video_url"])).content == b"....ftyp"
    assert paced.model.model.steps == 4
    assert paced.ledger.rows(customer) == [CREDIT, DEBIT, DEBIT]


async def test_a_job_that_ends_each_process_that_runs_it_is_given_up_and_refunded(paced: App) -> None:
    headers, customer = paced.key()
    first = (await queue(paced, headers, seed=1)).json()["id"]
    await reaches(paced, headers, first, "running")
    deadly = (await queue(paced, headers, seed=2)).json()["id"]
    for _ in range(deployments.rollout_jobs.MAX_OWNERS):
        assert jobs(paced).store.claim("own_that_dies", lease_s=0) is not None
    paced.model.model.allow(4)
    failed = await ended(paced, headers, deadly)
    assert (failed["status"], failed["error"]["code"], failed["cost_usd"]) == ("failed", "ENGINE_FAILED", 0)
    assert paced.ledger.rows(customer) == [CREDIT, DEBIT, DEBIT, REFUND]


async def test_a_poisoned_job_fails_once_and_is_refunded(app: App) -> None:
    headers, customer = app.key()
    poisoned = actions()
    poisoned[12, RAISE] = 1
    failed = await ended(app, headers, (await queue(app, headers, poisoned)).json()["id"])
    assert (failed["status"], failed["frames"], failed["metadata"]["cost"]) == ("failed", 0, 0)
    assert failed["error"]["code"] == "ENGINE_FAILED"
    assert "poisoned" not in failed["error"]["message"]
    assert app.ledger.rows(customer) == [CREDIT, DEBIT, REFUND]


async def test_a_job_whose_reservation_has_run_out_never_runs(paced: App) -> None:
    headers, customer = paced.key()
    first = (await queue(paced, headers, seed=1)).json()["id"]
    await reaches(paced, headers, first, "running")
    unpaid = (await queue(paced, headers, seed=2)).json()["id"]
    paced.ledger.apply(Settle(request_id(unpaid), 0, "lease expired"))
    paced.model.model.allow(4)
    failed = await ended(paced, headers, unpaid)
    assert (failed["status"], failed["error"]["message"]) == ("failed", "lease expired")
    assert paced.model.model.steps == 4
    assert paced.ledger.rows(customer) == [CREDIT, DEBIT, DEBIT, REFUND]


async def test_a_job_that_waited_too_long_is_refunded_unrun(tmp_path: Path) -> None:
    async with running_app(tmp_path, limits=Limits(job_timeout_s=1e-6)) as app:
        headers, customer = app.key()
        failed = await ended(app, headers, (await queue(app, headers)).json()["id"])
        assert failed["error"]["code"] == "DEADLINE_EXCEEDED"
        assert app.ledger.rows(customer) == [CREDIT, DEBIT, REFUND]


class TestCanceling:
    async def test_a_queued_job_is_refunded_whole_and_never_runs(self, paced: App, tmp_path: Path) -> None:
        headers, customer = paced.key()
        first = (await queue(paced, headers, seed=1)).json()["id"]
        await reaches(paced, headers, first, "running")
        waiting = (await queue(paced, headers, seed=2)).json()["id"]
        answers = [(await paced.http.delete(f"/v1/rollouts/{waiting}", headers=headers)).json() for _ in range(2)]
        assert answers[0] == answers[1]
        assert (answers[0]["status"], answers[0]["metadata"]["cost"]) == ("canceled", 0)
        assert paced.ledger.rows(customer) == [CREDIT, DEBIT, DEBIT, REFUND]
        paced.model.model.allow(4)
        assert (await ended(paced, headers, first))["status"] == "succeeded"
        assert paced.model.model.steps == 4

    async def test_a_running_job_keeps_the_chunks_that_had_run_and_refunds_the_rest(self, paced: App) -> None:
        headers, customer = paced.key()
        running = (await queue(paced, headers)).json()["id"]
        paced.model.model.allow(1)
        for _ in range(2):  # the second chunk has begun, so the first one has ended
            await asyncio.to_thread(paced.model.model.entered.acquire)
        canceling = asyncio.create_task(paced.http.delete(f"/v1/rollouts/{running}", headers=headers))
        canceled = (await canceling).json()
        assert (canceled["status"], canceled["frames"], canceled["metadata"]["cost"]) == ("canceled", 13, 0.0065)
        assert len(decode((await paced.http.get(canceled["video_url"])).content)) == 13
        assert paced.ledger.rows(customer) == [CREDIT, DEBIT, ("refund", PRICE - 13 * 5)]

    async def test_a_job_that_another_process_runs_is_ended_there(self, paced: App) -> None:
        """The other process is told by the row; here it hears of it at its next renewal."""
        headers, customer = paced.key()
        running = (await queue(paced, headers)).json()["id"]
        await reaches(paced, headers, running, "running")
        await asyncio.to_thread(jobs(paced).store.cancel, request_id(running))
        assert (await ended(paced, headers, running))["status"] == "canceled"
        assert paced.ledger.rows(customer) == [CREDIT, DEBIT, REFUND]

    async def test_what_has_ended_stays_as_it_is(self, app: App) -> None:
        headers, customer = app.key()
        rollout_id = (await queue(app, headers)).json()["id"]
        done = await ended(app, headers, rollout_id)
        answer = await app.http.delete(f"/v1/rollouts/{rollout_id}", headers=headers)
        assert (answer.status_code, answer.json()) == (200, done)
        assert app.ledger.rows(customer) == [CREDIT, DEBIT]

    async def test_frames_that_a_vanished_cancellation_kept_are_told_by_their_number(self, paced: App) -> None:
        """Below a mil a frame, a part may cost as much as the whole."""
        headers, _ = paced.key()
        job = jobs(paced).store.get(request_id((await queue(paced, headers)).json()["id"]))
        assert job is not None
        paced.ledger.apply(Settle(job.request_id, 13, "canceled"))
        settled = paced.ledger.reader.reservation(job.request_id)
        assert settled is not None
        cheap = replace(settled, mils_per_frame=Mils(1), per_frames=100, amount_mils=Mils(1), captured_mils=Mils(1))
        ending = jobs(paced)._settled_before(replace(job, amount=Mils(1)), cheap)
        assert (ending.state, ending.delivered, ending.captured) == ("canceled", 13, 1)

    async def test_money_that_a_vanished_cancellation_left_is_given_back(self, paced: App) -> None:
        headers, customer = paced.key()
        first = (await queue(paced, headers, seed=1)).json()["id"]
        await reaches(paced, headers, first, "running")
        waiting = (await queue(paced, headers, seed=2)).json()["id"]
        await asyncio.to_thread(jobs(paced).store.cancel, request_id(waiting))  # and then its process ended
        await jobs(paced)._keep_reservations()
        assert paced.ledger.rows(customer) == [CREDIT, DEBIT, DEBIT, REFUND]


class TestSendingAgain:
    async def test_the_same_key_answers_with_the_same_job_in_every_state_and_charges_once(self, paced: App) -> None:
        headers, customer = paced.key()
        first = await queue(paced, headers, key="k")
        again = await queue(paced, headers, key="k")
        assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])
        paced.model.model.allow()
        done = await ended(paced, headers, first.json()["id"])
        replayed = await queue(paced, headers, key="k")
        assert (replayed.status_code, replayed.json()) == (200, done)
        assert (await queue(paced, headers, key="k", seed=1)).status_code == 422
        assert paced.ledger.rows(customer) == [CREDIT, DEBIT]

    async def test_the_clients_second_unkeyed_call_joins_the_job(self, app: App) -> None:
        """The public client answers a broken connection by sending the same work to /v1/predict."""
        headers, customer = app.key()
        queued = (await queue(app, headers, seed=3)).json()
        files = {"frame": png(), "actions": npy(actions())}
        knobs = {"seed": "3", "num_steps": "1", "guidance": "0.0"}
        answer = await app.http.post("/v1/predict", headers=headers, files=files, data=knobs)
        done = await ended(app, headers, queued["id"])
        assert answer.content == (await app.http.get(done["video_url"])).content
        assert app.ledger.rows(customer) == [CREDIT, DEBIT]

    async def test_what_was_delivered_without_async_is_what_the_job_answers(self, app: App) -> None:
        headers, customer = app.key()
        delivered = (await queue(app, headers, mode="sync")).json()
        again = await queue(app, headers)
        assert (again.status_code, again.json()["id"]) == (200, delivered["id"])
        assert app.ledger.rows(customer) == [CREDIT, DEBIT]

    async def test_what_was_canceled_half_done_is_not_taken_for_the_whole(self, paced: App) -> None:
        headers, customer = paced.key()
        running = (await queue(paced, headers)).json()["id"]
        paced.model.model.allow(1)
        for _ in range(2):
            await asyncio.to_thread(paced.model.model.entered.acquire)
        await paced.http.delete(f"/v1/rollouts/{running}", headers=headers)
        assert (await queue(paced, headers, mode="sync")).status_code == 409
        assert paced.ledger.rows(customer) == [CREDIT, DEBIT, ("refund", PRICE - 13 * 5)]


class TestBounds:
    async def test_a_customer_may_have_so_many_jobs_and_no_more(self, tmp_path: Path) -> None:
        limits = Limits(running_jobs=1, max_live_jobs_per_customer=2)
        model = PacedModel()
        async with running_app(tmp_path, model, limits) as app:
            headers, customer = app.key()
            others, _ = app.key()
            assert [(await queue(app, headers, seed=seed)).status_code for seed in range(2)] == [202, 202]
            refused = await queue(app, headers, seed=2)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "RATE_LIMITED")
            assert 1 <= int(refused.headers["Retry-After"]) <= 60
            assert app.ledger.rows(customer) == [CREDIT, DEBIT, DEBIT]
            assert (await queue(app, others)).status_code == 202
            model.allow()

    async def test_the_cluster_takes_so_many_jobs_and_no_more(self, tmp_path: Path) -> None:
        model = PacedModel()
        async with running_app(tmp_path, model, Limits(running_jobs=1, max_live_jobs=1)) as app:
            headers, _ = app.key()
            others, customer = app.key()
            assert (await queue(app, headers)).status_code == 202
            refused = await queue(app, others)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "OVERLOADED")
            assert 1 <= int(refused.headers["Retry-After"]) <= 60
            assert app.ledger.rows(customer) == [CREDIT]
            model.allow()

    async def test_a_customer_with_many_jobs_does_not_keep_anothers_waiting(self, paced: App) -> None:
        many, _ = paced.key()
        one, _ = paced.key()
        ids = [(await queue(paced, many, seed=seed)).json()["id"] for seed in range(4)]
        await reaches(paced, many, ids[0], "running")
        late = (await queue(paced, one)).json()["id"]
        turn = jobs(paced).store.claim("own_another", lease_s=60)
        assert turn is not None
        assert turn.request_id == request_id(late)
        assert jobs(paced).store.release(turn.request_id, "own_another", not_before=0.0)
        paced.model.model.allow()


async def test_the_money_of_a_waiting_job_stays_held_beyond_its_first_lease(
    paced: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployments.rollout_jobs, "RESERVATION_LEASE_S", 1.0)
    headers, _ = paced.key()
    ids = [(await queue(paced, headers, seed=seed)).json()["id"] for seed in range(2)]
    await reaches(paced, headers, ids[0], "running")
    monkeypatch.setattr(deployments.rollout_jobs, "RESERVATION_LEASE_S", 1_000.0)
    await jobs(paced)._keep_reservations()
    reader: LedgerReader = paced.ledger.reader
    for each in ids:  # the one that runs and the one that waits
        held = reader.reservation(request_id(each))
        assert held is not None
        assert held.lease_until > time.time() + 900


async def test_a_job_that_finds_no_room_goes_back_into_the_queue_unharmed(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deployments.errors import ModelOverloaded

    served = app.model.run_chunk
    refusals = [ModelOverloaded("tiny-pusher", 0), ModelOverloaded("tiny-pusher", 0)]

    async def full_at_first(*args: object, **options: object) -> object:
        if refusals:
            raise refusals.pop()
        return await served(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(app.model, "run_chunk", full_at_first)
    headers, customer = app.key()
    rollout_id = (await queue(app, headers)).json()["id"]
    assert (await ended(app, headers, rollout_id))["status"] == "succeeded"
    job = jobs(app).store.get(request_id(rollout_id))
    assert job is not None
    assert job.attempts == 1
    assert app.ledger.rows(customer) == [CREDIT, DEBIT]


async def test_an_ended_job_is_forgotten_with_its_log_when_its_time_has_come(app: App) -> None:
    headers, _ = app.key()
    rollout_id = (await queue(app, headers, webhook_url="http://127.0.0.1:1/")).json()["id"]
    done = await ended(app, headers, rollout_id)
    assert jobs(app).store.forget(done["created"] - 1) == 0
    assert jobs(app).store.forget(time.time() + 1) == 1
    assert jobs(app).store.get(request_id(rollout_id)) is None
