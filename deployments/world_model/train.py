"""Train the toy world model: `python -m deployments.world_model.train --out DIR --minutes 30`.

First the tokenizer on rendered frames, then the denoiser on a pool of their latents. `--refine-minutes M` adds
M minutes in which the denoiser alone is trained on episodes that it rolls out itself (`refine.py`). All data comes from
the simulator, drawn from (seed, phase, step), so a run that is stopped and started again sees what it would have seen.
With `--steps` the result is a function of the seed on a given machine; with `--minutes` also of its speed.

Written to DIR: the checkpoint, `MODEL_CARD.md`, `metrics.json`, `losses.csv`, `samples.png`, and `train_state.pt`, from
which the same command continues.

Shapes: B chunks, F pixel frames, T latent frames, C latent channels, H and W pixels or the latent grid.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from deployments.world_model import pusher, refine
from deployments.world_model.actions import FloatArray, encode_actions
from deployments.world_model.checkpoint import write_checkpoint, write_whole
from deployments.world_model.config import PRESETS, WorldModelConfig
from deployments.world_model.denoiser import predict_clean
from deployments.world_model.dit import DiT
from deployments.world_model.evaluate import HELD_OUT_SEED, evaluate
from deployments.world_model.report import model_card, write_losses, write_samples
from deployments.world_model.rollout import Frames, WorldModel, from_uint8
from deployments.world_model.tokenizer import PatchTokenizer

TOKENIZER_SHARE = 0.3  # of the time or steps
TOKENIZER_BATCH = 32  # chunks of one group of frames and the frame before it
DIT_BATCH = 32
REFINE_BATCH = 64
TOKENIZER_LR, DIT_LR, REFINE_LR = 2e-3, 1.2e-3, 1e-3
WARMUP, DECAY = 0.02, 0.4  # share of a phase in which the learning rate rises, and falls at the end
EMA_DECAY = 0.998
FOREGROUND_WEIGHT = 8.0  # objects cover a tenth of a frame, and are all that matters
LATENT_NOISE = 0.1  # on the decoder's input: the denoiser's predictions are never exact
CONDITION_NOISE = 0.15  # largest, on the conditioning latents: later chunks start from imperfect frames
POOL_CHUNKS, POOL_CHUNKS_PER_MINUTE = 32_768, 1_024  # encoded once for the denoiser: its size, and for short runs
ROUND_TRIP_SHARE = 0.5  # of start frames that have passed through the tokenizer, as those of later chunks have
ACTION_DROPOUT = 0.1  # of chunks that teach the unconditional pass
MIN_SIGMA = 0.2  # the weight 1 / sigma^2 of the loss stops growing here
ROUND_STEPS = 300  # of the last phase's training per pool
ROUND_EPISODES, ROLLOUT_BATCH = 1_024, 128
ROUND_NUM_STEPS = (1, 2, 4)  # denoising steps that the rounds roll out with, in turn
SAVE_EVERY_S = 60.0
LOG_EVERY = 25  # steps
EVALUATION_EPISODES = 64


@dataclass(frozen=True)
class Budget:
    """How long a phase lasts: exactly one of the two is set."""

    steps: int | None
    seconds: float | None

    def progress(self, phase: Phase) -> float:
        """0 at the start, 1 when the phase is over."""
        if self.steps is not None:
            return min(phase.step / max(self.steps, 1), 1.0)
        assert self.seconds is not None
        return min(phase.seconds / max(self.seconds, 1e-9), 1.0)


@dataclass
class Phase:
    """One network in training, with everything needed to go on after a stop."""

    name: str
    module: nn.Module
    averaged: nn.Module
    optimizer: torch.optim.Optimizer
    peak_lr: float
    step: int = 0
    seconds: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)

    @classmethod
    def of(cls, name: str, module: nn.Module, peak_lr: float) -> Phase:
        averaged = copy.deepcopy(module).requires_grad_(False)
        optimizer = torch.optim.AdamW(module.parameters(), lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        return cls(name, module, averaged, optimizer, peak_lr)

    def state_dict(self) -> dict[str, Any]:
        return {
            "module": self.module.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.losses = [(int(step), float(loss)) for step, loss in state["losses"]]


@dataclass(frozen=True)
class Settings:
    out: Path
    seed: int
    minutes: float | None
    steps: int | None
    device: torch.device
    bf16: bool
    compiled: bool
    refine_minutes: float | None = None
    refine_steps: int | None = None

    @property
    def pool_chunks(self) -> int:
        asked = (
            self.steps * DIT_BATCH if self.steps is not None else round((self.minutes or 0) * POOL_CHUNKS_PER_MINUTE)
        )
        return max(DIT_BATCH, min(POOL_CHUNKS, asked))

    def budget(self, share: float) -> Budget:
        if self.steps is not None:
            return Budget(max(1, round(self.steps * share)), None)
        assert self.minutes is not None
        return Budget(None, self.minutes * 60 * share)

    @property
    def refine_budget(self) -> Budget | None:
        if self.refine_steps is None and self.refine_minutes is None:
            return None
        return Budget(self.refine_steps, None if self.refine_minutes is None else self.refine_minutes * 60)


def train(config: WorldModelConfig, settings: Settings) -> None:
    """The whole run, from nothing or from where it stopped."""
    settings.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)  # of this process's initial weights; the training data has its own generators
    tokenizer = PatchTokenizer(config.tokenizer, config.temporal_compression).to(settings.device)
    dit = DiT(config.dit, config.grouped_action_dim).to(settings.device)
    phases = [
        Phase.of("tokenizer", tokenizer, TOKENIZER_LR),
        Phase.of("dit", dit, DIT_LR),
        Phase.of("refine", dit, REFINE_LR),
    ]
    rounds = Rounds(copy.deepcopy(dit).requires_grad_(False))
    resume(phases, rounds, settings)
    if settings.compiled:
        for block in (*dit.blocks, *tokenizer.encoder, *tokenizer.decoder):
            block.compile()

    codec = phases[0].averaged
    assert isinstance(codec, PatchTokenizer)
    run_phase(
        phases[0],
        settings.budget(TOKENIZER_SHARE),
        lambda step: tokenizer_loss(config, tokenizer, settings, step),
        lambda: save(phases, rounds, settings),
    )
    budget = settings.budget(1 - TOKENIZER_SHARE)
    if budget.progress(phases[1]) < 1:
        pool = encode_pool(config, codec, settings)
        run_phase(
            phases[1],
            budget,
            lambda step: dit_loss(config, dit, pool, settings, step),
            lambda: save(phases, rounds, settings),
        )
    refined = phases[2]
    if refined.step == 0:
        for network in (dit, refined.averaged):
            network.load_state_dict(phases[1].averaged.state_dict())
    if settings.refine_budget is not None:
        run_phase(
            refined,
            settings.refine_budget,
            lambda step: refine_loss(config, rounds, refined, codec, settings, step),
            lambda: save(phases, rounds, settings),
        )

    averaged = refined.averaged
    assert isinstance(averaged, DiT)
    publish(config, averaged, codec, phases, settings)


def run_phase(phase: Phase, budget: Budget, loss_at: Callable[[int], Tensor], save_all: Callable[[], None]) -> None:
    bar = tqdm(total=1000, initial=round(1000 * budget.progress(phase)), desc=phase.name, unit="‰", mininterval=2.0)
    saved_at, recent = time.monotonic(), []
    while (progress := budget.progress(phase)) < 1:
        started = time.monotonic()
        for group in phase.optimizer.param_groups:
            group["lr"] = phase.peak_lr * schedule(progress)
        loss = loss_at(phase.step)
        phase.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(phase.module.parameters(), 1.0)
        phase.optimizer.step()
        phase.step += 1
        average(phase)
        recent.append(loss.item())
        if not math.isfinite(recent[-1]):
            raise RuntimeError(f"{phase.name}: the loss is {recent[-1]} at step {phase.step}; lower the learning rate")
        if len(recent) == LOG_EVERY:
            phase.losses.append((phase.step, sum(recent) / len(recent)))
            recent.clear()
            bar.set_postfix(step=phase.step, loss=f"{phase.losses[-1][1]:.4f}")
        phase.seconds += time.monotonic() - started
        bar.update(round(1000 * budget.progress(phase)) - bar.n)
        if time.monotonic() - saved_at > SAVE_EVERY_S:
            save_all()
            saved_at = time.monotonic()
    bar.close()
    save_all()


def schedule(progress: float) -> float:
    """Learning rate as a share of its peak: up, level, and down to a hundredth."""
    return min(1.0, 0.01 + progress / WARMUP, 0.01 + (1 - progress) / DECAY)


@torch.no_grad()
def average(phase: Phase) -> None:
    """Exponential moving average of the weights, with a shorter memory at first; buffers are taken as they are."""
    decay = min(EMA_DECAY, (1 + phase.step) / (10 + phase.step))
    for mean, weight in zip(phase.averaged.parameters(), phase.module.parameters(), strict=True):
        mean.lerp_(weight, 1 - decay)
    for kept, buffer in zip(phase.averaged.buffers(), phase.module.buffers(), strict=True):
        kept.copy_(buffer)


def tokenizer_loss(config: WorldModelConfig, tokenizer: PatchTokenizer, settings: Settings, step: int) -> Tensor:
    """Foreground-weighted squared error of reconstruction through latents of unit variance with some noise."""
    frames_BFHWC, _ = draw_chunks([settings.seed, 1, step], TOKENIZER_BATCH, config.temporal_compression)
    video = from_uint8(frames_BFHWC, settings.device, torch.float32)
    background = torch.tensor(pusher.BACKGROUND, device=settings.device).view(1, 3, 1, 1, 1) / 127.5 - 1
    weight = 1 + FOREGROUND_WEIGHT * ((video - background).abs().amax(1, keepdim=True) > 0.05)
    with autocast(settings):
        raw = tokenizer.encode_raw(video).float()
        # Unit variance over this batch: the noise below then costs information, however large the latents grow.
        mean, std = raw.mean((0, 2, 3, 4), keepdim=True), raw.std((0, 2, 3, 4), keepdim=True)
        latents = (raw - mean) / (std + 1e-4)
        noise = torch.randn(latents.shape, generator=generator(settings, 1, step)).to(settings.device)
        decoded = tokenizer.decode(latents + LATENT_NOISE * noise)
    tokenizer.update_statistics(raw.detach())
    return (weight * (decoded.float() - video) ** 2).sum() / weight.sum()


@dataclass(frozen=True)
class Pool:
    """N encoded chunks, in half precision."""

    latents_NCTHW: Tensor
    round_trip_NCHW: Tensor  # latents of the first frame after one pass through the tokenizer
    actions_NFA: Tensor


@torch.no_grad()
def encode_pool(config: WorldModelConfig, codec: PatchTokenizer, settings: Settings) -> Pool:
    """Encoding costs as much as a training step, so chunks are encoded once and drawn from several times."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for index in tqdm(range(math.ceil(settings.pool_chunks / DIT_BATCH)), desc="pool", mininterval=2.0):
        frames_BFHWC, moves_BT2 = draw_chunks([settings.seed, 2, index], DIT_BATCH, config.chunk_size)
        with autocast(settings):
            latents_BCTHW = codec.encode(from_uint8(frames_BFHWC, settings.device, torch.float32))
            again_BCTHW = codec.encode(codec.decode(latents_BCTHW[:, :, :1]).clamp(-1, 1))
        parts.append((latents_BCTHW.half(), again_BCTHW[:, :, 0].half(), encode_moves(config, moves_BT2)))
    return Pool(*(torch.cat(tensors).to(settings.device) for tensors in zip(*parts, strict=True)))


