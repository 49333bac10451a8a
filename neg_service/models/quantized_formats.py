"""How quantised weights lie in files: which tensors belong to a weight, and of which shape they have to be.

A format is a row: by which tensor a quantised weight is known (its name and its type, never what a configuration lists,
for lists of modules name them otherwise than files do), which others belong to it, and a function that looks at their
headers and gives the plain weight's shape and what computes it. Shapes decide how scales are laid over a weight; where
they fit in no way, or in two, the weight is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

from neg_service.models import dequantize
from neg_service.models.folder import StoredTensor

Parts = Mapping[str, StoredTensor]
Settings = Mapping[str, Any]
Block = tuple[int, int]
# A weight's plain values from the tensors that belong to it, in a dtype.
Compute = Callable[[Mapping[str, Tensor], torch.dtype], Tensor]

_FLOATS_OF_8_BITS = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_SCALES = ("F64", "F32", "F16", "BF16", "F8_E8M0", "U8")


class Unfit(ValueError):
    """The tensors of a weight do not belong together; says why."""


@dataclass(frozen=True)
class Format:
    """One way in which a weight is stored.

    known_by: the name of the tensor that tells it, with a group `stem`; dtypes: of this tensor, any if left out.
    plain: the weight's name. needs, may_have: names of what belongs to it, the first that is there; {module} is what
    stands before the last point of {stem}.
    """

    known_by: re.Pattern[str]
    plain: str
    needs: Mapping[str, Sequence[str]]
    arrange: Callable[[Parts, Settings], tuple[tuple[int, ...], Compute]]
    may_have: Mapping[str, Sequence[str]] = field(default_factory=dict)
    dtypes: Sequence[str] = ()

    def is_of(self, name: str, dtype: str) -> re.Match[str] | None:
        """The match of its name, if a tensor tells of this format."""
        return self.known_by.fullmatch(name) if not self.dtypes or dtype in self.dtypes else None


def _scaled_weight(
    block_sizes: Callable[[Settings], Iterable[Block]], parts: Parts, settings: Settings, is_fp4: bool = False
) -> Any:
    """Numbers of 8 bits, or 4-bit floats in bytes, with a scale for all, for rows or for blocks; experts or one."""
    weight, scale, zero = parts["weight"], parts["scale"], parts.get("zero")
    rows, columns = _matrix(weight, 2 if is_fp4 else 1)
    _require_scales(scale)
    n_experts = weight.shape[0] if len(weight.shape) == 3 else None
    grid = _grid(scale, n_experts)
    if zero is not None and zero.shape != scale.shape:
        raise Unfit(f"zero points {list(zero.shape)}, but scales {list(scale.shape)}")
    block = _block((rows, columns), grid, block_sizes(settings))

    def one(weight: Tensor, scale: Tensor, zero: Tensor | None, work: torch.dtype) -> Tensor:
        codes = dequantize.fp4_values(weight, work) if is_fp4 else weight
        return dequantize.scaled(codes, scale.reshape(grid), None if zero is None else zero.reshape(grid), block, work)

    def compute(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        own = (tensors["weight"], tensors["scale"], tensors.get("zero"))
        if n_experts is None:
            return one(*own, torch.promote_types(dtype, torch.float32)).to(dtype)
        each = [None if it is None else it.reshape(1).expand(n_experts) if it.numel() == 1 else it for it in own]
        return dequantize.by_expert(one, each, dtype)

    return (*weight.shape[:-1], columns), compute


def _mxfp4(parts: Parts, _settings: Settings) -> Any:
    blocks, scales = parts["weight"], parts["scale"]
    if len(blocks.shape) != 4 or blocks.shape[-1] != 16 or blocks.shape[:-1] != scales.shape:
        raise Unfit(f"blocks {list(blocks.shape)} of which the last axis is to be 16, and scales {list(scales.shape)}")
    n_experts, rows, n_blocks, _ = blocks.shape

    def compute(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return dequantize.by_expert(dequantize.mxfp4, [tensors["weight"], tensors["scale"]], dtype)

    return (n_experts, 32 * n_blocks, rows), compute


def _packed_fp4(parts: Parts, _settings: Settings) -> Any:
    """4-bit floats in bytes with scales of 16 or 32 columns; these times `multiplier`, or divided by `divisor`."""
    weight, scale = parts["weight"], parts["scale"]
    shape = _matrix(weight, 2)
    block = _block(shape, scale.shape, [(1, 32)] if scale.dtype in ("U8", "F8_E8M0") else [(1, 16)])
    if len(weight.shape) != 2:
        raise Unfit(f"codes {list(weight.shape)}, which are no matrix")
    for factor in (parts.get("divisor"), parts.get("multiplier")):
        if factor is not None and prod(factor.shape) != 1:
            raise Unfit(f"{factor.name} has {prod(factor.shape)} values in the place of one")
    if scale.dtype in _FLOATS_OF_8_BITS and not {"divisor", "multiplier"} & set(parts):
        raise Unfit("scales of 8 bits without the scale of these scales")

    def compute(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        work = torch.promote_types(dtype, torch.float32)
        numbers = dequantize.scale_values(tensors["scale"], work)
        if "divisor" in tensors:
            numbers = numbers / tensors["divisor"].to(work).reshape(())
        if "multiplier" in tensors:
            numbers = numbers * tensors["multiplier"].to(work).reshape(())
        values = dequantize.fp4_values(tensors["weight"], work)
        return dequantize.scaled(values, numbers, None, block, work).to(dtype)

    return shape, compute


def _packed_integers(parts: Parts, settings: Settings) -> Any:
    weight, scale, zero = parts["weight"], parts["scale"], parts.get("zero")
    try:
        rows, columns = map(int, parts["shape"].read().tolist())
    except (TypeError, ValueError) as error:
        raise Unfit(f"{parts['shape'].name} is no shape of a matrix") from error
    groups = parts.get("groups")
    bits = next((own for own in (2, 4, 8) if weight.shape == (rows, ceil(columns * own / 32))), None)
    if bits is None:
        raise Unfit(f"codes {list(weight.shape)} are no packed [{rows}, {columns}] of 2, 4 or 8 bits")
    if groups is not None and groups.shape != (columns,):
        raise Unfit(f"{groups.name} is {list(groups.shape)}, and there are {columns} columns")
    is_packed, n_groups = zero is not None and zero.dtype == "I32", (scale.shape or (1,))[-1]
    if zero is not None and zero.shape != (ceil(rows * bits / 32) if is_packed else rows, n_groups):
        raise Unfit(f"zero points {list(zero.shape)}, but scales {list(scale.shape)}")
    block = _block((rows, columns), _grid(scale, None), _sizes_of_groups(settings))

    def compute(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        own = (tensors["weight"], tensors["scale"].reshape(_grid(scale, None)), tensors.get("zero"))
        work = torch.promote_types(dtype, torch.float32)
        more: Any = {"bits": bits, "shape": (rows, columns), "block": block, "work": work}
        return dequantize.packed_integers(*own, tensors.get("groups"), **more).to(dtype)

    return (rows, columns), compute


def _gptq(parts: Parts, settings: Settings) -> Any:
    codes, zeros, scales, groups = parts["weight"], parts["zero"], parts["scale"], parts.get("groups")
    n_groups, rows = _matrix(scales)
    bits = zeros.shape[-1] * 32 // rows
    if bits not in (2, 4, 8) or zeros.shape != (n_groups, ceil(rows * bits / 32)) or rows * bits % 32:
        raise Unfit(f"zero points {list(zeros.shape)} and scales {list(scales.shape)} are not of 2, 4 or 8 bits")
    columns = codes.shape[0] * 32 // bits
    if codes.shape != (columns * bits // 32, rows) or (groups is not None and groups.shape != (columns,)):
        raise Unfit(f"codes {list(codes.shape)}, scales {list(scales.shape)}")
    block = _block((columns, rows), scales.shape, [(_size_of_group(settings, columns), 1)]) or (columns // n_groups, 1)
    is_less = str(settings.get("checkpoint_format", settings.get("format", "gptq"))) == "gptq"

    def compute(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        named = tensors.get("groups", torch.arange(columns) // block[0])
        own = (tensors["weight"], tensors["zero"], tensors["scale"], named)
        work = torch.promote_types(dtype, torch.float32)
        return dequantize.gptq(*own, group=block[0], bits=bits, zero_is_one_less=is_less, work=work).to(dtype)

    return (rows, columns), compute


def _awq(parts: Parts, settings: Settings) -> Any:
    codes, zeros, scales = parts["weight"], parts["zero"], parts["scale"]
    (columns, packed), (n_groups, rows) = _matrix(codes), _matrix(scales)
    group = _size_of_group(settings, columns)
    if 8 * packed != rows or zeros.shape != (n_groups, packed) or n_groups != ceil(columns / group):
        raise Unfit(
            f"codes {list(codes.shape)}, zero points {list(zeros.shape)} and scales {list(scales.shape)} in groups of "
            f"{group}"
        )

    def compute(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        work = torch.promote_types(dtype, torch.float32)
        return dequantize.awq(tensors["weight"], tensors["zero"], tensors["scale"], group, work).to(dtype)

    return (rows, columns), compute


def _bitsandbytes_4_bits(parts: Parts, _settings: Settings) -> Any:
    try:
        state = json.loads(bytes(parts["state"].read().tolist()))
        shape, block = tuple(map(int, state["shape"])), int(state["blocksize"])
        nested = (int(state["nested_blocksize"]), float(state["nested_offset"])) if "nested" in parts else None
    except (ValueError, LookupError, TypeError) as error:
        raise Unfit(f"{parts['state'].name} cannot be read: {error}") from error
    n, n_blocks = prod(shape), ceil(prod(shape) / block)
    if parts["scale"].shape != (n_blocks,) or parts["table"].shape != (16,):
        raise Unfit(f"absmax {list(parts['scale'].shape)}, but {n} values in blocks of {block}")
    if (nested is None) == (parts["scale"].dtype == "U8") or (nested and "nested_table" not in parts):
        raise Unfit(f"absmax of the type {parts['scale'].dtype}, which needs nested_absmax and nested_quant_map")

    def compute(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        inner = (tensors["nested"], tensors["nested_table"], *nested) if nested else None
        own = (tensors["weight"], tensors["scale"], tensors["table"], inner)
        work = torch.promote_types(dtype, torch.float32)
        return dequantize.table_values(*own, shape=shape, block=block, work=work).to(dtype)

    return shape, compute


def _bitsandbytes_8_bits(parts: Parts, _settings: Settings) -> Any:
    weight, scale, layout = parts["weight"], parts["scale"], parts.get("layout")
    if weight.dtype != "I8" or scale.shape != weight.shape[:1]:
        raise Unfit(f"SCB {list(scale.shape)}, and a weight {list(weight.shape)} of the type {weight.dtype}")
    if layout is not None and int(layout.read()) != 0:
        raise Unfit(f"weight_format is {int(layout.read())}: only rows (0) are known")

    def compute(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        work = torch.promote_types(dtype, torch.float32)
        # SCB is the largest of a row, whose code is 127.
        return dequantize.scaled(tensors["weight"], tensors["scale"].to(work)[:, None] / 127, None, None, work).to(
            dtype
        )

    return weight.shape, compute


def _matrix(stored: StoredTensor, values: int = 1) -> Block:
    """Rows and columns, of a weight or of each expert's."""
    if len(stored.shape) not in (2, 3):
        raise Unfit(f"{stored.name} is {list(stored.shape)}, which is no matrix")
    return stored.shape[-2], stored.shape[-1] * values


