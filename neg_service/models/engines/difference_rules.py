"""What each torch function does to differences: the rules by which a pass is traced (`difference_trace.py`).

Functions that are linear are the same on differences; of a product (a + da)(b + db) - ab = da(b + db) + a·db; what
curves is rewritten so that nothing nearly equal is subtracted (`difference_functions.py`). A rule computes the row
without a shift, which is what the model itself computes, and leaves a step for the differences.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from neg_service.models.engines import difference_functions as functions
from neg_service.models.engines.difference_program import Batch
from neg_service.models.engines.difference_shapes import SHAPE_RULES
from neg_service.models.engines.difference_trace import Rule, Trace, Traced, first_traced, no_rule, promoted, put_in

RULES: dict[str, Rule] = dict(SHAPE_RULES)
_rule = put_in(RULES)


# --- sums and products


def _operands(trace: Trace, args: Any, kwargs: Any, name: str) -> tuple[Any, Any, Any, torch.dtype]:
    """Rows of two operands, the shape of what they give, and its dtype."""
    if kwargs or len(args) != 2:
        raise no_rule(f"{name} with options")
    x, y = args
    like = first_traced(args).row
    a, b = (own.row if isinstance(own, Traced) else trace.constant(own, like) for own in (x, y))
    shapes = [own.shape for own in (x, y) if isinstance(own, Tensor)]
    shape = shapes[0] if len(shapes) == 1 or shapes[0] == shapes[1] else _broadcast(*shapes)
    return a, b, shape, promoted(x, y)


def _broadcast(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of two shapes that fit; torch's own takes milliseconds."""
    n = max(len(first), len(second))
    padded = ((1,) * (n - len(own)) + tuple(own) for own in (first, second))
    return tuple(a if b == 1 else b for a, b in zip(*padded, strict=True))


def _traced(value: Any) -> Traced | None:
    return value if isinstance(value, Traced) else None


def _in_place(func: Any, args: Any, found: Traced) -> Traced:
    """Functions in place change the object; its memory is another's row as well and stays as it is."""
    target = args[0]
    if not isinstance(target, Traced) or target.shape != found.shape:
        raise no_rule(f"{func.__name__} on what has no differences")
    target.row, target.slot = found.row, found.slot
    return target


def _expanded(trace: Trace, d: Tensor, shape: Any, batch: Batch) -> Tensor:
    return d.expand(trace.sized(tuple(shape), batch.n))


def _sum(trace: Trace, func: Any, args: Any, kwargs: Any, sign: int = 1) -> Traced:
    a, b, shape, dtype = _operands(trace, args, kwargs, func.__name__)

    def added(batch: Batch, d_a: Tensor | None, d_b: Tensor | None) -> Tensor:
        if d_a is None or d_b is None:
            known = d_a if d_b is None else d_b if sign > 0 else -d_b
            assert known is not None
            return _expanded(trace, known, shape, batch)
        return d_a + d_b if sign > 0 else d_a - d_b

    slot = trace.step(added, *map(_traced, args))
    return trace.made(a + b if sign > 0 else a - b, slot, shape, dtype)


@_rule("add", "__add__", "__radd__", "add_", "__iadd__")
def _add(trace: Trace, func: Any, args: Any, kwargs: Any) -> Traced:
    found = _sum(trace, func, args, kwargs)
    return _in_place(func, args, found) if func.__name__ in ("add_", "__iadd__") else found


@_rule("sub", "__sub__", "subtract", "sub_", "__isub__")
def _sub(trace: Trace, func: Any, args: Any, kwargs: Any) -> Traced:
    found = _sum(trace, func, args, kwargs, -1)
    return _in_place(func, args, found) if func.__name__ in ("sub_", "__isub__") else found


@_rule("__rsub__", "rsub")
def _rsub(trace: Trace, func: Any, args: Any, kwargs: Any) -> Traced:
    return _sum(trace, func, args[::-1], kwargs, -1)


def _scaled(
    trace: Trace, func: Any, changed: Any, other: Any, row: Any, operation: Callable[..., Tensor]
) -> int | None:
    """A step that multiplies with an operand that no shift changes, or divides by it; `row` is what it is of a row."""

    def make(row: Any) -> functions.Difference:
        kept = trace.kept(row)
        return lambda d: operation(d, kept)

    if trace.has_rows(other):
        return trace.step_of(func.__name__, make, (row,), changed)
    found = make(row)
    return trace.step(lambda _batch, d: found(d), changed)


@_rule("mul", "__mul__", "__rmul__", "multiply", "mul_", "__imul__")
def _mul(trace: Trace, func: Any, args: Any, kwargs: Any) -> Traced:
    a, b, shape, dtype = _operands(trace, args, kwargs, func.__name__)

    x, y = map(_traced, args)
    if x is not None and y is not None and x.slot is not None and y.slot is not None:
        slot = trace.step_of(func.__name__, lambda own, other: functions.product(own, other, trace.dtype), (a, b), x, y)
    else:
        changed, other, factor = (x, args[1], b) if y is None or y.slot is None else (y, args[0], a)
        slot = _scaled(trace, func, changed, other, factor, torch.mul)

    found = trace.made(a * b, slot, shape, dtype)
    return _in_place(func, args, found) if func.__name__ in ("mul_", "__imul__") else found