def dit_loss(config: WorldModelConfig, dit: DiT, pool: Pool, settings: Settings, step: int) -> Tensor:
    """Squared error of the predicted velocity, for generated latent frames, at random noise levels."""
    random, device = generator(settings, 3, step), settings.device
    rows = torch.randint(len(pool.latents_NCTHW), (DIT_BATCH,), generator=random).to(device)
    clean_BCTHW = pool.latents_NCTHW[rows].float()
    uniform = torch.rand(4, len(rows), 1, 1, 1, generator=random).to(device)
    condition_BCHW = torch.where(
        uniform[0] < ROUND_TRIP_SHARE, pool.round_trip_NCHW[rows].float(), clean_BCTHW[:, :, 0]
    )
    condition_noise = torch.randn(condition_BCHW.shape, generator=random).to(device)
    condition_BCHW = condition_BCHW + CONDITION_NOISE * uniform[1] * condition_noise
    sigma_B = config.sampler.shift * uniform[2] / (1 + (config.sampler.shift - 1) * uniform[2])
    sigma_B = sigma_B.flatten().clamp(1e-3, 0.9998)
    noise_BCTHW = torch.randn(clean_BCTHW.shape, generator=random).to(device)
    sigma_column = sigma_B[:, None, None, None, None]
    x_BCTHW = (1 - sigma_column) * clean_BCTHW + sigma_column * noise_BCTHW
    text_LE = torch.zeros(config.dit.text_tokens, config.dit.text_dim, device=device)
    with autocast(settings):
        predicted = predict_clean(
            config,
            dit,
            dit.context(text_LE),
            x_BCTHW,
            sigma_B,
            condition_BCHW,
            pool.actions_NFA[rows],
            (uniform[3].flatten() >= ACTION_DROPOUT).float(),
        )
    error = (predicted.float() - clean_BCTHW)[:, :, 1:] / sigma_column.clamp_min(MIN_SIGMA)
    return (error**2).mean()


