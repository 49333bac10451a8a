"""Gradients of a task as numbers drawn at random, with and without ties."""

from __future__ import annotations

import numpy as np
import pytest

P, K, M = 40, 4, 300


@pytest.fixture(params=["ties", "reals"])
def gradients(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """g [P, K, M], activations [P, M] and answers [P]; with ties, g has few different values, zero among them."""
    draw = np.random.default_rng(3)
    g = draw.integers(-1, 2, (P, K, M)) if request.param == "ties" else draw.normal(size=(P, K, M))
    return g.astype(np.float32), draw.normal(size=(P, M)).astype(np.float32), draw.integers(0, K, P)
