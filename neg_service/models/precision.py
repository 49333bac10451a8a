"""The same model in another precision, for a moment: what rounding does to a result is measured, not guessed.

Weights are converted as they are needed, a layer at a time, and put back untouched. Embeddings and heads can be larger
than many layers: of them only the rows that are looked up are converted, and for a product pieces of `PIECE_BYTES`.
So a check in float64 costs the memory of a layer and two pieces, not of a second model; `cluster/plan.py` counts it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

# A weight outside the layers that is larger than this, converted, is converted in pieces, anew in each pass.
PIECE_BYTES = 2**28


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32, or as it is where it is more precise: softmax and statistics are never done in less."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextmanager
def in_precision(model: PreTrainedModel, layers: Iterable[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """Let `model` compute in `dtype` for as long as this lasts; afterwards its weights are the same objects and bits.

    For forward passes: a backward pass would find the weights of layers that it left as they were.
    In float64, what the model's own code casts to float32 (norms, rotary angles, softmax) is float64 as well.
    """
    with ExitStack() as stack:
        in_layers: set[int] = set()
        for layer in layers:
            tensors = _floating(layer)
            in_layers.update(map(id, tensors))
            put_back: list[Callable[[], None]] = []

            def enter(_module: nn.Module, _args: Any, own: list[Tensor] = tensors, undo: Any = put_back) -> None:
                undo.append(_converted(own, dtype))

            def leave(_module: nn.Module, _args: Any, _output: Any, undo: Any = put_back) -> None:
                # Called on an error too, which may have come before the layer was entered.
                while undo:
                    undo.pop()()

            stack.callback(layer.register_forward_pre_hook(enter, prepend=True).remove)
            stack.callback(layer.register_forward_hook(leave, always_call=True).remove)
        outside = [tensor for tensor in _floating(model) if id(tensor) not in in_layers]
        large = [tensor for tensor in outside if tensor.ndim == 2 and tensor.numel() * dtype.itemsize > PIECE_BYTES]
        stack.callback(_converted([tensor for tensor in outside if all(tensor is not own for own in large)], dtype))
        if dtype == torch.float64:
            stack.enter_context(_Float32IsFloat64())  # type: ignore[no-untyped-call]
        if large:
            stack.enter_context(_InPieces(large, dtype))
        yield


def _floating(module: nn.Module) -> list[Tensor]:
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return [tensor for tensor in tensors.values() if tensor.is_floating_point()]


def _converted(tensors: list[Tensor], dtype: torch.dtype) -> Callable[[], None]:
    """Convert in place; gives what puts the original data back."""
    originals = [tensor.data for tensor in tensors]

    def put_back() -> None:
        for tensor, data in zip(tensors, originals, strict=True):
            tensor.data = data

    for tensor, data in zip(tensors, originals, strict=True):
        tensor.data = data.to(dtype)
    return put_back


@contextmanager
def float32_as_asked() -> Iterator[None]:
    """Let own code have float32 where it asks for it, also in a model that computes in float64 for a moment."""
    before, _Float32IsFloat64.is_on = _Float32IsFloat64.is_on, False
    try:
        yield
    finally:
        _Float32IsFloat64.is_on = before


class _Float32IsFloat64(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Whatever asks for float32 gets float64, but for what runs in `float32_as_asked`."""

    is_on: ClassVar[bool] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") is torch.float32 and self.is_on:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


class _InPieces(TorchFunctionMode):
    """Lets large weights [rows, E] act as if they were of another precision, and never converts one whole if it can.

    What is neither a look-up of rows nor a product with them, which no known model does, gets a converted copy.
    """

    def __init__(self, weights: list[Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self._weights = {id(weight): weight for weight in weights}
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        if func is nn.functional.embedding and id(weight) in self._weights:
            # Looking up rows rounds nothing, so it can come first.
            return func(*args, **kwargs).to(self._dtype)
        if func is nn.functional.linear and id(weight) in self._weights:
            return self._product(*args, **kwargs)
        if id(args[0] if args else None) in self._weights and getattr(func, "__name__", "") == "__get__":
            is_asked_for_dtype = getattr(func, "__self__", None) is torch.Tensor.dtype
            return self._dtype if is_asked_for_dtype else func(*args, **kwargs)
        args, kwargs = tree_map(self._whole, (args, kwargs))
        return func(*args, **kwargs)

    def _product(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        pieces = torch.split(weight, max(1, PIECE_BYTES // (weight.shape[1] * self._dtype.itemsize)))
        product = torch.cat([nn.functional.linear(input, piece.to(self._dtype)) for piece in pieces], -1)
        return product if bias is None else product + bias

    def _whole(self, one: Any) -> Any:
        return one.to(self._dtype) if id(one) in self._weights else one
