"""The least joint shift with a wanted effect, by the gradient of what is to be moved: a closed form.

Of all shifts d with g·d = c, with g the gradient over M neurons, the least is d = c·h / (g·h) with h = D·g, where D is
diagonal: 1 of every neuron that may move, 0 of the others, and with norm `scaled` the square of its activation, so that
what counts is by which share of its activation a neuron moves.

Held references are prompts whose own outputs shall stay: with a row of G for each of their tokens, √p·∇log p, the KL
divergence of their outputs is ‖G·d‖²/2 to second order. The least shift is then that of

    ‖G·d‖² + μ·dᵀ·D⁻¹·d,     h = D·g - D·Gᵀ·(G·D·Gᵀ + μ)⁻¹·G·D·g,     μ = ridge · mean of the diagonal of G·D·Gᵀ.

A target that is to be above several other tokens has a gradient for each, and g_c·d ≥ c_c: the least such d is a sum of
the directions h_c with weights that are not negative, 0 of those tokens that fall behind anyway.

Axes: M neurons that act on a prompt, C values that are to move, q rows of held references.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

# Of the mean of the diagonal. From 1e-4 to 1 effects on references that were not held differ little.
RIDGE = 0.01
# Of values that are to move together, how far off by rounding one may be.
_CLOSE = 1e-9


@dataclass(frozen=True)
class LeastShift:
    """Which shifts are small: `h = apply(g)` is the direction of the least one, up to a factor.

    scale_m: by which neurons' shifts are measured [M], 0 of those that stay. held_qm: rows of held references [q, M].
    """

    scale_m: Vector
    held_qm: NDArray[np.float32] | None = None
    gram_qq: Vector | None = None

    @classmethod
    def of(cls, scale_m: Vector, held_qm: NDArray[np.float32] | None = None) -> LeastShift:
        """With what the references need worked out once."""
        if held_qm is None or not len(held_qm):
            return cls(scale_m)
        scaled_qm = held_qm * scale_m.astype(np.float32)
        gram_qq = (scaled_qm @ scaled_qm.T).astype(np.float64)
        return cls(scale_m, held_qm, gram_qq)

    def apply(self, gradient_m: Vector) -> Vector:
        """The direction of the least shift."""
        own_m = self.scale_m**2 * gradient_m
        if self.held_qm is None or self.gram_qq is None:
            return own_m
        ridge = RIDGE * float(self.gram_qq.diagonal().mean())
        if not ridge > 0:
            return own_m
        # In the rows' own precision: they are not to be copied into another one each time.
        met_q = (self.held_qm @ own_m.astype(self.held_qm.dtype)).astype(np.float64)
        weight_q = np.linalg.solve(self.gram_qq + ridge * np.eye(len(met_q)), met_q)
        return own_m - self.scale_m**2 * (weight_q.astype(self.held_qm.dtype) @ self.held_qm)

    def step(self, gradient_cm: Vector, lacks_c: Vector) -> Vector | None:
        """The least shift that moves one value by what it lacks, or several by at least so much; None if none does."""
        if len(lacks_c) == 1 or lacks_c[0] <= 0:
            gradient_cm, lacks_c = gradient_cm[:1], lacks_c[:1]
        direction_cm = np.stack([self.apply(own_m) for own_m in gradient_cm])
        slope_cc = gradient_cm @ direction_cm.T
        for n in range(1, len(lacks_c) + 1):
            for own in map(list, combinations(range(len(lacks_c)), n)):
                slope_oo = slope_cc[np.ix_(own, own)]
                if not (slope_oo.diagonal() > 0).all() or np.linalg.matrix_rank(slope_oo) < n:
                    continue
                weight_o = np.linalg.solve(slope_oo, lacks_c[own])
                reached_c = slope_cc[:, own] @ weight_o
                is_least = n == 1 or (weight_o >= 0).all()
                if len(lacks_c) == 1 or (is_least and (reached_c >= lacks_c - _CLOSE * abs(lacks_c)).all()):
                    found: Vector = weight_o @ direction_cm[own]
                    return found
        return None

    def norm(self, shift_m: Vector) -> float:
        """Of a shift, in what its neurons' shifts are measured by."""
        moves_m = self.scale_m > 0
        return float(np.linalg.norm(shift_m[moves_m] / self.scale_m[moves_m]))


def strongest(gradient_m: Vector, scale_m: Vector, count: int) -> Vector:
    """`scale_m` with all but `count` neurons at 0: those that the least shift would move most; the first of equals."""
    order = np.argsort(-np.abs(gradient_m * scale_m), kind="stable")[:count]
    chosen_m = np.zeros_like(scale_m)
    chosen_m[order] = scale_m[order]
    return chosen_m
