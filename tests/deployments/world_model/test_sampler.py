import numpy as np
import pytest
import torch
from torch import Tensor

from deployments.world_model.config import SamplerConfig
from deployments.world_model.sampler import SamplerState, advance, coefficients, sigma

UNIPC = SamplerConfig(solver="unipc")
EULER = SamplerConfig(solver="euler")


def integrate(config: SamplerConfig, num_steps: int, noise: Tensor, clean_at: object) -> Tensor:
    """Run one row alone, with `clean_at(x, sigma)` in the network's place."""
    state = SamplerState.stack([SamplerState.start(noise)])
    for step in range(num_steps):
        predicted = clean_at(state.x, sigma(config, step, num_steps))  # type: ignore[operator]
        state = advance(config, state, predicted, [(step, num_steps)])
    return state.x[0]


def test_sigmas_are_the_published_schedule() -> None:
    sigmas = [sigma(UNIPC, step, 35) for step in range(36)]
    assert sigmas[:2] == pytest.approx([0.9998, 0.9939], abs=1e-4)
    assert sigmas[33:] == pytest.approx([0.2324, 0.1281, 0.0], abs=1e-4)


@pytest.mark.parametrize("config", [UNIPC, EULER], ids=lambda config: config.solver)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 35])
def test_a_right_prediction_is_reached_exactly(config: SamplerConfig, num_steps: int) -> None:
    target, noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(integrate(config, num_steps, noise, lambda x, s: target[None]), target)


@pytest.mark.parametrize("config", [UNIPC, EULER], ids=lambda config: config.solver)
def test_the_weights_of_a_move_keep_signal_and_noise_in_proportion(config: SamplerConfig) -> None:
    """On the straight path x = (1 - s) clean + s noise with the true prediction, a move lands on the path again."""
    clean, noise = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    state = SamplerState.stack([SamplerState.start(sigma(config, 0, 10) * noise + (1 - sigma(config, 0, 10)) * clean)])
    for step in range(10):
        state = advance(config, state, clean[None], [(step, 10)])
        level = sigma(config, step + 1, 10)
        torch.testing.assert_close(state.x[0], (1 - level) * clean + level * noise)


def gaussian_error(config: SamplerConfig, num_steps: int) -> float:
    """Distance from the exact flow where data is Gaussian: mean 1, deviation 0.5, so the best prediction is linear."""
    mean, deviation = 1.0, 0.5

    def clean_at(x: Tensor, level: float) -> Tensor:
        variance = ((1 - level) * deviation) ** 2 + level**2
        return mean + (1 - level) * deviation**2 / variance * (x - (1 - level) * mean)

    start = torch.tensor([-1.5, 0.2, 2.0], dtype=torch.float64)
    first = sigma(config, 0, num_steps)
    spread = np.hypot((1 - first) * deviation, first)
    exact = mean + deviation / spread * (start - (1 - first) * mean)
    return float((integrate(config, num_steps, start, clean_at) - exact).abs().max())


def test_unipc_is_of_higher_order_than_euler() -> None:
    unipc = gaussian_error(UNIPC, 20) / gaussian_error(UNIPC, 40)
    euler = gaussian_error(EULER, 20) / gaussian_error(EULER, 40)
    assert euler == pytest.approx(2, abs=0.4)  # first order: half the step, half the error
    assert unipc > 3.5  # second order or better: a quarter
    assert gaussian_error(UNIPC, 40) < gaussian_error(EULER, 40) / 2


def reference_unipc(num_steps: int, noise: Tensor, predictions: list[Tensor]) -> list[Tensor]:
    """The points that UniPC-2 (bh2) visits, written out for one sample and given predictions of the clean data."""
    sigmas = [sigma(UNIPC, step, num_steps) for step in range(num_steps + 1)]
    log_snr = [np.log((1 - s) / s) for s in sigmas[:-1]]
    points = [noise]
    corrected = noise
    for i in range(num_steps - 1):
        if i > 0:
            h = log_snr[i] - log_snr[i - 1]
            phi_1 = np.expm1(-h)
            phi_2 = phi_1 / -h - 1
            phi_3 = phi_2 / -h - 1 / 2
            delta = predictions[i] - predictions[i - 1]
            if i == 1:
                correction = 0.5 * delta
            else:
                r = (log_snr[i - 2] - log_snr[i - 1]) / h
                rho = np.linalg.solve(np.array([[1, 1], [r, 1]]), np.array([phi_2, 2 * phi_3]) / phi_1)
                correction = rho[0] * (predictions[i - 2] - predictions[i - 1]) / r + rho[1] * delta
            base = sigmas[i] / sigmas[i - 1] * corrected - (1 - sigmas[i]) * phi_1 * predictions[i - 1]
            corrected = base - (1 - sigmas[i]) * phi_1 * correction
        h = log_snr[i + 1] - log_snr[i] if i + 1 < num_steps else np.inf
        phi_1 = np.expm1(-h)
        base = sigmas[i + 1] / sigmas[i] * corrected - (1 - sigmas[i + 1]) * phi_1 * predictions[i]
        if i > 0:
            r = (log_snr[i - 1] - log_snr[i]) / h
            base = base - (1 - sigmas[i + 1]) * phi_1 * 0.5 * (predictions[i - 1] - predictions[i]) / r
        points.append(base)
    return [*points, predictions[-1]]


def test_unipc_visits_the_points_of_the_method_written_out() -> None:
    noise, *predictions = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = reference_unipc(6, noise, predictions)
    state = SamplerState.stack([SamplerState.start(noise)])
    for step, prediction in enumerate(predictions):
        state = advance(UNIPC, state, prediction[None], [(step, 6)])
        torch.testing.assert_close(state.x[0], expected[step + 1])


def test_rows_at_different_steps_move_as_if_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [(0, 4), (2, 4), (3, 4), (5, 35)]
    states = [SamplerState(*torch.randn(4, 3, 2, generator=generator)) for _ in rows]
    predictions = torch.randn(4, 3, 2, generator=generator)
    together = advance(UNIPC, SamplerState.stack(states), predictions, rows).unstack()
    for index, row in enumerate(rows):
        alone = advance(UNIPC, SamplerState.stack([states[index]]), predictions[index][None], [row])
        assert torch.equal(together[index].x, alone.x[0])
        assert torch.equal(together[index].corrected, alone.corrected[0])


def test_the_first_and_the_last_move_use_no_earlier_prediction() -> None:
    assert coefficients(UNIPC, 0, 4).predictor[2] == 0
    assert coefficients(UNIPC, 3, 4).predictor == (0.0, 1.0, 0.0)
