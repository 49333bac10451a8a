"""Differences of elementwise functions, f(a + d) - f(a), to the last digits of d however small d is.

Subtracting the two values loses the digits that they share. Each function here is rewritten so that nothing nearly
equal is subtracted, and what depends on `a` alone, the row without a shift, is worked out once, in float64. Each takes
`a` and gives a function of d; both are float32 or float64, a broadcasts against d, and d is not written to.

    swish, x·σ(g(x)) with q = exp(-g(a)), e = expm1(-dg):     (d - e·a·q/(1+q)) / (1 + q + q·e)
    tanh:      tanh(d)·(1 - tanh(a)·tanh(a + d)), and σ(x) = (1 + tanh(x/2))/2
    GELU, x·Φ(x):     d·Φ(a + d) + a·∫ of the normal density from a to a + d, by three Gauss points
    1/√x with t = d/a, s = √(1+t):     -a^(-1/2)·t / (s·(1+s))
    ReLU and clamp piece by piece; powers as polynomials

Where the exponentials of a rewritten form would leave float32, the difference is had in float64 as it stands.

Axes: R rows, F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

# From a difference d to that of the values.
Difference = Callable[[Tensor], Tensor]

# How large g(a) may be, how large the exponent of exp(-dg), and that of exp(-g(a) - dg): float32 holds these, and what
# is beyond them changes nothing.
_FAR, _MOST, _MOST_OF_BOTH = 40.0, 87.0, 80.0
# Up to where three Gauss points are exact to 2e-9; beyond, the density's integral is not small against its ends.
_NEAR = 0.25
_GAUSS = ((0.5 - math.sqrt(0.15), 5 / 18), (0.5, 8 / 18), (0.5 + math.sqrt(0.15), 5 / 18))
_CUBIC, _SQRT_2_PI = 0.044715, math.sqrt(2 / math.pi)
# On a CPU so many values at a time: they stay in the processor's cache from step to step.
_BLOCK = 2**16


def in_blocks(function: Callable[..., Tensor], a: Tensor, *parts: Tensor) -> Tensor:
    """A function of tensors of one shape, each row by itself, a few rows at a time where that is faster.

    `a` is the row without a shift, of as many axes, and of one element where the others have the rows.
    """
    first = parts[0]
    if first.device.type != "cpu" or first.numel() < 2 * _BLOCK:
        return function(*parts)
    axis = next(i for i, (one, n) in enumerate(zip(a.shape, first.shape, strict=True)) if n > 1 and one == 1)
    found = torch.empty_like(first)
    at_once = max(1, _BLOCK * first.shape[axis] // first.numel())
    for start in range(0, first.shape[axis], at_once):
        own = min(at_once, first.shape[axis] - start)
        found.narrow(axis, start, own).copy_(function(*(part.narrow(axis, start, own) for part in parts)))
    return found


def silu(a: Tensor) -> Difference:
    """x·σ(x)."""
    return _swish(a, a.double(), lambda d: d, nn.functional.silu)


def gelu(a: Tensor, approximate: str = "none") -> Difference:
    """x·Φ(x), or its approximation by tanh, which is x·σ(2·√(2/π)·(x + 0.044715·x³))."""
    plain = partial(nn.functional.gelu, approximate=approximate)
    if approximate == "none":
        return partial(_gelu, a)
    scale, wide = 2 * _SQRT_2_PI, a.double()
    # scale·(d + c·((a+d)³ - a³)) = d·(scale + scale·c·(3a² + 3a·d + d²))
    square, linear = (scale * (1 + 3 * _CUBIC * wide**2)).to(a.dtype), (3 * scale * _CUBIC * wide).to(a.dtype)

    def inner(d: Tensor) -> Tensor:
        return torch.addcmul(square, d, linear + (scale * _CUBIC) * d).mul_(d)

    return _swish(a, scale * (wide + _CUBIC * wide**3), inner, plain)


def _swish(a: Tensor, inner: Tensor, inner_difference: Difference, plain: Difference) -> Difference:
    """x·σ(g(x)), of g(a) in float64 and the difference of g; `plain` is the function itself."""
    wide = a.double()
    if inner.abs().amax() > _FAR:
        return lambda d: (plain(wide + d) - plain(wide)).to(d.dtype)
    q = torch.exp(-inner)
    c = (wide * q / (1 + q)).to(a.dtype)
    one_q, q = (1 + q).to(a.dtype), q.to(a.dtype)
    most = (_MOST_OF_BOTH + inner).clamp(max=_MOST).to(a.dtype)

    def difference(d: Tensor) -> Tensor:
        e = torch.minimum(inner_difference(d).neg(), most).expm1_()
        below = torch.addcmul(one_q, q, e)
        return torch.addcmul(d, c, e, value=-1).div_(below)

    return partial(in_blocks, difference, a)


def _gelu(a: Tensor, d: Tensor) -> Tensor:
    def difference(d: Tensor) -> Tensor:
        after = a + d
        # By erfc, which keeps the digits of what is nearly zero.
        found = torch.erfc(after * -math.sqrt(0.5)).mul_(0.5).mul_(d)
        density = torch.zeros_like(d)
        for place, weight in _GAUSS:
            density.add_(
                torch.add(a, d, alpha=place).square_().mul_(-0.5).exp_(), alpha=weight / math.sqrt(2 * math.pi)
            )
        near = density.mul_(d)
        far = (torch.erf(after.mul_(math.sqrt(0.5))) - torch.erf(a * math.sqrt(0.5))).mul_(0.5)
        return found.addcmul_(a, torch.where(d.abs() <= _NEAR, near, far))

    return in_blocks(difference, a, d)


def tanh(a: Tensor) -> Difference:
    before = a.double().tanh().to(a.dtype)
    return partial(in_blocks, lambda d: torch.tanh(a + d).mul_(-before).add_(1).mul_(torch.tanh(d)), a)


def sigmoid(a: Tensor) -> Difference:
    of_tanh = tanh(a / 2)
    return lambda d: of_tanh(d / 2).mul_(0.5)


def relu(a: Tensor) -> Difference:
    is_on = a > 0
    # From above zero down to it at the most; from below only what rises above it.
    return partial(in_blocks, lambda d: torch.where(is_on, torch.maximum(d, -a), (a + d).clamp_(min=0)), a)


def clamp(a: Tensor, low: float | None, high: float | None) -> Difference:
    inside = a.clamp(low, high)
    beyond = a - inside
    least, most = (None if end is None else end - inside for end in (low, high))
    return lambda d: (d + beyond).clamp(least, most)


def power(a: Tensor, exponent: float) -> Difference | None:
    """Of 1, 2, 3, 1/2 and -1/2; None of others."""
    rules: dict[float, Callable[[Tensor], Difference]] = {
        1: lambda _: lambda d: d.clone(),
        2: square,
        3: lambda a: lambda d: (d * (d + 3 * a)).add_(3 * a * a).mul_(d),
        0.5: sqrt,
        -0.5: rsqrt,
    }
    return None if exponent not in rules else rules[exponent](a)


def square(a: Tensor) -> Difference:
    twice = 2 * a
    return partial(in_blocks, lambda d: (d + twice).mul_(d), a)


def sqrt(a: Tensor) -> Difference:
    before = a.sqrt()
    return lambda d: d / ((a + d).sqrt() + before)


def rsqrt(a: Tensor) -> Difference:
    before = a.rsqrt()

    def difference(d: Tensor) -> Tensor:
        t = d / a
        s = (1 + t).sqrt()
        return t.mul_(before).neg_().div_(s * (1 + s))

    return difference


def exp(a: Tensor) -> Difference:
    before = a.exp()
    return lambda d: torch.expm1(d).mul_(before)


def product(a: Tensor, d_a: Tensor, b: Tensor, d_b: Tensor) -> Tensor:
    """(a + d_a)·(b + d_b) - a·b = d_a·(b + d_b) + a·d_b; all broadcast, and one of the d's may have less features."""

    def difference(d_a: Tensor, d_b: Tensor) -> Tensor:
        return torch.mul(d_a, b + d_b).addcmul_(a, d_b)

    if d_a.shape == d_b.shape:
        return in_blocks(difference, a, d_a, d_b)
    return difference(d_a, d_b)


