"""Runs episodes' actions through the world model: over the cluster's HTTP API, or in this process from a checkpoint."""

import asyncio
import hashlib
import io
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
import numpy as np
from PIL import Image, ImageOps

from serve_app.jobs.episodes import Actions, Episode, Frames

ATTEMPTS = 8
BACKOFF_S = 1.0
MAX_BACKOFF_S = 60.0
RETRIED = frozenset({408, 429, 500, 502, 503, 504})


class Refused(Exception):
    """This episode's rollout was refused, and would be again; the message says why."""


class CannotGoOn(Exception):
    """No further rollout can succeed: no credits, no such model, a key that is not accepted."""


@dataclass(frozen=True, slots=True)
class Rollout:
    frames: Frames
    """(1 + T, H, W, 3), before any video was made of them."""
    cost_usd: float
    request_id: str
    engine_ms: float


class Roller(Protocol):
    resolution: tuple[int, int]
    """(H, W) of the model's frames."""
    action_dim: int

    async def roll_out(self, start_frame: Frames, actions: Actions, seed: int, name: str) -> Rollout:
        """`name` is the same for the same work: whoever asks again under it pays once. Raises Refused, CannotGoOn."""


class ClusterRoller:
    """Through `POST /v1/predict/batch` of a running cluster, which reserves and charges as for any customer."""

    def __init__(self, http: httpx.AsyncClient, model: str, num_steps: int | None) -> None:
        """`http` has the cluster's base URL and a key."""
        self._http = http
        self._base = f"/models/{model}"
        self._num_steps = num_steps
        self._model = model
        self.resolution = (0, 0)
        self.action_dim = 0
        self.usd_per_frame = 0.0

    async def open(self) -> None:
        """Read the model's form from the catalog. Raises CannotGoOn."""
        answer = await self._send("GET", f"/v1/models/{self._model}")
        entry = answer.json()
        if not entry["active"]:
            raise CannotGoOn(f"{self._model} is not served there")
        self.resolution = tuple(entry["spec"]["resolution"])
        self.action_dim = entry["spec"]["action_dim"]
        self.usd_per_frame = entry["price_per_frame_usd"]

    async def quote(self, start_frame: Frames, actions: Actions, seed: int) -> dict[str, float]:
        """What one rollout would cost; nothing is run. Raises Refused, CannotGoOn."""
        form = self._form(start_frame, actions, seed)
        answer = await self._send("POST", f"{self._base}/v1/predict/batch?dryRun=true", **form)
        quoted: dict[str, float] = answer.json()
        return quoted

    async def roll_out(self, start_frame: Frames, actions: Actions, seed: int, name: str) -> Rollout:
        answer = await self._send(
            "POST",
            f"{self._base}/v1/predict/batch",
            headers={"Idempotency-Key": name},
            **self._form(start_frame, actions, seed),
        )
        with zipfile.ZipFile(io.BytesIO(answer.content)) as files, files.open("rollout_000.npy") as file:
            frames = np.lib.format.read_array(io.BytesIO(file.read()), allow_pickle=False)
        return Rollout(
            frames,
            float(answer.headers["X-DreamEngine-Estimated-Charge-USD"]),
            answer.headers["X-DreamEngine-Request-Id"],
            float(answer.headers["X-DreamEngine-Engine-Wall-Ms"]),
        )

    def _form(self, start_frame: Frames, actions: Actions, seed: int) -> dict[str, Any]:
        png, npy = io.BytesIO(), io.BytesIO()
        Image.fromarray(start_frame).save(png, "PNG")
        np.save(npy, actions)
        fields = {"seed": str(seed), "return": "npz"}
        if self._num_steps is not None:
            fields["num_steps"] = str(self._num_steps)
        return {"files": {"frame": png.getvalue(), "actions": npy.getvalue()}, "data": fields}

    async def _send(self, method: str, path: str, **content: Any) -> httpx.Response:
        """Tries again, for minutes, while the cluster is busy or away; asks in the same words, so pays once."""
        problem = ""
        for attempt in range(ATTEMPTS):
            wait_s = min(MAX_BACKOFF_S, BACKOFF_S * 2**attempt)
            try:
                answer = await self._http.request(method, path, **content)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__} {error}"
            else:
                if answer.is_success:
                    return answer
                problem = f"{answer.status_code} {_reason(answer)}"
                if answer.status_code in (401, 402, 403, 404):
                    raise CannotGoOn(problem)
                if answer.status_code not in RETRIED:
                    raise Refused(problem)
                wait_s = min(MAX_BACKOFF_S, max(wait_s, float(answer.headers.get("Retry-After", 0))))
            if attempt + 1 < ATTEMPTS:
                await asyncio.sleep(wait_s)
        raise Refused(f"tried {ATTEMPTS} times; the last answer was {problem}")


