"""The players beside the model: exact without error, and the worse the less they know."""

import numpy as np

from benchmarks.predictability import by_noise, by_tokenizer, compared, final_puck, play
from deployments.world_model import WorldModel, pusher
from serve_app.catalog import PACKAGED_CHECKPOINTS

EPISODES = 8


def test_a_player_without_error_is_exact_and_one_with_more_error_is_worse() -> None:
    random = np.random.default_rng(0)
    start = pusher.reset(256, random)
    moves = pusher.random_actions(start, 48, random)
    truth = pusher.simulate(start, moves)[-1]
    exact, near, far = (compared(play(start, moves, 12, by_noise(std)).puck, truth) for std in (0.0, 0.1, 1.0))
    assert exact == {"goal_distance_pearson": 1.0, "final_puck_error_px": 0.0}
    assert 1 > near["goal_distance_pearson"] > far["goal_distance_pearson"] > 0


def test_the_models_and_its_tokenizers_players_end_on_the_table() -> None:
    model = WorldModel.load(PACKAGED_CHECKPOINTS["tiny-pusher"])
    random = np.random.default_rng(0)
    start = pusher.reset(EPISODES, random)
    moves = pusher.random_actions(start, 24, random)
    truth = pusher.simulate(start, moves)[-1]
    through = play(start, moves, 12, by_tokenizer(model)).puck
    for puck in (through, final_puck(model, start, moves, num_steps=1)):
        assert puck.shape == (EPISODES, 2)
        assert 0 < compared(puck, truth)["final_puck_error_px"] < pusher.SIZE / 2
