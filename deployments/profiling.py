"""How long a model's batches take on the machine that it runs on, measured before it serves."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

from deployments.batching import BatchProfile
from deployments.messages import ChunkRow
from deployments.model import OUT_OF_MEMORY, Model

REPEATS = 3


def measure(model: Model, row: ChunkRow, max_rows: int, clock: Callable[[], float] = time.perf_counter) -> BatchProfile:
    """Time the model's step on 1, 2, 4, ... `max_rows` copies of `row`, as far as its memory goes."""
    sizes = sorted({2**power for power in range(max_rows.bit_length()) if 2**power < max_rows} | {max_rows})
    measured_s: dict[int, float] = {}
    for size in sizes:
        try:
            rows = model.start([replace(row, num_steps=1 + REPEATS)] * size)
            model.step(rows)  # whatever is prepared at the first sight of a batch size
            times = []
            for _ in range(REPEATS):
                started = clock()
                model.step(rows)
                times.append(clock() - started)
        except OUT_OF_MEMORY:
            if not measured_s:
                raise
            break
        measured_s[size] = max(statistics.median(times), 1e-9)
    return BatchProfile.fit(measured_s)
