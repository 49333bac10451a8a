"""Experts that are always on and that a router weighs all the same: a layer's MLP, made of experts' weights.

Inkling keeps a few such experts beside those that it chooses, in tensors of their own, with a weight of each from the
same router. Their neurons stand side by side, those of the first one first, as one MLP's; a basis is read where that of
the chosen experts is, so `hidden` is before the router's weight.

No module gives these neurons, and so their `forward` is replaced while a pass of ours runs (`experts.py`).

Axes: T tokens, S shared experts, N neurons of one, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from neg_service.models.experts_function import VISITS
from neg_service.models.onednn import product_of

INKLING = "InklingSharedExperts"


def is_shared(module: nn.Module) -> bool:
    """Whether a module is a layer's experts that are always on."""
    return type(module).__name__ in SHARED_FORWARDS


def n_shared_neurons_of(module: Any) -> int:
    """How many neurons they have, all together."""
    return int(module.up_proj.shape[0] * module.up_proj.shape[1])


def inkling_forward(self: Any, hidden_states: Tensor, gammas: Tensor) -> Tensor:
    """In the place of `InklingSharedExperts.forward`; gammas: the router's weights of all tokens."""
    product = product_of(self)
    x_th, gamma_ts = hidden_states.reshape(-1, hidden_states.shape[-1]), gammas.reshape(-1, len(self.down_proj))
    up_tm = _visited(self, "paper", product(x_th, self.up_proj.flatten(0, 1), None))
    act_tm = _visited(self, "gate", self.act_fn(product(x_th, self.gate_proj.flatten(0, 1), None)))
    hidden_tm = _visited(self, "hidden", act_tm * up_tm)
    weighed_tsn = hidden_tm.view(len(hidden_tm), *self.up_proj.shape[:2]) * gamma_ts[..., None]
    out_th = sum(
        product(weighed_tn, down_hn, None).float()
        for weighed_tn, down_hn in zip(weighed_tsn.unbind(1), self.down_proj, strict=True)
    )
    assert isinstance(out_th, Tensor)
    # A token that became several rows on the way has no place in this: then a whole layer runs for each row.
    return out_th.to(hidden_states.dtype).view(hidden_states.shape)


def _visited(module: nn.Module, basis: str, x_tm: Tensor) -> Tensor:
    """What visits make of a basis' neurons."""
    for visit in VISITS.get(module, {}).get(basis, ()):
        changed = visit(x_tm)
        x_tm = x_tm if changed is None else changed
    return x_tm


SHARED_FORWARDS: dict[str, Callable[..., Tensor]] = {INKLING: inkling_forward}