@dataclass
class Rounds:
    """The last phase goes in rounds: each has a pool, rolled out by the weights that the round began with."""

    actor: DiT
    index: int = -1
    pool: refine.Pool | None = None

    def pool_at(
        self, step: int, config: WorldModelConfig, phase: Phase, codec: PatchTokenizer, settings: Settings
    ) -> refine.Pool:
        index = step // ROUND_STEPS
        if index != self.index:
            self.actor.load_state_dict(phase.averaged.state_dict())
            self.index, self.pool = index, None
        if self.pool is None:
            model = WorldModel(config, self.actor, codec, str(settings.device))
            draw = np.random.default_rng([settings.seed, 4, index])
            num_steps = ROUND_NUM_STEPS[index % len(ROUND_NUM_STEPS)]
            with autocast(settings):
                self.pool = refine.roll_out_pool(model, draw, ROUND_EPISODES, ROLLOUT_BATCH, num_steps)
            tqdm.write(
                f"round {index}, {num_steps} denoising steps, end of chunk: "
                f"agent {self.pool.agent_error_px:.2f} px, puck {self.pool.puck_error_px:.2f} px off"
            )
        return self.pool


def refine_loss(
    config: WorldModelConfig, rounds: Rounds, phase: Phase, codec: PatchTokenizer, settings: Settings, step: int
) -> Tensor:
    """The loss of `refine.py` on the round's pool."""
    pool = rounds.pool_at(step, config, phase, codec, settings)
    assert isinstance(phase.module, DiT)
    with autocast(settings):
        return refine.loss(config, phase.module, pool, REFINE_BATCH, generator(settings, 4, step))


