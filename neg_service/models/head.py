"""The way back through the vocabulary head, and the softmax over it, with sums that keep their digits.

The gradient at the head's input is a sum over the whole vocabulary, g[F] = Σ_v g[v]·W[v, F], in which the
probabilities' terms all have one sign. Matrix libraries choose their kernels by shape: with a full sequence of rows
they sum in blocks, with the few rows of a target or two they add one term after the other. In float32 that costs
digits in proportion to the vocabulary: a relative error of 5e-5 for 49,152 tokens and of 4e-4 for 262,144, in all
gradients of all layers, where the full sequence has 1e-6. So the sum is had in parts of `_PART` tokens, which are
added in float64: 1e-6 for any vocabulary, any number of rows and any library.

The softmax over the vocabulary is such a sum, too, of terms of one sign: on a CPU float32 loses the many small ones,
and all probabilities come out too large, by 1e-5 to 3e-5 for 49,152 tokens and by up to 1e-4 for 262,144. They then do
not sum up to one, which in a gradient, W[t] - Σ_v p[v]·W[v], counts as often as what W has in common is larger than
the rest. So the sum is had as `torch.sum` has it, by sums of sums, which lose nothing that counts (`log_softmax`); in
float64 it was no more exact and cost NeurGrad a tenth of its time.

In low precision the products are float32 inside and are rounded to far fewer digits after; there nothing is changed.

Axes: R rows, V vocabulary, P tokens of a part, F features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from neg_service.models.onednn import Product, product_of

# So short a sum has an error of 1e-6 in any order. On SmolLM2 the product takes a fifth longer for it, which is about a
# hundredth of all that NeurGrad does.
_PART = 512


@contextmanager
def exact_head_gradient(model: PreTrainedModel) -> Iterator[None]:
    """Let gradients go back through `model`'s vocabulary head in parts; the head's output stays bit for bit."""
    head = model.get_output_embeddings()
    if not torch.is_grad_enabled() or not isinstance(head, nn.Linear) or head.weight.dtype != torch.float32:
        yield
        return

    def replace(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        found: Tensor = _Head.apply(inputs[0], module.weight, output.detach(), product_of(module))  # type: ignore[no-untyped-call]
        return found

    handle = head.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


class _Head(torch.autograd.Function):
    """A head's output, given as it is, with a way back of its own."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight_vf: Tensor, output: Tensor, product: Product) -> Tensor:
        # The weight is frozen; as an attribute it costs no memory.
        ctx.weight_vf, ctx.device, ctx.product = weight_vf, hidden.device, product
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None, None]:
        found = product_in_parts(slope.to(ctx.weight_vf.device), ctx.weight_vf, ctx.product)
        return found.to(ctx.device), None, None, None


def product_in_parts(slope_rv: Tensor, weight_vf: Tensor, product: Product = nn.functional.linear) -> Tensor:
    """`slope_rv @ weight_vf` in parts of the vocabulary, which are added in float64; in the precision of the slopes."""
    total_rf = slope_rv.new_zeros(*slope_rv.shape[:-1], weight_vf.shape[1], dtype=torch.float64)
    for slope_rp, weight_pf in zip(torch.split(slope_rv, _PART, -1), torch.split(weight_vf, _PART), strict=True):
        total_rf += product(slope_rp, weight_pf.T, None)
    return total_rf.to(slope_rv.dtype)


def log_softmax(logits_rv: Tensor) -> Tensor:
    """log p [R, V] of logits in float32 or better, in their precision; the sum over the vocabulary keeps its digits."""
    found: Tensor = _LogSoftmax.apply(logits_rv)  # type: ignore[no-untyped-call]
    return found


class _LogSoftmax(torch.autograd.Function):
    """log p = z - log Σ exp z, and its way back g - p·Σ g, both with sums of sums."""

    @staticmethod
    def forward(ctx: Any, logits_rv: Tensor) -> Tensor:
        relative_rv = logits_rv - logits_rv.amax(-1, keepdim=True)
        total_r1 = relative_rv.exp().sum(-1, keepdim=True).double()
        log_p_rv = relative_rv.sub_(total_r1.log().to(logits_rv.dtype))
        ctx.save_for_backward(log_p_rv)
        return log_p_rv

    @staticmethod
    def backward(ctx: Any, slope_rv: Tensor) -> Tensor:
        (log_p_rv,) = ctx.saved_tensors
        total_r1 = slope_rv.sum(-1, keepdim=True)
        return torch.addcmul(slope_rv, log_p_rv.exp(), total_r1, value=-1)
