"""A thousand reservations at once against a balance for exactly N: N get it, whichever way they come."""

import asyncio
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import Engine

import deployments.ledger_client
from billing.commands import InsufficientCredits, Outcome, Reserved
from billing.writer import LedgerWriter
from deployments.ledger_client import LedgerClient
from tests.billing.conftest import Clock, Desk
from tests.support.app import running_app
from tests.support.payloads import actions, npy, png

CALLERS = 1_000
PRICE = 245
FRAMES = 49


def count(outcomes: list[Outcome]) -> Counter[type[Outcome]]:
    return Counter(type(outcome) for outcome in outcomes)


@pytest.mark.parametrize(("affordable", "change"), [(0, PRICE - 1), (1, 0), (137, PRICE - 1), (CALLERS, 0)])
def test_of_a_thousand_threads_as_many_reserve_as_the_balance_covers(desk: Desk, affordable: int, change: int) -> None:
    account = desk.account(affordable * PRICE + change)
    deaths: list[BaseException] = []
    writer = LedgerWriter(desk.ledger, deaths.append)
    with ThreadPoolExecutor(50) as pool:
        outcomes = list(
            pool.map(lambda _: writer.submit([desk.reserve(account, FRAMES)]).result(30)[0], range(CALLERS))
        )
    writer.stop()
    assert deaths == []
    assert count(outcomes) == Counter({Reserved: affordable, InsufficientCredits: CALLERS - affordable})
    assert desk.balance(account) == change


async def test_of_a_thousand_callers_on_four_replicas_as_many_reserve_as_the_balance_covers(desk: Desk) -> None:
    account = desk.account(137 * PRICE)
    deaths: list[BaseException] = []
    writer = LedgerWriter(desk.ledger, deaths.append)
    replicas = [LedgerClient(lambda commands: asyncio.wrap_future(writer.submit(commands))) for _ in range(4)]
    for replica in replicas:
        replica.start()
    outcomes = await asyncio.gather(
        *(replicas[index % 4].apply(desk.reserve(account, FRAMES)) for index in range(CALLERS))
    )
    for replica in replicas:
        await replica.stop()
    writer.stop()
    assert deaths == []
    assert count(outcomes) == Counter({Reserved: 137, InsufficientCredits: CALLERS - 137})
    assert desk.balance(account) == 0


async def test_of_a_thousand_paid_requests_over_http_as_many_run_as_the_balance_covers(
    engine: Engine, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployments.ledger_client, "RETRY_FOR_S", 120.0)  # a thousand at once, on a busy machine
    affordable = 25
    url = engine.url.render_as_string(hide_password=False)
    async with running_app(tmp_path, database_url=url) as app:
        headers, customer = app.key(affordable * 13 * 5 + 64, burst=2 * CALLERS)
        frame, twelve = png(), [npy(actions(12, seed=seed)) for seed in range(10)]

        async def predict(index: int) -> int:
            files = {"frame": frame, "actions": twelve[index % 10]}
            answer = await app.http.post("/v1/predict", headers=headers, files=files, data={"seed": str(index)})
            return answer.status_code

        answers = Counter(await asyncio.gather(*map(predict, range(CALLERS))))
        assert answers == Counter({200: affordable, 402: CALLERS - affordable})
        assert app.ledger.reader.balance(customer) == 64
        assert [kind for kind, _ in app.ledger.rows(customer)] == ["credit", *["debit"] * affordable]
        assert len(app.model.model.chunks_started) == affordable
