"""That what is meant for a GPU runs: the same path with a small network, here. And that the CPU's does."""

import sys

import pytest
import torch

from benchmarks import world_model
from benchmarks.world_model import CPU_BATCHES, against_floor, main, on_cpu, small, work_of
from deployments.world_model import PRESETS


def test_the_path_for_a_gpu_runs_end_to_end_and_compares_with_a_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world_model, "NUM_ACTIONS", 12)
    monkeypatch.setattr(world_model, "GPU_BATCHES", (1, 2))
    result = against_floor(small(PRESETS["dreamdojo-2b"]), torch.device("cpu"), side=64, repeats=1)
    assert set(result["batch"]) == {1, 2}
    for figures in result["batch"].values():
        assert all(value > 0 for value in figures.values())
    assert result["row_floor_ms"] > 0


def test_the_path_for_a_cpu_times_the_shipped_model_at_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world_model, "NUM_ACTIONS", 12)
    result = on_cpu(repeats=1)
    assert result["model"] == "tiny-pusher"
    assert set(result["batch"]) == set(CPU_BATCHES)
    alone, eight = (result["batch"][batch]["rollout_ms"] for batch in (1, 8))
    assert result["throughput_8_to_1"] == pytest.approx(8 * alone / eight, rel=0.02)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_without_a_gpu_it_says_so_and_prints_no_figure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["world_model", "--device", "cuda"])
    with pytest.raises(SystemExit) as stopped:
        main()
    told = capsys.readouterr()
    assert stopped.value.code == 2
    assert "finds no GPU here" in told.err
    assert told.out == ""


def test_a_denoising_step_of_the_2b_is_21_6_tflop() -> None:
    products, attention = work_of(PRESETS["dreamdojo-2b"])
    assert round((products + attention) / 1e12, 1) == 21.6
    assert round(attention / 1e12, 1) == 5.8  # 5.3 among the latents' tokens, and the text's
