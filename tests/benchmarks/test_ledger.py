"""The ledger's benchmark runs on today's schema, its naive design too; what it measures is for a quiet machine."""

from pathlib import Path

import pytest

from benchmarks import ledger


def test_every_figure_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "NUM_WALLETS", 10)
    monkeypatch.setattr(ledger, "BATCHES", (1, 70))
    with ledger.database("sqlite") as (engine, directory):
        result = ledger.measure(engine, "sqlite", directory, seconds=0.05, keyed=True)
    assert result["rollouts_per_s"].keys() == {"10 wallets", "1 wallets"}
    assert all(rate > 0 for by_batch in result["rollouts_per_s"].values() for rate in by_batch.values())
    assert result["ratio_to_naive"] > 0
    assert result["reserve_ms_at_500_per_s"]["p50"] > 0
