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

from serve_app.jobs.episodes import Actions, Frames

BACKOFF_S = 1.0
MAX_BACKOFF_S = 30.0
ENGINE_ATTEMPTS = 3
"""Of work that breaks the engine: a lost replica is behind it after that, or the input is."""
AWAY = frozenset({408, 429, 502, 503, 504})
"""Answers of a cluster that is busy, restarts, or is not there."""
STOPPING = frozenset({401, 402, 403, 404})
"""Answers that any other episode would get too."""
ROWS = 16
"""Rollouts in one request: what a replica runs in one forward, unless it is told otherwise."""
MAX_ANSWER_BYTES = 64 * 2**20
"""Of frames in one request's answer: half of what a cluster sends unless it is told otherwise."""

Work = tuple[Frames, Actions]
"""A start frame (H, W, 3) and actions (T, A)."""


class Refused(Exception):
    """This episode's rollout was refused, and would be again; the message says why."""


class CannotGoOn(Exception):
    """No further rollout can succeed for now: no credits, no such model, a key that is not accepted, no cluster."""


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

    def most_rows(self, num_frames: int) -> int:
        """Rollouts of so many frames that are worth asking for at once."""

    async def roll_out(self, work: Sequence[Work], seed: int) -> list[Rollout]:
        """All of them, or none. Raises Refused, CannotGoOn."""


