"""The sign that makes a gradient a NeurGrad: that of the activation, plus one at zero.

A silent neuron can only grow, hence sgn(0) = +1; the paper's code has 0 or -1 there, depending on the place.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float32]


def sign(activation: Floats) -> Floats:
    """The sign of an activation, +1 at zero."""
    return np.where(activation < 0, np.float32(-1), np.float32(1))


def signed_by(activation: Tensor, values: Tensor) -> Tensor:
    """`values` times the sign of `activation`, where the sign of zero is plus one: a silent neuron can only grow."""
    return values * torch.where(activation < 0, -1.0, 1.0).to(values.dtype)
