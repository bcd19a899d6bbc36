"""The toy world that `tiny-pusher` models: an agent that pushes a puck on a small table with a goal, seen from above.

Quasi-static: the puck moves only while the agent touches it, so a single frame tells all there is to know.
Deterministic; randomness enters through the generator given to `reset` and `random_actions`. Everything is vectorised
over E episodes.

Units are pixels of the rendered frame, positions are (x, y) with y down, actions are velocities in [-1, 1] per axis,
scaled by MAX_SPEED pixels per frame.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
Reader: TypeAlias = Callable[[npt.NDArray[np.uint8]], FloatArray]  # frames (..., 64, 64, 3) to positions (..., 2)

SIZE = 64
MAX_SPEED = 2.5
AGENT_RADIUS = 4.5
PUCK_RADIUS = 7.0
GOAL_RADIUS = 9.5  # larger than the puck's, so that a puck on the goal hides no part of the ring
GOAL_WIDTH = 2.0
CONTACT = AGENT_RADIUS + PUCK_RADIUS
MARGIN = 4  # pixels around the table on which a shape's window may hang over while it is drawn

BACKGROUND = (40, 42, 50)
# Each colour has one channel well above both others, by which `read_agent` and `read_puck` tell them apart.
AGENT_COLOR = (70, 110, 255)
PUCK_COLOR = (255, 120, 60)
GOAL_COLOR = (80, 220, 110)


@dataclass(frozen=True)
class PusherState:
    """Positions of E episodes, each float32 (E, 2)."""

    agent: FloatArray
    puck: FloatArray
    goal: FloatArray


def reset(episodes: int, generator: np.random.Generator) -> PusherState:
    """Random starts: anywhere on the table, the agent not inside the puck, and in half of the episodes close to it."""
    puck = generator.uniform(PUCK_RADIUS, SIZE - PUCK_RADIUS, (episodes, 2))
    goal = generator.uniform(GOAL_RADIUS, SIZE - GOAL_RADIUS, (episodes, 2))
    angle = generator.uniform(0, 2 * np.pi, episodes)
    distance = CONTACT + np.where(
        generator.random(episodes) < 0.5, generator.uniform(0, 6, episodes), generator.uniform(6, SIZE, episodes)
    )
    agent = puck + distance[:, None] * np.stack((np.cos(angle), np.sin(angle)), axis=1)
    agent = _inside(agent, AGENT_RADIUS)
    # Clipping to the table may have put the agent into a puck that is near a wall: let the contact push it out.
    agent, puck = _resolve_contact(agent, puck)
    return PusherState(agent.astype(np.float32), puck.astype(np.float32), goal.astype(np.float32))


def step(state: PusherState, actions_E2: FloatArray) -> PusherState:
    """One frame later: the agent moves, pushes the puck out of its way, and stops where puck or wall cannot give."""
    velocity = MAX_SPEED * np.clip(actions_E2, -1, 1)
    agent, puck = _resolve_contact(_inside(state.agent + velocity, AGENT_RADIUS), state.puck)
    return PusherState(agent.astype(np.float32), puck.astype(np.float32), state.goal)


def simulate(state: PusherState, actions_ET2: FloatArray) -> list[PusherState]:
    """The T + 1 states that T actions lead through, the given one first."""
    states = [state]
    for t in range(actions_ET2.shape[1]):
        states.append(step(states[-1], actions_ET2[:, t]))
    return states


def random_actions(state: PusherState, length: int, generator: np.random.Generator) -> FloatArray:
    """Varied behaviour, (E, length, 2): wandering, and seeking the puck to push it, in a random blend per episode.

    Open loop from the true simulator, so that a seeker keeps pushing as the puck moves.
    """
    episodes = len(state.agent)
    seeking = generator.choice([0.0, 0.6, 1.0], (episodes, 1), p=[0.35, 0.3, 0.35])
    drift = generator.normal(size=(episodes, 2))
    offset = generator.normal(size=(episodes, 2)) * 4
    actions = np.empty((episodes, length, 2), np.float32)
    for t in range(length):
        renew = generator.random((episodes, 1)) < 0.1
        drift = np.where(renew, generator.normal(size=(episodes, 2)) * 0.9, drift)
        offset = np.where(renew, generator.normal(size=(episodes, 2)) * 4, offset)
        toward = state.puck + offset - state.agent
        toward /= np.linalg.norm(toward, axis=1, keepdims=True) + 1e-6
        wanted = seeking * toward + (1 - seeking) * drift + generator.normal(size=(episodes, 2)) * 0.15
        actions[:, t] = np.clip(wanted, -1, 1)
        state = step(state, actions[:, t])
    return actions


def render(state: PusherState) -> npt.NDArray[np.uint8]:
    """Frames (E, 64, 64, 3), edges anti-aliased over one pixel so that a position is visible to below a pixel."""
    canvas = np.empty((len(state.agent), SIZE + 2 * MARGIN, SIZE + 2 * MARGIN, 3), np.uint8)
    canvas[:] = BACKGROUND
    _paint(canvas, state.goal, GOAL_RADIUS, GOAL_COLOR, hole=GOAL_RADIUS - GOAL_WIDTH)
    _paint(canvas, state.puck, PUCK_RADIUS, PUCK_COLOR)
    _paint(canvas, state.agent, AGENT_RADIUS, AGENT_COLOR)
    return np.ascontiguousarray(canvas[:, MARGIN:-MARGIN, MARGIN:-MARGIN])


def read_agent(frames: npt.NDArray[np.uint8]) -> FloatArray:
    """The agent's (x, y) in each frame of (..., 64, 64, 3): the centroid of what is blue; NaN where nothing is."""
    return _read(frames, channel=2)


