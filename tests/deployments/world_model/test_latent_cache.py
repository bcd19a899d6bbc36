"""Start frames are encoded once while they are remembered, and never taken for one another."""

import numpy as np
import torch
from torch import Tensor

from deployments.world_model.latent_cache import Frame, LatentCache

LATENT_BYTES = 4 * 4


class Encoder:
    """A frame's latents are its first pixel, four times; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, frames: list[Frame]) -> list[Tensor]:
        self.asked += [int(frame[0, 0, 0]) for frame in frames]
        return list(torch.tensor([[float(frame[0, 0, 0])] * 4 for frame in frames]))


def frame(value: int) -> Frame:
    return np.full((8, 8, 3), value, np.uint8)


def values(latents: list[Tensor]) -> list[int]:
    return [int(tensor[0]) for tensor in latents]


def test_each_distinct_frame_is_encoded_once_and_answers_come_in_order() -> None:
    cache, encode = LatentCache(), Encoder()
    assert values(cache.get_or_encode([frame(1), frame(2), frame(1)], encode, [True] * 3)) == [1, 2, 1]
    assert values(cache.get_or_encode([frame(2), frame(3), frame(1)], encode, [True] * 3)) == [2, 3, 1]
    assert encode.asked == [1, 2, 3]
    assert cache.hits == 2


def test_what_is_not_worth_keeping_is_encoded_again() -> None:
    cache, encode = LatentCache(), Encoder()
    for _ in range(2):
        assert values(cache.get_or_encode([frame(1), frame(2)], encode, [False, True])) == [1, 2]
    assert encode.asked == [1, 2, 1]
    assert cache.num_bytes == LATENT_BYTES


def test_the_least_recently_used_goes_first_and_the_bound_holds() -> None:
    cache, encode = LatentCache(max_bytes=2 * LATENT_BYTES), Encoder()
    for value in (1, 2, 1, 3, 1, 2):
        cache.get_or_encode([frame(value)], encode, [True])
        assert cache.num_bytes <= 2 * LATENT_BYTES
    assert encode.asked == [1, 2, 3, 2]


def test_a_frame_larger_than_the_bound_is_encoded_and_not_kept() -> None:
    cache, encode = LatentCache(max_bytes=1), Encoder()
    assert values(cache.get_or_encode([frame(1)], encode, [True])) == [1]
    assert cache.num_bytes == 0


def test_what_is_kept_does_not_hold_on_to_the_batch_that_it_was_encoded_in() -> None:
    cache = LatentCache()
    batch = torch.zeros(100, 4)
    (latents,) = cache.get_or_encode([frame(1)], lambda _: [batch[0]], [True])
    (again,) = cache.get_or_encode([frame(1)], lambda _: [batch[1]], [True])
    assert again.untyped_storage().nbytes() == LATENT_BYTES
    assert torch.equal(latents, again)
