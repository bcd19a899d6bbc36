"""What a rollout costs, without server and network: `python -m benchmarks.world_model [--device cuda]`.

On a CPU: the shipped tiny-pusher, 49 frames at batch 1, 8 and 16 in turn, round by round. A row in a batch costs less
than a row alone as far as a forward of one row is overhead, launching some 300 small operations, and not arithmetic:
0.24 GFLOP per denoising step and row, about half of the time that one takes alone. Its time of CPU is beside the time
by the clock, which on a machine that does other work says more of that work.

On a GPU: the 2B at 480x640, randomly initialised, since timing does not depend on the weights. A denoising step is 21.6
TFLOP per row, so it is arithmetic alone that counts: the floor is its matrix products at the rate measured here for one
large product, and its attention at the rate measured here for one attention of its shape. The rates are measured in the
same run, so a slow machine has a high floor.

`--smoke` runs the GPU's path with a small network on any device. Prints one JSON line; times are medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from deployments.world_model import PRESETS, WorldModel, WorldModelConfig, pusher
from deployments.world_model.attention import attention, attention_backend
from deployments.world_model.denoiser import predict_clean
from deployments.world_model.dit import Context, DiT
from deployments.world_model.rollout import rollouts
from deployments.world_model.tokenizer import build_tokenizer
from serve_app.catalog import PACKAGED_CHECKPOINTS

NUM_ACTIONS = 48
CPU_BATCHES, GPU_BATCHES = (1, 8, 16), (1, 8)


def median_ms(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Of `repeats` runs after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        _finish(device)
        started = time.perf_counter()
        run()
        _finish(device)
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[1:])


def rollouts_of(model: WorldModel, batch: int) -> Callable[[], object]:
    """That many rollouts side by side, always the same ones."""
    config = model.config
    random = np.random.default_rng(0)
    if config.resolution == (pusher.SIZE, pusher.SIZE):
        frames = list(pusher.render(pusher.reset(batch, random)))
    else:
        frames = list(random.integers(0, 256, (batch, *config.resolution, 3), dtype=np.uint8))
    actions = list(random.uniform(-1, 1, (batch, NUM_ACTIONS, config.action_dim)).astype(np.float32))
    return lambda: rollouts(model, frames, actions, range(batch), [0] * batch)


def on_cpu(repeats: int) -> dict[str, Any]:
    model = WorldModel.load(PACKAGED_CHECKPOINTS["tiny-pusher"])
    runs = {batch: rollouts_of(model, batch) for batch in CPU_BATCHES}
    peak_rss_mib = {}
    for batch, run in runs.items():  # rising, so that the peak of memory so far is the peak of this batch
        run()
        peak_rss_mib[batch] = _peak_rss_mib()
    rounds = [{batch: _timed(run) for batch, run in runs.items()} for _ in range(repeats)]
    by_batch = {}
    for batch in CPU_BATCHES:
        wall_ms, cpu_ms = (statistics.median(took[batch][clock] for took in rounds) for clock in (0, 1))
        by_batch[batch] = {
            "rollout_ms": round(wall_ms, 1),
            "cpu_ms": round(cpu_ms, 1),
            "rollouts_per_s": round(1e3 * batch / wall_ms, 3),
            "peak_rss_mib": round(peak_rss_mib[batch], 1),
        }
    return {
        "model": model.config.name,
        "num_steps": model.config.default_num_steps,
        "batch": by_batch,
        "throughput_8_to_1": round(statistics.median(8 * took[1][0] / took[8][0] for took in rounds), 2),
        "rounds": repeats,
        "threads": torch.get_num_threads(),
    }


def _timed(run: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds by the clock, and of CPU over all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def random_model(config: WorldModelConfig, device: torch.device) -> WorldModel:
    """In the precision that a checkpoint of it is served in; a prompt of distinct tokens, the most that it can cost."""
    dtype = getattr(torch, config.dtype) if device.type != "cpu" else torch.float32
    with torch.device(device):
        dit, tokenizer = DiT(config.dit, config.grouped_action_dim).to(dtype), build_tokenizer(config).to(dtype)
    for module in (dit, tokenizer):
        module.eval().requires_grad_(False)
    context = torch.randn(config.dit.text_tokens, config.dit.context_dim, device=device)
    return WorldModel(config, dit, tokenizer, str(device), context_LE=context)


def forward_once(config: WorldModelConfig, dit: DiT, context: Context, batch: int, device: torch.device) -> None:
    channels, frames, height, width = config.latent_shape
    with torch.inference_mode():
        predict_clean(
            config,
            dit,
            context,
            torch.zeros(batch, channels, frames, height, width, device=device),
            torch.full((batch,), 0.9, device=device),
            torch.zeros(batch, channels, height, width, device=device),
            torch.zeros(batch, frames - 1, config.grouped_action_dim, device=device),
            torch.ones(batch, device=device),
        )


def work_of(config: WorldModelConfig) -> tuple[float, float]:
    """FLOP of one row's DiT forward: (matrix products, attention), counted without weights."""
    _, frames, height, width = config.latent_shape
    patch = config.dit.patch_spatial
    tokens = frames * (height // patch) * (width // patch)
    per_key = 4 * config.dit.width * config.dit.num_blocks  # a product with the keys and one with the values
    attended = per_key * tokens * (tokens + config.dit.text_tokens)
    meta = torch.device("meta")
    with meta:
        dit = DiT(config.dit, config.grouped_action_dim).requires_grad_(False)
        context = dit.projected_context(torch.zeros(config.dit.text_tokens, config.dit.context_dim))
    with FlopCounterMode(display=False) as counter:
        forward_once(config, dit, context, 1, meta)
    return counter.get_total_flops() - attended, attended


def ceilings(config: WorldModelConfig, device: torch.device, side: int, repeats: int) -> tuple[float, float]:
    """FLOP per second of one large product, and of one attention of the model's shape."""
    dtype = getattr(torch, config.dtype) if device.type != "cpu" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    _, frames, height, width = config.latent_shape
    tokens, heads = frames * height * width // config.dit.patch_spatial**2, config.dit.num_heads
    q = torch.randn(1, tokens, heads, config.dit.head_dim, device=device, dtype=dtype)
    product_ms = median_ms(lambda: a @ b, repeats, device)
    attention_ms = median_ms(lambda: attention(q, q, q), repeats, device)
    return 2e3 * side**3 / product_ms, 4e3 * tokens**2 * config.dit.width / attention_ms


def against_floor(config: WorldModelConfig, device: torch.device, side: int, repeats: int) -> dict[str, Any]:
    model = random_model(config, device)
    products, attended = work_of(config)
    product_rate, attention_rate = ceilings(config, device, side, 10 * repeats)
    row_floor_ms = 1e3 * (products / product_rate + attended / attention_rate)
    by_batch = {}
    for batch in GPU_BATCHES:
        forward = partial(forward_once, config, model.dit, model.context, batch, device)
        forward_ms = median_ms(forward, 10 * repeats, device)
        took_ms = median_ms(rollouts_of(model, batch), repeats, device)
        chunks_ms = NUM_ACTIONS // config.chunk_size * config.default_num_steps * batch * row_floor_ms
        by_batch[batch] = {
            "forward_ms": round(forward_ms, 3),
            "forward_to_floor": round(forward_ms / (batch * row_floor_ms), 3),
            "rollout_ms": round(took_ms, 1),
            "rollout_to_denoising_floor": round(took_ms / chunks_ms, 3),
        }
    return {
        "model": config.name,
        "resolution": list(config.resolution),
        "num_steps": config.default_num_steps,
        "batch": by_batch,
        "row_tflop": {"products": _rounded(products / 1e12), "attention": _rounded(attended / 1e12)},
        "ceiling_tflop_per_s": {"product": _rounded(product_rate / 1e12), "attention": _rounded(attention_rate / 1e12)},
        "row_floor_ms": round(row_floor_ms, 4),
        "attention": attention_backend(device, model.dit.final_layer.linear.weight.dtype, config.dit.head_dim),
        "peak_memory_mib": round(_peak_memory_mib(device), 1),
    }


def small(config: WorldModelConfig) -> WorldModelConfig:
    """Of the same design, for a machine that could not run it."""
    return replace(
        config,
        name=f"{config.name}-smoke",
        resolution=(32, 32),
        dit=replace(config.dit, width=64, num_blocks=2, num_heads=2, adaln_rank=16, text_dim=64, context_dim=32),
        tokenizer=replace(config.tokenizer, width=8),
        default_num_steps=2,
    )


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_rss_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _peak_memory_mib(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else _peak_rss_mib()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu for tiny-pusher, cuda for the randomly initialised 2B")
    parser.add_argument("--smoke", action="store_true", help="the 2B's path with a small network, on any device")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(
            f"--device {device}: torch {torch.__version__} finds no GPU here; --smoke --device cpu runs its path"
        )
    if arguments.smoke:
        result = against_floor(small(PRESETS["dreamdojo-2b"]), device, side=256, repeats=1)
    elif device.type == "cpu":
        result = on_cpu(arguments.repeats)
    else:
        result = against_floor(PRESETS["dreamdojo-2b"], device, side=8192, repeats=arguments.repeats)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    line = {"benchmark": "world_model", "device": str(device), "hardware": hardware, "frames": NUM_ACTIONS + 1}
    print(json.dumps(line | result | {"torch": torch.__version__, "python": platform.python_version()}))


if __name__ == "__main__":
    main()
