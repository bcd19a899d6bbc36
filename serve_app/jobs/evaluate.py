"""How well a world model predicts recorded episodes, or which of two policies does better in it.

    ray job submit --working-dir . -- python -m serve_app.jobs.evaluate --dataset EPISODES --model tiny-pusher --out DIR

Each recorded episode's first frame and actions go through the model; every generated frame is compared with the
recorded one. With `--model` the rollouts run on the cluster at `--url`, paid for by the key in `DREAM_API_KEY`: the
price of all that is left is asked for first (`--dry-run` stops there), and `--max-cost` refuses to begin above it. With
`--checkpoint` they run on actors of this job instead. Ray Data spreads the episodes over `--workers`.

A job that was killed goes on where it was when it is started again with the same arguments: finished episodes have a
file each in DIR, and a rollout that was paid for but not written is asked for under the same idempotency key, which
gives it again without a second charge. Episodes that cannot be used are listed with the reason. Exit status: 0 all is
in the report; 1 nothing was run; 2 the arguments are wrong; 3 it stopped on the way, and will go on where it was.

With `--policy NAME=DATASET` twice, both policies' actions start from the same recorded frames, `--score
module:function` gives each rollout (frames, uint8 (1 + T, H, W, 3)) a number, and the report compares them episode by
episode.

DIR gets `report.html`, `table.md`, `summary.json`, `episodes.parquet`, `bad.jsonl`, `clips/`.
"""

import argparse
import asyncio
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from serve_app.jobs.episodes import BadDataset, BadEpisode, EpisodeRef, list_episodes, load_episode
from serve_app.jobs.evaluator import (
    Evaluator,
    Plan,
    client,
    groups_left,
    left_of,
    named_function,
    open_roller,
    row_of,
)
from serve_app.jobs.records import Records
from serve_app.jobs.report import write_report
from serve_app.jobs.rollouts import CannotGoOn, Refused, fit

KEY_VARIABLE = "DREAM_API_KEY"
MILS_PER_USD = 10_000
RESERVED = frozenset({".", "..", "comparison"})
"""Directories, and what the report calls what it says of both policies."""
STOPPED = 3
"""Exit status of a job that can go on."""

Work = tuple[str, Plan, list[EpisodeRef]]


class Stopped(Exception):
    """On the way: what was done is kept, and the same command goes on with the rest."""


def estimate_usd(plan: Plan, key: str, refs: Sequence[EpisodeRef]) -> float:
    """What one rollout of `refs` costs at most: one is quoted, and taken to be as long as they may be.

    Raises:
        CannotGoOn: the cluster refuses, or none of the first episodes can be read.
    """

    async def ask() -> float:
        async with client(plan, key) as http:
            roller = await open_roller(plan, http)
            for ref in islice(refs, 20):
                try:
                    episode = load_episode(ref)
                    actions = episode.actions[: plan.max_actions]
                    quoted = await roller.quote(fit(episode.frames[:1], roller.resolution)[0], actions, plan.seed)
                except (BadEpisode, Refused):
                    continue
                return quoted["cost_usd"] / (1 + len(actions)) * (1 + plan.max_actions)
        raise CannotGoOn("none of the first 20 episodes can be used; see the layouts in serve_app/jobs/episodes.py")

    return asyncio.run(ask())


def run_plan(plan: Plan, key: str, refs: Sequence[EpisodeRef], workers: int) -> None:
    """Evaluate what has no record yet, spread by Ray Data. Raises Stopped."""
    import ray
    import ray.data

    groups = groups_left(plan, refs)
    if not groups:
        return
    ray.data.DataContext.get_current().enable_progress_bars = False
    done = ray.data.from_items([row_of(group) for group in groups], override_num_blocks=len(groups)).map_batches(
        Evaluator,
        fn_constructor_args=(plan, key),
        batch_size=None,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(
            size=workers,
            max_tasks_in_flight_per_actor=plan.calls,
            max_concurrent_calls_per_actor=plan.calls,
            enable_true_multi_threading=True,
        ),
        num_gpus=1 if plan.checkpoint and plan.device.startswith("cuda") else None,
    )
    what, stopped = f"episodes of {plan.run.split()[0]}", ""
    with tqdm(total=len(refs), initial=len(refs) - len(left_of(plan, refs)), desc=what, mininterval=2.0) as bar:
        try:
            for row in done.iter_rows():
                if row["status"] == "stopped":  # the others in flight still come
                    stopped = stopped or row["reason"]
                else:
                    bar.update()
        except ray.exceptions.RayError as error:
            raise Stopped(f"{type(error).__name__}: {error}") from error
    if stopped:
        raise Stopped(stopped)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="recorded episodes: a path or URL")
    parser.add_argument("--policy", action="append", default=[], metavar="NAME=DATASET", help="twice: compare the two")
    parser.add_argument("--score", default="", help="module:function that gives a rollout's frames a number")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--model", default="", help="slug of a served model: run on the cluster, paid for")
    where.add_argument("--checkpoint", default="", help="directory of a checkpoint: run on actors of this job")
    parser.add_argument("--out", type=Path, required=True, help="a directory that every worker can write")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the cluster")
    parser.add_argument("--key-file", type=Path, help=f"file with the key, in place of {KEY_VARIABLE}")
    parser.add_argument("--device", default="cpu", help="for --checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-steps", type=int, help="denoising steps; the model's default without it")
    parser.add_argument("--max-actions", type=int, default=48, help="of each episode (default 48)")
    parser.add_argument("--limit", type=int, help="only so many episodes; more of them later go on from there")
    parser.add_argument("--concurrency", type=int, default=48, help="episodes at a time, per worker (default 48)")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--patience", type=float, default=600.0, help="seconds for which a cluster may be away (600)")
    parser.add_argument("--max-cost", type=float, help="USD: do not begin if the whole evaluation may cost more")
    parser.add_argument("--dry-run", action="store_true", help="say what it would cost, and stop")
    parser.add_argument("--camera", default="", help="of a LeRobot data set; its first without it")
    parser.add_argument("--lpips-weights", default="")
    parser.add_argument("--lpips-sha256", default="")
    args = parser.parse_args()
    policies = dict(each.split("=", 1) for each in args.policy if "=" in each)
    if bool(args.dataset) + (len(args.policy) > 0) != 1 or (args.policy and (len(policies) != 2 or not args.score)):
        parser.error("give --dataset, or --policy NAME=DATASET twice and --score")
    if any(not re.fullmatch(r"[\w.-]+", name) or name in RESERVED for name in policies):
        parser.error("a policy's NAME is of letters, digits, `_`, `.` and `-`, and not `comparison`")
    for name, bound in (
        ("max-actions", args.max_actions),
        ("concurrency", args.concurrency),
        ("workers", args.workers),
    ):
        if bound < 1:
            parser.error(f"--{name} is 1 or more")
    try:
        print(evaluate_all(args, policies or {"": args.dataset}))
    except (BadDataset, CannotGoOn, ValueError, OSError) as error:
        sys.exit(f"evaluate: {error}")
    except Stopped as stopped:
        print(f"evaluate: stopped: {stopped}; the same command goes on with the rest", file=sys.stderr)
        sys.exit(STOPPED)


