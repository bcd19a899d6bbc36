"""What a training run leaves for people: the loss curve as CSV, a grid of sample frames, the model card.

Knows nothing of how the training went beyond the numbers it is given.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from deployments.world_model import pusher
from deployments.world_model.config import WorldModelConfig
from deployments.world_model.evaluate import HELD_OUT_SEED, LOST_PX, Figures, held_out_episodes, predict
from deployments.world_model.rollout import WorldModel

GRID_EPISODES = 5
GRID_EVERY = 6  # frames


def write_losses(path: Path, rows: Iterable[tuple[str, int, float]]) -> None:
    """(phase, step, mean loss since the row before)."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("phase", "step", "loss"))
    writer.writerows((phase, step, f"{loss:.5f}") for phase, step, loss in rows)
    path.write_text(text.getvalue())


def write_samples(path: Path, model: WorldModel) -> None:
    """Held-out episodes: for each, the true frames above the predicted ones."""
    episodes = held_out_episodes(model, GRID_EPISODES)
    predicted = predict(model, episodes, episodes.actions)
    rows = []
    for truth, prediction in zip(episodes.frames, predicted, strict=True):
        rows += [np.concatenate(list(video[::GRID_EVERY]), axis=1) for video in (truth, prediction)]
    grid = np.concatenate(rows, axis=0)
    Image.fromarray(grid).resize((grid.shape[1] * 2, grid.shape[0] * 2), Image.Resampling.NEAREST).save(path)


def model_card(
    config: WorldModelConfig, figures: Figures, parameters: dict[str, int], pool_chunks: int, training: dict[str, str]
) -> str:
    """Markdown."""
    height, width = config.resolution
    training_rows = "\n".join(f"| {name} | {value} |" for name, value in training.items())
    figure_rows = "\n".join(f"| `{name}` | {value:g} |" for name, value in figures.to_json().items())
    return f"""# {config.name}

A small world model of a toy: an agent (blue) pushes a puck (orange) about a table with a goal (green ring). It has the
architecture of DreamDojo (action-conditioned diffusion transformer, rectified flow, chunks of {config.chunk_size}
frames) with a small tokenizer, and exists so that the whole cluster can run and be tested on a CPU. It says nothing
about robots, nor about the quality of DreamDojo itself.

## Use
- In: a {width}x{height} RGB start frame and actions `(T, {config.action_dim})` float32. Columns 0 and 1 are the agent's
  velocity right and down, in [-1, 1], {pusher.MAX_SPEED} pixels per frame at 1; larger values are clipped and the other
  columns ignored.
- Out: T + 1 frames at {config.fps} per second, the start frame first.
- Default: {config.default_num_steps} denoising steps, guidance {config.default_guidance:g}. The world is deterministic,
  so more steps gain little.
- Limits: only frames that the toy's renderer could have drawn; errors add up over chunks, so the puck drifts in long
  rollouts and contact that is only just made or missed is often predicted wrongly.

## Size
| part | parameters |
|---|---|
| denoiser | {parameters["net"]:,} |
| tokenizer | {parameters["tokenizer"]:,} |

## Training
All data is drawn by the simulator in `pusher.py` from the seed; no other data was used. Encoded once, {pool_chunks:,}
chunks served the denoiser.

| what | value |
|---|---|
{training_rows}

## Held-out figures
Means over {figures.episodes} episodes of 49 frames that were never trained on (simulator seed {HELD_OUT_SEED}), with
{figures.num_steps} denoising steps: PSNR in dB and positions in pixels, over the frames after the start frame.
`_1_12` is the first chunk, `_37_48` the last. An object that a frame does not show counts as {LOST_PX:g} pixels off.

| figure | value |
|---|---|
{figure_rows}

`copy_first` holds the start frame still, `shuffled` uses the actions of another episode, `zeroed` none: the distance
to them is what the model knows. `tokenizer_psnr_db` is the ceiling that the tokenizer sets.
"""
