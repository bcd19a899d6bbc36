"""Random weights for tests of what holds of any weights."""

import torch
from torch import nn


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> None:
    """Draw every tensor, so that nothing is switched off, and scale it so that activations stay of order one."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        drawn = torch.randn(tensor.shape, generator=generator)
        if "norm" in name or name.endswith("gamma"):
            tensor.copy_(1 + 0.3 * drawn)
        else:
            fan_in = tensor[0].numel() if tensor.ndim > 1 else 10
            tensor.copy_(drawn / fan_in**0.5)