def _require_scales(scale: StoredTensor) -> None:
    if scale.dtype not in (*_SCALES, *_FLOATS_OF_8_BITS):
        raise Unfit(f"{scale.name} is of the type {scale.dtype}, and no scale")


def _grid(scale: StoredTensor, n_experts: int | None) -> tuple[int, ...]:
    """The shape of the scales of one weight: () or two axes."""
    if prod(scale.shape) == 1:
        return ()
    grid = scale.shape
    if n_experts is not None:
        if grid[0] != n_experts:
            raise Unfit(f"scales {list(scale.shape)} of {n_experts} experts")
        grid = grid[1:]
    if prod(grid) == 1:
        return ()
    if len(grid) != 2:
        raise Unfit(f"scales {list(scale.shape)}, which are neither one nor a grid")
    return grid


def _block(shape: Block, grid: Sequence[int], sizes: Iterable[Block]) -> Block | None:
    """How many rows and columns have a scale in common; None where the grid broadcasts.

    Raises:
        Unfit: in no way, or in several.
    """
    if not grid or all(own in (1, size) for own, size in zip(grid, shape, strict=True)):
        return None
    asked = list(dict.fromkeys(sizes))
    found = [size for size in asked if tuple(grid) == (ceil(shape[0] / size[0]), ceil(shape[1] / size[1]))]
    # Sizes beyond the weight's are all the same.
    if len({(min(a, shape[0]), min(b, shape[1])) for a, b in found}) == 1:
        return found[0]
    said = f"scales {list(grid)} of a weight {list(shape)}"
    if not asked:
        raise Unfit(f"{said}, and config.json tells no size of blocks")
    named = " or ".join(f"{a} × {b}" for a, b in found or asked)
    raise Unfit(f"{said} are not those of blocks of {named}{' alone' * bool(found)}")