def read_puck(frames: npt.NDArray[np.uint8]) -> FloatArray:
    """The puck's (x, y) in each frame of (..., 64, 64, 3): the centroid of what is orange; NaN where nothing is."""
    return _read(frames, channel=0)


def _read(frames: npt.NDArray[np.uint8], channel: int) -> FloatArray:
    levels = frames.astype(np.float32)
    others = np.delete(levels, channel, axis=-1).max(-1)
    weight = np.maximum(levels[..., channel] - others - 30, 0)  # 30: above the background's tint and a blur's fringe
    total = weight.sum((-2, -1))
    centres = np.arange(SIZE, dtype=np.float32) + 0.5
    with np.errstate(invalid="ignore"):
        x = (weight.sum(-2) * centres).sum(-1) / total
        y = (weight.sum(-1) * centres).sum(-1) / total
    return np.stack((x, y), axis=-1).astype(np.float32)


def _resolve_contact(agent: npt.NDArray[np.floating], puck: npt.NDArray[np.floating]) -> tuple[np.ndarray, np.ndarray]:
    normal, overlap = _overlap(agent, puck)
    puck = _inside(puck + normal * overlap, PUCK_RADIUS)
    normal, overlap = _overlap(agent, puck)  # what is left, because the puck met a wall, pushes the agent back
    return _inside(agent - normal * overlap, AGENT_RADIUS), puck


def _overlap(agent: np.ndarray, puck: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    difference = puck - agent
    distance = np.linalg.norm(difference, axis=1, keepdims=True)
    normal = np.where(distance > 1e-6, difference / np.maximum(distance, 1e-6), [1.0, 0.0])
    return normal, np.maximum(CONTACT - distance, 0)


def _inside(position: np.ndarray, radius: float) -> np.ndarray:
    inside: np.ndarray = np.clip(position, radius, SIZE - radius)
    return inside


def _paint(
    canvas: npt.NDArray[np.uint8],
    position_E2: FloatArray,
    radius: float,
    color: tuple[int, int, int],
    hole: float = 0.0,
) -> None:
    """A disc, or a ring around a hole, drawn in a window just large enough for it."""
    side = 2 * int(radius) + 5
    corner = np.floor(position_E2).astype(np.int64) - side // 2 + MARGIN  # (E, 2), of the window on the canvas
    columns, rows = (corner[:, axis, None] + np.arange(side) for axis in (0, 1))
    dx = (columns + 0.5 - MARGIN).astype(np.float32) - position_E2[:, :1]
    dy = (rows + 0.5 - MARGIN).astype(np.float32) - position_E2[:, 1:]
    distance = np.sqrt(dx[:, None, :] ** 2 + dy[:, :, None] ** 2)
    coverage = np.clip(radius + 0.5 - distance, 0, 1)
    if hole:
        coverage = np.minimum(coverage, np.clip(distance - hole + 0.5, 0, 1))
    window = (np.arange(len(canvas))[:, None, None], rows[:, :, None], columns[:, None, :])
    under = canvas[window].astype(np.float32)
    shade = under + coverage[..., None].astype(np.float32) * (np.array(color, np.float32) - under)
    canvas[window] = np.rint(shade).astype(np.uint8)
