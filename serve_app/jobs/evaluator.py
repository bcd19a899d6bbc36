"""Evaluates episodes, many at a time: roll out, compare with the recording, write the record. One on each worker."""

import asyncio
import bisect
import importlib
import json
import os
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np

from deployments.video import Encoder, join_chunks
from deployments.world_model.lpips import Lpips
from deployments.world_model.metrics import psnr_per_frame, ssim_per_frame
from serve_app.jobs.episodes import BadEpisode, Episode, EpisodeRef, Frames, list_episodes, load_episode
from serve_app.jobs.records import Groups, Record, Records, halves, write_whole
from serve_app.jobs.rollouts import (
    ROWS,
    CannotGoOn,
    ClusterRoller,
    LocalRoller,
    Refused,
    Roller,
    Rollout,
    fit,
    work_name,
)

Result = TypeVar("Result")

TIMEOUT_S = 300.0
CLIP_FPS = 10
CLIPS_OF_EACH_END = 3
CLIP_EVERY = 16
"""Beside the worst and the best so far: a video costs more than the comparison, and the report shows nine."""
CALLS = 3
"""Groups of episodes that a worker has at a time: one that is compared, one that is rolled out, and one that the model
turns to between the chunks of that."""
MAX_DB = 100.0
"""Of equal frames, whose PSNR has no bound."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What one evaluation does; the same on every worker, and after a restart."""

    run: str
    out: str
    url: str
    model: str
    checkpoint: str
    device: str
    seed: int
    num_steps: int | None
    max_actions: int
    concurrency: int
    patience_s: float
    lpips_weights: str
    lpips_sha256: str
    score: str = ""
    starts: str = ""
    """Data set of the start frames, if they are not the episodes' own."""
    camera: str = ""
    max_rollout_mils: int = 0
    """What one rollout may cost; 0 sets no bound."""

    @property
    def rows(self) -> int:
        """Episodes that are asked for together: some of those at work, so that the model is never without."""
        return max(1, min(ROWS, self.concurrency // CALLS))

    @property
    def calls(self) -> int:
        """Groups of episodes at work at a time."""
        return -(-self.concurrency // self.rows)


class Evaluator:
    """Calls from several threads share its loop: while the rollouts of one group are compared, others are made."""

    def __init__(self, plan: Plan, key: str) -> None:
        self._plan = plan
        self._key = key
        self._records = Records(Path(plan.out), plan.run)
        self._groups = Groups(Path(plan.out))
        self._lpips: Lpips | None = None
        self._score = named_function(plan.score) if plan.score else None
        starts = list_episodes(plan.starts, plan.camera) if plan.starts else []
        self._starts = {ref.episode_id: ref for ref in starts}
        self._comparing = ThreadPoolExecutor(min(ROWS, os.cpu_count() or 1), thread_name_prefix="compare")
        """No more than there are cores: those beyond would push each other's frames out of the caches."""
        self._opening = asyncio.Lock()
        self._roller: Roller | None = None
        self._stop: CannotGoOn | None = None
        self._notable = Notable()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """As Ray Data's `map_batches` calls it: columns in, columns out. What stops it is a status, not an exception:
        those after it have it too."""
        with self._starting:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="evaluator", daemon=True)
                self._thread.start()
        refs = [EpisodeRef(**each) for group in batch["group"] for each in json.loads(group)]
        working = asyncio.run_coroutine_threadsafe(self.evaluate(refs), self._loop)
        try:
            records = working.result()
        except CannotGoOn as stop:
            return {"status": ["stopped"], "reason": [str(stop)]}
        return {"status": [each.status for each in records], "reason": [each.reason for each in records]}

    def close(self) -> None:
        """When no call runs any more; a worker's process just ends."""
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def evaluate(self, refs: Sequence[EpisodeRef], http: httpx.AsyncClient | None = None) -> list[Record]:
        """The records of those that had none, which are written. Raises CannotGoOn when those that had begun are done
        and written."""
        try:
            roller = await self._open(http)
        except CannotGoOn as stop:
            self._stop = stop
            raise
        rows = roller.most_rows(1 + self._plan.max_actions)
        groups = [refs[first : first + rows] for first in range(0, len(refs), rows)]
        records = await asyncio.gather(*(self._evaluate(roller, group) for group in groups))
        if self._stop is not None:
            raise self._stop
        return [record for group in records for record in group]

    async def _open(self, http: httpx.AsyncClient | None) -> Roller:
        """Raises CannotGoOn."""
        plan = self._plan
        async with self._opening:
            if self._roller is None:
                try:
                    if plan.lpips_weights:
                        self._lpips = Lpips.read(Path(plan.lpips_weights), plan.lpips_sha256)
                    if plan.checkpoint:
                        self._roller = LocalRoller(plan.checkpoint, plan.device, plan.num_steps)
                except Exception as error:  # torch has several for a device that there is not
                    raise CannotGoOn(f"the model cannot be loaded: {error}") from error
            if self._roller is None:
                self._roller = await open_roller(plan, http or client(plan, self._key))
        return self._roller

    async def _evaluate(self, roller: Roller, refs: Sequence[EpisodeRef]) -> list[Record]:
        """In one request. Where that is refused, each half in one of its own: so one alone is refused in the end."""
        if self._stop is not None:
            return []
        ids = [ref.episode_id for ref in refs]
        try:
            known = set(await asyncio.to_thread(self._known, ids))  # after a lost worker, or a kill
            if len(known) == len(ids):
                return []
            await asyncio.to_thread(self._groups.begin, ids)
            try:
                records = await self._roll_out(roller, refs, known)
            except Refused:
                await asyncio.to_thread(self._groups.halve, ids)
                return [record for half in halves(refs) for record in await self._evaluate(roller, half)]
        except CannotGoOn as stop:
            self._stop = stop
        except OSError as error:
            self._stop = CannotGoOn(f"{self._plan.out} cannot be written: {error}")
        else:
            return records
        return []

    def _known(self, episode_ids: Sequence[str]) -> list[str]:
        return [each for each in episode_ids if self._records.get(each) is not None]

    async def _roll_out(self, roller: Roller, refs: Sequence[EpisodeRef], known: Collection[str]) -> list[Record]:
        """Of those that are not `known`, written. Raises Refused where that may be the fault of one among several."""
        loaded = await _in_threads(None, (partial(self._load, roller, ref) for ref in refs))
        episodes = [each for each in loaded if isinstance(each, Episode)]
        records = [each for each in loaded if isinstance(each, Record)]
        try:
            work = [(episode.frames[0], episode.actions) for episode in episodes]
            rollouts = await roller.roll_out(work, self._plan.seed) if work else []
        except Refused as error:
            if len(refs) > 1:
                raise
            episodes, rollouts, records = [], [], [Record(refs[0].episode_id, "bad", str(error))]
        new = [record for record in records if record.episode_id not in known]
        await _in_threads(None, (partial(self._records.put, record) for record in new))
        comparisons = (
            partial(self._finish, episode, rollout)
            for episode, rollout in zip(episodes, rollouts, strict=True)
            if episode.episode_id not in known
        )
        compared = await _in_threads(self._comparing, comparisons)
        return [*new, *compared]

    def _finish(self, episode: Episode, rollout: Rollout) -> Record:
        """Raises OSError."""
        try:
            record = self._compare(episode, rollout.frames)
        except BadEpisode as error:
            record = Record(episode.episode_id, "bad", str(error))
        record = replace(
            record, cost_usd=rollout.cost_usd, request_id=rollout.request_id, engine_ms=round(rollout.engine_ms, 3)
        )
        self._records.put(record)
        return record

    def _load(self, roller: Roller, ref: EpisodeRef) -> Episode | Record:
        """As the model can take it, or why that is not possible."""
        try:
            episode = load_episode(ref)
            columns = episode.actions.shape[1]
            if columns != roller.action_dim:
                raise BadEpisode(f"actions have {columns} columns; the model takes {roller.action_dim}")
            length = min(len(episode.actions), self._plan.max_actions)
            frames = fit(episode.frames[: length + 1], roller.resolution)
            if self._plan.starts:
                if ref.episode_id not in self._starts:
                    raise BadEpisode("it has no start frame in the data set of the starts")
                start = load_episode(self._starts[ref.episode_id])
                frames = np.concatenate([fit(start.frames[:1], roller.resolution), frames[1:]])
        except BadEpisode as error:
            return Record(ref.episode_id, "bad", str(error))
        return Episode(ref.episode_id, frames, episode.actions[:length])

    def _compare(self, episode: Episode, generated: Frames) -> Record:
        truth, made = episode.frames[1:], generated[1:]
        first = np.broadcast_to(episode.frames[:1], truth.shape).copy()
        psnr_db = _decibels(made, truth)
        lpips = self._lpips
        return Record(
            episode.episode_id,
            "ok",
            num_frames=len(generated),
            psnr_db=psnr_db,
            copy_first_psnr_db=_decibels(first, truth),
            ssim=[round(float(each), 5) for each in ssim_per_frame(made, truth)],
            lpips=None
            if lpips is None
            else [round(lpips(a[None], b[None]), 5) for a, b in zip(made, truth, strict=True)],
            score=self._scored(generated),
            clip=self._clip(episode, generated) if self._notable.add(float(np.mean(psnr_db))) else "",
        )

    def _scored(self, generated: Frames) -> float | None:
        if self._score is None:
            return None
        try:
            return float(self._score(generated))
        except Exception as error:  # somebody else's function
            raise BadEpisode(f"{self._plan.score} raised {type(error).__name__}: {error}") from error

    def _clip(self, episode: Episode, generated: Frames) -> str:
        """The recording on the left, the rollout on the right."""
        directory = Path(self._plan.out) / "clips"
        directory.mkdir(parents=True, exist_ok=True)
        beside = np.concatenate([episode.frames, generated], axis=2)
        plan = self._plan
        name = f"{work_name(plan.run, plan.num_steps, plan.seed, [(episode.frames, episode.actions)])[5:21]}.mp4"
        chunk = Encoder(beside.shape[1:3], CLIP_FPS).encode(beside)
        write_whole(directory / name, join_chunks([chunk], CLIP_FPS, len(beside)))
        return f"clips/{name}"


async def _in_threads(pool: Executor | None, calls: Iterable[Callable[[], Result]]) -> list[Result]:
    """What each returns; what the first to fail raises, once all are done. Without a `pool` in the loop's own."""
    loop = asyncio.get_running_loop()
    results = await asyncio.gather(*(loop.run_in_executor(pool, call) for call in calls), return_exceptions=True)
    for each in results:
        if isinstance(each, BaseException):
            raise each
    return [each for each in results if not isinstance(each, BaseException)]


class Notable:
    """Which episodes a clip is made of: each that is among the worst or best so far, and every `CLIP_EVERY`th."""

    def __init__(self) -> None:
        self._seen: list[float] = []
        self._turn = threading.Lock()

    def add(self, psnr_db: float) -> bool:
        with self._turn:
            rank = bisect.bisect(self._seen, psnr_db)
            self._seen.insert(rank, psnr_db)
            count = len(self._seen)
        at_an_end = min(rank, count - 1 - rank) < CLIPS_OF_EACH_END
        return at_an_end or count % CLIP_EVERY == 0


def client(plan: Plan, key: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=plan.concurrency)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.AsyncClient(base_url=plan.url, headers=headers, timeout=TIMEOUT_S, limits=limits)


async def open_roller(plan: Plan, http: httpx.AsyncClient) -> ClusterRoller:
    """Raises CannotGoOn."""
    roller = ClusterRoller(http, plan.model, plan.num_steps, plan.patience_s, plan.max_rollout_mils)
    await roller.open()
    return roller


def named_function(path: str) -> Callable[[Frames], float]:
    """The callable named by `module:attribute`. Raises ValueError."""
    module, _, attribute = path.partition(":")
    try:
        found: Callable[[Frames], float] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--score {path} is not a module:function here: {error}") from error
    return found


def left_of(plan: Plan, refs: Sequence[EpisodeRef]) -> list[EpisodeRef]:
    """Those without a record. Raises ValueError, OSError."""
    records = Records(Path(plan.out), plan.run)
    return [ref for ref in refs if records.get(ref.episode_id) is None]


def groups_left(plan: Plan, refs: Sequence[EpisodeRef]) -> list[list[EpisodeRef]]:
    """What is left, as it is asked for together: what an earlier start had begun as it was then, with the episodes of
    it that are finished, and the rest in order. Raises ValueError, OSError."""
    left = {ref.episode_id: ref for ref in left_of(plan, refs)}
    named = {ref.episode_id: ref for ref in refs}
    groups = []
    for ids in Groups(Path(plan.out)):
        if not left.keys().isdisjoint(ids) and named.keys() >= set(ids):
            groups.append([named[each] for each in ids])
            left = {name: ref for name, ref in left.items() if name not in ids}
    rest, rows = list(left.values()), plan.rows
    return groups + [rest[first : first + rows] for first in range(0, len(rest), rows)]


def row_of(group: Sequence[EpisodeRef]) -> dict[str, str]:
    """As `Evaluator` reads it."""
    return {"group": json.dumps([asdict(ref) for ref in group])}


def _decibels(frames: Frames, reference: Frames) -> list[float]:
    return [round(min(float(each), MAX_DB), 4) for each in psnr_per_frame(frames, reference)]
