"""A request's whole life, with the real ledger and engine, and only the hops between processes left out."""

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deployments.ingress
import deployments.ledger_client
import deployments.reservations
from billing.commands import (
    Command,
    CustomerId,
    KeyTerms,
    KeyTermsSet,
    Outcome,
    Reserve,
    RevokeKey,
    SetKeyTerms,
    Settle,
)
from billing.keys import mint_request_id, token_sha256
from billing.prices import Work, price
from billing.reader import KeyRecord
from deployments.errors import (
    BudgetUsedUp,
    CreditsInsufficient,
    DeadlinePassed,
    EngineFailed,
    IdempotencyKeyReused,
    KeyNotAccepted,
    KeyNotAllowed,
    ModelOverloaded,
    ResultExpired,
)
from deployments.ingress import Ingress
from deployments.messages import RolloutRequest, RolloutResult
from deployments.pricing import default_price
from serve_app.catalog import CATALOG, model_spec
from tests.support.app import SLUG, App, running_app
from tests.support.models import RAISE, StandInModel, StandInRow
from tests.support.payloads import actions
from tests.support.video import decode

RATE = 5


class HeldModel(StandInModel):
    """Its steps wait until the test opens the gate."""

    def __init__(self) -> None:
        super().__init__(Path(), "cpu")
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()

    def step(self, rows: Sequence[StandInRow]) -> None:
        self.entered.release()
        assert self.gate.wait(timeout=10)
        super().step(rows)


@pytest.fixture
async def held(tmp_path: Path) -> AsyncIterator[App]:
    model = HeldModel()
    async with running_app(tmp_path, model) as app:
        yield app
        model.gate.set()


def customer(app: App, credits_mils: int) -> KeyRecord:
    token, _ = app.ledger.create_key(credits_mils)
    key = app.ledger.reader.key_by_token_hash(token_sha256(token))
    assert key is not None
    return key


def request_of(key: KeyRecord, *candidates: Any, idempotency_key: str = "", payload: str = "") -> RolloutRequest:
    """Each is its own work unless `payload` says which work it is."""
    return RolloutRequest(
        request_id=mint_request_id(),
        key_id=key.key_id,
        model=SLUG,
        start_frames=(np.full((64, 64, 3), 100, np.uint8),),
        candidates=candidates or (actions(),),
        seed=0,
        num_steps=1,
        guidance=0.0,
        payload_sha256=hashlib.sha256((payload or mint_request_id()).encode()).hexdigest(),
        idempotency_key=idempotency_key,
        price=price(default_price(model_spec(CATALOG[SLUG])), Work(frames=49, fps=10, height=64, width=64)),
    )


def ingress(app: App) -> Ingress:
    return app.services.ingress


def balance(app: App, customer_id: CustomerId) -> int:
    return app.ledger.reader.balance(customer_id)


async def test_48_actions_give_49_frames_for_245_mils(app: App) -> None:
    key = customer(app, 1_000)
    result = await ingress(app).run(request_of(key))
    assert (result.num_frames, result.cost_mils) == (49, 245)
    assert len(decode(result.videos[0])) == 49
    assert app.ledger.rows(key.customer_id) == [("credit", 1_000), ("debit", -245)]


async def test_eight_candidates_are_one_reservation_of_1960_mils_and_one_forward_per_chunk(app: App) -> None:
    key = customer(app, 10_000)
    result = await ingress(app).run(request_of(key, *(actions(seed=seed) for seed in range(8))))
    assert (len(result.videos), result.num_frames, result.cost_mils) == (8, 392, 1_960)
    assert app.ledger.rows(key.customer_id) == [("credit", 10_000), ("debit", -1_960)]
    assert app.model.model.largest_batch == 8


async def test_each_chunk_starts_from_the_last_frame_of_the_one_before(app: App) -> None:
    """The stand-in brightens each frame by one level, so a chunk that started elsewhere would show."""
    result = await ingress(app).run(request_of(customer(app, 1_000)))
    brightness = [float(frame.mean()) for frame in decode(result.videos[0])]
    assert np.allclose(brightness, 100 + np.arange(49), atol=1.5)