class LocalRoller:
    """On a model in this process: no server, no charge. Rollouts that wait together share their forwards."""

    def __init__(self, checkpoint: str, device: str, num_steps: int | None, max_rows: int = 16) -> None:
        from deployments.world_model.rollout import WorldModel

        self._model = WorldModel.load(Path(checkpoint), device)
        config = self._model.config
        self.resolution = config.resolution
        self.action_dim = config.action_dim
        self._num_steps = num_steps or config.default_num_steps
        self._max_rows = max_rows
        self._waiting: list[_Waiting] = []
        self._runner: asyncio.Task[None] | None = None

    async def roll_out(self, start_frame: Frames, actions: Actions, seed: int, name: str) -> Rollout:
        waiting = _Waiting(start_frame, actions, seed, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._runner is None or self._runner.done():
            self._runner = asyncio.get_running_loop().create_task(self._run())
        started = time.perf_counter()
        frames = await waiting.frames
        return Rollout(frames, 0.0, "", (time.perf_counter() - started) * 1e3)

    async def _run(self) -> None:
        await asyncio.sleep(0)  # whoever asks in this turn of the loop shares the batch
        while self._waiting:
            batch, self._waiting = self._waiting[: self._max_rows], self._waiting[self._max_rows :]
            try:
                videos = await asyncio.to_thread(self._generate, batch)
            except Exception as error:
                for each in batch:
                    each.frames.set_exception(Refused(f"{type(error).__name__}: {error}"))
            else:
                for each, video in zip(batch, videos, strict=True):
                    each.frames.set_result(video)

    def _generate(self, batch: Sequence["_Waiting"]) -> list[Frames]:
        from deployments.world_model.rollout import ChunkInput

        size = self._model.config.chunk_size
        videos = [[each.start_frame[None]] for each in batch]
        for chunk in range(max(-(-len(each.actions) // size) for each in batch)):
            first = chunk * size
            going_on = [index for index, each in enumerate(batch) if len(each.actions) > first]
            inputs = [
                ChunkInput(
                    videos[index][-1][-1],
                    batch[index].actions[first : first + size],
                    batch[index].seed,
                    0,
                    chunk,
                    self._num_steps,
                    self._model.config.default_guidance,
                )
                for index in going_on
            ]
            for index, frames in zip(going_on, self._model.generate(inputs), strict=True):
                videos[index].append(frames)
        return [np.concatenate(parts) for parts in videos]


@dataclass(frozen=True, slots=True)
class _Waiting:
    start_frame: Frames
    actions: Actions
    seed: int
    frames: asyncio.Future[Frames]


def fit(frames: Frames, resolution: tuple[int, int]) -> Frames:
    """As the service fits start frames: cropped about the centre to the aspect ratio, resized bilinearly."""
    height, width = resolution
    if frames.shape[1:3] == (height, width):
        return frames
    fitted = [ImageOps.fit(Image.fromarray(each), (width, height), Image.Resampling.BILINEAR) for each in frames]
    return np.stack([np.asarray(each, np.uint8) for each in fitted])


def work_name(run: str, episode: Episode, seed: int) -> str:
    """The same for the same run, episode and seed, also after a restart: the idempotency key of its rollout."""
    return "eval-" + hashlib.sha256(f"{run}\n{episode.episode_id}\n{seed}".encode()).hexdigest()[:40]


def _reason(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:200]
