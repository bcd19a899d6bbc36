"""The denoiser's last phase of training: on episodes that it rolls out itself, and on its own first guesses.

Trained on perfect start frames alone, a model drifts: later chunks start from frames it made, in states that random
starts rarely have (contact, walls). So every round draws whole episodes and lets the model roll them out. Each chunk
starts from the frame that the model made; what should follow is simulated from the positions read off that very frame,
so the target is right for what the model was shown, however far it is from the episode it began as.

A sampler's later steps see the earlier steps' errors, and training on noised truth does not. So half of the second
passes are given a noised guess of the first pass instead.

Shapes: E episodes, B chunks, C latent channels, T latent frames, H and W the latent grid, F = T - 1, A action features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deployments.world_model import pusher
from deployments.world_model.actions import encode_actions
from deployments.world_model.config import WorldModelConfig
from deployments.world_model.denoiser import predict_clean
from deployments.world_model.dit import DiT
from deployments.world_model.rollout import ChunkInput, Frames, WorldModel, from_uint8
from deployments.world_model.sampler import sigma

CHUNKS_PER_EPISODE = 4
OWN_SHARE = 0.7  # of episodes that go on from the model's own frames; the others from the simulator's
SECOND_SHARE = 0.5  # of chunks that get a second pass
GUESS_SHARE = 0.5  # of second passes that start from the model's guess
MIN_SIGMA = 0.5  # the weight 1 / sigma^2 of the second pass stops growing here
ACTION_DROPOUT = 0.05  # of chunks that teach the unconditional pass


@dataclass(frozen=True)
class Pool:
    """Chunks in half precision; a chunk's first latent frame is its condition, the others are its target."""

    latents_NCTHW: Tensor
    actions_NFA: Tensor
    agent_error_px: float  # mean distance at the end of a chunk, of the model that rolled out
    puck_error_px: float


@torch.no_grad()
def roll_out_pool(model: WorldModel, random: np.random.Generator, episodes: int, batch: int, num_steps: int) -> Pool:
    latents, actions, errors = [], [], []
    for first in range(0, episodes, batch):
        count = min(batch, episodes - first)
        state = pusher.reset(count, random)
        own = random.random((count, 1)) < OWN_SHARE
        frame = pusher.render(state)
        # Drawn open loop from the episode as it would have gone.
        moves = pusher.random_actions(state, CHUNKS_PER_EPISODE * model.config.chunk_size, random)
        for chunk, chunk_moves in enumerate(np.split(moves, CHUNKS_PER_EPISODE, axis=1)):
            states = pusher.simulate(state, chunk_moves)[1:]
            columns = np.zeros((count, model.config.chunk_size, model.config.action_dim), np.float32)
            columns[..., model.config.embodiment.columns] = chunk_moves
            seeds = random.integers(0, 2**62, count)
            inputs = [
                ChunkInput(frame[row], columns[row], int(seeds[row]), 0, chunk, num_steps, 0.0) for row in range(count)
            ]
            generated = np.stack(model.generate(inputs))[:, -1]
            video_BFHWC = np.stack([frame, *(pusher.render(each) for each in states)], axis=1)
            video = from_uint8(video_BFHWC, model.device, torch.float32)
            latents.append(model.tokenizer.encode(video).float())
            actions += [encode_actions(model.config, each) for each in columns]
            shown = shown_positions(generated, states[-1])
            errors.append(
                [np.linalg.norm(getattr(shown, name) - getattr(states[-1], name), axis=1) for name in ("agent", "puck")]
            )
            frame, state = _continue(own, generated, shown, states[-1])
    agent, puck = (float(np.concatenate(each).mean()) for each in zip(*errors, strict=True))
    latents_NCTHW = torch.cat(latents)  # in float32: under autocast, a CPU joins no halves
    return Pool(latents_NCTHW.half(), torch.from_numpy(np.stack(actions)).to(model.device), agent, puck)


def shown_positions(frames: Frames, truth: pusher.PusherState) -> pusher.PusherState:
    """What the frames show; the truth where an object is not to be seen."""
    agent, puck = pusher.read_agent(frames), pusher.read_puck(frames)
    return pusher.PusherState(
        np.where(np.isnan(agent), truth.agent, agent), np.where(np.isnan(puck), truth.puck, puck), truth.goal
    )


def _continue(
    own_E1: np.ndarray, generated: Frames, shown: pusher.PusherState, truth: pusher.PusherState
) -> tuple[Frames, pusher.PusherState]:
    frame = np.where(own_E1[:, :, None, None], generated, pusher.render(truth))
    agent, puck = np.where(own_E1, shown.agent, truth.agent), np.where(own_E1, shown.puck, truth.puck)
    return frame, pusher.PusherState(agent.astype(np.float32), puck.astype(np.float32), truth.goal)


def loss(config: WorldModelConfig, dit: DiT, pool: Pool, batch: int, random: torch.Generator) -> Tensor:
    """Squared error of a guess from pure noise, and of a second one from a noised guess or the noised truth."""
    device = pool.latents_NCTHW.device
    rows = torch.randint(len(pool.latents_NCTHW), (batch,), generator=random).to(device)
    clean_BCTHW, actions_BFA = pool.latents_NCTHW[rows].float(), pool.actions_NFA[rows]
    noise_BCTHW = torch.randn(clean_BCTHW.shape, generator=random).to(device)
    uniform = torch.rand(3, batch, generator=random).to(device)
    action_weight_B = (uniform[0] >= ACTION_DROPOUT).float()
    context = dit.context(torch.zeros(config.dit.text_tokens, config.dit.text_dim, device=device))

    def guess(count: int, x_BCTHW: Tensor, sigma_B: Tensor) -> Tensor:
        condition_BCHW = clean_BCTHW[:count, :, 0]
        return predict_clean(
            config,
            dit,
            context,
            x_BCTHW,
            sigma_B,
            condition_BCHW,
            actions_BFA[:count],
            action_weight_B[:count],
        ).float()

    start = torch.full((batch,), sigma(config.sampler, 0, 1), device=device)
    first_BCTHW = guess(batch, _noised(clean_BCTHW, noise_BCTHW, start), start)
    first_error = (first_BCTHW - clean_BCTHW)[:, :, 1:] ** 2

    count = round(batch * SECOND_SHARE)
    shift = config.sampler.shift
    sigma_B = (shift * uniform[1] / (1 + (shift - 1) * uniform[1])).clamp(1e-3, 0.9998)[:count]
    guessed = (uniform[2, :count] < GUESS_SHARE)[:, None, None, None, None]
    origin_BCTHW = torch.where(guessed, first_BCTHW[:count].detach(), clean_BCTHW[:count])
    second_BCTHW = guess(count, _noised(origin_BCTHW, noise_BCTHW[:count], sigma_B), sigma_B)
    weight = 1 / sigma_B[:, None, None, None, None].clamp_min(MIN_SIGMA) ** 2
    second_error = weight * (second_BCTHW - clean_BCTHW[:count])[:, :, 1:] ** 2
    return first_error.mean() + SECOND_SHARE * second_error.mean()


def _noised(clean_BCTHW: Tensor, noise_BCTHW: Tensor, sigma_B: Tensor) -> Tensor:
    column = sigma_B[:, None, None, None, None]
    return (1 - column) * clean_BCTHW + column * noise_BCTHW
