"""The experts function: what the experts of a layer compute, with their neurons passing by one site of each basis.

Registered with transformers' experts interface as `EXPERTS`. The chosen experts of a token stand side by side, in the
order of their numbers. Where the weights of a class of experts are, and what it computes between its projections:
`experts_classes.py`.

A router may also choose identities (LongCat), which hand on what they read: their numbers are above those of all
experts, they have no neurons, and what stands in their places is zero and goes nowhere.

Axes: T tokens, k chosen experts of a token, N neurons of an expert, H hidden size, S = T·k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from neg_service.models.experts_classes import (
    DBRX,
    INTERFACE,
    JETMOE,
    LLAMA_4,
    LONGCAT,
    gate_of,
    is_gated,
    lacks_of_interface,
    n_choices_of,
    n_experts_of,
    projections_of,
)
from neg_service.models.onednn import Product, product_of

EXPERTS = "neg_service_experts"
# Given the tensor [T, k·N] of a basis, it may give another one in its place, of more tokens where it was of one.
Visit = Callable[[Tensor], Tensor | None]

VISITS: WeakKeyDictionary[nn.Module, dict[str, list[Visit]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Routing:
    """Which experts a layer chose for each token, in ascending order, and the router's weights: [T, k] both.

    Identities among them stand last. Of Llama 4 the weights are 1: its router scales what the experts read.
    is_attention: they are no feed-forward experts.
    """

    expert_tk: Tensor
    weight_tk: Tensor
    is_attention: bool = False


# Who watches: the routing of each experts module in the pass that runs, the last one's.
_WATCHERS: list[dict[nn.Module, Routing]] = []


# How many experts of such a module its router chooses, which it is not told itself.
LLAMA_4_CHOSEN: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


@contextmanager
def watching_routing() -> Iterator[dict[nn.Module, Routing]]:
    """The routing of each module of experts in the last pass of an engine that ran."""
    seen: dict[nn.Module, Routing] = {}
    _WATCHERS.append(seen)
    try:
        yield seen
    finally:
        # By identity: what others saw may be equal.
        _WATCHERS[:] = [own for own in _WATCHERS if own is not seen]


def summed(module: nn.Module, output: Tensor) -> Tensor:
    """What a call of a layer's experts adds up to for each token [T, H]; Llama 4 leaves the sum to the caller."""
    if type(module).__name__ != LLAMA_4:
        return output
    return output.view(n_experts_of(module), -1, output.shape[-1]).sum(0)


class _Pairs:
    """Pairs (token, chosen expert), in the order of the experts: all of one expert stand together.

    t, k: how many tokens there are, and experts of each. order_s: where each pair stands in the order of the tokens.
    counts: how many pairs each expert has.
    """

    def __init__(self, t: int, k: int, order_s: Tensor, counts: list[int]) -> None:
        self.t, self.k, self._order, self._counts = t, k, order_s, counts

    @classmethod
    def of(cls, expert_tk: Tensor, n_choices: int) -> _Pairs:
        """The pairs of tokens that chose these experts."""
        t, k = expert_tk.shape
        expert_s, order_s = expert_tk.flatten().sort(stable=True)
        counts_x = expert_s.new_zeros(n_choices).scatter_add(0, expert_s, torch.ones_like(expert_s))
        # Products are made one expert after the other, so that their numbers are needed here: on an accelerator this
        # waits for all that came before, once in a pass of a layer.
        return cls(t, k, order_s, counts_x.cpu().tolist())

    def repeated(self, n: int) -> _Pairs:
        """Of one token, as `n` tokens with the same experts."""
        token_n = torch.arange(n, device=self._order.device)
        order_s = (self._order[:, None] + self.k * token_n).flatten()
        return _Pairs(n, self.k, order_s, [n * count for count in self._counts])

    @property
    def token_s(self) -> Tensor:
        """The token of each pair, in that order."""
        return self._order // self.k

    def of_experts(self, x_tkf: Tensor) -> Tensor:
        """[T, k, F] as [S, F] in that order."""
        return x_tkf.reshape(self.t * self.k, -1)[self._order]

    def of_tokens(self, x_sf: Tensor) -> Tensor:
        """The reverse."""
        return torch.empty_like(x_sf).index_copy(0, self._order, x_sf).view(self.t, self.k, -1)

    def linear(
        self, x_sf: Tensor, weight: Tensor, bias: Tensor | None, is_transposed: bool, product: Product
    ) -> Tensor:
        """Each pair's product with its expert's matrix; zero of an identity, which has none."""
        parts = [
            product(part, weight[expert].T if is_transposed else weight[expert], None if bias is None else bias[expert])
            if expert < len(weight)
            else part.new_zeros(len(part), weight.shape[-1 if is_transposed else -2])
            for expert, part in enumerate(torch.split(x_sf, self._counts))
            if self._counts[expert]
        ]
        return torch.cat(parts)