def draw_chunks(key: list[int], chunks: int, length: int) -> tuple[Frames, FloatArray]:
    """Frames (B, length + 1, H, W, 3) and the moves (B, length, 2) between them, a function of the key."""
    random = np.random.default_rng(key)
    state = pusher.reset(chunks, random)
    moves = pusher.random_actions(state, length, random)
    states = pusher.simulate(state, moves)
    return np.stack([pusher.render(each) for each in states], axis=1), moves


def encode_moves(config: WorldModelConfig, moves_BT2: FloatArray) -> Tensor:
    """(B, F, action features per latent frame), as the engine encodes a caller's actions."""
    actions = np.zeros((*moves_BT2.shape[:2], config.action_dim), np.float32)
    actions[..., config.embodiment.columns] = moves_BT2
    return torch.from_numpy(np.stack([encode_actions(config, each) for each in actions]))


def generator(settings: Settings, phase: int, step: int) -> torch.Generator:
    """A CPU generator for one training step, so that the device does not change what is drawn."""
    words = np.random.SeedSequence([settings.seed, phase, step]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]) >> 1)


def autocast(settings: Settings) -> torch.autocast:
    return torch.autocast(settings.device.type, torch.bfloat16, enabled=settings.bf16)


def save(phases: list[Phase], rounds: Rounds, settings: Settings) -> None:
    partial = settings.out / "train_state.pt.partial"
    state: dict[str, Any] = {phase.name: phase.state_dict() for phase in phases}
    state |= {"seed": settings.seed, "actor": rounds.actor.state_dict(), "round": rounds.index}
    torch.save(state, partial)
    partial.replace(settings.out / "train_state.pt")
    write_losses(settings.out / "losses.csv", [(p.name, step, loss) for p in phases for step, loss in p.losses])