@_rule("div", "__truediv__", "true_divide", "divide", "div_", "__itruediv__")
def _div(trace: Trace, func: Any, args: Any, kwargs: Any) -> Traced:
    a, b, shape, dtype = _operands(trace, args, kwargs, func.__name__)

    x, y = map(_traced, args)
    if y is None or y.slot is None:
        slot = _scaled(trace, func, x, args[1], b, torch.div)
    else:
        slot = trace.step_of(
            func.__name__,
            lambda own, other: functions.quotient(own, other, trace.dtype),
            (torch.as_tensor(a), b),
            x,
            y,
        )
    found = trace.made(a / b, slot, shape, dtype)
    return _in_place(func, args, found) if func.__name__ in ("div_", "__itruediv__") else found


@_rule("__rtruediv__", "__rdiv__", "reciprocal")
def _rdiv(trace: Trace, func: Any, args: Any, kwargs: Any) -> Traced:
    found: Traced = _div(trace, torch.div, (*args, 1)[1::-1], kwargs)
    return found


@_rule("mean", "sum")
def _mean(trace: Trace, func: Any, args: Any, kwargs: Any) -> Traced:
    x, *rest = args
    options = {**dict(zip(("dim", "keepdim"), rest, strict=False)), **kwargs}
    dtype = options.pop("dtype", None) or x.dtype
    dims = options.get("dim")
    if dims not in (-1, x.ndim - 1, [-1], (-1,)) or options.keys() - {"dim", "keepdim"}:
        raise no_rule(f"{func.__name__} over dim={dims}")
    keepdim = bool(options.get("keepdim"))
    shape = (*x.shape[:-1], 1) if keepdim else x.shape[:-1]
    slot = trace.step(lambda _batch, d: func(d, dim=-1, keepdim=keepdim), x)
    return trace.made(func(x.row, dim=-1, keepdim=keepdim), slot, shape, dtype)


# --- weights


@_rule("linear")
def _linear(trace: Trace, _func: Any, args: Any, kwargs: Any) -> Traced:
    x, weight, bias = _given(args, kwargs, "input", "weight", "bias")
    return _weighed(trace, x, weight, bias, is_transposed=False)


@_rule("addmm")
def _addmm(trace: Trace, _func: Any, args: Any, kwargs: Any) -> Traced:
    if kwargs:
        raise no_rule("addmm with options")
    bias, x, weight = args
    return _weighed(trace, x, weight, bias, is_transposed=True)


@_rule("matmul", "__matmul__", "mm")
def _matmul(trace: Trace, _func: Any, args: Any, kwargs: Any) -> Traced:
    if kwargs or len(args) != 2:
        raise no_rule("matmul with options")
    return _weighed(trace, args[0], args[1], None, is_transposed=True)


def _weighed(trace: Trace, x: Any, weight: Any, bias: Any, *, is_transposed: bool) -> Traced:
    """x·Wᵀ + bias, of a weight [G, F], or [F, G] where it is transposed already."""
    is_plain = not isinstance(weight, Traced) and not isinstance(bias, Traced)
    if not isinstance(x, Traced) or not is_plain or weight.ndim != 2:
        raise no_rule("a product of two tensors that rows change")
    if not isinstance(weight, nn.Parameter) and weight.dtype != trace.weights_dtype:
        # What is worked out of weights on the way would be kept in another precision than they are.
        raise no_rule("a weight that is computed")
    a, product = x.row, trace.product
    row = a @ (weight if is_transposed else weight.mT).to(a.dtype)
    row = row if bias is None else row + bias.to(a.dtype)

    def multiplied(_batch: Batch, d: Tensor) -> Tensor:
        return product(d.reshape(-1, d.shape[-1]), weight, is_transposed).view(*d.shape[:-1], -1)

    return trace.made(row, trace.step(multiplied, x), (*x.shape[:-1], row.shape[-1]), x.dtype)


# --- functions


def _given(args: Any, kwargs: Any, *names: str) -> list[Any]:
    """A function's arguments by the names of its parameters; None for those that are not given."""
    found = {**dict(zip(names, args, strict=False)), **kwargs}
    if len(args) > len(names) or found.keys() - set(names):
        raise no_rule(f"a function with {', '.join(sorted(found.keys() - set(names))) or 'more arguments'}")
    return [found.get(name) for name in names]


# From a row without a shift to what differences from it become; None where there is no rule.
_Make = Callable[[Tensor], functions.Difference | None]


