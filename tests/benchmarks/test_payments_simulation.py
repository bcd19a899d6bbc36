"""A small share of `make simulate-payments`."""

from pathlib import Path

from benchmarks.payments_simulation import agrees, simulate


async def test_the_books_agree_after_days_in_which_every_part_failed(tmp_path: Path) -> None:
    result = await simulate(tmp_path, customers=16, days=1, seed=1)
    assert agrees(result), result
    assert result["charges"] >= 3
