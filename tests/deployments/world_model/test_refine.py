"""Training on the model's own rollouts: what follows a frame is simulated from what that frame shows."""

import numpy as np
import pytest
import torch

from deployments.world_model import WorldModel, pusher, refine
from deployments.world_model.refine import roll_out_pool
from deployments.world_model.rollout import ChunkInput, Frames


class Renderer(WorldModel):
    """Generates any chunk as the same frames, whose objects are where no episode has them."""

    shown = pusher.PusherState(*(np.array([at], np.float32) for at in ((20, 20), (44, 44), (30, 50))))

    def generate(self, inputs: list[ChunkInput]) -> list[Frames]:  # type: ignore[override]
        return [np.repeat(pusher.render(self.shown), 12, axis=0) for _ in inputs]


@pytest.fixture
def renderer(small_model: WorldModel) -> Renderer:
    return Renderer(small_model.config, small_model.dit, small_model.tokenizer)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_chunk_starts_from_the_models_own_frame_or_from_the_simulators(
    renderer: Renderer, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    monkeypatch.setattr(refine, "OWN_SHARE", share)
    pool = roll_out_pool(renderer, np.random.default_rng(0), episodes=3, batch=2, num_steps=1)
    assert pool.latents_NCTHW.shape == (12, *renderer.config.latent_shape)
    assert pool.actions_NFA.shape == (12, 3, renderer.config.grouped_action_dim)
    own = renderer._encode(list(pusher.render(renderer.shown)))[0].half()
    conditions = pool.latents_NCTHW[:, :, 0]
    is_own = [torch.allclose(condition, own, atol=1e-2) for condition in conditions]
    # Two episodes side by side, then one: the first chunk of each starts as the episode does.
    assert is_own == [False] * 2 + [share == 1.0] * 6 + [False] + [share == 1.0] * 3


def test_the_error_of_the_model_is_measured_at_the_end_of_each_chunk(renderer: Renderer) -> None:
    pool = roll_out_pool(renderer, np.random.default_rng(0), episodes=8, batch=8, num_steps=1)
    assert pool.agent_error_px > 5
    assert pool.puck_error_px > 5


def test_an_object_that_no_frame_shows_goes_on_where_it_truly_is() -> None:
    truth = Renderer.shown
    blank = np.full((1, 64, 64, 3), pusher.BACKGROUND, np.uint8)
    positions = refine.shown_positions(blank, truth)
    assert np.array_equal(positions.agent, truth.agent)
    assert np.array_equal(positions.puck, truth.puck)


def test_the_loss_falls_when_it_is_followed(small_model: WorldModel) -> None:
    pool = roll_out_pool(small_model, np.random.default_rng(0), episodes=2, batch=2, num_steps=1)
    dit = type(small_model.dit)(small_model.config.dit, small_model.config.grouped_action_dim)
    optimizer = torch.optim.AdamW(dit.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = refine.loss(small_model.config, dit, pool, 8, torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
