"""Products of differences with a model's weights: the one place where a row of differences meets a large matrix.

A product of differences has the relative error of its own sums, so it may be coarser than the row without a shift. In
what precision it is computed:

| weights          | `exact`                               | `fast`                              |
|------------------|---------------------------------------|-------------------------------------|
| float32, float64 | as they are                           | the same: nothing is faster         |
| bfloat16         | differences keep 16 binary digits, +  | differences are rounded to bfloat16 |

Sums are float32 in both. On a GPU of NVIDIA bfloat16 is multiplied as it is, with float32 sums, and `exact` is two such
products, of the difference's first eight bits and of the next eight. Elsewhere no library gives float32 sums of
bfloat16, so a few rows of the weight at a time become float32, which rounds nothing; `fast` is no faster there.

Axes: R rows, F features of the difference, G features of the product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

# d [R, F] times the transpose of a weight [G, F], or a weight [F, G] as it is: [R, G], in d's precision.
Product = Callable[[Tensor, Tensor, bool], Tensor]

EXACT, FAST = "exact", "fast"
# About so many of a weight's values are converted at a time. Smaller pieces make products slower than they save memory.
_TILE = 2**20


def product_of(mode: str) -> Product:
    """How differences are multiplied; `mode` counts for weights in bfloat16."""
    return _fast if mode == FAST else _exact


def plain_product(d_rf: Tensor, weight: Tensor, is_transposed: bool) -> Tensor:
    """Of tensors of one precision. To be replaced where a library has a faster product."""
    # `linear`, because what converts large weights piece by piece for a moment (`in_precision`) knows it.
    return torch.mm(d_rf, weight) if is_transposed else nn.functional.linear(d_rf, weight)


def _exact(d_rf: Tensor, weight: Tensor, is_transposed: bool) -> Tensor:
    if weight.dtype == d_rf.dtype:
        return plain_product(d_rf, weight, is_transposed)
    if _has_float32_sums(d_rf, weight):
        first = d_rf.to(weight.dtype)
        rest = (d_rf - first).to(weight.dtype)
        return _float32_sums(first, weight, is_transposed).add_(_float32_sums(rest, weight, is_transposed))
    return _in_tiles(d_rf, weight, is_transposed)


def _fast(d_rf: Tensor, weight: Tensor, is_transposed: bool) -> Tensor:
    if weight.dtype != torch.bfloat16 or d_rf.dtype != torch.float32:
        return _exact(d_rf, weight, is_transposed)
    rounded = d_rf.to(weight.dtype)
    if _has_float32_sums(d_rf, weight):
        return _float32_sums(rounded, weight, is_transposed)
    return _in_tiles(rounded.to(d_rf.dtype), weight, is_transposed)


def _has_float32_sums(d_rf: Tensor, weight: Tensor) -> bool:
    # A difference of float16 weights may be smaller than float16 reaches.
    is_bfloat16 = weight.dtype == torch.bfloat16 and d_rf.dtype == torch.float32
    return weight.is_cuda and is_bfloat16 and _cuda_gives_float32()


@functools.cache
def _cuda_gives_float32() -> bool:
    """Whether this torch multiplies bfloat16 into float32, which older ones do not."""
    few = torch.ones(16, 16, dtype=torch.bfloat16, device="cuda")
    try:
        return bool(torch.mm(few, few, out_dtype=torch.float32).dtype == torch.float32)
    except (TypeError, RuntimeError):
        return False


def _float32_sums(d_rf: Tensor, weight: Tensor, is_transposed: bool) -> Tensor:
    return torch.mm(d_rf, weight if is_transposed else weight.mT, out_dtype=torch.float32)


def _in_tiles(d_rf: Tensor, weight: Tensor, is_transposed: bool) -> Tensor:
    """With the weight converted to d's precision, a few of its outputs at a time."""
    weight_gf = weight.mT if is_transposed else weight
    found_rg = d_rf.new_empty(len(d_rf), len(weight_gf))
    n_tiles = -(-weight_gf.numel() // _TILE)
    at_once = -(-len(weight_gf) // n_tiles)
    for start in range(0, len(weight_gf), at_once):
        tile = weight_gf[start : start + at_once].to(d_rf.dtype)
        torch.mm(d_rf, tile.mT, out=found_rg[:, start : start + at_once])
    return found_rg