@pytest.mark.parametrize("num_actions", [1, 11, 12, 13, 25])
async def test_a_short_last_chunk_is_trimmed_and_only_returned_frames_are_charged(app: App, num_actions: int) -> None:
    key = customer(app, 1_000)
    result = await ingress(app).run(request_of(key, actions(num_actions)))
    assert len(decode(result.videos[0])) == 1 + num_actions
    assert app.ledger.rows(key.customer_id)[-1] == ("debit", -RATE * (1 + num_actions))


async def test_candidates_may_have_different_lengths(app: App) -> None:
    result = await ingress(app).run(request_of(customer(app, 1_000), actions(5), actions(30), actions(12)))
    assert [len(decode(video)) for video in result.videos] == [6, 31, 13]
    assert result.cost_mils == RATE * (6 + 31 + 13)


async def test_a_balance_of_exactly_the_price_is_enough_and_one_mil_less_is_refused_unrun(app: App) -> None:
    exact, short = customer(app, 245), customer(app, 244)
    await ingress(app).run(request_of(exact))
    assert balance(app, exact.customer_id) == 0
    with pytest.raises(CreditsInsufficient) as refusal:
        await ingress(app).run(request_of(short))
    assert (refusal.value.balance_mils, refusal.value.requested_mils) == (244, 245)
    assert app.ledger.rows(short.customer_id) == [("credit", 244)]


async def test_a_refused_request_never_reaches_the_model(held: App) -> None:
    with pytest.raises(CreditsInsufficient):
        await ingress(held).run(request_of(customer(held, 1)))
    assert not held.model.model.entered.acquire(blocking=False)


async def test_a_key_revoked_after_it_was_read_reserves_nothing(app: App) -> None:
    key = customer(app, 1_000)
    app.ledger.apply(RevokeKey(key.key_id))
    with pytest.raises(KeyNotAccepted):
        await ingress(app).run(request_of(key))
    assert app.ledger.rows(key.customer_id) == [("credit", 1_000)]


async def test_one_poisoned_candidate_of_eight_refunds_the_whole_batch(app: App) -> None:
    key = customer(app, 10_000)
    candidates = [actions(seed=seed) for seed in range(8)]
    candidates[3][24, RAISE] = 1
    with pytest.raises(EngineFailed, match="chunk 2 of candidate 3"):
        await ingress(app).run(request_of(key, *candidates))
    assert app.ledger.rows(key.customer_id) == [("credit", 10_000), ("debit", -1_960), ("refund", 1_960)]
    await ingress(app).run(request_of(key, actions()))


async def test_the_refund_is_durable_before_the_failure_is_answered(app: App) -> None:
    key = customer(app, 245)
    poisoned = actions()
    poisoned[0, RAISE] = 1
    with pytest.raises(EngineFailed):
        await ingress(app).run(request_of(key, poisoned))
    assert balance(app, key.customer_id) == 245
    await ingress(app).run(request_of(key))


