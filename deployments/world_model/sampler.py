"""Rectified flow as pure functions over batched per-row state, so rows at different steps share one forward.

A row starts at noise (sigma near 1) and is moved to sigma 0 in `num_steps` moves. Each move is a linear combination of
tensors the row already has, with coefficients that depend only on (solver, step, num_steps); moving a batch of rows is
then one weighted sum, a column of coefficients per term. The solvers work on predictions of the clean latents.

UniPC (arXiv 2302.04867): order 2, B(h) = expm1(h) ("bh2"), corrector from the second step on, first and last step of
order 1. Shapes: B rows, ... the latents of one row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from deployments.world_model.config import SamplerConfig


@dataclass(frozen=True)
class SamplerState:
    """What the solver remembers of its rows; every tensor is (B, ...) or, for one row, (...)."""

    x: Tensor  # the noisy latents at the current sigma
    corrected: Tensor  # the latents at the previous sigma, after its corrector
    clean: Tensor  # the last prediction of the clean latents
    clean_before: Tensor  # and the one before it

    @classmethod
    def start(cls, noise: Tensor) -> SamplerState:
        zeros = torch.zeros_like(noise)
        return cls(noise, zeros, zeros, zeros)

    @classmethod
    def stack(cls, rows: Sequence[SamplerState]) -> SamplerState:
        return cls(*(torch.stack(tensors) for tensors in zip(*(row._tensors() for row in rows), strict=True)))

    def unstack(self) -> list[SamplerState]:
        return [SamplerState(*tensors) for tensors in zip(*self._tensors(), strict=True)]

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.corrected, self.clean, self.clean_before


@dataclass(frozen=True)
class Coefficients:
    """One move: point = corrector . (x, corrected, clean, clean_before, new); x' = predictor . (point, new, clean)."""

    corrector: tuple[float, float, float, float, float]
    predictor: tuple[float, float, float]


def sigma(config: SamplerConfig, step: int, num_steps: int) -> float:
    """The noise level before move `step`; exactly 0 at `num_steps`."""
    linear = config.sigma_max * (1 - step / num_steps)
    return config.shift * linear / (1 + (config.shift - 1) * linear)


def advance(
    config: SamplerConfig, state: SamplerState, new_clean: Tensor, steps: Sequence[tuple[int, int]]
) -> SamplerState:
    """One move of every row. `new_clean`: the network's prediction at `state.x`; `steps`: (step, num_steps) per row."""
    moves = [coefficients(config, step, num_steps) for step, num_steps in steps]
    corrector = np.array([move.corrector for move in moves])
    predictor = np.array([move.predictor for move in moves])
    point = _combine(corrector, state.x, state.corrected, state.clean, state.clean_before, new_clean)
    return SamplerState(_combine(predictor, point, new_clean, state.clean), point, new_clean, state.clean)


@lru_cache(maxsize=8 * 1024)
def coefficients(config: SamplerConfig, step: int, num_steps: int) -> Coefficients:
    """The coefficients of move `step` of `num_steps`, in double precision."""
    now, after = sigma(config, step, num_steps), sigma(config, step + 1, num_steps)
    as_is = (1.0, 0.0, 0.0, 0.0, 0.0)
    if config.solver == "euler" or step == num_steps - 1:
        # The last move is of order 1, which for sigma 0 is the prediction itself, whatever the corrector said.
        return Coefficients(as_is, (after / now, 1 - after / now, 0.0))
    if step == 0:
        return Coefficients(as_is, _predictor(now, after, None))
    before = sigma(config, step - 1, num_steps)
    two_before = sigma(config, step - 2, num_steps) if step > 1 else None
    return Coefficients(_corrector(two_before, before, now), _predictor(now, after, before))


def _predictor(now: float, after: float, before: float | None) -> tuple[float, float, float]:
    """UniP from `now` to `after`: weights of the point, the prediction at it, and the prediction before that."""
    h = _log_snr(after) - _log_snr(now)
    phi = math.expm1(-h)
    scale = (1 - after) * phi  # phi_1 and B(h) coincide for bh2
    if before is None:
        return after / now, -scale, 0.0
    ratio = (_log_snr(before) - _log_snr(now)) / h
    slope = scale * 0.5 / ratio
    return after / now, -scale + slope, -slope


def _corrector(two_before: float | None, before: float, now: float) -> tuple[float, float, float, float, float]:
    """UniC from `before` to `now`: weights of (x, corrected, clean, clean_before, new)."""
    h = _log_snr(now) - _log_snr(before)
    phi = math.expm1(-h)
    scale = (1 - now) * phi
    if two_before is None:
        return 0.0, now / before, -scale + 0.5 * scale, 0.0, -0.5 * scale
    ratio = (_log_snr(two_before) - _log_snr(before)) / h
    phi_2 = phi / -h - 1
    phi_3 = phi_2 / -h - 0.5
    matrix = np.array([[1.0, 1.0], [ratio, 1.0]])
    rho_before, rho_new = np.linalg.solve(matrix, np.array([phi_2 / phi, 2 * phi_3 / phi]))
    old, new = scale * float(rho_before) / ratio, scale * float(rho_new)
    return 0.0, now / before, -scale + old + new, -old, -new


def _log_snr(sigma: float) -> float:
    return math.log1p(-sigma) - math.log(sigma)


def _combine(weights_BK: np.ndarray, *terms: Tensor) -> Tensor:
    """The weighted sum, without the terms that no row needs: on a CPU, a pass over memory each."""
    columns = torch.as_tensor(weights_BK, dtype=terms[0].dtype, device=terms[0].device)
    shape = (-1,) + (1,) * (terms[0].ndim - 1)
    needed = [k for k in range(len(terms)) if weights_BK[:, k].any()]
    out = columns[:, needed[0]].view(shape) * terms[needed[0]]
    for k in needed[1:]:
        out = torch.addcmul(out, columns[:, k].view(shape), terms[k])
    return out