def _elementwise(trace: Trace, x: Any, plain: Callable[[Tensor], Tensor], make: _Make, name: str) -> Traced:
    if not isinstance(x, Traced):
        raise no_rule(name)
    return trace.made(plain(x.row), trace.step_of(name, make, (x.row,), x), x.shape, x.dtype)


def _of(plain: Callable[[Tensor], Tensor], difference: Callable[[Tensor, torch.dtype], functions.Difference]) -> Rule:
    """The rule of a function of one argument."""

    def rule(trace: Trace, func: Any, args: Any, kwargs: Any) -> Traced:
        x, in_place = _given(args, kwargs, "input", "inplace")
        found = _elementwise(trace, x, plain, lambda row: difference(row, trace.dtype), func.__name__)
        return _in_place(func, args, found) if in_place or func.__name__.endswith("_") else found

    return rule


for _name, _plain, _difference in (
    ("silu", nn.functional.silu, functions.silu),
    ("sigmoid", torch.sigmoid, functions.sigmoid),
    ("tanh", torch.tanh, functions.tanh),
    ("relu", torch.relu, functions.relu),
    ("square", torch.square, functions.square),
    ("sqrt", torch.sqrt, functions.sqrt),
    ("rsqrt", torch.rsqrt, functions.rsqrt),
    ("exp", torch.exp, functions.exp),
    ("neg", torch.neg, lambda _a, _dtype: torch.neg),
):
    RULES[_name] = RULES[f"{_name}_"] = _of(_plain, _difference)
RULES["__neg__"] = RULES["neg"]


@_rule("pow", "__pow__")
def _pow(trace: Trace, func: Any, args: Any, kwargs: Any) -> Traced:
    x, exponent = _given(args, kwargs, "input", "exponent")
    if isinstance(exponent, Tensor):
        raise no_rule("a power that is a tensor")
    make = partial(functions.power, dtype=trace.dtype, exponent=exponent)
    return _elementwise(trace, x, lambda row: row**exponent, make, f"the power of {exponent}")


@_rule("gelu")
def _gelu(trace: Trace, _func: Any, args: Any, kwargs: Any) -> Traced:
    x, approximate = _given(args, kwargs, "input", "approximate")
    kind = approximate or "none"
    make = partial(functions.gelu, dtype=trace.dtype, approximate=kind)
    return _elementwise(trace, x, partial(nn.functional.gelu, approximate=kind), make, "gelu")


@_rule("clamp", "clip", "clamp_")
def _clamp(trace: Trace, func: Any, args: Any, kwargs: Any) -> Traced:
    x, low, high = _given(args, kwargs, "input", "min", "max")
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        raise no_rule("clamp between tensors")
    make = partial(functions.clamp, dtype=trace.dtype, low=low, high=high)
    found = _elementwise(trace, x, lambda row: row.clamp(low, high), make, "clamp")
    return _in_place(func, args, found) if func.__name__ == "clamp_" else found


@_rule("softmax")
def _softmax(trace: Trace, _func: Any, args: Any, kwargs: Any) -> Traced:
    x, dim, _stacklevel, dtype = _given(args, kwargs, "input", "dim", "_stacklevel", "dtype")
    if dim not in (-1, x.ndim - 1):
        raise no_rule("softmax over another axis than the last")
    p = x.row.softmax(-1)
    slot = trace.step_of("softmax", partial(functions.softmax, dtype=trace.dtype), (p,), x)
    return trace.made(p, slot, x.shape, dtype or x.dtype)


@_rule("layer_norm")
def _layer_norm(trace: Trace, _func: Any, args: Any, kwargs: Any) -> Traced:
    x, shape, weight, bias, eps = _given(args, kwargs, "input", "normalized_shape", "weight", "bias", "eps")
    if not isinstance(x, Traced) or tuple(shape) != (x.shape[-1],):
        raise no_rule("layer_norm over several axes")
    weight, bias = (None if own is None else own.detach().to(x.row.dtype) for own in (weight, bias))
    eps = 1e-5 if eps is None else eps
    make = partial(functions.layer_norm, dtype=trace.dtype, weight=weight, eps=eps)
    return _elementwise(
        trace, x, lambda row: nn.functional.layer_norm(row, shape, weight, bias, eps), make, "layer_norm"
    )


@_rule("rms_norm")
def _rms_norm(trace: Trace, _func: Any, args: Any, kwargs: Any) -> Traced:
    x, shape, weight, eps = _given(args, kwargs, "input", "normalized_shape", "weight", "eps")
    if not isinstance(x, Traced) or tuple(shape) != (x.shape[-1],):
        raise no_rule("rms_norm over several axes")
    weight = None if weight is None else weight.detach().to(x.row.dtype)
    # By the dtype that the code believes.
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    make = partial(functions.rms_norm, dtype=trace.dtype, weight=weight, eps=eps)
    return _elementwise(trace, x, lambda row: nn.functional.rms_norm(row, shape, weight, eps), make, "rms_norm")
