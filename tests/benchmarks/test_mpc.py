"""The planner against the true simulator; the model's part is measured, not tested."""

import numpy as np

from benchmarks.mpc import (
    CHUNK,
    EPISODE_ACTIONS,
    imagined,
    plan,
    play,
    policies,
    simulated,
    start_of,
    summary,
    task_cost,
)
from deployments.world_model import pusher


def perfect(frame: np.ndarray, moves: np.ndarray, seed: int) -> np.ndarray:
    """A world model without error, of the worlds that have their goal at the centre."""
    agent, puck = pusher.read_agent(frame)[None], pusher.read_puck(frame)[None]
    state = pusher.PusherState(*(np.repeat(each, len(moves), 0) for each in (agent, puck, np.full_like(puck, 32))))
    return pusher.render(pusher.simulate(state, moves)[-1])


def test_planning_in_the_true_simulator_mostly_succeeds_and_acting_at_random_mostly_fails() -> None:
    players = policies(perfect, candidates=32, iterations=2)
    rates = {name: summary([play(episode, players[name]) for episode in range(8)])["success_rate"] for name in players}
    assert rates["oracle"] >= 0.75
    assert rates["noop"] == 0
    assert rates["random"] <= 0.25


def test_what_is_read_off_frames_costs_what_the_simulator_says() -> None:
    state = start_of(0)
    moves = np.random.default_rng(0).uniform(-1, 1, (8, CHUNK, 2)).astype(np.float32)
    read, true = imagined(perfect, state, state.goal[0], 0)(moves), simulated(state, state.goal[0])(moves)
    assert np.abs(read - true).max() < 1.5


def test_a_candidate_that_shows_no_puck_is_the_worst() -> None:
    nowhere, puck = np.full((1, 2), np.nan, np.float32), np.array([[32, 32]], np.float32)
    goal = np.array([10, 10], np.float32)
    assert task_cost(puck, nowhere, goal)[0] > task_cost(puck, np.array([[63, 63]], np.float32), goal)[0]


def test_the_best_plan_of_all_iterations_is_the_one_executed() -> None:
    seen: list[np.ndarray] = []

    def cost(moves: np.ndarray) -> np.ndarray:
        seen.append(moves)
        # The first iteration is the best by far; a planner that took the last one's would lose it.
        return np.abs(moves).sum((1, 2)) + 1000.0 * (len(seen) - 1)

    best = plan(cost, np.random.default_rng(0), candidates=16, iterations=3)
    assert len(seen) == 3
    assert np.array_equal(best, seen[0][np.abs(seen[0]).sum((1, 2)).argmin()])


def test_no_episode_starts_solved_and_each_is_a_function_of_its_number() -> None:
    starts = [start_of(episode) for episode in range(50)]
    assert all(np.linalg.norm(start.puck - start.goal) > 2 * pusher.GOAL_RADIUS for start in starts)
    assert np.array_equal(start_of(7).puck, starts[7].puck)
    assert EPISODE_ACTIONS % CHUNK == 0