def evaluate_all(args: argparse.Namespace, sources: dict[str, str]) -> str:
    """Every source, then the report over them, also over what there is when it stops; returns its path.

    Raises:
        BadDataset, CannotGoOn, ValueError, OSError: nothing was run.
        Stopped: on the way.
    """
    key = args.key_file.read_text().strip() if args.key_file else os.environ.get(KEY_VARIABLE, "")
    if args.model and not key:
        raise CannotGoOn(f"{KEY_VARIABLE} is not set; rollouts on a cluster are paid for by a key")
    if args.score:
        named_function(args.score)
    work = [_plan(args, name, url, sources) for name, url in sources.items()]
    if args.model:
        left = [(plan, rest) for _, plan, refs in work if (rest := left_of(plan, refs))]
        each = {plan.out: estimate_usd(plan, key, rest) for plan, rest in left}
        cost = sum(each[plan.out] * len(rest) for plan, rest in left)
        spent = sum(record.cost_usd for _, plan, _ in work for record in Records(Path(plan.out), plan.run))
        episodes = sum(len(rest) for _, rest in left)
        most = f"of up to {args.max_actions} actions each they cost at most ${cost:.4f}"
        print(f"{episodes} episodes are left; {most}; ${spent:.4f} spent", file=sys.stderr)
        if args.dry_run:
            return f"${cost:.4f}"
        if args.max_cost is not None:
            if cost + spent > args.max_cost:
                raise CannotGoOn(
                    f"${cost:.4f} after ${spent:.4f} is more than --max-cost ${args.max_cost:.4f}; nothing was run"
                )
            bounds = {out: math.ceil(round(usd * MILS_PER_USD, 6)) for out, usd in each.items()}
            work = [(name, replace(p, max_rollout_mils=bounds.get(p.out, 0)), refs) for name, p, refs in work]
    stopped: Stopped | None = None
    try:
        for _, plan, refs in work:
            run_plan(plan, key, refs, args.workers)
    except Stopped as reason:
        stopped = reason
    try:
        found = {name: list(Records(Path(plan.out), plan.run)) for name, plan, _ in work}
        page = write_report(args.out, found, {name: len(refs) for name, _, refs in work}, args.model or args.checkpoint)
    except OSError as error:
        raise stopped or Stopped(f"the report cannot be written: {error}") from error
    if stopped is not None:
        raise stopped
    return str(page)


def _plan(args: argparse.Namespace, name: str, url: str, sources: dict[str, str]) -> Work:
    refs = list_episodes(url, args.camera)[: args.limit]
    if not refs:
        raise BadDataset(f"{url} has no episodes")
    first = next(iter(sources.values()))
    starts = "" if url == first else first
    model = args.model or args.checkpoint
    settings = (args.seed, args.num_steps, args.max_actions, args.camera, args.lpips_sha256, args.score, starts)
    plan = Plan(
        run=" ".join(map(str, (name or "dataset", url, model, *settings))).rstrip(),
        out=str(args.out / name if name else args.out),
        url=args.url,
        model=args.model,
        checkpoint=args.checkpoint,
        device=args.device,
        seed=args.seed,
        num_steps=args.num_steps,
        max_actions=args.max_actions,
        concurrency=args.concurrency,
        patience_s=args.patience,
        lpips_weights=args.lpips_weights,
        lpips_sha256=args.lpips_sha256,
        score=args.score,
        starts=starts,
        camera=args.camera,
    )
    return name, plan, refs


if __name__ == "__main__":
    main()
