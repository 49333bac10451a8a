"""The same model in another precision, for a moment: what rounding does to a result is measured, not guessed.

Weights are converted as they are needed, a layer at a time, and put back untouched; so a check in float64 costs the
memory of one layer and of what lies outside the layers, not of a second model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel


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
        stack.callback(_converted(outside, dtype))
        if dtype == torch.float64:
            stack.enter_context(_Float32IsFloat64())  # type: ignore[no-untyped-call]
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


class _Float32IsFloat64(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Whatever asks for float32 gets float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)
