"""How well a world model predicts recorded episodes, or which of two policies does better in it.

    ray job submit --working-dir . -- python -m serve_app.jobs.evaluate --dataset EPISODES --model tiny-pusher --out DIR

Each recorded episode's first frame and actions go through the model; every generated frame is compared with the
recorded one. With `--model` the rollouts run on the cluster at `--url`, paid for by the key in `DREAM_API_KEY`: the
price of all that is left is asked for first (`--dry-run` stops there), and `--max-cost` refuses to begin above it. With
`--checkpoint` they run on actors of this job instead. Ray Data spreads the episodes over `--workers`.

A job that was killed goes on where it was when it is started again with the same arguments: finished episodes have a
file each in DIR, and a rollout that was paid for but not written is asked for under the same idempotency key, which
gives it again without a second charge. Episodes that cannot be used are listed with the reason.

With `--policy NAME=DATASET` twice, both policies' actions start from the same recorded frames, `--score
module:function` gives each rollout (frames, uint8 (1 + T, H, W, 3)) a number, and the report compares them episode by
episode.

DIR gets `episodes.parquet`, `bad.jsonl`, `summary.json`, `report.html`, `clips/`.
"""

import argparse
import asyncio
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from tqdm import tqdm

from deployments.video import encode_chunk, join_chunks, open_encoder
from deployments.world_model.lpips import Lpips
from deployments.world_model.metrics import psnr_per_frame, ssim
from serve_app.jobs.episodes import BadDataset, BadEpisode, Episode, EpisodeRef, Frames, list_episodes, load_episode
from serve_app.jobs.records import Record, Records
from serve_app.jobs.report import write_report
from serve_app.jobs.rollouts import CannotGoOn, ClusterRoller, LocalRoller, Refused, Roller, fit, work_name

KEY_VARIABLE = "DREAM_API_KEY"
TIMEOUT_S = 300.0
CLIP_FPS = 10
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
    lpips_weights: str
    lpips_sha256: str
    score: str = ""
    starts: str = ""
    """Data set of the start frames, if they are not the episodes' own."""
    camera: str = ""


class Evaluator:
    """Evaluates one batch of episodes after the other, `concurrency` at a time."""

    def __init__(self, plan: Plan, key: str) -> None:
        self._plan = plan
        self._key = key
        self._records = Records(Path(plan.out), plan.run)
        self._lpips = Lpips.read(Path(plan.lpips_weights), plan.lpips_sha256) if plan.lpips_weights else None
        self._score = named_function(plan.score) if plan.score else None
        starts = list_episodes(plan.starts, plan.camera) if plan.starts else []
        self._starts = {ref.episode_id: ref for ref in starts}
        self._local = LocalRoller(plan.checkpoint, plan.device, plan.num_steps) if plan.checkpoint else None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """As Ray Data's `map_batches` calls it: columns in, columns out."""
        refs = [EpisodeRef(**dict(zip(batch, row, strict=True))) for row in zip(*batch.values(), strict=True)]
        records = asyncio.run(self.evaluate([replace(ref, row=int(ref.row)) for ref in refs]))
        return {"episode_id": [each.episode_id for each in records], "status": [each.status for each in records]}

    async def evaluate(self, refs: Sequence[EpisodeRef], http: httpx.AsyncClient | None = None) -> list[Record]:
        """Raises CannotGoOn: those that were finished before it have their record."""
        gate = asyncio.Semaphore(self._plan.concurrency)
        async with client(self._plan, self._key) as own:
            roller: Roller
            if self._local is not None:
                roller = self._local
            else:
                roller = ClusterRoller(http or own, self._plan.model, self._plan.num_steps)
                await roller.open()

            async def one(ref: EpisodeRef) -> Record:
                async with gate:
                    record = await self._evaluate_one(roller, ref)
                    await asyncio.to_thread(self._records.put, record)
                    return record

            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one(ref)) for ref in refs]
            except* CannotGoOn as stopped:
                raise CannotGoOn(str(stopped.exceptions[0])) from None
        return [task.result() for task in tasks]

    async def _evaluate_one(self, roller: Roller, ref: EpisodeRef) -> Record:
        try:
            episode = await asyncio.to_thread(self._load, roller, ref)
            name = work_name(self._plan.run, episode, self._plan.seed)
            rollout = await roller.roll_out(episode.frames[0], episode.actions, self._plan.seed, name)
        except (BadEpisode, Refused) as error:
            return Record(ref.episode_id, "bad", str(error))
        record = await asyncio.to_thread(self._compare, episode, rollout.frames)
        return replace(
            record, cost_usd=rollout.cost_usd, request_id=rollout.request_id, engine_ms=round(rollout.engine_ms, 3)
        )

    def _load(self, roller: Roller, ref: EpisodeRef) -> Episode:
        episode = load_episode(ref)
        length = min(len(episode.actions), self._plan.max_actions)
        if episode.actions.shape[1] != roller.action_dim:
            raise BadEpisode(f"actions have {episode.actions.shape[1]} columns; the model takes {roller.action_dim}")
        frames = fit(episode.frames[: length + 1], roller.resolution)
        if self._plan.starts:
            if ref.episode_id not in self._starts:
                raise BadEpisode("it has no start frame in the data set of the starts")
            start = load_episode(self._starts[ref.episode_id])
            frames = np.concatenate([fit(start.frames[:1], roller.resolution), frames[1:]])
        return Episode(ref.episode_id, frames, episode.actions[:length])

    def _compare(self, episode: Episode, generated: Frames) -> Record:
        truth, made = episode.frames[1:], generated[1:]
        first = np.repeat(episode.frames[:1], len(truth), axis=0)
        pairs = list(zip(made, truth, strict=True))
        lpips = None if self._lpips is None else [round(self._lpips(a[None], b[None]), 5) for a, b in pairs]
        return Record(
            episode.episode_id,
            "ok",
            num_frames=len(generated),
            psnr_db=[round(min(float(each), MAX_DB), 4) for each in psnr_per_frame(made, truth)],
            copy_first_psnr_db=[round(min(float(each), MAX_DB), 4) for each in psnr_per_frame(first, truth)],
            ssim=[round(ssim(*pair), 5) for pair in pairs],
            lpips=lpips,
            score=None if self._score is None else float(self._score(generated)),
            clip=self._clip(episode, generated),
        )

    def _clip(self, episode: Episode, generated: Frames) -> str:
        """The recording on the left, the rollout on the right."""
        directory = Path(self._plan.out) / "clips"
        directory.mkdir(parents=True, exist_ok=True)
        beside = np.concatenate([episode.frames, generated], axis=2)
        name = f"{work_name(self._plan.run, episode, self._plan.seed)[5:21]}.mp4"
        chunk = encode_chunk(beside, open_encoder(beside.shape[1:3], CLIP_FPS))
        (directory / name).write_bytes(join_chunks([chunk], CLIP_FPS, len(beside)))
        return f"clips/{name}"


