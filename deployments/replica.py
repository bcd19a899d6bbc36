"""One model on one device, as a Serve replica: loads and warms it, announces itself to its scheduler, runs chunk jobs.

Torch never runs on the event loop: a blocked loop would fail health checks and delay cancellation.
"""

import asyncio
import importlib
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from ray.util import get_node_ip_address

from deployments.actors import start_scheduler
from deployments.channel import Listener
from deployments.checkpoints import local_checkpoint
from deployments.engine import Engine
from deployments.logs import configure_logs
from deployments.messages import (
    ChunkFailed,
    ChunkJob,
    ChunkPiece,
    ChunkReport,
    ChunkRow,
    ModelSpec,
    ReplicaId,
    TicketId,
)
from deployments.meter import Meter, Series
from deployments.metrics import (
    CONTEXT_CACHE_BYTES,
    CONTEXT_CACHE_HITS,
    CONTEXT_CACHE_MISSES,
    LATENT_CACHE_BYTES,
    LATENT_CACHE_HITS,
    LATENT_CACHE_MISSES,
    REPLICA_BOOT_SECONDS,
    REPLICA_GPU_SECONDS,
    REPLICA_SECONDS,
    Metric,
)
from deployments.model import Model
from deployments.presenter import FrameDistance
from deployments.profiling import MAX_ROUNDS, measure
from deployments.replica_jobs import ReplicaJobs
from deployments.replies import Replies
from deployments.scheduler import SchedulerLimits
from deployments.tracing import configure_tracing

ANNOUNCE_EVERY_S = 1.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ReplicaConfig:
    spec: ModelSpec
    runner: str
    """`module:callable` that makes the model from `checkpoint` and `device`."""
    checkpoint: str
    """A directory, or the URL of one that is copied to `cache_dir` first."""
    cache_dir: str
    device: str
    max_rows: int
    """Rows in one forward."""
    context_bytes: int
    """Of streams' contexts that it keeps, if its model streams."""
    torch_threads: int
    """Threads of one forward on a CPU; 0 leaves torch's own choice."""
    scheduler_limits: SchedulerLimits
    control_labels: Mapping[str, str]
    """Of the nodes for the scheduler, should this replica be the first to need it."""
    stall_s: float
    """How long one call of the model may take before the replica counts as hung and is replaced."""
    encoders: int = 2
    lpips_weights: str = ""
    """File of the LPIPS network; empty without that metric."""
    lpips_sha256: str = ""
    num_gpus: float = 0.0


