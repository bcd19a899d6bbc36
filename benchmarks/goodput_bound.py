"""What a batcher that knew every arrival beforehand would finish in time: nobody can finish more of the same schedule.

Exact for single rows that share one limit on their latency, on one model whose forward of b rows takes a + c b; for
groups that count only whole it is a bound from above. With equal limits some best schedule runs rows in the order in
which they came and leaves out only what its batch would be too late for; what remains to choose is each batch's size.
"""

from collections.abc import Sequence

from deployments.batching import BatchProfile


def most_in_time(arrivals_s: Sequence[float], profile: BatchProfile, cap: int, limit_s: float) -> int:
    """Of rows that arrive at these times, in order."""
    num_rows = len(arrivals_s)
    plans: list[list[tuple[float, int]]] = [[] for _ in range(num_rows + 1)]
    """By how many rows are done or left out: when the model is free, and how many were done in time."""
    plans[0] = [(0.0, 0)]
    most = 0
    for first in range(num_rows + 1):
        for free_s, in_time in _not_worse(plans[first]):
            most = max(most, in_time)
            for rows in range(1, min(cap, num_rows - first) + 1):
                took_s = profile.step_s(rows)
                for head in range(first, num_rows - rows + 1):
                    start_s = max(free_s, arrivals_s[head + rows - 1])
                    if start_s + took_s <= arrivals_s[head] + limit_s:
                        plans[head + rows].append((start_s + took_s, in_time + rows))
                        break
        plans[first] = []
    return most


def _not_worse(plans: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """Without those that are free no sooner than another which has done as many."""
    kept: list[tuple[float, int]] = []
    for free_s, in_time in sorted(plans, key=lambda plan: (plan[0], -plan[1])):
        if not kept or in_time > kept[-1][1]:
            kept.append((free_s, in_time))
    return kept
