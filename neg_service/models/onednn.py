"""Products of float32 matrices on a CPU by oneDNN, in the place of PyTorch's own way; `cpu_product.py` says when.

PyTorch gives products in float32 to MKL, and no public setting sends them to oneDNN, which is part of PyTorch too:
`torch.set_float32_matmul_precision` and `torch.backends.mkldnn.matmul.fp32_precision` round the factors where the
processor can, and change nothing elsewhere; `torch.utils.mkldnn` keeps copies of the weights in a layout of its own.
So the operator is called that PyTorch's compiler calls. It is private: nobody else should call it.

oneDNN reads the weights where they lie, and on the way back the same weights transposed. No copy is kept, and a model
takes as much memory as before. What is replaced is the `forward` of linear layers, vocabulary heads among them; hooks,
shared weights and conversions to other precisions (`precision.py`) work as before, because whatever is not float32
goes PyTorch's way.

Axes: R rows, O features out, I features in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]

# An attribute and no list of modules, so that copies of a model multiply as it does.
_MARK = "_multiplies_by_onednn"
_IS_PLAIN: ContextVar[bool] = ContextVar("is_plain", default=False)


def use_onednn(model: nn.Module, wanted: bool = True) -> None:
    """Let a model's linear layers and experts multiply by oneDNN where they are float32 on a CPU, or no longer."""
    for module in model.modules():
        if module.__dict__.pop(_MARK, False) and isinstance(module.__dict__.get("forward"), partial):
            del module.__dict__["forward"]
        if wanted and weight_of(module) is not None:
            setattr(module, _MARK, True)
            if isinstance(module, nn.Linear | Conv1D):
                module.__dict__["forward"] = partial(_forward, module)


def weight_of(module: nn.Module) -> Tensor | None:
    """The weight [O, I] of a module that multiplies by one in float32 on a CPU, of experts the first; else None.

    Linear layers that compute in a way of their own are left alone.
    """
    weight = _of_experts(module)
    for kind in (nn.Linear, Conv1D):
        if isinstance(module, kind) and type(module).forward is kind.forward:
            weight = module.weight.T if kind is Conv1D else module.weight
    if not isinstance(weight, Tensor) or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return None
    return weight


def _of_experts(module: nn.Module) -> Tensor | None:
    """Experts keep their weights in one tensor [X, O, I], or transposed."""
    down = module._parameters.get("down_proj")
    return down[0] if "Experts" in type(module).__name__ and down is not None and down.ndim == 3 else None


def product_of(module: nn.Module) -> Product:
    """What multiplies by a module's weights, in the place of `nn.functional.linear`."""
    return linear if module.__dict__.get(_MARK) else nn.functional.linear


@contextmanager
def plain_products() -> Iterator[None]:
    """Meanwhile products go PyTorch's own way: what oneDNN gives is compared with that."""
    token = _IS_PLAIN.set(True)
    try:
        yield
    finally:
        _IS_PLAIN.reset(token)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x[.., I] · weight[O, I]ᵀ + bias[O] by oneDNN, with a gradient of `x`.

    Whatever is not float32 on a CPU, has no rows, or wants the gradient of a weight, goes PyTorch's own way.
    """
    if not _takes(x, weight, bias):
        return nn.functional.linear(x, weight, bias)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return raw_linear(x, weight, bias)
    found: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return found


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    wants_gradient = weight.requires_grad or (bias is not None and bias.requires_grad)
    return (
        x.dtype == torch.float32
        and weight.dtype == torch.float32
        and x.device.type == "cpu"
        and x.ndim > 1
        and x.numel() > 0
        and not (wants_gradient and torch.is_grad_enabled())
        and not _IS_PLAIN.get()
    )


def raw_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The operator itself, without a gradient."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


class _Linear(torch.autograd.Function):
    """A product with a frozen weight: the way back is a product with it, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # The weight is frozen; as an attribute it costs no memory.
        ctx.weight = weight
        return raw_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        return linear(slope, ctx.weight.T), None, None


def _forward(module: Any, x: Tensor) -> Tensor:
    # A Conv1D keeps its weight as [I, O].
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    # The other ways of a module are its class's, so that what replaces functions (`precision.py`) finds its calls.
    found: Tensor = (
        linear(x, weight, module.bias) if _takes(x, weight, module.bias) else type(module).forward(module, x)
    )
    return found