def _sizes_of_blocks(settings: Settings) -> list[Block]:
    # An empty value says one scale a weight; what says nothing has the size of transformers' default.
    size = settings.get("weight_block_size", (128, 128))
    return [(int(size[0]), int(size[1]))] if size else []


def _sizes_of_groups(settings: Settings) -> list[Block]:
    found = []
    for group in (settings.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        if weights.get("block_structure"):
            a, b = weights["block_structure"]
            found.append((int(a), int(b)))
        if int(weights.get("group_size") or -1) > 0:
            found.append((1, int(weights["group_size"])))
    return found


def _size_of_group(settings: Settings, columns: int) -> int:
    size = int(settings.get("group_size", settings.get("q_group_size", 128)) or -1)
    return size if 0 < size <= columns else columns


def _format(known_by: str, plain: str, arrange: Any, dtypes: Sequence[str] = (), **names: str) -> Format:
    """A row; names that begin with `maybe_` need not be there, alternatives are parted by a space."""
    needs = {key: own.split() for key, own in names.items() if not key.startswith("maybe_")}
    may_have = {key.removeprefix("maybe_"): own.split() for key, own in names.items() if key.startswith("maybe_")}
    return Format(re.compile(known_by), plain, needs, arrange, may_have, dtypes)


_blocks = partial(_scaled_weight, _sizes_of_blocks)
_fp4_blocks = partial(_scaled_weight, lambda _settings: [(1, 32)], is_fp4=True)
_groups = partial(_scaled_weight, _sizes_of_groups)
_rows = partial(_scaled_weight, lambda _settings: [])
_ANY, _WEIGHT, _PACKED = r"(?P<stem>.+)", r"(?P<stem>.+\.weight)", r"(?P<stem>.+\.weight)_packed"
_SCALE = "{stem}_scale_inv {stem}_scale {module}.scale {module}.qscale_weight"
_ZERO = "{stem}_zero_point"
_OF_QWEIGHT = {"weight": "{stem}.qweight", "zero": "{stem}.qzeros", "scale": "{stem}.scales"}
_STATES = "{stem}.quant_state.bitsandbytes__nf4 {stem}.quant_state.bitsandbytes__fp4"

FP8 = (
    _format(_ANY, "{stem}", _blocks, _FLOATS_OF_8_BITS, weight="{stem}", scale=_SCALE),
    # DeepSeek V4's experts: two 4-bit floats in a byte.
    _format(_ANY, "{stem}", _fp4_blocks, ("I8",), weight="{stem}", scale=_SCALE),
)
FBGEMM = (_format(_ANY, "{stem}", _rows, _FLOATS_OF_8_BITS, weight="{stem}", scale="{stem}_scale"),)
MXFP4 = (_format(r"(?P<stem>.+)_blocks", "{stem}", _mxfp4, ("U8",), weight="{stem}_blocks", scale="{stem}_scales"),)
COMPRESSED_TENSORS = (
    _format(
        _WEIGHT,
        "{stem}",
        _groups,
        (*_FLOATS_OF_8_BITS, "I8"),
        weight="{stem}",
        scale="{stem}_scale",
        maybe_zero=_ZERO,
    ),
    _format(
        _PACKED,
        "{stem}",
        _packed_integers,
        ("I32",),
        weight="{stem}_packed",
        scale="{stem}_scale",
        shape="{stem}_shape",
        maybe_zero=_ZERO,
        maybe_groups="{stem}_g_idx",
    ),
    _format(
        _PACKED,
        "{stem}",
        _packed_fp4,
        ("U8",),
        weight="{stem}_packed",
        scale="{stem}_scale",
        maybe_divisor="{stem}_global_scale",
    ),
)
MODELOPT = (
    _format(_WEIGHT, "{stem}", _rows, _FLOATS_OF_8_BITS, weight="{stem}", scale="{stem}_scale"),
    _format(
        _WEIGHT,
        "{stem}",
        _packed_fp4,
        ("U8",),
        weight="{stem}",
        scale="{stem}_scale",
        multiplier="{stem}_scale_2",
    ),
)
GPTQ = (
    _format(r"(?P<stem>.+)\.qweight", "{stem}.weight", _gptq, ("I32",), **_OF_QWEIGHT, maybe_groups="{stem}.g_idx"),
)
AWQ = (_format(r"(?P<stem>.+)\.qweight", "{stem}.weight", _awq, ("I32",), **_OF_QWEIGHT),)
BITSANDBYTES = (
    _format(
        r"(?P<stem>.+\.weight)\.quant_state\.bitsandbytes__\w+",
        "{stem}",
        _bitsandbytes_4_bits,
        weight="{stem}",
        state=_STATES,
        scale="{stem}.absmax",
        table="{stem}.quant_map",
        maybe_nested="{stem}.nested_absmax",
        maybe_nested_table="{stem}.nested_quant_map",
    ),
    _format(
        r"(?P<stem>.+)\.SCB",
        "{stem}.weight",
        _bitsandbytes_8_bits,
        weight="{stem}.weight",
        scale="{stem}.SCB",
        maybe_layout="{stem}.weight_format",
    ),
)
