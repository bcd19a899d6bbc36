from dataclasses import replace

import numpy as np
import pytest
import torch

from deployments.world_model import WorldModel, WorldModelError
from deployments.world_model.causal import SIGMAS, WINDOW, Cache, CausalWorldModel, predict_all, predict_next

FRAMES = 6  # latent frames: more than the window holds


@pytest.fixture(scope="module")
def student(small_model: WorldModel) -> CausalWorldModel:
    return CausalWorldModel(small_model)


def start_frames(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(5).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8))


def actions(count: int, length: int = 4 * FRAMES) -> list[np.ndarray]:
    return list(np.random.default_rng(6).uniform(-1, 1, (count, length, 8)).astype(np.float32))


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def test_a_frame_from_the_cache_is_what_recomputing_all_before_it_gives(student: CausalWorldModel) -> None:
    config, dit, context = student.config, student.dit, student.context
    latents = drawn(2, config.dit.latent_channels, FRAMES, 8, 8)
    noisy = drawn(2, config.dit.latent_channels, FRAMES, 8, 8) + 1
    action = drawn(2, FRAMES, config.grouped_action_dim)
    sigma = torch.tensor([0.8, 0.6])
    whole = predict_all(config, dit, context, latents, noisy, sigma[:, None].expand(2, FRAMES), action)
    cache = Cache()
    for t in range(FRAMES):
        own, weight = action[:, t], torch.full((2,), float(t > 0))
        cached, _ = predict_next(config, dit, context, cache, noisy[:, :, t], sigma, own, weight)
        assert torch.allclose(cached, whole[:, :, t], atol=1e-4), t
        written = predict_next(config, dit, context, cache, latents[:, :, t], torch.zeros(2), own, weight)[1]
        cache = cache.followed_by(written)
        assert len(cache.frames) == min(t + 1, WINDOW)


@torch.inference_mode()
def test_a_frame_depends_on_no_frame_after_it(student: CausalWorldModel) -> None:
    config, dit, context = student.config, student.dit, student.context
    before, x = drawn(1, config.dit.latent_channels, FRAMES, 8, 8), drawn(1, config.dit.latent_channels, FRAMES, 8, 8)
    action, sigma = drawn(1, FRAMES, config.grouped_action_dim), torch.full((1, FRAMES), 0.5)
    changed_before, changed_x, changed_action = before.clone(), x.clone(), action.clone()
    changed_before[:, :, 3:] += 1  # its own clean latents included: they are what it is to find
    changed_x[:, :, 4:] += 1
    changed_action[:, 4:] += 1
    first = predict_all(config, dit, context, before, x, sigma, action)
    second = predict_all(config, dit, context, changed_before, changed_x, sigma, changed_action)
    assert torch.equal(first[:, :, :4], second[:, :, :4])
    assert not torch.allclose(first[:, :, 4:], second[:, :, 4:], atol=1e-3)


def test_a_stream_gives_what_the_whole_rollout_gives(student: CausalWorldModel) -> None:
    frames, moves = start_frames(2), actions(2)
    whole = student.rollouts(frames, moves, [7, 8])
    session = student.begin(frames, [7, 8])
    streamed = [session.advance([each[4 * t : 4 * t + 4] for each in moves]) for t in range(FRAMES)]
    assert all(part.shape == (2, 4, 64, 64, 3) for part in streamed)
    assert np.array_equal(np.concatenate(streamed, axis=1), np.stack(whole)[:, 1:])


def test_a_longer_rollout_begins_as_the_shorter_one_does(student: CausalWorldModel) -> None:
    (long,) = student.rollouts(start_frames(1), actions(1), [7])
    (short,) = student.rollouts(start_frames(1), [actions(1)[0][:8]], [7])
    assert np.array_equal(long[:9], short)


def test_a_frame_follows_the_actions_given_with_it_in_every_place_of_the_window(student: CausalWorldModel) -> None:
    """Beyond the window too, where slicing actions by the place in the window would repeat the first ones."""
    (moves,) = actions(1)
    (reference,) = student.rollouts(start_frames(1), [moves], [7])
    for t in range(FRAMES):
        changed = moves.copy()
        changed[4 * t : 4 * t + 4, :2] *= -1
        (other,) = student.rollouts(start_frames(1), [changed], [7])
        differs = [
            bool((reference[1 + 4 * s : 5 + 4 * s] != other[1 + 4 * s : 5 + 4 * s]).any()) for s in range(FRAMES)
        ]
        assert differs[: t + 1] == [False] * t + [True]


def test_rows_side_by_side_are_rows_alone(student: CausalWorldModel) -> None:
    frames, moves = start_frames(3), actions(3)
    together = student.rollouts(frames, moves, [1, 2, 3])
    for row in range(3):
        (alone,) = student.rollouts([frames[row]], [moves[row]], [row + 1])
        assert np.abs(alone.astype(int) - together[row]).max() <= 1


def test_the_noise_levels_are_trigflow_times() -> None:
    angles = [np.pi / 2, *np.arctan([15, 5, 5 / 3])]
    assert [np.sin(t) / (np.cos(t) + np.sin(t)) for t in angles] == pytest.approx(SIGMAS)


def test_a_latent_frame_takes_exactly_its_actions(student: CausalWorldModel) -> None:
    with pytest.raises(ValueError, match="3 actions, a latent frame takes 4"):
        student.begin(start_frames(1), [0]).advance([actions(1)[0][:3]])


@pytest.mark.parametrize("num_steps", [0, 5])
def test_there_are_one_to_four_passes(student: CausalWorldModel, num_steps: int) -> None:
    with pytest.raises(ValueError, match="must be 1 to 4"):
        student.begin(start_frames(1), [0], num_steps)


def test_latents_that_are_not_finite_become_no_frame(small_model: WorldModel) -> None:
    dit = small_model.dit
    poisoned = CausalWorldModel(small_model)
    broken = type(dit)(dit.config, small_model.config.grouped_action_dim)
    broken.load_state_dict({n: t * float("nan") for n, t in dit.state_dict().items()})
    poisoned.dit = broken
    with pytest.raises(WorldModelError, match="not finite"):
        poisoned.begin(start_frames(1), [0]).advance([actions(1)[0][:4]])


def test_a_tokenizer_with_memory_is_refused(small_model: WorldModel) -> None:
    other = WorldModel(replace(small_model.config), small_model.dit, small_model.tokenizer)
    other.tokenizer = torch.nn.Identity()  # type: ignore[assignment]
    with pytest.raises(WorldModelError, match="codes each latent frame by itself"):
        CausalWorldModel(other)