class ClusterRoller:
    """Through `POST /v1/predict/batch` of a running cluster, which reserves and charges as for any customer.

    Every request has an idempotency key that is derived from its content, so whoever asks again pays once. It waits up
    to `patience_s` for a cluster that is busy or away. `max_mils` bounds what one rollout may cost; 0 sets no bound.
    """

    def __init__(
        self, http: httpx.AsyncClient, model: str, num_steps: int | None, patience_s: float, max_mils: int = 0
    ) -> None:
        """`http` has the cluster's base URL and a key."""
        self._http = http
        self._base = f"/models/{model}"
        self._model = model
        self._num_steps = num_steps
        self._patience_s = patience_s
        self._max_mils = max_mils
        self.resolution = (0, 0)
        self.action_dim = 0

    async def open(self) -> None:
        """Read the model's form from the catalog. Raises CannotGoOn."""
        try:
            answer = await self._send("GET", f"/v1/models/{self._model}")
            entry = answer.json()
            active, spec = entry["active"], entry["spec"]
            self.resolution, self.action_dim = tuple(spec["resolution"]), spec["action_dim"]
        except (Refused, ValueError, KeyError, TypeError) as error:
            raise CannotGoOn(f"the catalog's entry of {self._model} cannot be read: {error}") from error
        if not active:
            raise CannotGoOn(f"{self._model} is not served there")

    def most_rows(self, num_frames: int) -> int:
        height, width = self.resolution
        return max(1, min(ROWS, MAX_ANSWER_BYTES // (num_frames * height * width * 3)))

    async def quote(self, start_frame: Frames, actions: Actions, seed: int) -> dict[str, float]:
        """What one rollout would cost; nothing is run. Raises Refused, CannotGoOn."""
        form = self._form([(start_frame, actions)], seed)
        answer = await self._send("POST", f"{self._base}/v1/predict/batch?dryRun=true", **form)
        quoted: dict[str, float] = answer.json()
        return quoted

    async def roll_out(self, work: Sequence[Work], seed: int) -> list[Rollout]:
        form = self._form(work, seed)
        if self._max_mils:
            form["data"]["max_cost_mils"] = str(len(work) * self._max_mils)
        headers = {"Idempotency-Key": work_name(self._model, self._num_steps, seed, work)}
        path = f"{self._base}/v1/predict/batch"
        answer = await self._send("POST", path, alone=len(work) == 1, headers=headers, **form)
        videos = await asyncio.to_thread(_unpacked, answer.content, work)
        usd_per_frame = float(answer.headers["X-DreamEngine-Estimated-Charge-USD"]) / sum(map(len, videos))
        return [
            Rollout(
                video,
                round(usd_per_frame * len(video), 6),
                answer.headers["X-DreamEngine-Request-Id"],
                float(answer.headers["X-DreamEngine-Engine-Wall-Ms"]),
            )
            for video in videos
        ]

    def _form(self, work: Sequence[Work], seed: int) -> dict[str, Any]:
        """A start frame for each, so that each is what it would be alone."""
        fields = {"seed": str(seed), "return": "npz", "service_class": "batch"}
        if self._num_steps is not None:
            fields["num_steps"] = str(self._num_steps)
        files = [("frame", _png(start_frame)) for start_frame, _ in work]
        return {"files": files + [("actions", _npy(actions)) for _, actions in work], "data": fields}

    async def _send(self, method: str, path: str, alone: bool = True, **content: Any) -> httpx.Response:
        """Asks again in the same words, so pays once. What may be one rollout's fault, or too dear for all of them, is
        left to smaller requests unless it is `alone`. Raises Refused, CannotGoOn."""
        began, attempt, broken = time.monotonic(), 0, 0
        while True:
            wait_s = min(MAX_BACKOFF_S, BACKOFF_S * 2**attempt)
            try:
                answer = await self._http.request(method, path, **content)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__} {error}"
            else:
                if answer.is_success:
                    return answer
                problem = f"{answer.status_code} {_reason(answer)}"
                if "max_cost_mils" in problem or (
                    answer.status_code in STOPPING and (alone or answer.status_code != 402)
                ):
                    raise CannotGoOn(problem)
                broken += answer.status_code == 500
                if broken == (ENGINE_ATTEMPTS if alone else 1) or answer.status_code not in (500, *AWAY):
                    raise Refused(problem)
                wait_s = max(wait_s, _retry_after_s(answer))
            left_s = began + self._patience_s - time.monotonic()
            if wait_s > left_s:
                raise CannotGoOn(f"the cluster could not be used for {self._patience_s:.0f} s: {problem}")
            await asyncio.sleep(wait_s)
            attempt += 1


class LocalRoller:
    """On a model in this process: no server, no charge."""

    def __init__(self, checkpoint: str, device: str, num_steps: int | None) -> None:
        from deployments.world_model.rollout import WorldModel

        self._model = WorldModel.load(Path(checkpoint), device)
        config = self._model.config
        self.resolution = config.resolution
        self.action_dim = config.action_dim
        self._num_steps = num_steps or config.default_num_steps
        self._turn = asyncio.Lock()

    def most_rows(self, num_frames: int) -> int:
        return ROWS

    async def roll_out(self, work: Sequence[Work], seed: int) -> list[Rollout]:
        async with self._turn:
            started = time.perf_counter()
            try:
                videos = await asyncio.to_thread(self.generate, work, seed)
            except Exception as error:
                raise Refused(f"{type(error).__name__}: {error}") from error
            took_ms = (time.perf_counter() - started) * 1e3
        return [Rollout(video, 0.0, "", took_ms) for video in videos]

    def generate(self, work: Sequence[Work], seed: int) -> list[Frames]:
        """(1 + T, H, W, 3) of each, chunk by chunk in one batch."""
        from deployments.world_model.rollout import ChunkInput

        config = self._model.config
        size = config.chunk_size
        videos = [[start_frame[None]] for start_frame, _ in work]
        for chunk in range(max(-(-len(actions) // size) for _, actions in work)):
            first = chunk * size
            going_on = [index for index, (_, actions) in enumerate(work) if len(actions) > first]
            inputs = [
                ChunkInput(
                    videos[index][-1][-1],
                    work[index][1][first : first + size],
                    seed,
                    0,
                    chunk,
                    self._num_steps,
                    config.default_guidance,
                )
                for index in going_on
            ]
            for index, frames in zip(going_on, self._model.generate(inputs), strict=True):
                videos[index].append(frames)
        return [np.concatenate(parts) for parts in videos]


def fit(frames: Frames, resolution: tuple[int, int]) -> Frames:
    """As the service fits start frames: cropped about the centre to the aspect ratio, resized bilinearly."""
    height, width = resolution
    if frames.shape[1:3] == (height, width):
        return frames
    fitted = [ImageOps.fit(Image.fromarray(each), (width, height), Image.Resampling.BILINEAR) for each in frames]
    return np.stack([np.asarray(each, np.uint8) for each in fitted])


def work_name(model: str, num_steps: int | None, seed: int, work: Sequence[Work]) -> str:
    """The same for the same work, whichever job asks for it, also after a restart: its idempotency key."""
    digest = hashlib.sha256(f"npz {model} {num_steps} {seed}\n".encode())
    for start_frame, actions in work:
        digest.update(f"{start_frame.shape} {actions.shape}\n".encode())
        digest.update(np.ascontiguousarray(start_frame).data)
        digest.update(np.ascontiguousarray(actions).data)
    return f"eval-{digest.hexdigest()[:40]}"


def _png(frame: Frames) -> bytes:
    output = io.BytesIO()
    Image.fromarray(frame).save(output, "PNG", compress_level=1)
    return output.getvalue()


def _npy(array: Actions) -> bytes:
    output = io.BytesIO()
    np.save(output, array)
    return output.getvalue()


def _unpacked(content: bytes, work: Sequence[Work]) -> list[Frames]:
    """The rollouts of a `return=npz` answer. Raises Refused unless they are those of `work`."""
    videos: list[Frames] = []
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as files:
            for index in range(len(work)):
                with files.open(f"rollout_{index:03d}.npy") as file:
                    videos.append(np.lib.format.read_array(io.BytesIO(file.read()), allow_pickle=False))
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise Refused(f"the answer is not what was asked for: {type(error).__name__}: {error}") from error
    for video, (start_frame, actions) in zip(videos, work, strict=True):
        expected = (1 + len(actions), *start_frame.shape)
        if video.shape != expected or video.dtype != np.uint8:
            raise Refused(f"the answer holds {video.dtype} {video.shape} where uint8 {expected} was asked for")
    return videos


def _retry_after_s(answer: httpx.Response) -> float:
    try:
        return min(MAX_BACKOFF_S, float(answer.headers.get("Retry-After", 0)))
    except ValueError:  # a proxy's date
        return 0.0


def _reason(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:200]