def quotient(a: Tensor, d_a: Tensor | None, b: Tensor, d_b: Tensor) -> Tensor:
    """(a + d_a)/(b + d_b) - a/b = (d_a - (a/b)·d_b)/(b + d_b)."""
    above = d_b * (-a / b)
    return (above if d_a is None else above + d_a) / (b + d_b)


def softmax(p: Tensor) -> Difference:
    """Of probabilities p [..., S] over the last axis: p·(e - m)/(1 + m), e = expm1(d), m = Σ p·e."""

    def difference(d: Tensor) -> Tensor:
        # What is added to all scores changes nothing, and keeps exponentials finite.
        e = torch.expm1(d - (d.amax(-1, keepdim=True) - _MOST).clamp_(min=0))
        m = (p * e).sum(-1, keepdim=True)
        return (e - m).mul_(p).div_(1 + m)

    return difference


def layer_norm(a: Tensor, weight: Tensor | None, eps: float) -> Difference:
    """(x - mean)/√(variance + eps), times a weight, over the last axis."""
    wide = a.double()
    centred = wide - wide.mean(-1, keepdim=True)
    return _scaled_to_one(centred.to(a.dtype), centred.square().mean(-1, keepdim=True) + eps, weight, is_centred=True)


def rms_norm(a: Tensor, weight: Tensor | None, eps: float) -> Difference:
    """x/√(mean of squares + eps), times a weight, over the last axis."""
    return _scaled_to_one(a, a.double().square().mean(-1, keepdim=True) + eps, weight, is_centred=False)


def _scaled_to_one(a: Tensor, mean: Tensor, weight: Tensor | None, *, is_centred: bool) -> Difference:
    """d·r' + a·(r' - r) of r = mean^(-1/2), where the mean of squares changes by that of d·(d + 2a)."""
    scale = mean.rsqrt().to(a.dtype)
    twice, mean = 2 * a, mean.to(a.dtype)
    weighted = a if weight is None else a * weight

    def difference(d: Tensor) -> Tensor:
        if is_centred:
            d = d - d.mean(-1, keepdim=True)
        t = (d + twice).mul_(d).mean(-1, keepdim=True).div_(mean)
        s = (1 + t).sqrt()
        found = d * (scale / s)
        if weight is not None:
            found = found.mul_(weight)
        return found.addcmul_(weighted, t.mul_(-scale).div_(s * (1 + s)))

    return partial(in_blocks, difference, a)
