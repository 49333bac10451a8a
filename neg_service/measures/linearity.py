"""What a curve of Δp over shifts says: NEG, and how straight the curve is.

For shifts δ_1..δ_S of a neuron, and Δp(δ) a target's probability with the shift minus without it:

    NEG = Σ_s δ_s·Δp_s / Σ_s δ_s²          least squares through the origin, probability per activation unit
    r   = Pearson correlation of (δ_s, Δp_s); 0 where all Δp are equal; |r| >= 0.95 counts as linear
    R²  = 1 - Σ_s (Δp_s - NEG·δ_s)² / Σ_s Δp_s²     of that fit; 0 where all Δp are 0

All of it is linear algebra in float64 on whatever device the curves are on.

Source: Zhao, Jiang, Yoshinaga, "Neuron Empirical Gradient", ACL 2025 (arXiv 2412.18053).

Axes: S shifts that are run, G shifts of the curve that is evaluated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neg_service.measures.shifts import Doubles, Grid


@dataclass(frozen=True)
class Linearity:
    """Of each curve; formulas in the module's header. `max_abs_delta_p` is the largest |Δp|."""

    neg: Tensor
    r: Tensor
    r2: Tensor
    max_abs_delta_p: Tensor


def evaluated_curves(grid: Grid, delta_p: Tensor, slope: Tensor | None = None) -> Tensor:
    """Curves on the shifts that are evaluated [..., G], float64, from those that were run, Δp [..., S].

    slope: of the curves at zero [...], for a grid that uses it.
    """
    curve = delta_p.double()
    if grid.interpolation is not None:
        curve = curve @ torch.from_numpy(grid.interpolation).to(curve.device).T
    if grid.slope is not None:
        assert slope is not None
        curve = curve + slope.double()[..., None] * torch.from_numpy(grid.slope).to(curve.device)
    return curve


def linearity(grid: Grid, delta_p: Tensor, slope: Tensor | None = None) -> Linearity:
    """Evaluate curves Δp [..., S], with their slopes at zero [...] where the grid uses them; results [...], float64."""
    curve = evaluated_curves(grid, delta_p, slope)
    shifts_g = torch.from_numpy(grid.evaluated).to(curve.device)
    neg = curve @ shifts_g / (shifts_g @ shifts_g)
    centred_g = shifts_g - shifts_g.mean()
    centred = curve - curve.mean(-1, keepdim=True)
    spread = ((centred**2).sum(-1) * (centred_g @ centred_g)).sqrt()
    max_abs_delta_p = curve.abs().amax(-1)
    # Rounding leaves equal values a hair apart; what is that small against the values is no correlation.
    is_flat = (curve.amax(-1) - curve.amin(-1) <= 1e-14 * max_abs_delta_p) | (spread == 0)
    r = torch.where(is_flat, 0.0, (centred @ centred_g) / spread.where(~is_flat, 1.0))
    total = (curve**2).sum(-1)
    left = ((curve - neg[..., None] * shifts_g) ** 2).sum(-1)
    r2 = torch.where(total > 0, 1 - left / total.where(total > 0, 1.0), 0.0)
    return Linearity(neg, r.clamp(-1, 1), r2, max_abs_delta_p)


def evaluate(grid: Grid, curves: Doubles) -> dict[str, Doubles]:
    """`linearity` of curves [I, S] in NumPy: `neg`, `r`, `r2` and `max_abs_delta_p`, each [I]."""
    found = linearity(grid, torch.from_numpy(np.ascontiguousarray(curves)))
    return {name: getattr(found, name).numpy() for name in ("neg", "r", "r2", "max_abs_delta_p")}
