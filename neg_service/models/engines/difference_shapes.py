"""Rules for what changes no values: what only asks, casts, and shapes; the same is done to differences as to values.

How rules are used: `difference_trace.py`; the others: `difference_rules.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neg_service.models.engines.base import MismatchError
from neg_service.models.engines.difference_program import Batch
from neg_service.models.engines.difference_trace import Rule, Trace, Traced, first_traced, no_rule, promoted, put_in

SHAPE_RULES: dict[str, Rule] = {}
_rule = put_in(SHAPE_RULES)


# --- what only asks, and what changes nothing


@_rule(
    "size", "dim", "numel", "nelement", "is_floating_point", "is_complex", "element_size", "get_device", "__len__",
    "stride", "is_inference", "is_same_size",
)  # fmt: skip
def _asks(_trace: Trace, func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


@_rule("is_contiguous")
def _is_contiguous(*_: Any) -> bool:
    return True


@_rule("contiguous", "clone", "detach", "requires_grad_")
def _same(_trace: Trace, _func: Any, args: Any, _kwargs: Any) -> Traced:
    x: Traced = args[0]
    # An object of its own: what is done to it in place must not reach the other.
    return Traced(x.tracer, x.row, x.slot, x.shape, x.dtype)


@_rule("dropout")
def _dropout(_trace: Trace, _func: Any, args: Any, kwargs: Any) -> Any:
    if kwargs.get("training", args[2] if len(args) > 2 else True):
        raise no_rule("dropout while training")
    return args[0]


@_rule("to", "float", "double", "half", "bfloat16", "type_as", "type")
def _cast(trace: Trace, func: Any, args: Any, kwargs: Any) -> Traced:
    x: Traced = args[0]

    def stand_in(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        device = value.row.device if isinstance(value, Traced) else value.device
        return torch.empty(0, dtype=value.dtype, device=device)

    asked = func(stand_in(x), *map(stand_in, args[1:]), **{key: stand_in(own) for key, own in kwargs.items()})
    if not isinstance(asked, Tensor) or not asked.is_floating_point():
        raise no_rule(f"a cast to {asked if isinstance(asked, str) else asked.dtype}")
    if asked.device == x.row.device:
        return Traced(trace, x.row, x.slot, x.shape, asked.dtype)
    slot = trace.step(lambda _batch, d: d.to(asked.device), x)
    return Traced(trace, x.row.to(asked.device), slot, x.shape, asked.dtype)


# --- shapes


@_rule("reshape", "view", "flatten", "unflatten", "transpose", "permute", "unsqueeze", "squeeze", "expand", "movedim",
        "swapaxes", "repeat_interleave", "narrow", "select", "t", "__getitem__", ".T", ".mT")  # fmt: skip
def _shape(trace: Trace, func: Any, args: Any, kwargs: Any) -> Traced:
    x, *rest = args
    if not all(map(_is_plain, (*rest, *kwargs.values()))):
        raise no_rule(f"{func.__name__} by a tensor")
    # Memory may be laid out otherwise than the code believes.
    change = Tensor.reshape if func.__name__ == "view" else func

    def changed(n_rows: int, x: Tensor) -> Any:
        return change(x, *trace.sized(rest, n_rows), **{key: trace.sized(own, n_rows) for key, own in kwargs.items()})

    row = changed(trace.prompts, x.row)
    shape = changed(trace.rows, _with_shape(x)).shape
    return trace.made(row, trace.step(lambda batch, d: changed(batch.n, d), x), shape, x.dtype)


@_rule("expand_as")
def _expand_as(trace: Trace, _func: Any, args: Any, kwargs: Any) -> Any:
    x, like = args
    # What has no rows of its own is the same in all of them.
    return _shape(trace, Tensor.expand, (x, *like.shape), kwargs) if isinstance(x, Traced) else x.expand(like.shape)


@_rule("chunk", "split", "unbind", "tensor_split", "split_with_sizes")
def _parts(trace: Trace, func: Any, args: Any, kwargs: Any) -> tuple[Traced, ...]:
    x, *rest = args
    if not all(map(_is_plain, (*rest, *kwargs.values()))):
        raise no_rule(f"{func.__name__} by a tensor")
    rows, shapes = func(x.row, *rest, **kwargs), func(_with_shape(x), *rest, **kwargs)
    if len(rows) != len(shapes):
        raise MismatchError(f"rows are mixed by {func.__name__}")
    return tuple(
        trace.made(row, trace.step(lambda _batch, d, i=i: func(d, *rest, **kwargs)[i], x), own.shape, x.dtype)
        for i, (row, own) in enumerate(zip(rows, shapes, strict=True))
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    if isinstance(value, slice):
        return all(end is None or type(end) is int for end in (value.start, value.stop, value.step))
    return value is None or value is Ellipsis or isinstance(value, int | str | torch.Size)


def _with_shape(x: Traced) -> Tensor:
    """Something of its shape that takes no memory."""
    return torch.empty(()).expand(x.shape)


@_rule("cat", "concat", "stack")
def _cat(trace: Trace, func: Any, args: Any, kwargs: Any) -> Traced:
    parts, like = list(args[0]), first_traced(args)
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    rows = [part.row if isinstance(part, Traced) else trace.constant(part, like.row) for part in parts]
    row = func(rows, dim)
    # Some, as keys of a prefix, may not have rows at all: these are the same in all.
    shape = func([_with_shape(part) if isinstance(part, Traced) else torch.empty(()).expand(part.shape)
                  for part in parts], dim).shape  # fmt: skip

    shapes = [tuple(part.shape) for part in parts]

    def joined(batch: Batch, *given: Tensor | None) -> Tensor:
        known = next(own for own in given if own is not None)
        whole = [
            known.new_zeros(()).expand(trace.sized(own_shape, batch.n)) if own is None else own
            for own_shape, own in zip(shapes, given, strict=True)
        ]
        found: Tensor = func(whole, dim)
        return found

    slot = trace.step(joined, *(part if isinstance(part, Traced) else None for part in parts))
    return trace.made(row, slot, shape, promoted(*parts))
