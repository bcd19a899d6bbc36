"""Attention, through one function, so that its kernel can be chosen in one place.

Shapes: B batch, Q query tokens, K key tokens, H heads, D features per head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def attention(q_BQHD: Tensor, k_BKHD: Tensor, v_BKHD: Tensor) -> Tensor:
    """Bidirectional softmax attention with scale 1/sqrt(D); returns (B, Q, H, D) in the dtype of `v_BKHD`."""
    dtype = v_BKHD.dtype
    q_BHQD, k_BHKD, v_BHKD = (x.transpose(1, 2) for x in (q_BQHD, k_BKHD, v_BKHD))
    if v_BKHD.device.type == "cpu":
        # Always in float32: there, the backward pass in bfloat16 takes five times as long.
        with torch.autocast("cpu", enabled=False):
            out_BHQD = functional.scaled_dot_product_attention(q_BHQD.float(), k_BHKD.float(), v_BHKD.float())
    else:
        out_BHQD = functional.scaled_dot_product_attention(q_BHQD, k_BHKD, v_BHKD)
    return out_BHQD.transpose(1, 2).to(dtype)
