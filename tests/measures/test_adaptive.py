"""The adaptive grid: polynomials by hand, curves that are known, and neurons against all of their shifts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import neg_service
from neg_service.errors import ConfigurationError
from neg_service.measures.adaptive import Evaluated, Swept, evaluate_in_stages
from neg_service.measures.changes import Steps, taken
from neg_service.measures.linearity import linearity
from neg_service.measures.shifts import AdaptiveGrid, Doubles, adaptive_grid, chosen_grid, full_grid, with_slope
from tests.rare import one_of
from tests.refusals import refused
from tests.tiny_models import tiny_model

TEXT, TARGET = "w3 w14 w15 w9 w26 w5 w35 w8", " w7"
Curve = Callable[[Tensor], Tensor]


def finished(steps: Steps[Evaluated]) -> Evaluated:
    """What comes out of steps that ask a model for nothing."""
    return taken(steps, lambda moved: pytest.fail("asked for interventions"))


def evaluated(
    curves: list[Curve], grid: AdaptiveGrid, noise: float = 0.0, changed: Callable[[Doubles], Doubles] = np.zeros_like
) -> Evaluated:
    """Curves of one neuron each, all for one target, with their slopes by a difference of first order."""

    def run(shifts: Doubles, own_m: Tensor) -> Steps[Swept]:
        yield from ()
        at = torch.from_numpy(shifts)
        values = torch.stack([curves[i](at) for i in own_m.tolist()])
        return Swept(values[..., None], torch.from_numpy(changed(shifts) > 0).expand(len(own_m), -1))

    tiny = torch.tensor([1e-7], dtype=torch.float64)
    slope_nk = torch.stack([(curve(tiny) - curve(-tiny)) / 2e-7 for curve in curves])
    return finished(evaluate_in_stages(grid, run, slope_nk, torch.tensor([noise]), keep_curves=True, has_experts=True))


def the_adaptive(**given: float) -> AdaptiveGrid:
    grid = adaptive_grid(**given)
    assert isinstance(grid, AdaptiveGrid)
    return grid


def test_a_polynomial_with_a_known_slope_by_hand() -> None:
    # Through (-1, -2), (0, 0), (1, 4) with slope 1 at zero: δ + δ² + 2δ³, so -2, 0, 4, and at 2: 2 + 4 + 16 = 22.
    grid = with_slope(np.array([-1.0, 1.0]), np.array([-1.0, 1.0, 2.0]))
    assert grid.interpolation is not None
    assert grid.slope is not None
    np.testing.assert_allclose(grid.interpolation @ [-2.0, 4.0] + 1.0 * grid.slope, [-2.0, 4.0, 22.0])


def test_stages_are_pairs_of_the_grids_own_shifts() -> None:
    grid = the_adaptive()
    assert [stage.shifts.tolist() for stage in grid.stages] == [
        [-2.0, 2.0],
        [-2.0, -1.5, 1.5, 2.0],
        [-2.0, -1.5, -0.8, 0.8, 1.5, 2.0],
    ]
    assert grid.shifts.tolist() == full_grid().shifts.tolist()
    # A grid of few shifts is run as it is, and so are shifts that are given.
    assert len(adaptive_grid(2.0, 0.5).shifts) == 8
    assert not isinstance(adaptive_grid(2.0, 0.5), AdaptiveGrid)
    assert chosen_grid("adaptive", [1.0, 3.0]).shifts.tolist() == [1.0, 3.0]
    for tolerance in (-0.1, 2.0, float("nan")):
        with refused(ConfigurationError, "measure.tolerance", tolerance, says="from 0 to 1"):
            adaptive_grid(tolerance=tolerance)


@pytest.mark.parametrize("degree", range(1, 8))
def test_a_polynomial_of_up_to_the_seventh_degree_is_exact_in_six_shifts(degree: int) -> None:
    full = full_grid()
    # With no tolerance all stages are run, and the last before the full grid holds seven degrees.
    stage = the_adaptive().stages[2]
    curve = 0.3 * stage.shifts + 0.1 * stage.shifts**degree
    slope = torch.tensor(0.3 + 0.1 * (degree == 1), dtype=torch.float64)
    found = linearity(stage, torch.from_numpy(curve)[None], slope[None])
    expected = linearity(full, torch.from_numpy(0.3 * full.shifts + 0.1 * full.shifts**degree)[None])
    for name in ("neg", "r", "r2", "max_abs_delta_p"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-9), name


def test_straight_curves_take_two_shifts_bent_ones_more_and_broken_ones_all() -> None:
    curves: list[Curve] = [
        lambda s: 0.2 * s,
        lambda s: torch.expm1(0.05 * s),
        lambda s: torch.expm1(0.3 * s),
        lambda s: torch.expm1(0.9 * s),
        lambda s: torch.where(s > 0.3, s - 0.3, 0.0) - 0.01 * s,
        lambda s: 0 * s,
    ]
    found = evaluated(curves, the_adaptive())
    assert found.n_shifts_n.tolist() == [2, 2, 4, 6, 40, 2]
    grid = full_grid()
    shifts = torch.from_numpy(grid.shifts)
    exact = linearity(grid, torch.stack([curve(shifts) for curve in curves]))
    off = (found.linearity_nk.neg[:, 0] - exact.neg).abs()
    assert (off <= 1e-3 * exact.neg.abs() + 1e-15).all()
    assert (off <= found.error(torch.zeros(1), torch.float64)[:, 0] + 1e-15).all()
    torch.testing.assert_close(found.linearity_nk.r[:, 0], exact.r, rtol=0, atol=1e-4)
    # What is kept is the curve, as measured where it was run.
    assert found.curve_nsk is not None
    torch.testing.assert_close(found.curve_nsk[2, [0, 5, 34, 39], 0], curves[2](shifts[[0, 5, 34, 39]]))
    torch.testing.assert_close(found.curve_nsk[4, :, 0], curves[4](shifts))


def test_a_tolerance_buys_shifts_and_noise_makes_them_worthless() -> None:
    curves: list[Curve] = [lambda s: torch.expm1(0.3 * s)]
    counts = [int(evaluated(curves, the_adaptive(tolerance=share)).n_shifts_n) for share in (0.3, 1e-3, 1e-4, 0.0)]
    assert counts == [2, 4, 6, 40]
    # The noise of a single Δp, of which NEG has 0.22 in two shifts, leaves more unknown than they do.
    noisy = evaluated(curves, the_adaptive(), noise=0.2)
    assert noisy.n_shifts_n.tolist() == [2]
    gain = the_adaptive().stages[0].noise_gain
    assert noisy.resolution(torch.tensor([0.2])).item() == pytest.approx(2 * 0.2 * gain, rel=1e-6)
    assert noisy.error(torch.tensor([0.2]), torch.float64).item() == pytest.approx(3 * 0.2 * gain, rel=1e-6)


def test_all_targets_have_to_be_known() -> None:
    grid = the_adaptive()

    def run(shifts: Doubles, own_m: Tensor) -> Steps[Swept]:
        yield from ()
        at = torch.from_numpy(shifts)
        both = torch.stack([0.2 * at, torch.expm1(0.3 * at)], 1)
        return Swept(both.expand(len(own_m), -1, -1), torch.zeros(len(own_m), len(at), dtype=torch.bool))

    slope_nk = torch.tensor([[0.2, 0.3]], dtype=torch.float64)
    found = finished(evaluate_in_stages(grid, run, slope_nk, torch.zeros(2), keep_curves=False, has_experts=False))
    assert found.n_shifts_n.tolist() == [4]


def test_where_a_shift_has_other_experts_chosen_all_are_run() -> None:
    found = evaluated([lambda s: 0.2 * s], the_adaptive(), changed=lambda shifts: np.abs(shifts) > 1.95)
    assert found.n_shifts_n.tolist() == [40]
    assert found.routing_changed_n.tolist() == [2 / 40]


def test_errors_that_are_a_share_of_effects_are_weighed_by_these() -> None:
    def run(shifts: Doubles, own_m: Tensor) -> Steps[Swept]:
        yield from ()
        at = torch.from_numpy(shifts)
        moved = 0.2 * at.expand(len(own_m), -1)
        return Swept(moved[..., None], torch.zeros_like(moved, dtype=torch.bool), moved.abs())

    slope_nk = torch.tensor([[0.2]], dtype=torch.float64)
    noise = torch.tensor([0.1])
    found = finished(
        evaluate_in_stages(the_adaptive(), run, slope_nk, noise, keep_curves=False, has_experts=False, is_per_row=True)
    )
    weights = the_adaptive().stages[0].weights
    # Σ |w|·|0.2·δ| with both shifts at 2, times twice the share.
    assert found.resolution(noise).item() == pytest.approx(2 * 0.1 * np.abs(weights).sum() * 0.4)


@pytest.mark.parametrize("shift", ["magnitude", "signed"])
@pytest.mark.parametrize(
    ("family", "held"), one_of(2, [("Llama 2", 0.97), ("Gemma 2", 0.92), ("BERT", 0.97), ("OPT", 0.9)])
)
def test_all_neurons_of_a_model_are_as_exact_as_is_said(family: str, held: float, shift: str) -> None:
    model = tiny_model(family, torch.float64)
    text, target = ("w3 [MASK] w9", "w7") if family == "BERT" else (TEXT, TARGET)
    full = neg_service.neg(model, text, target, shift=shift, grid="full")
    found = neg_service.neg(model, text, target, shift=shift)
    assert found.delta_p.shape == full.delta_p.shape
    # Broken by ReLU's kinks many curves of a model with few neurons need all shifts.
    assert found.n_shifts.mean() < (30 if family == "OPT" else 8)
    off = np.abs(found.neg - full.neg)
    assert (off <= found.error + 1e-12 * np.abs(full.neg).max()).mean() >= held
    assert np.quantile(off / np.abs(full.neg).clip(1e-12), 0.97) < (1e-2 if family == "OPT" else 1e-3)
    assert np.quantile(np.abs(found.r - full.r), 0.99) < 4e-3
    np.testing.assert_allclose(found.delta_p[:, [0, -1]], full.delta_p[:, [0, -1]], rtol=1e-9, atol=1e-15)
    np.testing.assert_array_equal(full.n_shifts, 40)


def test_noise_is_in_the_error_of_a_call_of_the_library() -> None:
    single, double = tiny_model("Llama 2"), tiny_model("Llama 2", torch.float64)
    found = neg_service.neg(single, TEXT, TARGET, grid="full")
    exact = neg_service.neg(double, TEXT, TARGET, grid="full")
    off = np.abs(found.neg - exact.neg)
    assert (off <= found.error).mean() >= 0.95
    # And not by being far too large.
    assert np.median(off / found.error) > 0.02
    assert neg_service.neg(single, TEXT, TARGET, [(0, 1)], grid="full").error[0] == found.error[1]