async def test_an_overloaded_model_refunds_and_says_when_to_come_back(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def overloaded(*_: object, **__: object) -> None:
        raise ModelOverloaded(SLUG, 7)

    monkeypatch.setattr(app.model, "run_chunk", overloaded)
    key = customer(app, 1_000)
    with pytest.raises(ModelOverloaded) as refusal:
        await ingress(app).run(request_of(key))
    assert refusal.value.retry_after_s == 7
    assert balance(app, key.customer_id) == 1_000


async def test_a_deadline_that_passes_is_refunded_and_its_rows_leave_the_batch(held: App) -> None:
    key = customer(held, 1_000)
    with pytest.raises(DeadlinePassed):
        await ingress(held).run(replace(request_of(key), deadline_s=0.05))
    assert held.ledger.rows(key.customer_id) == [("credit", 1_000), ("debit", -245), ("refund", 245)]


async def test_every_chunk_says_for_whom_it_runs_and_how_much_is_left(app: App) -> None:
    key = customer(app, 1_000)
    await ingress(app).run(replace(request_of(key), deadline_s=60.0, service_class="interactive"))
    terms = app.model.terms
    assert {(each.customer_id, each.service_class) for each in terms} == {(key.customer_id, "interactive")}
    assert [each.chunks_left for each in terms] == [4, 3, 2, 1]
    left_s = [60.0, *(each.deadline_s or 0.0 for each in terms), 0.0]
    assert left_s == sorted(left_s, reverse=True)


async def test_an_unexpected_error_refunds_too(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(app.model, "run_chunk", broken)
    key = customer(app, 1_000)
    with pytest.raises(KeyError):
        await ingress(app).run(request_of(key))
    assert balance(app, key.customer_id) == 1_000


async def test_a_client_that_leaves_during_a_step_is_refunded_and_its_rows_leave_the_batch(held: App) -> None:
    key = customer(held, 1_000)
    running = asyncio.create_task(ingress(held).run(request_of(key)))
    await asyncio.to_thread(held.model.model.entered.acquire)
    assert balance(held, key.customer_id) == 755
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    held.model.model.gate.set()
    await ingress(held).drain(0)
    assert held.ledger.rows(key.customer_id) == [("credit", 1_000), ("debit", -245), ("refund", 245)]


async def test_a_client_that_leaves_during_the_reservation_is_refunded(app: App) -> None:
    key = customer(app, 1_000)
    running = asyncio.create_task(ingress(app).run(request_of(key)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await ingress(app).drain(0)
    assert balance(app, key.customer_id) == 1_000


async def test_draining_lets_running_work_finish_and_refuses_new_work_unreserved(held: App) -> None:
    early, late = customer(held, 245), customer(held, 245)
    running = asyncio.create_task(ingress(held).run(request_of(early)))
    await asyncio.to_thread(held.model.model.entered.acquire)
    draining = asyncio.create_task(ingress(held).drain(timeout_s=10))
    await asyncio.sleep(0)
    with pytest.raises(ModelOverloaded):
        await ingress(held).run(request_of(late))
    held.model.model.gate.set()
    assert (await running).num_frames == 49
    await draining
    assert balance(held, late.customer_id) == 245


async def test_draining_refunds_what_does_not_finish_in_time(held: App) -> None:
    key = customer(held, 245)
    running = asyncio.create_task(ingress(held).run(request_of(key)))
    await asyncio.to_thread(held.model.model.entered.acquire)
    await ingress(held).drain(timeout_s=0)
    assert running.done()
    assert held.ledger.rows(key.customer_id)[-1] == ("refund", 245)
    with pytest.raises(ModelOverloaded):
        await running


async def test_a_client_that_leaves_while_the_ledger_settles_is_answered_for_its_retry(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the frames exist nothing may come between them and their caller: the settlement is not waited for."""
    away = asyncio.Event()
    send = app.ledger_call.call

    async def settlements_wait(commands: list[Command]) -> list[Outcome]:
        if any(isinstance(command, Settle) for command in commands):
            await away.wait()
        return await send(commands)

    monkeypatch.setattr(app.ledger_call, "call", settlements_wait)
    key = customer(app, 1_000)
    result = await ingress(app).run(request_of(key))
    assert result.num_frames == 49
    away.set()
    await ingress(app).drain(0)
    reservation = app.ledger.reader.reservation(result.request_id)
    assert reservation is not None
    assert (reservation.state, reservation.captured_mils) == ("settled", 245)


async def test_a_settlement_is_tried_until_the_ledger_is_back(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployments.reservations, "SETTLE_RETRY_S", 0.0)
    monkeypatch.setattr(deployments.ledger_client, "RETRY_EVERY_S", 0.01)
    failures = 30
    send = app.ledger_call.call

    async def flaky(commands: list[Command]) -> list[Outcome]:
        nonlocal failures
        if any(isinstance(command, Settle) for command in commands) and failures:
            failures -= 1
            raise ConnectionError
        outcomes = await send(commands)
        monkeypatch.setattr(deployments.ledger_client, "RETRY_FOR_S", 0.05)  # once it is reserved
        return outcomes

    monkeypatch.setattr(app.ledger_call, "call", flaky)
    result = await ingress(app).run(request_of(customer(app, 1_000)))
    await ingress(app).drain(0)
    reservation = app.ledger.reader.reservation(result.request_id)
    assert reservation is not None
    assert reservation.state == "settled"
    assert failures == 0


def disk_full(*_: object) -> None:
    raise OSError("no space left on device")


async def test_a_video_whose_link_cannot_be_kept_is_not_charged(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.services.results, "put", disk_full)
    key = customer(app, 1_000)
    with pytest.raises(OSError, match="no space"):
        await ingress(app).run(request_of(key), lasting=True)
    assert balance(app, key.customer_id) == 1_000


async def test_what_only_a_repetition_would_miss_is_delivered_though_it_cannot_be_kept(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.services.results, "put", disk_full)
    key = customer(app, 1_000)
    assert (await ingress(app).run(request_of(key, payload="same"))).videos
    with pytest.raises(ResultExpired):
        await ingress(app).run(request_of(key, payload="same"))
    assert balance(app, key.customer_id) == 755


async def test_a_repetition_waits_until_the_first_result_can_be_read(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    may_store, put = threading.Event(), app.services.results.put

    def slow(*arguments: Any) -> None:
        assert may_store.wait(timeout=30)
        put(*arguments)

    monkeypatch.setattr(app.services.results, "put", slow)
    key = customer(app, 1_000)
    first = await ingress(app).run(request_of(key, payload="same"))
    again = asyncio.create_task(ingress(app).run(request_of(key, payload="same")))
    await asyncio.wait([again], timeout=0.2)
    assert not again.done()
    may_store.set()
    assert (await again).videos == first.videos
    assert balance(app, key.customer_id) == 755


async def test_of_one_key_so_many_may_wait_for_the_same_result_and_no_more(
    held: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are free, and each holds a place that somebody else cannot have."""
    monkeypatch.setattr(deployments.ingress, "MAX_JOINING", 2)
    key, other = customer(held, 1_000), customer(held, 1_000)
    first = asyncio.create_task(ingress(held).run(request_of(key, payload="same")))
    await asyncio.to_thread(held.model.model.entered.acquire)
    again = [asyncio.create_task(ingress(held).run(request_of(key, payload="same"))) for _ in range(2)]
    async with asyncio.timeout(10):
        while ingress(held)._joining[key.key_id] < 2:  # noqa: ASYNC110 - of tasks in this process
            await asyncio.sleep(0.001)
    with pytest.raises(ModelOverloaded):
        await ingress(held).run(request_of(key, payload="same"))
    others = asyncio.create_task(ingress(held).run(request_of(other, payload="same")))
    held.model.model.gate.set()
    results = await asyncio.gather(first, *again, others)
    assert len({result.request_id for result in results}) == 2
    assert (balance(held, key.customer_id), balance(held, other.customer_id)) == (755, 755)
    assert not ingress(held)._joining


async def test_stopping_waits_for_the_settlements_that_are_left(app: App) -> None:
    key = customer(app, 1_000)
    result = await ingress(app).run(request_of(key))
    await ingress(app).stop()
    reservation = app.ledger.reader.reservation(result.request_id)
    assert reservation is not None
    assert (reservation.state, reservation.captured_mils) == ("settled", 245)


async def test_draining_leaves_who_has_a_result_alone(held: App) -> None:
    """A request is still being answered after its rollout is done: it is charged, so its answer must get out."""
    answered = asyncio.Event()

    async def request() -> str:
        await ingress(held).run(request_of(customer(held, 1_000)))
        await answered.wait()
        return "answered"

    answering = asyncio.create_task(request())
    await asyncio.to_thread(held.model.model.entered.acquire)
    draining = asyncio.create_task(ingress(held).drain(timeout_s=1))
    held.model.model.gate.set()
    await draining
    answered.set()
    assert await answering == "answered"


async def test_concurrent_rollouts_spend_exactly_the_balance_and_not_a_mil_more(app: App) -> None:
    key = customer(app, 245 * 5)
    outcomes = await asyncio.gather(
        *(ingress(app).run(request_of(key, actions(seed=seed))) for seed in range(12)), return_exceptions=True
    )
    assert sum(isinstance(outcome, CreditsInsufficient) for outcome in outcomes) == 7
    assert balance(app, key.customer_id) == 0


class TestRepetition:
    """The same request again: by its idempotency key, or as the same payload within the window."""

    @pytest.fixture(params=["key", "payload"])
    def same(self, request: pytest.FixtureRequest) -> dict[str, str]:
        return {"payload": "work"} | ({"idempotency_key": "name"} if request.param == "key" else {})

    async def test_it_gets_the_first_answer_and_is_charged_once(self, app: App, same: dict[str, str]) -> None:
        key = customer(app, 1_000)
        first = await ingress(app).run(request_of(key, **same))
        again = await ingress(app).run(request_of(key, **same))
        assert again == first
        assert app.ledger.rows(key.customer_id) == [("credit", 1_000), ("debit", -245)]

    async def test_it_waits_for_the_first_while_that_runs(self, held: App, same: dict[str, str]) -> None:
        key = customer(held, 1_000)
        first = asyncio.create_task(ingress(held).run(request_of(key, **same)))
        await asyncio.to_thread(held.model.model.entered.acquire)
        again = [asyncio.create_task(ingress(held).run(request_of(key, **same))) for _ in range(5)]
        await asyncio.sleep(0)
        held.model.model.gate.set()
        assert {result.request_id for result in await asyncio.gather(first, *again)} == {(await first).request_id}
        assert balance(held, key.customer_id) == 755

    async def test_it_runs_itself_when_the_first_was_refunded(self, app: App, same: dict[str, str]) -> None:
        key = customer(app, 1_000)
        poisoned = actions()
        poisoned[0, RAISE] = 1
        with pytest.raises(EngineFailed):
            await ingress(app).run(request_of(key, poisoned, **same))
        assert (await ingress(app).run(request_of(key, **same))).num_frames == 49
        assert balance(app, key.customer_id) == 755

    async def test_it_runs_itself_when_the_first_client_leaves_meanwhile(self, held: App, same: dict[str, str]) -> None:
        key = customer(held, 1_000)
        first = asyncio.create_task(ingress(held).run(request_of(key, **same)))
        await asyncio.to_thread(held.model.model.entered.acquire)
        again = asyncio.create_task(ingress(held).run(request_of(key, **same)))
        await asyncio.sleep(0)
        first.cancel()
        held.model.model.gate.set()
        assert (await again).num_frames == 49
        await ingress(held).drain(0)
        assert sorted(held.ledger.rows(key.customer_id)) == [
            ("credit", 1_000),
            ("debit", -245),
            ("debit", -245),
            ("refund", 245),
        ]

    async def test_it_is_recognised_by_another_ingress_after_a_restart(
        self, tmp_path: Path, same: dict[str, str]
    ) -> None:
        async with running_app(tmp_path) as before:
            key = customer(before, 1_000)
            first = await ingress(before).run(request_of(key, **same))
        async with running_app(tmp_path) as after:
            assert await ingress(after).run(request_of(key, **same)) == first
            assert balance(after, key.customer_id) == 755

    async def test_it_is_never_given_what_was_refunded(
        self, held: App, same: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first one's client leaves after its result was stored and before it was settled."""
        stored, put = threading.Event(), held.services.results.put

        def put_and_wait(result: RolloutResult, lasting: bool) -> None:
            put(result, lasting)
            stored.set()

        monkeypatch.setattr(held.services.results, "put", put_and_wait)
        key = customer(held, 1_000)
        first = asyncio.create_task(ingress(held).run(request_of(key, **same)))
        await asyncio.to_thread(held.model.model.entered.acquire)
        again = asyncio.create_task(ingress(held).run(request_of(key, **same)))
        held.model.model.gate.set()
        await asyncio.to_thread(stored.wait, 10)
        first.cancel()
        outcome = (await asyncio.gather(first, return_exceptions=True))[0]
        result = await again
        await ingress(held).drain(0)
        delivered = {result.request_id} | ({outcome.request_id} if isinstance(outcome, RolloutResult) else set())
        assert balance(held, key.customer_id) == 1_000 - 245 * len(delivered)

    async def test_another_customer_is_not_answered_with_it(self, app: App, same: dict[str, str]) -> None:
        one, other = customer(app, 245), customer(app, 245)
        first = await ingress(app).run(request_of(one, **same))
        assert (await ingress(app).run(request_of(other, **same))).request_id != first.request_id
        assert balance(app, other.customer_id) == 0

    async def test_a_key_with_another_payload_is_refused_and_nothing_runs(self, app: App) -> None:
        key = customer(app, 1_000)
        await ingress(app).run(request_of(key, idempotency_key="name", payload="one"))
        with pytest.raises(IdempotencyKeyReused):
            await ingress(app).run(request_of(key, idempotency_key="name", payload="other"))
        assert app.ledger.rows(key.customer_id) == [("credit", 1_000), ("debit", -245)]

    async def test_a_key_whose_result_has_expired_says_so_and_does_not_run_again(self, app: App) -> None:
        key = customer(app, 1_000)
        await ingress(app).run(request_of(key, idempotency_key="name", payload="work"))
        app.services.results.ttl_s = -1.0
        assert app.services.results.sweep() == 1
        with pytest.raises(ResultExpired):
            await ingress(app).run(request_of(key, idempotency_key="name", payload="work"))
        assert app.ledger.rows(key.customer_id) == [("credit", 1_000), ("debit", -245)]


class TestKeyTerms:
    """What an operator allows a key, decided with the reservation."""

    @pytest.fixture
    def key(self, app: App) -> KeyRecord:
        return customer(app, 10_000)

    def allow(self, app: App, key: KeyRecord, **terms: Any) -> None:
        assert app.ledger.apply(SetKeyTerms(key.key_id, KeyTerms(**terms))) == KeyTermsSet(key.key_id)

    @pytest.mark.parametrize("terms", [{"scope": "read"}, {"models": ("dreamdojo-2b-gr1",)}])
    async def test_a_key_that_may_not_spend_here_runs_nothing(
        self, app: App, key: KeyRecord, terms: dict[str, Any]
    ) -> None:
        self.allow(app, key, **terms)
        with pytest.raises(KeyNotAllowed):
            await ingress(app).run(request_of(key))
        assert app.ledger.rows(key.customer_id) == [("credit", 10_000)]

    async def test_a_key_that_names_this_model_runs_it(self, app: App, key: KeyRecord) -> None:
        self.allow(app, key, models=(SLUG,))
        assert (await ingress(app).run(request_of(key))).num_frames == 49

    async def test_a_budget_holds_to_the_mil_whatever_the_wallet_has(self, app: App, key: KeyRecord) -> None:
        self.allow(app, key, daily_budget_mils=490)
        await ingress(app).run(request_of(key))
        await ingress(app).run(request_of(key))
        with pytest.raises(BudgetUsedUp) as refusal:
            await ingress(app).run(request_of(key, actions(1)))
        assert (refusal.value.limit_mils, refusal.value.spent_mils, refusal.value.requested_mils) == (490, 490, 10)
        assert balance(app, key.customer_id) == 10_000 - 490

    async def test_an_expired_key_reserves_nothing(self, app: App, key: KeyRecord) -> None:
        self.allow(app, key, expires_at=1.0)
        with pytest.raises(KeyNotAccepted):
            await ingress(app).run(request_of(key))


async def test_room_is_asked_for_beside_the_price_and_nothing_runs_before_it_is_held(app: App) -> None:
    key = customer(app, 1_000)
    await ingress(app).run(request_of(key))  # who pays is known from here on
    asked, answer, send = asyncio.Event(), asyncio.Event(), app.ledger_call.call

    async def slow(commands: list[Command]) -> list[Outcome]:
        if any(isinstance(command, Reserve) for command in commands):
            asked.set()
            await answer.wait()
        return await send(commands)

    app.ledger_call.call = slow  # type: ignore[method-assign]
    running = asyncio.create_task(ingress(app).run(request_of(key)))
    await asked.wait()
    await asyncio.wait([running], timeout=0.05)
    assert len(app.model.terms) == 4 + 1
    assert app.model.terms[-1].customer_id == key.customer_id
    assert app.model.engine.num_rows == 0
    answer.set()
    assert (await running).num_frames == 49
    assert balance(app, key.customer_id) == 1_000 - 2 * 245


async def test_room_that_was_asked_for_beside_a_refused_price_is_given_back(app: App) -> None:
    key = customer(app, 245)
    await ingress(app).run(request_of(key))
    for asked in (5, 5):  # beside the refusal; and after it no more
        with pytest.raises(CreditsInsufficient):
            await ingress(app).run(request_of(key))
        assert len(app.model.terms) == asked
    assert app.model.engine.num_rows == 0


async def test_room_is_not_held_for_a_ledger_that_is_away(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployments.ingress, "HOLD_S", 0.0)
    key = customer(app, 1_000)
    await ingress(app).run(request_of(key))
    send = app.ledger_call.call

    async def slow(commands: list[Command]) -> list[Outcome]:
        for _ in range(10):
            await asyncio.sleep(0)
        return await send(commands)

    app.ledger_call.call = slow  # type: ignore[method-assign]
    asked = len(app.model.terms)
    assert (await ingress(app).run(request_of(key))).num_frames == 49
    assert len(app.model.terms) == asked + 1 + 4
    assert balance(app, key.customer_id) == 1_000 - 2 * 245