def client(plan: Plan, key: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=plan.concurrency)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.AsyncClient(base_url=plan.url, headers=headers, timeout=TIMEOUT_S, limits=limits)


def named_function(path: str) -> Callable[[Frames], float]:
    """The callable named by `module:attribute`."""
    module, _, attribute = path.partition(":")
    found: Callable[[Frames], float] = getattr(importlib.import_module(module), attribute)
    return found


def estimate_usd(plan: Plan, key: str, refs: Sequence[EpisodeRef]) -> float:
    """What the rollouts of `refs` will cost: one is quoted, the others are taken to be at most as long.

    Raises:
        CannotGoOn: the cluster refuses, or none of the first episodes can be read.
    """

    async def ask() -> float:
        async with client(plan, key) as http:
            roller = ClusterRoller(http, plan.model, plan.num_steps)
            await roller.open()
            for ref in islice(refs, 20):
                try:
                    episode = load_episode(ref)
                    actions = episode.actions[: plan.max_actions]
                    quoted = await roller.quote(fit(episode.frames[:1], roller.resolution)[0], actions, plan.seed)
                except (BadEpisode, Refused):
                    continue
                frames = 1 + plan.max_actions
                return quoted["cost_usd"] / (1 + len(actions)) * frames * len(refs)
        raise CannotGoOn("none of the first 20 episodes can be used; see the layouts in serve_app/jobs/episodes.py")

    return asyncio.run(ask())


