"""Evaluations through the real API: what is found, what is paid, and what a second start does."""

import argparse
import asyncio
import errno
import io
import json
import os
import re
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from pyarrow import parquet

from billing.commands import Grant
from billing.money import Mils
from deployments.world_model import pusher
from serve_app.catalog import PACKAGED_CHECKPOINTS
from serve_app.jobs.episodes import BadDataset, EpisodeRef, list_episodes
from serve_app.jobs.evaluate import Stopped, evaluate_all, main
from serve_app.jobs.evaluator import Evaluator, Notable, Plan, groups_left, left_of, row_of
from serve_app.jobs.records import Groups, Record, Records
from serve_app.jobs.report import summarise, write_report
from serve_app.jobs.rollouts import CannotGoOn, ClusterRoller, LocalRoller
from tests.support.app import App
from tests.support.models import RAISE

PRICE_USD = 13 * 5 / 10_000
STARTS = [(10, 12), (90, 30), (200, 5)]
"""Level of the start frame, and number of actions."""


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
        "patience_s": 5.0,
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
    assert {each.service_class for each in app.model.terms} == {"batch"}


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
    page = write_report(tmp_path / "out", {"": records}, {"": 4}, "tiny-pusher")
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
    headers, customer = app.key(credits_mils=70)
    app.http.headers.update(headers)
    refs = list_episodes(write_episodes(tmp_path / "data", 3))
    with pytest.raises(CannotGoOn, match="402"):
        await Evaluator(plan(tmp_path / "out", concurrency=1), "").evaluate(refs, app.http)
    assert len(list(Records(tmp_path / "out", "test"))) == 1
    grant = Grant(customer, Mils(130), "adm_more", "more")
    app.ledger.apply(grant)
    await Evaluator(plan(tmp_path / "out"), "").evaluate(refs, app.http)
    assert len(list(Records(tmp_path / "out", "test"))) == 3
    assert [row for row in app.ledger.rows(customer) if row[0] == "debit"] == [("debit", -65), ("debit", -130)]


class LosesAnswers(httpx.AsyncBaseTransport):
    """A network over which requests arrive and their first answers do not."""

    def __init__(self, inner: httpx.AsyncBaseTransport) -> None:
        self._inner = inner
        self._seen: set[bytes] = set()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        name = request.headers.get("Idempotency-Key", "").encode()
        answer = await self._inner.handle_async_request(request)
        if name and name not in self._seen:
            self._seen.add(name)
            await answer.aread()
            raise httpx.ReadError("connection reset")
        return answer


