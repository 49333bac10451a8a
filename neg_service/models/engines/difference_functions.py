"""Differences of elementwise functions, f(a + d) - f(a), to the last digits of d however small d is.

Subtracting the two values loses the digits that they share. Each function here is rewritten so that nothing nearly
equal is subtracted, and what depends on `a` alone, the row without a shift, is worked out once. Each takes `a`, in
float64, and the precision of differences, and gives a function of d; a broadcasts against d, and d is not written to.

    swish, x·σ(g(x)), where g(a) ≥ 0 with q = exp(-g(a)), e = expm1(-dg):     (d - e·c) / (1 + q + q·e), c = a·q/(1+q)
        where it is negative with q = exp(g(a)), e = expm1(dg):               (q·d + e·(q·d + c)) / (1 + q + q·e)
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
# From those of two operands, of which one may have none.
DifferenceOfTwo = Callable[[Tensor | None, Tensor | None], Tensor]

# How large g(a) may be, and exponents of e: products of both stay within float32, and what is beyond changes nothing.
_FAR, _MOST = 40.0, 80.0
# Up to where three Gauss points are exact, to 2e-9 and to 1e-14; beyond, the density's integral is not small against
# its ends, whose difference then has its digits.
_NEAR = {torch.float32: 0.25, torch.float64: 0.03}
_GAUSS = ((0.5 - math.sqrt(0.15), 5 / 18), (0.5, 8 / 18), (0.5 + math.sqrt(0.15), 5 / 18))
_CUBIC, _SQRT_2_PI = 0.044715, math.sqrt(2 / math.pi)
# On a CPU so many values at a time: they stay in the processor's cache from step to step.
_BLOCK = 2**16


def in_blocks(function: Callable[..., Tensor], a: Tensor, *parts: Tensor) -> Tensor:
    """A function of tensors of one shape, each row by itself, a few rows at a time where that is faster.

    `a` is the row without a shift, or one of each prompt: of as many axes, of one element where the others have rows.
    """
    first = parts[0]
    if first.device.type != "cpu" or first.numel() < 2 * _BLOCK:
        return function(*parts)
    axis = next((i for i, (one, n) in enumerate(zip(a.shape, first.shape, strict=True)) if n > 1 and one == 1), None)
    if axis is None:
        return function(*parts)
    found = torch.empty_like(first)
    at_once = max(1, _BLOCK * first.shape[axis] // first.numel())
    for start in range(0, first.shape[axis], at_once):
        own = min(at_once, first.shape[axis] - start)
        found.narrow(axis, start, own).copy_(function(*(part.narrow(axis, start, own) for part in parts)))
    return found


def silu(a: Tensor, dtype: torch.dtype) -> Difference:
    """x·σ(x)."""
    return _swish(a, a, lambda d: d, nn.functional.silu, dtype)


def gelu(a: Tensor, dtype: torch.dtype, approximate: str = "none") -> Difference:
    """x·Φ(x), or its approximation by tanh, which is x·σ(2·√(2/π)·(x + 0.044715·x³))."""
    plain = partial(nn.functional.gelu, approximate=approximate)
    if approximate == "none":
        return _gelu(a, dtype)
    scale = 2 * _SQRT_2_PI
    # scale·(d + c·((a+d)³ - a³)) = d·(scale + scale·c·(3a² + 3a·d + d²))
    squared, linear = (scale * (1 + 3 * _CUBIC * a**2)).to(dtype), (3 * scale * _CUBIC * a).to(dtype)

    def inner(d: Tensor) -> Tensor:
        return torch.addcmul(squared, d, linear + (scale * _CUBIC) * d).mul_(d)

    return _swish(a, scale * (a + _CUBIC * a**3), inner, plain, dtype)


def _swish(a: Tensor, inner: Tensor, inner_difference: Difference, plain: Difference, dtype: torch.dtype) -> Difference:
    """x·σ(g(x)), of g(a) and the difference of g; `plain` is the function itself."""
    if inner.abs().amax() > _FAR:
        return lambda d: (plain(a + d) - plain(a)).to(d.dtype)
    # By exponentials of what is negative, so that 1 + q + q·e never is a difference of large numbers.
    is_negative, q = inner < 0, torch.exp(-inner.abs())
    sign, c = torch.where(is_negative, 1.0, -1.0), a * q / (1 + q)
    of_d, of_both, of_e = torch.where(is_negative, q, 1.0), torch.where(is_negative, q, 0.0), sign * c
    sign, one_q, q, of_d, of_both, of_e = (own.to(dtype) for own in (sign, 1 + q, q, of_d, of_both, of_e))

    def difference(d: Tensor) -> Tensor:
        e = (inner_difference(d) * sign).clamp_(max=_MOST).expm1_()
        below = torch.addcmul(one_q, q, e)
        return torch.addcmul(of_e, of_both, d).mul_(e).addcmul_(of_d, d).div_(below)

    return partial(in_blocks, difference, a)


def _gelu(a: Tensor, dtype: torch.dtype) -> Difference:
    own, before = a.to(dtype), torch.erf(a * math.sqrt(0.5)).to(dtype)

    def difference(d: Tensor) -> Tensor:
        after = own + d
        # By erfc, which keeps the digits of what is nearly zero.
        found = torch.erfc(after * -math.sqrt(0.5)).mul_(0.5).mul_(d)
        density = torch.zeros_like(d)
        for place, weight in _GAUSS:
            density.add_(
                torch.add(own, d, alpha=place).square_().mul_(-0.5).exp_(), alpha=weight / math.sqrt(2 * math.pi)
            )
        near = density.mul_(d)
        far = (torch.erf(after.mul_(math.sqrt(0.5))) - before).mul_(0.5)
        return found.addcmul_(own, torch.where(d.abs() <= _NEAR[dtype], near, far))

    return partial(in_blocks, difference, a)


def tanh(a: Tensor, dtype: torch.dtype) -> Difference:
    own, before = a.to(dtype), a.tanh().to(dtype)

    def difference(d: Tensor) -> Tensor:
        return torch.tanh(own + d).mul_(-before).add_(1).mul_(torch.tanh(d))

    return partial(in_blocks, difference, a)


def sigmoid(a: Tensor, dtype: torch.dtype) -> Difference:
    of_tanh = tanh(a / 2, dtype)
    return lambda d: of_tanh(d / 2).mul_(0.5)


def relu(a: Tensor, dtype: torch.dtype) -> Difference:
    is_on, own = a > 0, a.to(dtype)

    def difference(d: Tensor) -> Tensor:
        # From above zero down to it at the most; from below only what rises above it.
        return torch.where(is_on, torch.maximum(d, -own), (own + d).clamp_(min=0))

    return partial(in_blocks, difference, a)


def clamp(a: Tensor, dtype: torch.dtype, low: float | None, high: float | None) -> Difference:
    inside = a.clamp(low, high)
    beyond = (a - inside).to(dtype)
    least, most = (None if end is None else (end - inside).to(dtype) for end in (low, high))
    return lambda d: (d + beyond).clamp(least, most)


def power(a: Tensor, dtype: torch.dtype, exponent: float) -> Difference | None:
    """Of 1, 2, 3, 1/2 and -1/2; None of others."""
    rules: dict[float, Callable[[Tensor, torch.dtype], Difference]] = {
        1: lambda _a, _dtype: torch.clone,
        2: square,
        3: _cube,
        0.5: sqrt,
        -0.5: rsqrt,
    }
    return None if exponent not in rules else rules[exponent](a, dtype)


def square(a: Tensor, dtype: torch.dtype) -> Difference:
    twice = (2 * a).to(dtype)
    return partial(in_blocks, lambda d: (d + twice).mul_(d), a)


def _cube(a: Tensor, dtype: torch.dtype) -> Difference:
    thrice, square_thrice = (3 * a).to(dtype), (3 * a * a).to(dtype)
    return lambda d: (d + thrice).mul_(d).add_(square_thrice).mul_(d)


def sqrt(a: Tensor, dtype: torch.dtype) -> Difference:
    own, before = a.to(dtype), a.sqrt().to(dtype)
    return lambda d: d / ((own + d).sqrt_() + before)


def rsqrt(a: Tensor, dtype: torch.dtype) -> Difference:
    own, before = a.to(dtype), a.rsqrt().to(dtype)

    def difference(d: Tensor) -> Tensor:
        t = d / own
        s = (1 + t).sqrt_()
        return t.mul_(before).neg_().div_(s * (1 + s))

    return difference


def exp(a: Tensor, dtype: torch.dtype) -> Difference:
    before = a.exp().to(dtype)
    return lambda d: torch.expm1(d).mul_(before)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> DifferenceOfTwo:
    """(a + d_a)·(b + d_b) - a·b = d_a·(b + d_b) + a·d_b, of differences with as many features or one."""
    own, other = a.to(dtype), b.to(dtype)

    def difference(d_a: Tensor, d_b: Tensor) -> Tensor:
        return torch.mul(d_a, other + d_b).addcmul_(own, d_b)

    def of_known(d_a: Tensor | None, d_b: Tensor | None) -> Tensor:
        if d_a is not None and d_b is not None:
            return in_blocks(difference, a, d_a, d_b) if d_a.shape == d_b.shape else difference(d_a, d_b)
        return d_a * other if d_a is not None else _known(d_b) * own

    return of_known


def quotient(a: Tensor, b: Tensor, dtype: torch.dtype) -> DifferenceOfTwo:
    """(a + d_a)/(b + d_b) - a/b = (d_a - (a/b)·d_b)/(b + d_b)."""
    minus, below = (-a / b).to(dtype), b.to(dtype)

    def difference(d_a: Tensor | None, d_b: Tensor | None) -> Tensor:
        if d_b is None:
            return _known(d_a) / below
        above = d_b * minus
        return (above if d_a is None else above + d_a) / (below + d_b)

    return difference


def _known(d: Tensor | None) -> Tensor:
    # A step has at least one difference.
    assert d is not None
    return d


def softmax(p: Tensor, dtype: torch.dtype) -> Difference:
    """Of probabilities p [..., S] over the last axis: p·(e - m)/(1 + m), e = expm1(d), m = Σ p·e."""
    p = p.to(dtype)

    def difference(d: Tensor) -> Tensor:
        # What is added to all scores changes nothing, and keeps exponentials finite.
        e = torch.expm1(d - (d.amax(-1, keepdim=True) - _MOST).clamp_(min=0))
        m = (p * e).sum(-1, keepdim=True)
        return (e - m).mul_(p).div_(1 + m)

    return difference


def layer_norm(a: Tensor, dtype: torch.dtype, weight: Tensor | None, eps: float) -> Difference:
    """(x - mean)/√(variance + eps), times a weight, over the last axis."""
    return _scaled_to_one(a - a.mean(-1, keepdim=True), dtype, weight, eps, is_centred=True)


def rms_norm(a: Tensor, dtype: torch.dtype, weight: Tensor | None, eps: float) -> Difference:
    """x/√(mean of squares + eps), times a weight, over the last axis."""
    return _scaled_to_one(a, dtype, weight, eps, is_centred=False)


def _scaled_to_one(a: Tensor, dtype: torch.dtype, weight: Tensor | None, eps: float, *, is_centred: bool) -> Difference:
    """d·r' + a·(r' - r) of r = mean^(-1/2), where the mean of squares changes by that of d·(d + 2a)."""
    mean = a.square().mean(-1, keepdim=True) + eps
    weighted = a if weight is None else a * weight
    twice, scale, weighted, mean = (own.to(dtype) for own in (2 * a, mean.rsqrt(), weighted, mean))
    factor = None if weight is None else weight.to(dtype)

    def difference(d: Tensor) -> Tensor:
        if is_centred:
            d = d - d.mean(-1, keepdim=True)
        t = (d + twice).mul_(d).mean(-1, keepdim=True).div_(mean)
        s = (1 + t).sqrt_()
        found = d * (scale / s)
        if factor is not None:
            found = found.mul_(factor)
        return found.addcmul_(weighted, t.mul_(-scale).div_(s * (1 + s)))

    return partial(in_blocks, difference, a)