class Replica:
    def __init__(self, config: ReplicaConfig) -> None:
        from ray import serve

        configure_logs()
        configure_tracing("replica")
        started = time.monotonic()
        self._config = config
        self._meter = Meter()
        self._id = ReplicaId(serve.get_replica_context().replica_id.unique_id)
        self._scheduler = start_scheduler(config.spec.slug, config.scheduler_limits, config.control_labels)
        if config.torch_threads:
            import torch

            torch.set_num_threads(config.torch_threads)
        model = load_runner(config.runner)(local_checkpoint(config.checkpoint, Path(config.cache_dir)), config.device)
        self._attention = str(getattr(model, "attention", ""))
        latents, contexts = getattr(model, "latent_cache", None), getattr(model, "context_cache", None)
        if contexts is not None:
            contexts.max_bytes = config.context_bytes
        self._caches = (
            CacheCounts(latents, LATENT_CACHE_HITS, LATENT_CACHE_MISSES, LATENT_CACHE_BYTES),
            CacheCounts(contexts, CONTEXT_CACHE_HITS, CONTEXT_CACHE_MISSES, CONTEXT_CACHE_BYTES),
        )
        spec = config.spec
        probe_steps = min(spec.max_num_steps, 1 + MAX_ROUNDS)
        self._profile = measure(model, blank_row(spec), config.max_rows, num_steps=probe_steps)
        log.info("profiled", model=spec.slug, base_s=self._profile.base_s, row_s=self._profile.row_s)
        self._engine = Engine(
            model,
            spec.resolution,
            spec.fps,
            config.max_rows,
            config.encoders,
            config.stall_s,
            lpips=load_lpips(config.lpips_weights, config.lpips_sha256),
            profile=self._profile,
            slug=spec.slug,
            meter=self._meter,
            forwards=lambda row: spec.forwards(len(row.actions), row.num_steps, row.guidance),
        )
        warm_up(self._engine, spec)
        self._replies = Replies()
        scheduler = self._scheduler
        self._jobs = ReplicaJobs(self._engine, lambda ticket_id: scheduler.notice.remote([("withdraw", ticket_id)]))
        self._ready_at = time.monotonic()
        self._meter.observe(REPLICA_BOOT_SECONDS, spec.slug, value=self._ready_at - started)
        log.info("replica_ready", model=spec.slug, replica=self._id, boot_s=round(self._ready_at - started, 3))
        self._listener = Listener({"run_chunk": self.run_chunk, "stream_chunk": self.stream_chunk})
        self._announcing = asyncio.get_running_loop().create_task(self._announce())

    async def run_chunk(self, job: ChunkJob) -> ChunkReport:
        """Cancelling the call takes its rows out of the batch at the next denoising step."""
        report = await self._replies.of(self._jobs.start(job))
        return replace(report, replica_id=self._id)

    async def stream_chunk(self, job: ChunkJob) -> AsyncGenerator[ChunkPiece | ChunkReport, None]:
        """As `run_chunk`, with each row's frames as they are made, before a report without them."""
        loop = asyncio.get_running_loop()
        made: asyncio.Queue[ChunkPiece | None] = asyncio.Queue()

        def on_piece(piece: ChunkPiece) -> None:
            loop.call_soon_threadsafe(made.put_nowait, piece)

        report = asyncio.wrap_future(self._jobs.start(job, on_piece))
        report.add_done_callback(lambda _: made.put_nowait(None))
        try:
            while (piece := await made.get()) is not None:
                yield piece
            yield replace(await report, replica_id=self._id)
        finally:
            report.cancel()

    async def num_rows(self) -> int:
        """Rows that the engine holds, waiting and running."""
        return self._engine.num_rows

    def check_health(self) -> None:
        if not self._engine.healthy():
            raise RuntimeError("the engine has stopped, hangs, or fails every call")
        if self._announcing.done():
            raise RuntimeError("the scheduler is not told any more that this replica is there")

    async def __del__(self) -> None:
        self._announcing.cancel()
        self._scheduler.replica_gone.remote(self._id)
        await self._listener.stop()
        await asyncio.to_thread(self._engine.stop)

    async def _announce(self) -> None:
        address = await self._listener.start(get_node_ip_address())
        while True:
            measured = self._measured()
            try:
                orphans: list[TicketId] = await self._scheduler.replica_alive.remote(
                    self._id,
                    self._engine.cap,
                    self._attention,
                    self._profile,
                    measured,
                    self._config.scheduler_limits,
                    address,
                )
                self._jobs.stop(orphans)
            except Exception as error:
                self._meter.add(measured)
                log.warning("scheduler_unreachable", model=self._config.spec.slug, error=type(error).__name__)
            await asyncio.sleep(ANNOUNCE_EVERY_S)

    def _measured(self) -> Series:
        """Since the last time."""
        slug, now = self._config.spec.slug, time.monotonic()
        elapsed_s, self._ready_at = now - self._ready_at, now
        self._meter.count(REPLICA_SECONDS, slug, by=elapsed_s)
        self._meter.count(REPLICA_GPU_SECONDS, slug, by=elapsed_s * self._config.num_gpus)
        for cache in self._caches:
            cache.measure(self._meter, slug)
        return self._meter.drain()


class CacheCounts:
    """Of a cache of a model's, if it has it."""

    def __init__(self, cache: Any, hits: Metric, misses: Metric, num_bytes: Metric) -> None:
        self._cache = cache
        self._metrics = hits, misses, num_bytes
        self._hits = self._misses = 0

    def measure(self, meter: Meter, slug: str) -> None:
        if self._cache is None:
            return
        hits, misses = self._cache.hits, self._cache.misses
        of_hits, of_misses, of_bytes = self._metrics
        meter.count(of_hits, slug, by=hits - self._hits)
        meter.count(of_misses, slug, by=misses - self._misses)
        meter.set(of_bytes, slug, to=self._cache.num_bytes)
        self._hits, self._misses = hits, misses


def load_runner(path: str) -> Callable[[Path, str], Model]:
    """The callable named by `module:attribute`, such as `deployments.world_model.rollout:WorldModel.load`."""
    module, _, attribute = path.partition(":")
    found: Any = importlib.import_module(module)
    for name in attribute.split("."):
        found = getattr(found, name)
    return found  # type: ignore[no-any-return]


def load_lpips(weights: str, sha256: str) -> FrameDistance | None:
    """The metric, or None where no weights are configured; raises CheckpointError where they do not fit."""
    if not weights:
        return None
    from deployments.world_model.lpips import Lpips

    return Lpips.read(Path(weights), sha256)


def warm_up(engine: Engine, spec: ModelSpec) -> None:
    """Run one chunk before the replica counts as ready, so that no customer pays for compilation or a broken model.

    Raises:
        RuntimeError: the model cannot run a blank chunk of its own spec.
    """
    outcome = engine.submit([blank_row(spec)]).result().outcomes[0]
    if isinstance(outcome, ChunkFailed):
        raise RuntimeError(f"{spec.slug} cannot run: {outcome.reason}")


def blank_row(spec: ModelSpec) -> ChunkRow:
    """A black start frame and no motion."""
    height, width = spec.resolution
    return ChunkRow(
        start_frame=np.zeros((height, width, 3), np.uint8),
        actions=np.zeros((spec.chunk_size, spec.action_dim), np.float32),
        seed=0,
        candidate=0,
        chunk=0,
        num_steps=1,
        guidance=0.0,
    )
