"""How long a model's batches take on the machine that it runs on, measured before it serves."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from deployments.batching import BatchProfile
from deployments.messages import ChunkRow
from deployments.model import OUT_OF_MEMORY, Model

MAX_ROUNDS = 4
BUDGET_S = 3.0
"""No further round begins after this long: a replica that starts on a busy machine should start all the same."""


def measure(
    model: Model,
    row: ChunkRow,
    max_rows: int,
    clock: Callable[[], float] = time.perf_counter,
    num_steps: int = 1 + MAX_ROUNDS,
) -> BatchProfile:
    """Time the model's step on 1, 2, 4, ... `max_rows` copies of `row`, as far as its memory goes.

    With `num_steps` a row must take 1 + MAX_ROUNDS steps or more.

    In rounds, and the fastest counts: what else the machine does can only make a step slower.
    """
    batches: dict[int, list[Any]] = {}
    for size in sorted({2**power for power in range(max_rows.bit_length()) if 2**power < max_rows} | {max_rows}):
        try:
            batch = model.start([replace(row, num_steps=num_steps)] * size)
            model.step(batch)  # whatever is prepared at the first sight of a batch size
        except OUT_OF_MEMORY:
            if not batches:
                raise
            break
        batches[size] = batch
    fastest_s = dict.fromkeys(batches, float("inf"))
    began = clock()
    for index in range(MAX_ROUNDS):
        if index and clock() - began > BUDGET_S:
            break
        for size, batch in batches.items():
            started = clock()
            model.step(batch)
            fastest_s[size] = max(1e-9, min(fastest_s[size], clock() - started))
    return BatchProfile.fit(fastest_s)
