"""Evaluations through the real API: what is found, what is paid, and what a second start does."""

import argparse
import json
from pathlib import Path

import httpx
import numpy as np
import pytest
from pyarrow import parquet

from deployments.world_model import pusher
from serve_app.catalog import PACKAGED_CHECKPOINTS
from serve_app.jobs.episodes import BadDataset, list_episodes
from serve_app.jobs.evaluate import Evaluator, Plan, evaluate_all
from serve_app.jobs.records import Record, Records
from serve_app.jobs.report import summarise, write_report
from serve_app.jobs.rollouts import CannotGoOn, LocalRoller
from tests.support.app import App
from tests.support.models import RAISE

PRICE_USD = 13 * 5 / 10_000


def write_episodes(root: Path, count: int, actions: int = 12) -> str:
    root.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    state = pusher.reset(count, random)
    moves = pusher.random_actions(state, actions, random)
    video = np.stack([pusher.render(each) for each in pusher.simulate(state, moves)], axis=1)
    for index in range(count):
        columns = np.zeros((actions, 8), np.float32)
        columns[:, :2] = moves[index]
        np.savez(root / f"e{index:03d}.npz", frames=video[index], actions=columns)
    return str(root)


def plan(out: Path, **changes: object) -> Plan:
    values: dict[str, object] = {
        "run": "test",
        "out": str(out),
        "url": "http://cluster.test",
        "model": "tiny-pusher",
        "checkpoint": "",
        "device": "cpu",
        "seed": 0,
        "num_steps": 1,
        "max_actions": 12,
        "concurrency": 4,
        "lpips_weights": "",
        "lpips_sha256": "",
    }
    return Plan(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture
def paying(app: App) -> httpx.AsyncClient:
    headers, _ = app.key()
    app.http.headers.update(headers)
    return app.http


async def test_every_episode_is_rolled_out_compared_and_paid_once(
    app: App, paying: httpx.AsyncClient, tmp_path: Path
) -> None:
    refs = list_episodes(write_episodes(tmp_path / "data", 5))
    records = await Evaluator(plan(tmp_path / "out"), "").evaluate(refs, paying)
    assert [record.status for record in records] == ["ok"] * 5
    assert all(len(record.psnr_db) == len(record.ssim) == 12 for record in records)
    assert records[0].copy_first_psnr_db[0] > records[0].psnr_db[0]  # the stand-in brightens what it repeats
    assert sum(record.cost_usd for record in records) == pytest.approx(5 * PRICE_USD)
    assert all((tmp_path / "out" / record.clip).stat().st_size for record in records)


async def test_work_that_was_paid_but_not_written_is_not_paid_again(
    app: App, paying: httpx.AsyncClient, tmp_path: Path
) -> None:
    refs = list_episodes(write_episodes(tmp_path / "data", 3))
    first = await Evaluator(plan(tmp_path / "out"), "").evaluate(refs, paying)
    balance = (await paying.get("/v1/billing/balance")).json()["balance_mils"]
    for file in (tmp_path / "out" / "episodes").glob("*.json"):
        file.unlink()
    again = await Evaluator(plan(tmp_path / "out"), "").evaluate(refs, paying)
    assert [record.request_id for record in again] == [record.request_id for record in first]
    assert (await paying.get("/v1/billing/balance")).json()["balance_mils"] == balance


async def test_bad_episodes_are_listed_with_the_reason_and_the_others_go_on(
    app: App, paying: httpx.AsyncClient, tmp_path: Path
) -> None:
    write_episodes(tmp_path / "data", 1)
    (tmp_path / "data" / "a-broken.npz").write_bytes(b"no archive")
    frames = np.zeros((13, 64, 64, 3), np.uint8)
    np.savez(tmp_path / "data" / "b-narrow.npz", frames=frames, actions=np.zeros((12, 3), np.float32))
    records = await Evaluator(plan(tmp_path / "out"), "").evaluate(list_episodes(str(tmp_path / "data")), paying)
    assert [record.status for record in records] == ["bad", "bad", "ok"]
    assert "3 columns; the model takes 8" in records[1].reason
    page = write_report(tmp_path / "out", {"": records}, "tiny-pusher")
    listed = [json.loads(line) for line in (tmp_path / "out" / "bad.jsonl").read_text().splitlines()]
    assert [row["episode_id"] for row in listed] == ["a-broken", "b-narrow"]
    assert parquet.read_table(tmp_path / "out" / "episodes.parquet").num_rows == 1
    assert "<video" in page.read_text()


async def test_an_engine_failure_is_tried_again_and_then_listed_unpaid(
    app: App, paying: httpx.AsyncClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.jobs.rollouts.BACKOFF_S", 0.0)
    frames, actions = np.zeros((13, 64, 64, 3), np.uint8), np.zeros((12, 8), np.float32)
    actions[0, RAISE] = 1
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "poison.npz", frames=frames, actions=actions)
    before = (await paying.get("/v1/billing/balance")).json()["balance_mils"]
    (record,) = await Evaluator(plan(tmp_path / "out"), "").evaluate(list_episodes(str(tmp_path / "data")), paying)
    assert record.status == "bad"
    assert "500" in record.reason
    assert (await paying.get("/v1/billing/balance")).json()["balance_mils"] == before


async def test_without_credits_the_evaluation_stops_instead_of_listing_everything_as_bad(
    app: App, tmp_path: Path
) -> None:
    headers, _ = app.key(credits_mils=70)
    app.http.headers.update(headers)
    refs = list_episodes(write_episodes(tmp_path / "data", 3))
    with pytest.raises(CannotGoOn, match="402"):
        await Evaluator(plan(tmp_path / "out", concurrency=1), "").evaluate(refs, app.http)
    assert len(list(Records(tmp_path / "out", "test"))) == 1


async def test_a_local_model_gives_batched_what_it_gives_alone() -> None:
    random = np.random.default_rng(1)
    state = pusher.reset(3, random)
    frames = pusher.render(state)
    actions = np.zeros((3, 20, 8), np.float32)
    actions[..., :2] = pusher.random_actions(state, 20, random)
    checkpoint = str(PACKAGED_CHECKPOINTS["tiny-pusher"])

    async def together(roller: LocalRoller) -> list[np.ndarray]:
        import asyncio

        rollouts = await asyncio.gather(*(roller.roll_out(frames[i], actions[i], 7, "") for i in range(3)))
        return [rollout.frames for rollout in rollouts]

    batched = await together(LocalRoller(checkpoint, "cpu", 1))
    alone = await together(LocalRoller(checkpoint, "cpu", 1, max_rows=1))
    assert all(each.shape == (21, 64, 64, 3) for each in batched)
    for a, b in zip(batched, alone, strict=True):
        assert np.abs(a.astype(int) - b.astype(int)).max() <= 2


def test_records_of_another_evaluation_are_not_taken_for_this_one(tmp_path: Path) -> None:
    Records(tmp_path, "one").put(Record("e", "ok"))
    with pytest.raises(ValueError, match="another evaluation"):
        Records(tmp_path, "two")


def test_two_policies_are_compared_over_the_episodes_that_both_have() -> None:
    better = [Record(f"e{i}", "ok", score=i + 1.0, psnr_db=[1.0]) for i in range(20)]
    worse = [Record(f"e{i}", "ok", score=float(i), psnr_db=[1.0]) for i in range(15)] + [Record("x", "bad", "why")]
    comparison = summarise({"a": better, "b": worse})["comparison"]
    assert (comparison["episodes"], comparison["mean_difference"], comparison["first_higher"]) == (15, 1.0, 15)
    assert comparison["interval_95"] == [1.0, 1.0]


def arguments(dataset: str, out: Path, **changes: object) -> argparse.Namespace:
    values: dict[str, object] = {
        "camera": "",
        "checkpoint": "",
        "concurrency": 4,
        "device": "cpu",
        "dry_run": False,
        "limit": None,
        "lpips_sha256": "",
        "lpips_weights": "",
        "max_actions": 12,
        "max_cost": None,
        "model": "tiny-pusher",
        "num_steps": 1,
        "out": out,
        "score": "",
        "seed": 0,
        "url": "http://127.0.0.1:1",
        "workers": 1,
    }
    return argparse.Namespace(**(values | changes))


def test_an_empty_data_set_and_a_missing_key_end_with_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DREAM_API_KEY", raising=False)
    with pytest.raises(CannotGoOn, match="DREAM_API_KEY is not set"):
        evaluate_all(arguments("", tmp_path / "out"), {"": str(tmp_path)})
    monkeypatch.setenv("DREAM_API_KEY", "dre_x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadDataset, match="has no episodes"):
        evaluate_all(arguments("", tmp_path / "out"), {"": str(tmp_path / "empty")})


def test_nothing_runs_above_the_highest_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DREAM_API_KEY", "dre_x")
    monkeypatch.setattr("serve_app.jobs.evaluate.estimate_usd", lambda *_: 3.0)
    data = write_episodes(tmp_path / "data", 1)
    with pytest.raises(CannotGoOn, match=r"\$3\.0000 is more than --max-cost \$2\.0000"):
        evaluate_all(arguments(data, tmp_path / "out", max_cost=2.0), {"": data})
    assert evaluate_all(arguments(data, tmp_path / "out", dry_run=True), {"": data}) == "$3.0000"
