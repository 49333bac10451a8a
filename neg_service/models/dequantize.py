"""What quantised numbers stand for: the arithmetic of each format, on tensors alone.

Every function gives plain weights in `work`, float32 or float64, from codes and scales as they are stored. Nothing is
rounded before the product of code and scale; a serving kernel that computes it in bfloat16 rounds more.

Axes: X = experts, R = rows of a weight (outputs), C = its columns (inputs); of grids of scales in blocks of a × b
⌈R/a⌉ × ⌈C/b⌉, where the last blocks may be cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from neg_service.errors import ModelError

# The numbers of a 4-bit float (e2m1) in the order of their codes.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# Where AWQ puts eight neighbouring columns in an integer, the lowest four bits first.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def by_expert(dequantize: Callable[..., Tensor], tensors: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    """Experts one after the other [X, ...], so that only one is ever held in more than `dtype`.

    dequantize: of one expert's tensors, and the dtype to work in.
    """
    work = torch.promote_types(dtype, torch.float32)
    parts: Tensor | None = None
    n_experts = next(own.shape[0] for own in tensors if own is not None)
    for x in range(n_experts):
        one = dequantize(*(None if own is None else own[x] for own in tensors), work)
        if parts is None:
            parts = torch.empty((n_experts, *one.shape), dtype=dtype)
        parts[x] = one
    assert parts is not None
    return parts


def scale_values(scale: Tensor, work: torch.dtype) -> Tensor:
    """Scales as numbers; stored as bytes they are exponents, 2^(byte - 127)."""
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    if scale.dtype == torch.float8_e8m0fnu:
        # Not every pair of types can be converted to each other directly.
        scale = scale.to(torch.float32)
    return scale.to(work)


def fp4_values(packed: Tensor, work: torch.dtype) -> Tensor:
    """The 4-bit floats of bytes [..., n], the lower four bits first: [..., 2n]."""
    codes = packed.contiguous().view(torch.uint8)
    table = torch.tensor(_FP4, dtype=work)
    return torch.stack([table[(codes & 15).int()], table[(codes >> 4).int()]], -1).flatten(-2)


def unpacked(packed: Tensor, bits: int, dim: int) -> Tensor:
    """The whole numbers of `bits` bits in 32-bit integers, without sign, along `dim`, the lowest bits first."""
    moved = packed.movedim(dim, -1)
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes: Tensor = (moved.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.flatten(-2).movedim(-1, dim)


def over_blocks(grid: Tensor, shape: Sequence[int], block: tuple[int, int]) -> Tensor:
    """A grid of scales, one for each a × b block, as one for each of R × C values."""
    rows, columns = shape
    return grid.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]


def scaled(
    codes: Tensor, scale: Tensor, zero: Tensor | None, block: tuple[int, int] | None, work: torch.dtype
) -> Tensor:
    """(code - zero) · scale [R, C]; block: of what a scale is for, None where it broadcasts."""
    values, numbers = codes.to(work), scale_values(scale, work)
    zeros = None if zero is None else zero.to(work)
    if block is not None:
        numbers = over_blocks(numbers, codes.shape, block)
        zeros = None if zeros is None else over_blocks(zeros, codes.shape, block)
    if zeros is not None:
        values = values - zeros
    return values * numbers


def mxfp4(blocks: Tensor, scales: Tensor, work: torch.dtype) -> Tensor:
    """One expert of gpt-oss: blocks [R, C/32, 16], scales [R, C/32], transposed to what the model has, [C, R]."""
    values = fp4_values(blocks, work) * scale_values(scales, work).unsqueeze(-1)
    return values.flatten(-2).T


def packed_integers(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    groups: Tensor | None,
    *,
    bits: int,
    shape: tuple[int, int],
    block: tuple[int, int] | None,
    work: torch.dtype,
) -> Tensor:
    """compressed-tensors' `pack-quantized`: numbers with an offset of 2^(bits-1) along columns, zero points along rows.

    groups: of each column, where groups are not of neighbours; without it, or below 0, they are.
    """
    offset = 2 ** (bits - 1)
    codes = unpacked(packed, bits, 1)[:, : shape[1]] - offset
    if zero is not None and zero.dtype == torch.int32:
        zero = unpacked(zero, bits, 0)[: shape[0]] - offset
    if groups is not None and bool((groups >= 0).all()):
        taken = checked_groups(groups, scale.shape[1])
        return scaled(codes, scale[:, taken], None if zero is None else zero[:, taken], None, work)
    return scaled(codes, scale, zero, block, work)


def gptq(
    codes: Tensor,
    zeros: Tensor,
    scales: Tensor,
    groups: Tensor,
    *,
    bits: int,
    zero_is_one_less: bool,
    work: torch.dtype,
) -> Tensor:
    """GPTQ: packed along inputs [C·bits/32, R], zero points [groups, R·bits/32], scales [groups, R]; gives [R, C].

    groups: of each input. zero_is_one_less: as the first version of the format stores zero points.

    Raises:
        ModelError: a zero point of which programs make different numbers; groups that are not there.
    """
    zero = unpacked(zeros, bits, 1)
    if zero_is_one_less:
        if bool((zero == 2**bits - 1).any()):
            raise ModelError(
                f"has a zero point of {2**bits}, which does not fit its {bits} bits: programs that read this format "
                "(gptq) make different numbers of it: save it as gptq_v2",
                change="model.source",
            )
        zero = zero + 1
    taken = checked_groups(groups, scales.shape[0])
    return ((unpacked(codes, bits, 0) - zero[taken]).to(work) * scales.to(work)[taken]).T


def awq(codes: Tensor, zeros: Tensor, scales: Tensor, group: int, work: torch.dtype) -> Tensor:
    """AWQ (gemm): packed along outputs [C, R/8], zero points [groups, R/8], scales [groups, R]; gives [R, C]."""
    order = torch.tensor(_AWQ_ORDER).argsort()
    numbers, zero = (unpacked(own, 4, 1).reshape(len(own), -1, 8)[:, :, order].flatten(1) for own in (codes, zeros))
    return scaled(numbers, scales, zero, (group, 1), work).T


def table_values(
    packed: Tensor,
    absmax: Tensor,
    table: Tensor,
    nested: tuple[Tensor, Tensor, int, float] | None,
    *,
    shape: Sequence[int],
    block: int,
    work: torch.dtype,
) -> Tensor:
    """bitsandbytes' 4 bits: table[code] · absmax of its block, over the flattened weight, the upper four bits first.

    nested: where absmax are codes themselves, their own absmax and table, the size of their blocks, and what is added.
    """
    sizes = absmax.to(work)
    if nested is not None:
        own, own_table, own_block, offset = nested
        sizes = own_table.to(work)[absmax.int()] * own.to(work).repeat_interleave(own_block)[: len(absmax)] + offset
    codes = packed.contiguous().view(torch.uint8).flatten()
    numbers = table.to(work)[torch.stack([codes >> 4, codes & 15], -1).flatten().int()]
    n = int(torch.Size(shape).numel())
    return (numbers[:n] * sizes.repeat_interleave(block)[:n]).reshape(tuple(shape))


def checked_groups(groups: Tensor, n: int) -> Tensor:
    """The group of each input, as an index.

    Raises:
        ModelError: one that is not there; a negative one would count from the end.
    """
    if int(groups.min()) < 0 or int(groups.max()) >= n:
        raise ModelError(
            f"g_idx names groups from {int(groups.min())} to {int(groups.max())}, but there are {n}",
            change="model.source",
        )
    return groups.long()
