"""How good a toy-world model is, on episodes it never saw: image quality, and where the objects are.

Episodes come from the true simulator, seeded apart from training; the model sees their first frame and their actions.
The baselines say what the figures are worth: the first frame held still, the actions of another episode, no actions.

Shapes: E episodes, F = T + 1 frames, T actions.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from deployments.world_model import pusher
from deployments.world_model.actions import FloatArray
from deployments.world_model.metrics import psnr_per_frame, ssim
from deployments.world_model.rollout import Frames, WorldModel, rollouts

HELD_OUT_SEED = 7_000_001  # a scalar seed; training seeds its generators with lists, whose streams are others
NUM_ACTIONS = 48
LOST_PX = pusher.SIZE / 2  # the error counted where a frame shows no object to read


@dataclass(frozen=True)
class Accuracy:
    """What a prediction is worth: means over episodes and over the frames after the start frame, or those named."""

    psnr_db: float
    psnr_db_1_12: float
    psnr_db_13_24: float
    psnr_db_37_48: float
    ssim: float
    agent_error_px: float
    agent_error_px_1_12: float
    puck_error_px: float
    puck_error_px_1_12: float
    goal_distance_pearson: float  # predicted against true distance of puck and goal in the last frame

    def to_json(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Figures:
    """A model's accuracy beside what holds the scale: other actions, a still frame, the tokenizer alone."""

    episodes: int
    num_steps: int
    accuracy: Accuracy
    copy_first_psnr_db: float
    shuffled_psnr_db: float
    zeroed_psnr_db: float
    tokenizer_psnr_db: float
    shuffled_agent_error_px: float
    copy_first_puck_error_px: float

    def to_json(self) -> dict[str, float]:
        own = {name: round(value, 4) for name, value in asdict(self).items() if name != "accuracy"}
        scale = {name: own.pop(name) for name in list(own) if name.endswith(("_db", "_px"))}
        return own | self.accuracy.to_json() | scale


@dataclass(frozen=True)
class Episodes:
    frames: Frames  # (E, F, H, W, 3)
    actions: FloatArray  # (E, T, action_dim)
    goal: FloatArray  # (E, 2)


def held_out_episodes(model: WorldModel, episodes: int, seed: int = HELD_OUT_SEED) -> Episodes:
    generator = np.random.default_rng(seed)
    state = pusher.reset(episodes, generator)
    moves = pusher.random_actions(state, NUM_ACTIONS, generator)
    frames = np.stack([pusher.render(each) for each in pusher.simulate(state, moves)], axis=1)
    return Episodes(frames, embed_actions(model, moves), state.goal)


def embed_actions(model: WorldModel, moves_ET2: FloatArray) -> FloatArray:
    """The simulator's two velocities in the model's action columns, (E, T, action_dim)."""
    actions = np.zeros((*moves_ET2.shape[:2], model.config.action_dim), np.float32)
    actions[..., model.config.embodiment.columns] = moves_ET2
    return actions


def predict(model: WorldModel, episodes: Episodes, actions: FloatArray, num_steps: int | None = None) -> Frames:
    """Rollouts (E, F, H, W, 3) from each episode's first frame under the given actions."""
    count = len(actions)
    start_frames = list(episodes.frames[:, 0])
    return np.stack(rollouts(model, start_frames, list(actions), range(count), [0] * count, num_steps=num_steps))


def evaluate(model: WorldModel, episodes: int, seed: int = HELD_OUT_SEED, num_steps: int | None = None) -> Figures:
    held_out = held_out_episodes(model, episodes, seed)
    truth = held_out.frames
    shuffled = predict(model, held_out, np.roll(held_out.actions, 1, axis=0), num_steps)
    zeroed = predict(model, held_out, np.zeros_like(held_out.actions), num_steps)
    still = np.repeat(truth[:, :1], truth.shape[1], axis=1)
    return Figures(
        episodes=episodes,
        num_steps=num_steps or model.config.default_num_steps,
        accuracy=accuracy(predict(model, held_out, held_out.actions, num_steps), held_out),
        copy_first_psnr_db=_psnr(still, truth),
        shuffled_psnr_db=_psnr(shuffled, truth),
        zeroed_psnr_db=_psnr(zeroed, truth),
        tokenizer_psnr_db=_psnr(model.reconstruct(truth), truth),
        shuffled_agent_error_px=float(position_error_px(pusher.read_agent, shuffled, truth)[:, 1:].mean()),
        copy_first_puck_error_px=float(position_error_px(pusher.read_puck, still, truth)[:, 1:].mean()),
    )


def accuracy(predicted: Frames, episodes: Episodes) -> Accuracy:
    truth = episodes.frames
    quality = psnr_per_frame(predicted, truth)
    agent = position_error_px(pusher.read_agent, predicted, truth)
    puck = position_error_px(pusher.read_puck, predicted, truth)
    true_distance = np.linalg.norm(pusher.read_puck(truth[:, -1]) - episodes.goal, axis=1)
    predicted_puck = np.nan_to_num(pusher.read_puck(predicted[:, -1]), nan=LOST_PX)
    predicted_distance = np.linalg.norm(predicted_puck - episodes.goal, axis=1)
    return Accuracy(
        psnr_db=float(quality[:, 1:].mean()),
        psnr_db_1_12=float(quality[:, 1:13].mean()),
        psnr_db_13_24=float(quality[:, 13:25].mean()),
        psnr_db_37_48=float(quality[:, 37:49].mean()),
        ssim=ssim(predicted[:, 1:], truth[:, 1:]),
        agent_error_px=float(agent[:, 1:].mean()),
        agent_error_px_1_12=float(agent[:, 1:13].mean()),
        puck_error_px=float(puck[:, 1:].mean()),
        puck_error_px_1_12=float(puck[:, 1:13].mean()),
        goal_distance_pearson=float(np.corrcoef(true_distance, predicted_distance)[0, 1]),
    )


def position_error_px(read: pusher.Reader, frames: Frames, truth: Frames) -> npt.NDArray[np.float64]:
    """Distance (E, F) between an object's positions read off both videos; LOST_PX where it cannot be read."""
    error = np.linalg.norm(read(frames).astype(np.float64) - read(truth), axis=-1)
    counted: npt.NDArray[np.float64] = np.nan_to_num(error, nan=LOST_PX)
    return counted


def _psnr(frames: Frames, truth: Frames) -> float:
    """Mean PSNR in dB after the start frame. A still scene repeats exactly; 60 dB stands for infinite there."""
    return float(np.minimum(psnr_per_frame(frames, truth)[:, 1:], 60).mean())
