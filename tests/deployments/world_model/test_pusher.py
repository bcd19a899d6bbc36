import numpy as np
import pytest

from deployments.video import Encoder, join_chunks
from deployments.world_model import pusher
from deployments.world_model.pusher import CONTACT, MAX_SPEED, PusherState
from tests.support.video import decode


def state(agent: tuple[float, float], puck: tuple[float, float], goal: tuple[float, float] = (48, 48)) -> PusherState:
    return PusherState(*(np.array([position], np.float32) for position in (agent, puck, goal)))


def move(start: PusherState, x: float, y: float, times: int = 1) -> PusherState:
    return pusher.simulate(start, np.tile(np.array([x, y], np.float32), (1, times, 1)))[-1]


def test_the_agent_moves_by_its_action() -> None:
    after = move(state((20, 20), (50, 50)), 1, -0.5)
    assert after.agent[0].tolist() == [20 + MAX_SPEED, 20 - MAX_SPEED / 2]


def test_an_action_beyond_1_moves_no_faster() -> None:
    assert np.array_equal(move(state((20, 20), (50, 50)), 9, 0).agent, move(state((20, 20), (50, 50)), 1, 0).agent)


def test_the_puck_rests_until_it_is_touched() -> None:
    after = move(state((32 - CONTACT - MAX_SPEED, 32), (32, 32)), 1, 0)
    assert after.puck[0].tolist() == [32, 32]
    assert move(after, 1, 0).puck[0, 0] == pytest.approx(32 + MAX_SPEED)


def test_a_pushed_puck_stays_at_the_distance_of_contact() -> None:
    after = move(state((15, 30), (32, 32)), 1, 0, times=8)
    assert np.linalg.norm(after.puck - after.agent) == pytest.approx(CONTACT, abs=1e-4)
    assert after.puck[0, 1] > 32  # struck above its centre, it slides down


def test_a_puck_at_the_wall_stops_the_agent() -> None:
    after = move(state((30, 32), (50, 32)), 1, 0, times=40)
    assert after.puck[0].tolist() == pytest.approx([64 - pusher.PUCK_RADIUS, 32])
    assert after.agent[0].tolist() == pytest.approx([64 - pusher.PUCK_RADIUS - CONTACT, 32])


def test_the_agent_stays_on_the_table() -> None:
    after = move(state((20, 20), (50, 50)), -1, -1, times=40)
    assert after.agent[0].tolist() == [pusher.AGENT_RADIUS, pusher.AGENT_RADIUS]


def test_a_reset_is_a_function_of_the_seed() -> None:
    first, second, other = (pusher.reset(5, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first.agent, second.agent)
    assert not np.array_equal(first.agent, other.agent)


def test_no_episode_starts_with_the_agent_inside_the_puck() -> None:
    start = pusher.reset(2000, np.random.default_rng(0))
    # In a corner the table may have no room for both: what is left then is half a pixel.
    assert np.linalg.norm(start.puck - start.agent, axis=1).min() > CONTACT - 0.6


def test_positions_are_read_off_a_frame_to_a_quarter_of_a_pixel() -> None:
    start = pusher.reset(300, np.random.default_rng(0))
    frames = pusher.render(start)
    assert np.abs(pusher.read_agent(frames) - start.agent).max() < 0.25
    apart = np.linalg.norm(start.puck - start.agent, axis=1) > CONTACT + 1  # the agent is drawn over a puck it touches
    assert np.abs(pusher.read_puck(frames) - start.puck)[apart].max() < 0.25


def test_positions_survive_the_video_that_clients_get_to_half_a_pixel() -> None:
    """H.264 with 4:2:0, which halves the resolution of colour."""
    start = pusher.reset(100, np.random.default_rng(0))
    video = join_chunks([Encoder((64, 64), fps=10).encode(pusher.render(start))], fps=10, num_frames=100)
    frames = np.stack(decode(video))
    assert np.abs(pusher.read_agent(frames) - start.agent).max() < 0.5
    assert np.abs(pusher.read_puck(frames) - start.puck).max() < 0.5


def test_a_frame_without_objects_reads_as_nan() -> None:
    assert np.isnan(pusher.read_agent(np.full((2, 64, 64, 3), 40, np.uint8))).all()


def test_every_episode_of_a_batch_is_what_it_is_alone() -> None:
    start = pusher.reset(6, np.random.default_rng(3))
    moves = pusher.random_actions(start, 20, np.random.default_rng(4))
    together = pusher.render(pusher.simulate(start, moves)[-1])
    third = PusherState(start.agent[2:3], start.puck[2:3], start.goal[2:3])
    assert np.array_equal(pusher.render(pusher.simulate(third, moves[2:3])[-1])[0], together[2])


def test_random_behaviour_often_moves_the_puck() -> None:
    start = pusher.reset(200, np.random.default_rng(0))
    end = pusher.simulate(start, pusher.random_actions(start, 48, np.random.default_rng(1)))[-1]
    assert (np.linalg.norm(end.puck - start.puck, axis=1) > 5).mean() > 0.5