def resume(phases: list[Phase], rounds: Rounds, settings: Settings) -> None:
    path = settings.out / "train_state.pt"
    if not path.exists():
        return
    state = torch.load(path, map_location=settings.device, weights_only=True)
    if state["seed"] != settings.seed:
        raise SystemExit(f"{path} was trained with --seed {state['seed']}: continue with it, or choose another --out")
    for phase in phases:
        if phase.name in state:  # a run from before the last phase existed lacks it
            phase.load_state_dict(state[phase.name])
    if "actor" in state:
        rounds.actor.load_state_dict(state["actor"])
        rounds.index = state["round"]


def publish(config: WorldModelConfig, dit: DiT, codec: PatchTokenizer, phases: list[Phase], settings: Settings) -> None:
    """Write the checkpoint in half precision, then measure and describe what was written."""
    modules: dict[str, nn.Module] = {"net": dit, "tokenizer": codec}
    tensors = {
        f"{part}.{name}": t.half() for part, module in modules.items() for name, t in module.state_dict().items()
    }
    write_checkpoint(settings.out, config, tensors)
    model = WorldModel.load(settings.out, str(settings.device))
    figures = evaluate(model, EVALUATION_EPISODES)
    metrics = {"seed": HELD_OUT_SEED, "held_out": figures.to_json()}
    write_whole(settings.out / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    asked = f"--steps {settings.steps}" if settings.steps is not None else f"--minutes {settings.minutes:g}"
    flags = "".join(f" {flag}" for flag, on in (("--bf16", settings.bf16), ("--compile", settings.compiled)) if on)
    if settings.refine_steps is not None:
        flags += f" --refine-steps {settings.refine_steps}"
    elif settings.refine_minutes is not None:
        flags += f" --refine-minutes {settings.refine_minutes:g}"
    training = {"command": f"`python -m deployments.world_model.train {asked} --seed {settings.seed}{flags}`"}
    for phase, batch in zip(phases, (TOKENIZER_BATCH, DIT_BATCH, REFINE_BATCH), strict=True):
        if phase.step:
            training[phase.name] = f"{phase.step:,} steps of {batch} chunks in {phase.seconds / 60:.1f} min"
    training["device"] = f"{settings.device.type}, {torch.get_num_threads()} threads"
    sizes = {part: sum(p.numel() for p in module.parameters()) for part, module in modules.items()}
    card = model_card(config, figures, sizes, settings.pool_chunks, training)
    write_whole(settings.out / "MODEL_CARD.md", card.encode())
    write_samples(settings.out / "samples.png", model)
    print(json.dumps(figures.to_json()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the toy world model, or go on with a training that stopped.")
    parser.add_argument("--out", type=Path, required=True, help="directory for the checkpoint and everything beside it")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=30.0, help="time for both phases together (default 30)")
    length.add_argument("--steps", type=int, help="steps of both phases together, instead of a time")
    more = parser.add_mutually_exclusive_group()
    more.add_argument("--refine-minutes", type=float, help="time after those, for the denoiser on its own rollouts")
    more.add_argument("--refine-steps", type=int, help="steps after those, instead of a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16: faster on a GPU or a CPU with AMX")
    parser.add_argument("--compile", action="store_true", help="compile both networks' blocks: needs a C++ compiler")
    parser.add_argument("--preset", choices=["tiny-pusher"], default="tiny-pusher")
    arguments = parser.parse_args()
    minutes = None if arguments.steps is not None else arguments.minutes
    settings = Settings(
        out=arguments.out,
        seed=arguments.seed,
        minutes=minutes,
        steps=arguments.steps,
        device=torch.device(arguments.device),
        bf16=arguments.bf16,
        compiled=arguments.compile,
        refine_minutes=arguments.refine_minutes,
        refine_steps=arguments.refine_steps,
    )
    train(PRESETS[arguments.preset], settings)


if __name__ == "__main__":
    main()
