"""Attention, through one function, so that its kernel is chosen in one place.

The kernel is xformers' where that is installed and works, and PyTorch's own elsewhere. What works is found out by
calling it, once per device, dtype and width of head: an import that succeeds says little about the hardware.

Shapes: B batch, Q query tokens, K key tokens, H heads, D features per head.
"""

from __future__ import annotations

import importlib
import logging
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Backend = Literal["xformers", "sdpa"]

PROBE_TOLERANCE = 0.05  # values of order one, in whatever dtype: this is about right or wrong, not about rounding

logger = logging.getLogger(__name__)


def attention(q_BQHD: Tensor, k_BKHD: Tensor, v_BKHD: Tensor) -> Tensor:
    """Bidirectional softmax attention with scale 1/sqrt(D); returns (B, Q, H, D) in the dtype of `v_BKHD`."""
    # Training stays with PyTorch: a kernel that works forwards may have no backward pass.
    training = torch.is_grad_enabled() and (q_BQHD.requires_grad or k_BKHD.requires_grad or v_BKHD.requires_grad)
    if not training and _uses_xformers(v_BKHD.device, v_BKHD.dtype, v_BKHD.shape[-1]):
        return _xformers(q_BQHD, k_BKHD, v_BKHD)
    return _sdpa(q_BQHD, k_BKHD, v_BKHD)


def attention_backend(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, head_dim: int = 128
) -> Backend:
    """The kernel that `attention` uses for such tensors outside training."""
    return choose_backend(torch.device(device), dtype, head_dim)


@lru_cache(maxsize=64)
def choose_backend(device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    """Tries and logs, the first time that it is asked; remembers after that."""
    backend, reason = _probe(device, dtype, head_dim)
    logger.info("attention on %s in %s with heads of %d uses %s: %s", device, dtype, head_dim, backend, reason)
    return backend


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _uses_xformers(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """A function of its own so that a compiled graph holds the choice, not the search for it."""
    return choose_backend(device, dtype, head_dim) == "xformers"


def _probe(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[Backend, str]:
    """The backend and why. Anything that goes wrong with xformers means that it does not work here."""
    x_BQHD = torch.linspace(-1, 1, 16 * head_dim).view(1, 8, 2, head_dim).to(device, dtype)
    with torch.no_grad():
        try:
            out_BQHD = _xformers(x_BQHD, x_BQHD, x_BQHD).float()
            difference = (out_BQHD - _sdpa(x_BQHD, x_BQHD, x_BQHD).float()).abs().max().item()
        except ImportError:
            return "sdpa", "xformers is not installed"
        except Exception as error:
            reason = str(error).strip().splitlines() or [""]
            return "sdpa", f"xformers raised {type(error).__name__}: {reason[0]}"
    if not difference <= PROBE_TOLERANCE:  # false for NaN too
        return "sdpa", f"xformers was wrong by {difference:.3g}"
    return "xformers", "it is installed and works"


def _xformers(q_BQHD: Tensor, k_BKHD: Tensor, v_BKHD: Tensor) -> Tensor:
    ops = importlib.import_module("xformers.ops")
    out_BQHD: Tensor = ops.memory_efficient_attention(q_BQHD.contiguous(), k_BKHD.contiguous(), v_BKHD.contiguous())
    return out_BQHD


def _sdpa(q_BQHD: Tensor, k_BKHD: Tensor, v_BKHD: Tensor) -> Tensor:
    dtype = v_BKHD.dtype
    q_BHQD, k_BHKD, v_BHKD = (x.transpose(1, 2) for x in (q_BQHD, k_BKHD, v_BKHD))
    if v_BKHD.device.type == "cpu":
        # Always in float32: there, the backward pass in bfloat16 takes five times as long.
        with torch.autocast("cpu", enabled=False):
            out_BHQD = functional.scaled_dot_product_attention(q_BHQD.float(), k_BHKD.float(), v_BHKD.float())
    else:
        out_BHQD = functional.scaled_dot_product_attention(q_BHQD, k_BHKD, v_BHKD)
    return out_BHQD.transpose(1, 2).to(dtype)
