import itertools
import random

from benchmarks.goodput_bound import most_in_time
from deployments.batching import BatchProfile

PROFILE, CAP, LIMIT_S = BatchProfile(0.3, 0.1), 3, 1.0


def by_trying_everything(arrivals_s: list[float], free_s: float = 0.0) -> int:
    """Any rows, in any batches, in any order."""
    most = 0
    for rows in range(1, min(CAP, len(arrivals_s)) + 1):
        for batch in itertools.combinations(range(len(arrivals_s)), rows):
            end_s = max(free_s, *(arrivals_s[index] for index in batch)) + PROFILE.step_s(rows)
            if end_s <= min(arrivals_s[index] for index in batch) + LIMIT_S:
                others = [at_s for index, at_s in enumerate(arrivals_s) if index not in batch]
                most = max(most, rows + by_trying_everything(others, end_s))
    return most


def test_it_finds_what_trying_every_schedule_finds() -> None:
    chance = random.Random(0)
    found = set()
    for _ in range(40):
        arrivals_s = sorted(chance.uniform(0.0, 0.8) for _ in range(6))
        found.add(most := most_in_time(arrivals_s, PROFILE, CAP, LIMIT_S))
        assert most == by_trying_everything(arrivals_s)
    assert len(found) > 1


def test_a_row_alone_is_in_time_exactly_while_its_forward_is_no_longer_than_the_limit() -> None:
    assert most_in_time([0.5], PROFILE, CAP, PROFILE.step_s(1) + 1e-9) == 1
    assert most_in_time([0.5], PROFILE, CAP, PROFILE.step_s(1) - 1e-9) == 0
