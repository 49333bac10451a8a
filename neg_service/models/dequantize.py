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


def pairs_of(table: Tensor, packed: Tensor, is_low_first: bool) -> Tensor:
    """What a table has at the two codes of 4 bits in each byte [..., n]: [..., 2n]."""
    # One look-up for a byte in the place of two, and of taking it apart.
    low, high = table.repeat(16), table.repeat_interleave(16)
    both = torch.stack([low, high] if is_low_first else [high, low], -1)
    return both[packed.contiguous().view(torch.uint8).int()].flatten(-2)


def fp4_values(packed: Tensor, work: torch.dtype) -> Tensor:
    """The 4-bit floats of bytes [..., n], the lower four bits first: [..., 2n]."""
    return pairs_of(torch.tensor(_FP4, dtype=work), packed, is_low_first=True)


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """The numbers of 2, 4 or 8 bits in 32-bit integers [..., n], without sign, the lowest bits first, as bytes."""
    in_bytes = packed.contiguous().view(torch.uint8)
    if bits == 8:
        return in_bytes
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    codes: Tensor = (in_bytes.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.flatten(-2)


def over_columns(grid: Tensor, columns: int, width: int) -> Tensor:
    """A grid of scales, one for each `width` columns, as one for each column."""
    rows, n = grid.shape
    return grid.unsqueeze(-1).expand(rows, n, width).reshape(rows, n * width)[:, :columns]


def scaled(
    codes: Tensor, scale: Tensor, zero: Tensor | None, block: tuple[int, int] | None, work: torch.dtype
) -> Tensor:
    """(code - zero) · scale [R, C]; block: of what a scale is for, None where it broadcasts."""
    values, scales = codes.to(work), scale_values(scale, work)
    zeros = None if zero is None else zero.to(work)
    if block is None:
        values = values if zeros is None else values.sub_(zeros)
        return values.mul_(scales)
    height, width = block
    # In place and in views, so that the grid is never as large as the weight.
    if height == 1 and codes.shape[1] % width == 0:
        groups = values.view(len(values), -1, width)
        groups = groups if zeros is None else groups.sub_(zeros.unsqueeze(-1))
        return groups.mul_(scales.unsqueeze(-1)).view(values.shape)
    scales = over_columns(scales, codes.shape[1], width)
    zeros = None if zeros is None else over_columns(zeros, codes.shape[1], width)
    for i, start in enumerate(range(0, len(values), height)):
        if zeros is not None:
            values[start : start + height] -= zeros[i]
        values[start : start + height] *= scales[i]
    return values


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
    codes = unpacked(packed, bits)[:, : shape[1]]
    # Both have the offset, or neither.
    if zero is None:
        zero = torch.full_like(scale, offset)
    elif zero.dtype == torch.int32:
        zero = unpacked(zero.T, bits)[:, : shape[0]].T
    else:
        zero = zero.to(work) + offset
    if groups is not None and bool((groups >= 0).all()):
        taken = checked_groups(groups, scale.shape[1])
        return scaled(codes, scale[:, taken], zero[:, taken], None, work)
    return scaled(codes, scale, zero, block, work)


def gptq(
    codes: Tensor,
    zeros: Tensor,
    scales: Tensor,
    groups: Tensor,
    *,
    group: int,
    bits: int,
    zero_is_one_less: bool,
    work: torch.dtype,
) -> Tensor:
    """GPTQ: packed along inputs [C·bits/32, R], zero points [groups, R·bits/32], scales [groups, R]; gives [R, C].

    groups: of each input; group: their size, where they are of neighbours. zero_is_one_less: zero points are stored so
    in the first version of the format.

    Raises:
        ModelError: a zero point of which programs make different numbers; groups that are not there.
    """
    zero = unpacked(zeros, bits)
    if zero_is_one_less:
        if bool((zero == 2**bits - 1).any()):
            raise ModelError(
                f"has a zero point of {2**bits}, which does not fit its {bits} bits: programs that read this format "
                "(gptq) make different numbers of it: save it as gptq_v2",
                change="model.source",
            )
        zero = zero + 1
    if torch.equal(groups, torch.arange(len(groups), dtype=groups.dtype) // group):
        return scaled(unpacked(codes.T, bits), scales.T, zero.T, (1, group), work)
    taken = checked_groups(groups, scales.shape[0])
    return scaled(unpacked(codes.T, bits), scales.T[:, taken], zero.T[:, taken], None, work)


def awq(codes: Tensor, zeros: Tensor, scales: Tensor, group: int, work: torch.dtype) -> Tensor:
    """AWQ (gemm): packed along outputs [C, R/8], zero points [groups, R/8], scales [groups, R]; gives [R, C]."""
    shifts = 4 * torch.tensor(_AWQ_ORDER, dtype=torch.int32).argsort().int()
    numbers, zero = (((own.unsqueeze(-1) >> shifts) & 15).to(torch.uint8).flatten(1).T for own in (codes, zeros))
    return scaled(numbers.contiguous(), scales.T, zero, (1, group), work)


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
    n = int(torch.Size(shape).numel())
    values = pairs_of(table.to(work), packed.flatten(), is_low_first=False)[:n]
    whole = n - n % block
    values[:whole].view(-1, block).mul_(sizes[: whole // block, None])
    values[whole:] *= sizes[-1]
    return values.reshape(tuple(shape))


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