def run_plan(plan: Plan, key: str, refs: Sequence[EpisodeRef], workers: int) -> None:
    """Evaluate what has no record yet, spread by Ray Data. Raises CannotGoOn."""
    import ray
    import ray.data

    records = Records(Path(plan.out), plan.run)
    left = [ref for ref in refs if not records.has(ref.episode_id)]
    bar = tqdm(
        total=len(refs), initial=len(refs) - len(left), desc=f"episodes of {plan.run.split()[0]}", mininterval=2.0
    )
    if left:
        ray.data.DataContext.get_current().enable_progress_bars = False
        # Batches of a few times the concurrency keep it filled, and let the bar move.
        rows = ray.data.from_items([asdict(ref) for ref in left], override_num_blocks=min(len(left), 4 * workers))
        done = rows.map_batches(
            Evaluator,
            fn_constructor_args=(plan, key),
            batch_size=4 * plan.concurrency,
            batch_format="numpy",
            concurrency=workers,
            num_gpus=1 if plan.checkpoint and plan.device.startswith("cuda") else None,
        )
        try:
            for _ in done.iter_rows():
                bar.update()
        except ray.exceptions.RayTaskError as error:
            raise CannotGoOn(str(error.cause or error)) from error
        except ray.exceptions.RayError as error:
            raise CannotGoOn(f"{type(error).__name__}: {error}") from error
    bar.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="recorded episodes: a path or URL")
    parser.add_argument("--policy", action="append", default=[], metavar="NAME=DATASET", help="twice: compare the two")
    parser.add_argument("--score", default="", help="module:function that gives a rollout's frames a number")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--model", default="", help="slug of a served model: run on the cluster, paid for")
    where.add_argument("--checkpoint", default="", help="directory of a checkpoint: run on actors of this job")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the cluster")
    parser.add_argument("--device", default="cpu", help="for --checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-steps", type=int, help="denoising steps; the model's default without it")
    parser.add_argument("--max-actions", type=int, default=48, help="of each episode (default 48)")
    parser.add_argument("--limit", type=int, help="only so many episodes")
    parser.add_argument("--concurrency", type=int, default=16, help="episodes at a time, per worker")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--max-cost", type=float, help="USD: do not begin if the rollouts that are left may cost more")
    parser.add_argument("--dry-run", action="store_true", help="say what it would cost, and stop")
    parser.add_argument("--camera", default="", help="of a LeRobot data set; its first without it")
    parser.add_argument("--lpips-weights", default="")
    parser.add_argument("--lpips-sha256", default="")
    args = parser.parse_args()
    policies = dict(each.split("=", 1) for each in args.policy if "=" in each)
    if bool(args.dataset) + (len(args.policy) > 0) != 1 or (args.policy and (len(policies) != 2 or not args.score)):
        parser.error("give --dataset, or --policy NAME=DATASET twice and --score")
    try:
        report = evaluate_all(args, policies or {"": args.dataset})
    except (BadDataset, CannotGoOn, ValueError) as error:
        sys.exit(f"evaluate: {error}")
    print(report)


def evaluate_all(args: argparse.Namespace, sources: dict[str, str]) -> str:
    """Every source, then the report over them; returns its path. Raises BadDataset, CannotGoOn, ValueError."""
    key = os.environ.get(KEY_VARIABLE, "")
    if args.model and not key:
        raise CannotGoOn(f"{KEY_VARIABLE} is not set; rollouts on a cluster are paid for by a key")
    first = next(iter(sources.values()))
    settings = (args.seed, args.num_steps, args.max_actions)
    work: list[tuple[str, Plan, list[EpisodeRef]]] = []
    for name, url in sources.items():
        out = args.out / name if name else args.out
        refs = list_episodes(url, args.camera)[: args.limit]
        if not refs:
            raise BadDataset(f"{url} has no episodes")
        plan = Plan(
            run=" ".join(map(str, (name or "dataset", url, args.model or args.checkpoint, *settings))),
            out=str(out),
            url=args.url,
            model=args.model,
            checkpoint=args.checkpoint,
            device=args.device,
            seed=args.seed,
            num_steps=args.num_steps,
            max_actions=args.max_actions,
            concurrency=args.concurrency,
            lpips_weights=args.lpips_weights,
            lpips_sha256=args.lpips_sha256,
            score=args.score,
            starts="" if url == first else first,
            camera=args.camera,
        )
        work.append((name, plan, refs))
    if args.model:
        left = {plan.out: _left(plan, refs) for _, plan, refs in work}
        cost = sum(estimate_usd(plan, key, left[plan.out]) for _, plan, _ in work if left[plan.out])
        episodes = sum(map(len, left.values()))
        print(f"{episodes} episodes are left; they cost at most ${cost:.4f}", file=sys.stderr)
        if args.dry_run:
            return f"${cost:.4f}"
        if args.max_cost is not None and cost > args.max_cost:
            raise CannotGoOn(f"${cost:.4f} is more than --max-cost ${args.max_cost:.4f}; nothing was run")
    for _, plan, refs in work:
        run_plan(plan, key, refs, args.workers)
    found = {name: list(Records(Path(plan.out), plan.run)) for name, plan, _ in work}
    return str(write_report(args.out, found, args.model or args.checkpoint))


def _left(plan: Plan, refs: Sequence[EpisodeRef]) -> list[EpisodeRef]:
    records = Records(Path(plan.out), plan.run)
    return [ref for ref in refs if not records.has(ref.episode_id)]


if __name__ == "__main__":
    main()