async def test_an_answer_that_was_lost_is_asked_for_again_and_paid_once(
    app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.jobs.rollouts.BACKOFF_S", 0.0)
    headers, customer = app.key()
    transport = LosesAnswers(httpx.ASGITransport(app.api, raise_app_exceptions=False))
    refs = list_episodes(write_episodes(tmp_path / "data", 3))
    async with httpx.AsyncClient(transport=transport, base_url="http://cluster.test", headers=headers) as http:
        records = await Evaluator(plan(tmp_path / "out"), "").evaluate(refs, http)
    assert [record.status for record in records] == ["ok"] * 3
    assert app.ledger.rows(customer)[1:] == [("debit", -195)]


async def test_a_cluster_that_stays_away_stops_the_job_and_makes_no_episode_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.jobs.rollouts.BACKOFF_S", 0.001)
    refs = list_episodes(write_episodes(tmp_path / "data", 2))
    entry = {"active": True, "spec": {"resolution": [64, 64], "action_dim": 8}}
    asked = []

    def away(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json=entry)
        asked.append(request.headers["Idempotency-Key"])
        return httpx.Response(503, headers={"Retry-After": "Sat, 21 Nov 2026 07:28:00 GMT"}, text="no replica")

    async with httpx.AsyncClient(transport=httpx.MockTransport(away), base_url="http://cluster.test") as http:
        with pytest.raises(CannotGoOn, match="could not be used for 0 s: 503 no replica"):
            await Evaluator(plan(tmp_path / "out", patience_s=0.05), "").evaluate(refs, http)
    assert len(asked) > len(set(asked)) == 1
    assert list(Records(tmp_path / "out", "test")) == []


def test_calls_from_several_threads_run_side_by_side_and_a_stop_is_a_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ray Data calls a worker."""
    refs = list_episodes(write_episodes(tmp_path / "data", 9))
    batches = [{"group": [row_of(refs[first : first + 3])["group"]]} for first in (0, 3, 6)]
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as files:
        for index in range(3):
            array = io.BytesIO()
            np.save(array, np.zeros((13, 64, 64, 3), np.uint8))
            files.writestr(f"rollout_{index:03d}.npy", array.getvalue())
    headers = {f"X-DreamEngine-{name}": "0" for name in ("Estimated-Charge-USD", "Request-Id", "Engine-Wall-Ms")}
    running, answered = 0, 0
    met = asyncio.Event()

    async def answer(request: httpx.Request) -> httpx.Response:
        nonlocal running, answered
        if request.method == "GET":
            return httpx.Response(200, json={"active": True, "spec": {"resolution": [64, 64], "action_dim": 8}})
        running, answered = running + 1, answered + 1
        refused = answered > 2
        if running == 2:
            met.set()
        await met.wait()
        return httpx.Response(403) if refused else httpx.Response(200, content=content.getvalue(), headers=headers)

    def mocked(plan: Plan, key: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://cluster.test")

    monkeypatch.setattr("serve_app.jobs.evaluator.client", mocked)
    evaluator = Evaluator(plan(tmp_path / "out"), "")
    with ThreadPoolExecutor(3) as pool:
        outcomes = list(pool.map(evaluator, batches))
    assert len(list(Records(tmp_path / "out", "test"))) == 6
    assert any(outcome["status"] == ["stopped"] and "403" in outcome["reason"][0] for outcome in outcomes)
    assert evaluator(batches[0])["status"] == ["stopped"]
    evaluator.close()


async def test_a_group_that_a_kill_cut_off_is_asked_for_in_the_same_words_and_not_paid_again(
    app: App, tmp_path: Path
) -> None:
    headers, customer = app.key()
    app.http.headers.update(headers)
    refs = list_episodes(write_episodes(tmp_path / "data", 20))
    paid = await Evaluator(plan(tmp_path / "out", concurrency=21), "").evaluate(refs[:7], app.http)
    for record in paid[2:]:  # as if it was killed before these were written
        (file,) = [each for each in (tmp_path / "out" / "episodes").iterdir() if record.episode_id in each.read_text()]
        file.unlink()
    groups = groups_left(plan(tmp_path / "out", concurrency=21), refs)
    assert [[ref.episode_id for ref in group] for group in groups] == [
        [f"e{index:03d}" for index in part] for part in (range(7), range(7, 14), range(14, 20))
    ]
    for group in groups:
        await Evaluator(plan(tmp_path / "out", concurrency=21), "").evaluate(group, app.http)
    again = list(Records(tmp_path / "out", "test"))
    assert len({record.episode_id for record in again}) == 20
    assert {record.request_id for record in again} >= {record.request_id for record in paid}
    assert app.ledger.rows(customer)[1:] == [("debit", -65 * count) for count in (7, 7, 6)]


def test_a_group_that_the_service_no_longer_knows_is_not_asked_for_again(tmp_path: Path) -> None:
    refs = list_episodes(write_episodes(tmp_path / "data", 4))
    asked = plan(tmp_path / "out", concurrency=6)
    Groups(tmp_path / "out").begin(["e001", "e003"])
    assert [len(group) for group in groups_left(asked, refs)] == [2, 2]
    (file,) = (tmp_path / "out" / "groups").iterdir()
    os.utime(file, (0, 0))
    assert [[ref.episode_id for ref in group] for group in groups_left(asked, refs)] == [
        ["e000", "e001"],
        ["e002", "e003"],
    ]


async def test_a_poisoned_episode_costs_those_beside_it_nothing(app: App, tmp_path: Path) -> None:
    headers, customer = app.key()
    app.http.headers.update(headers)
    write_episodes(tmp_path / "data", 5)
    frames, actions = np.zeros((13, 64, 64, 3), np.uint8), np.zeros((12, 8), np.float32)
    actions[0, RAISE] = 1
    np.savez(tmp_path / "data" / "e002.npz", frames=frames, actions=actions)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("serve_app.jobs.rollouts.BACKOFF_S", 0.0)
        refs = list_episodes(str(tmp_path / "data"))
        records = await Evaluator(plan(tmp_path / "out"), "").evaluate(refs, app.http)
    assert {record.episode_id: record.status for record in records} == {
        f"e{index:03d}": "bad" if index == 2 else "ok" for index in range(5)
    }
    assert sum(mils for _, mils in app.ledger.rows(customer)) == 1_000_000 - 4 * 65
    assert list(Groups(tmp_path / "out")) == [["e003", "e004"], ["e000", "e001"]]  # as they were paid for


async def test_an_episode_is_rolled_out_in_a_group_as_it_is_alone(app: App, paying: httpx.AsyncClient) -> None:
    roller = ClusterRoller(paying, "tiny-pusher", 1, 5.0)
    await roller.open()
    work = [(np.full((64, 64, 3), level, np.uint8), np.zeros((length, 8), np.float32)) for level, length in STARTS]
    together = await roller.roll_out(work, 3)
    alone = [(await roller.roll_out([each], 3))[0] for each in work]
    assert [each.cost_usd for each in together] == [pytest.approx(0.0005 * (1 + length)) for _, length in STARTS]
    for a, b in zip(together, alone, strict=True):
        assert np.array_equal(a.frames, b.frames)
        assert a.cost_usd == b.cost_usd


def test_no_more_frames_are_asked_for_at_once_than_an_answer_holds(paying: httpx.AsyncClient) -> None:
    roller = ClusterRoller(paying, "m", None, 1.0)
    for resolution, rows in (((64, 64), 16), ((240, 320), 5), ((480, 640), 1), ((4096, 4096), 1)):
        roller.resolution = resolution
        assert roller.most_rows(49) == rows


async def test_an_answer_that_is_no_rollout_costs_its_episode_and_not_the_job(tmp_path: Path) -> None:
    refs = list_episodes(write_episodes(tmp_path / "data", 2))
    entry = {"active": True, "spec": {"resolution": [64, 64], "action_dim": 8}}
    transport = httpx.MockTransport(
        lambda request: (
            httpx.Response(200, json=entry) if request.method == "GET" else httpx.Response(200, text="hello")
        )
    )
    async with httpx.AsyncClient(transport=transport, base_url="http://cluster.test") as http:
        records = await Evaluator(plan(tmp_path / "out"), "").evaluate(refs, http)
    assert [(record.status, "not what was asked for" in record.reason) for record in records] == [("bad", True)] * 2


async def test_a_full_disk_stops_the_job_and_what_was_paid_is_not_paid_again(
    app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers, customer = app.key()
    app.http.headers.update(headers)
    refs = list_episodes(write_episodes(tmp_path / "data", 3))
    evaluator = Evaluator(plan(tmp_path / "out"), "")

    move = os.replace

    def full(partial: str, file: Path) -> None:
        if file.parent.name == "episodes":
            raise OSError(errno.ENOSPC, "No space left on device")
        move(partial, file)

    with monkeypatch.context() as patched:
        patched.setattr("serve_app.jobs.records.os.replace", full)
        with pytest.raises(CannotGoOn, match=r"cannot be written: .*No space left"):
            await evaluator.evaluate(refs, app.http)
    assert list((tmp_path / "out" / "episodes").iterdir()) == []  # nor anything partial
    assert app.ledger.rows(customer)[1:] == [("debit", -195)]
    records = await Evaluator(plan(tmp_path / "out"), "").evaluate(refs, app.http)
    assert [record.status for record in records] == ["ok"] * 3
    assert app.ledger.rows(customer)[1:] == [("debit", -195)]


async def test_a_record_that_was_cut_off_is_made_again_at_no_cost(
    app: App, paying: httpx.AsyncClient, tmp_path: Path
) -> None:
    refs = list_episodes(write_episodes(tmp_path / "data", 2))
    first = await Evaluator(plan(tmp_path / "out"), "").evaluate(refs, paying)
    balance = (await paying.get("/v1/billing/balance")).json()["balance_mils"]
    file = next((tmp_path / "out" / "episodes").glob("*.json"))
    file.write_text(file.read_text()[:40])
    assert len(left_of(plan(tmp_path / "out"), refs)) == 1
    (group,) = groups_left(plan(tmp_path / "out"), refs)
    (again,) = await Evaluator(plan(tmp_path / "out"), "").evaluate(group, paying)
    assert replace(again, clip="") in [replace(record, clip="") for record in first]
    assert (await paying.get("/v1/billing/balance")).json()["balance_mils"] == balance


async def test_the_same_content_is_paid_once_whatever_its_data_set_is_called(
    app: App, paying: httpx.AsyncClient, tmp_path: Path
) -> None:
    first, second = (list_episodes(write_episodes(tmp_path / name, 2)) for name in ("a", "b"))
    paid = await Evaluator(plan(tmp_path / "out-a"), "").evaluate(first, paying)
    again = await Evaluator(plan(tmp_path / "out-b", run="other"), "").evaluate(second, paying)
    assert [record.request_id for record in again] == [record.request_id for record in paid]
    other_seed = await Evaluator(plan(tmp_path / "out-c", run="seed", seed=1), "").evaluate(second, paying)
    assert not {record.request_id for record in other_seed} & {record.request_id for record in paid}


async def test_a_price_that_rises_above_the_highest_cost_stops_the_job(
    app: App, paying: httpx.AsyncClient, tmp_path: Path
) -> None:
    refs = list_episodes(write_episodes(tmp_path / "data", 2))
    with pytest.raises(CannotGoOn, match="max_cost_mils"):
        await Evaluator(plan(tmp_path / "out", max_rollout_mils=64), "").evaluate(refs, paying)
    records = await Evaluator(plan(tmp_path / "out", max_rollout_mils=65), "").evaluate(refs, paying)
    assert [record.status for record in records] == ["ok"] * 2


async def test_a_score_that_raises_costs_its_episode(app: App, paying: httpx.AsyncClient, tmp_path: Path) -> None:
    refs = list_episodes(write_episodes(tmp_path / "data", 1))
    (record,) = await Evaluator(plan(tmp_path / "out", score="math:sqrt"), "").evaluate(refs, paying)
    assert (record.status, "math:sqrt raised TypeError" in record.reason) == ("bad", True)
    assert record.cost_usd == pytest.approx(PRICE_USD)


async def test_a_local_model_gives_batched_what_it_gives_alone() -> None:
    random = np.random.default_rng(1)
    state = pusher.reset(3, random)
    frames = pusher.render(state)
    actions = np.zeros((3, 20, 8), np.float32)
    actions[..., :2] = pusher.random_actions(state, 20, random)
    checkpoint = str(PACKAGED_CHECKPOINTS["tiny-pusher"])

    roller = LocalRoller(checkpoint, "cpu", 1)
    work = [(frames[index], actions[index]) for index in range(3)]
    batched = await roller.roll_out(work, 7)
    for each, alone in zip(batched, [await roller.roll_out([each], 7) for each in work], strict=True):
        assert each.frames.shape == (21, 64, 64, 3)
        assert np.abs(each.frames.astype(int) - alone[0].frames.astype(int)).max() <= 2


def test_a_model_or_a_network_that_cannot_be_loaded_stops_the_job_in_one_line(tmp_path: Path) -> None:
    group = row_of(list_episodes(write_episodes(tmp_path / "data", 1)))["group"]
    (tmp_path / "lpips").write_bytes(b"weights")
    packaged = str(PACKAGED_CHECKPOINTS["tiny-pusher"])
    for changes, why in (
        ({"checkpoint": str(tmp_path / "none")}, "none/config.json: cannot be read"),
        ({"checkpoint": packaged, "device": "cuda:9"}, "cannot be loaded: .*CUDA"),
        (
            {"checkpoint": packaged, "lpips_weights": str(tmp_path / "lpips"), "lpips_sha256": "0"},
            "has sha256 .*, not 0",
        ),
    ):
        evaluator = Evaluator(plan(tmp_path / "out", model="", **changes), "")
        outcome = evaluator({"group": [group]})
        evaluator.close()
        assert outcome["status"] == ["stopped"]
        assert re.search(why, outcome["reason"][0])


def test_records_of_another_evaluation_are_not_taken_for_this_one(tmp_path: Path) -> None:
    Records(tmp_path, "one").put(Record("e", "ok"))
    with pytest.raises(ValueError, match="another evaluation"):
        Records(tmp_path, "two")


def test_two_policies_are_compared_over_the_episodes_that_both_have() -> None:
    better = [Record(f"e{i}", "ok", score=i + 1.0, psnr_db=[1.0]) for i in range(20)]
    worse = [Record(f"e{i}", "ok", score=float(i), psnr_db=[1.0]) for i in range(15)] + [Record("x", "bad", "why")]
    comparison = summarise({"a": better, "b": worse}, {"a": 20, "b": 16})["comparison"]
    assert (comparison["episodes"], comparison["mean_difference"], comparison["first_higher"]) == (15, 1.0, 15)
    assert comparison["interval_95"] == [1.0, 1.0]
    assert comparison["p_value"] < 0.005


def test_clips_are_made_of_the_worst_and_the_best_and_of_few_others() -> None:
    notable = Notable()
    values = np.random.default_rng(0).normal(size=1000)
    chosen = {float(value) for value in values if notable.add(value)}
    assert {float(value) for value in (*sorted(values)[:3], *sorted(values)[-3:])} <= chosen
    assert len(chosen) < 130


def test_the_report_has_every_horizon_that_some_episode_reaches(tmp_path: Path) -> None:
    short = [Record(f"s{i}", "ok", psnr_db=[30.0] * 12, ssim=[0.9] * 12) for i in range(3)]
    long = [Record("l", "ok", psnr_db=[30.0] * 12 + [10.0] * 36, ssim=[0.5] * 48)]
    write_report(tmp_path, {"": [*short, *long]}, {"": 6}, "m")
    found = json.loads((tmp_path / "summary.json").read_text())["dataset"]
    assert {name: each["episodes"] for name, each in found["horizons"].items()} == {"1": 4, "12": 4, "24": 1, "48": 1}
    assert found["horizons"]["48"]["psnr_db"]["mean"] == 15.0
    assert found["left"] == 2
    assert "| dataset, frames 1 to 48 | 1 | 15.0 ± 0.0 | 0.5 ± 0.0 |" in (tmp_path / "table.md").read_text()
    assert "<td>dataset, frames 1 to 24<td>1<td>20.0 ± 0.0<td>0.5 ± 0.0" in (tmp_path / "report.html").read_text()


def test_a_job_that_stops_on_the_way_says_so_and_reports_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_episodes(tmp_path / "data", 2), tmp_path / "out"

    def stop(plan: Plan, key: str, refs: Sequence[EpisodeRef], workers: int) -> None:
        Records(Path(plan.out), plan.run).put(Record("e000", "ok", psnr_db=[20.0], ssim=[0.5]))
        raise Stopped("402 Your balance is $0.00.")

    monkeypatch.setattr("serve_app.jobs.evaluate.run_plan", stop)
    monkeypatch.setattr("sys.argv", ["evaluate", "--dataset", data, "--checkpoint", "here", "--out", str(out)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 3
    assert "stopped: 402 Your balance is $0.00.; the same command goes on" in capsys.readouterr().err
    found = json.loads((out / "summary.json").read_text())["dataset"]
    assert (found["episodes"], found["left"]) == (1, 1)


def arguments(dataset: str, out: Path, **changes: object) -> argparse.Namespace:
    values: dict[str, object] = {
        "camera": "",
        "checkpoint": "",
        "concurrency": 4,
        "device": "cpu",
        "dry_run": False,
        "key_file": None,
        "limit": None,
        "lpips_sha256": "",
        "lpips_weights": "",
        "max_actions": 12,
        "max_cost": None,
        "model": "tiny-pusher",
        "num_steps": 1,
        "out": out,
        "patience": 5.0,
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
    with pytest.raises(CannotGoOn, match=r"\$3\.0000 after \$0\.0000 is more than --max-cost \$2\.0000"):
        evaluate_all(arguments(data, tmp_path / "out", max_cost=2.0), {"": data})
    assert evaluate_all(arguments(data, tmp_path / "out", dry_run=True), {"": data}) == "$3.0000"