class _Run:
    """One call of a layer's experts: neurons in the order of the experts, and tokens that may become more."""

    def __init__(self, module: nn.Module, expert_tk: Tensor, weight_tk: Tensor) -> None:
        self.module: Any = module
        self.projections = projections_of(module)
        self.expert_tk, self.weight_tk = expert_tk, weight_tk
        self.slots = _Pairs.of(expert_tk, n_choices_of(module))

    def at(self, basis: str, x_sn: Tensor, *beside: Tensor) -> list[Tensor]:
        """What visits make of a basis' neurons; `beside` are grown with them."""
        visits = VISITS.get(self.module, {}).get(basis)
        if not visits:
            return [x_sn, *beside]
        before, n = self.slots, x_sn.shape[-1]
        x = before.of_tokens(x_sn).reshape(before.t, -1)
        for visit in visits:
            changed = visit(x)
            x = x if changed is None else changed
        if len(x) == before.t:
            return [before.of_experts(x.view(before.t, before.k, n)), *beside]
        # One token became several rows, which all go on through the same experts.
        self.expert_tk, self.weight_tk = (own.expand(len(x), -1) for own in (self.expert_tk, self.weight_tk))
        self.slots = before.repeated(len(x))
        grown = [before.of_tokens(own).expand(len(x), -1, -1) for own in beside]
        return [self.slots.of_experts(own) for own in (x.view(len(x), before.k, n), *grown)]

    def neurons(self, x_sh: Tensor) -> Tensor:
        """The input of the down projection, from each pair's input."""
        module, own = self.module, self.projections
        has_gate = is_gated(module)
        name = "gate_up_proj" if has_gate else "up_proj"
        bias = getattr(module, f"{name}_bias") if getattr(module, "has_bias", False) else None
        products = [
            self.slots.linear(x_sh, weight, bias, own.is_into_transposed, product_of(module)) for weight in own.into
        ]
        if not has_gate:
            (hidden,) = self.at("paper", module.act_fn(products[0]))
        else:
            gate, up = products if len(products) == 2 else self._halves(products[0])
            up, gate = self.at("paper", up, gate)
            apply = gate_of(module)
            assert apply is not None
            act, factor = apply(module, gate, up)
            act, factor = self.at("gate", act, factor)
            # Some gate in float32.
            hidden = (act * factor).to(products[0].dtype)
        (hidden,) = self.at("hidden", hidden)
        return hidden

    def _halves(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up of one product."""
        if getattr(self.module, "is_concatenated", True):
            gate, up = both.chunk(2, -1)
            return gate, up
        return both[..., ::2], both[..., 1::2]

    def output(self, hidden_sn: Tensor) -> Tensor:
        """What the layer's experts give for each token [T, H], by the router's weights."""
        module = self.module
        bias = module.down_proj_bias if getattr(module, "has_bias", False) else None
        own = self.projections
        out_sh = self.slots.linear(hidden_sn, own.down, bias, own.is_down_transposed, product_of(module))
        if getattr(module, "has_post_expert_norm", False):
            out_sh = module.post_expert_norm(out_sh)
        out_sh = out_sh * self.slots.of_experts(self.weight_tk[..., None])
        return self.slots.of_tokens(out_sh).sum(1)


def note_routing(module: nn.Module, expert_tk: Tensor, weight_tk: Tensor, *, is_attention: bool = False) -> None:
    """Let those who watch see what a module's tokens chose, ascending."""
    for seen in _WATCHERS:
        seen[module] = Routing(expert_tk, weight_tk.detach(), is_attention)


def _experts(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts of a layer, as transformers' interface calls them."""
    expert_tk, order = top_k_index.sort(-1)
    weight_tk = top_k_weights.gather(-1, order)
    note_routing(module, expert_tk, weight_tk)
    run = _Run(module, expert_tk, weight_tk)
    hidden = run.neurons(hidden_states[run.slots.token_s])
    return run.output(hidden).to(hidden_states.dtype)


def llama_4_forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """In the place of `Llama4TextExperts.forward`, which gets all tokens for each expert, scaled by their scores.

    The scores of experts that were not chosen are zero, and so is what they read.
    """
    n_experts = n_experts_of(self)
    x_xth = hidden_states.view(n_experts, -1, hidden_states.shape[-1])
    size_tx = x_xth.detach().abs().amax(-1).T
    n_chosen = int(LLAMA_4_CHOSEN[self])
    expert_tk = size_tx.topk(n_chosen, -1).indices.sort(-1).values
    weight_tk = torch.ones_like(expert_tk, dtype=x_xth.dtype)
    note_routing(self, expert_tk, weight_tk)
    run = _Run(self, expert_tk, weight_tk)
    x_tkh = x_xth.transpose(0, 1).gather(1, expert_tk[..., None].expand(-1, -1, x_xth.shape[-1]))
    out_th = run.output(run.neurons(run.slots.of_experts(x_tkh))).to(hidden_states.dtype)
    # The caller adds up what the experts give.
    return torch.cat([out_th, out_th.new_zeros((n_experts - 1) * len(out_th), out_th.shape[-1])])


def dbrx_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """In the place of `DbrxExperts.forward`, which is called as the interface would be, with sequences of tokens."""
    out_th = _experts(self, hidden_states.flatten(0, -2), top_k_index, top_k_weights)
    return out_th.view(hidden_states.shape)


def longcat_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """In the place of `LongcatFlashExperts.forward`: of identities what a token reads goes on, weighed as they are."""
    passed_t1 = (top_k_weights * (top_k_index >= n_experts_of(self))).sum(-1, keepdim=True)
    out_th = _experts(self, hidden_states, top_k_index, top_k_weights)
    return out_th + (passed_t1 * hidden_states).to(out_th.dtype)


def jetmoe_forward(self: Any, layer_input: Tensor) -> Tensor:
    """In the place of `JetMoeMoE.forward`, which is router and experts in one."""
    x_th = layer_input.flatten(0, -2)
    out_th: Tensor = _experts(self, x_th, *choice_of_jetmoe(self.router(x_th))) + self.bias
    return out_th.view(layer_input.shape)


def choice_of_jetmoe(routed: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """The experts of each token, and their weights, from a router that gives pairs in the order of the experts."""
    order_s, _, weight_s, counts, logits_tx = routed
    expert_s = torch.arange(len(counts), device=order_s.device).repeat_interleave(order_s.new_tensor(counts))
    by_token = (torch.empty_like(own).index_copy(0, order_s, own) for own in (expert_s, weight_s))
    expert_tk, weight_tk = (own.view(len(logits_tx), -1) for own in by_token)
    return expert_tk, weight_tk


# What has no interface, and runs by these while a pass of ours runs.
FORWARDS: dict[str, Callable[..., Tensor]] = {
    LLAMA_4: llama_4_forward,
    DBRX: dbrx_forward,
    JETMOE: jetmoe_forward,
    LONGCAT: longcat_forward,
}


if lacks_of_interface() is None:
    INTERFACE.ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _experts)
