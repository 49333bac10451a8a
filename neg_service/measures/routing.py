"""Which experts a prompt's readout token used, or several tokens, and the neurons that act on the prompt because of it.

Axes: E layers with experts, k chosen experts, R rows, S tokens, X experts of a layer, U of them that any token uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from neg_service import schema
from neg_service.errors import NonFiniteError
from neg_service.layer_neurons import ALWAYS_ON
from neg_service.models.engines.token_sums import UsedExperts
from neg_service.models.experts_function import Routing
from neg_service.models.feed_forward import FeedForward, Site
from neg_service.models.transfer import fetched, sent
from neg_service.neurons import Ints, NeuronSet
from neg_service.slots import Slots


@dataclass(frozen=True)
class PromptRouting:
    """The experts that one prompt's readout token used, without identities, which have no neurons.

    layer: [E]. expert: [E] arrays [k], ascending. weight: [E] arrays [k], the router's; of Llama 4, whose router scales
    what experts read, 1.
    """

    layer: tuple[int, ...] = ()
    expert: tuple[Ints, ...] = ()
    weight: tuple[NDArray[np.float32], ...] = ()

    @property
    def experts(self) -> dict[int, Ints]:
        """By layer."""
        return dict(zip(self.layer, self.expert, strict=True))

    def table(self, prompt_id: str) -> pa.Table:
        """Rows of the table `routing`."""
        rows = [
            {"prompt_id": prompt_id, "layer": layer, "experts": expert, "weights": weight}
            for layer, expert, weight in zip(self.layer, self.expert, self.weight, strict=True)
        ]
        return pa.Table.from_pylist(rows, schema.ROUTING)


def routing_of_rows(
    feed_forward: FeedForward, seen: Mapping[nn.Module, Routing], position_r: Tensor
) -> list[PromptRouting]:
    """What the tokens at some positions of a pass used, each."""
    layers: list[int] = []
    chosen: list[Tensor] = []
    n_experts: list[int] = []
    for layer, own in enumerate(feed_forward.experts):
        if own is not None:
            routing = seen[own.module]
            place_r = sent(position_r, routing.expert_tk.device)
            layers.append(layer)
            n_experts.append(own.n_experts)
            chosen += [routing.expert_tk[place_r], routing.weight_tk[place_r].float()]
    values = [own.numpy() for own in fetched(chosen)]
    experts, weights = values[::2], values[1::2]
    have_neurons = [own < n for own, n in zip(experts, n_experts, strict=True)]
    return [
        PromptRouting(
            tuple(layers),
            tuple(own[r, there[r]] for own, there in zip(experts, have_neurons, strict=True)),
            tuple(own[r, there[r]] for own, there in zip(weights, have_neurons, strict=True)),
        )
        for r in range(len(position_r))
    ]


def routing_changed(
    feed_forward: FeedForward, layer: int, seen: Mapping[nn.Module, Routing], position_rs: Tensor, device: torch.device
) -> Tensor | None:
    """Whether layers above one chose other experts for a row than for the first, which is not shifted [R - 1].

    Those of attention count, too: a curve breaks there likewise. position_rs: where each row's tokens are that count,
    those that are read. None of a model without experts.
    """
    if not feed_forward.has_experts:
        return None
    n_rows = len(position_rs)
    changed = torch.zeros(n_rows - 1, dtype=torch.bool, device=device)
    for experts in feed_forward.experts[layer + 1 :]:
        for module in () if experts is None else (experts.module, *experts.attention_routers):
            chosen = seen[module].expert_tk
            chosen_rk = chosen[sent(position_rs.flatten(), chosen.device)].view(n_rows, -1)
            changed |= (chosen_rk[1:] != chosen_rk[:1]).any(-1).to(device)
    return changed


def experts_of_prompts(feed_forward: FeedForward, used: UsedExperts, n_prompts: int) -> list[dict[int, Ints]]:
    """By layer with experts, those that any of some tokens of each prompt uses, ascending."""
    layers = {layer: own.module for layer, own in enumerate(feed_forward.experts) if own is not None}
    is_used = [own.numpy() for own in fetched([used[module] for module in layers.values()])]
    return [
        {layer: np.flatnonzero(own_bx[b]) for layer, own_bx in zip(layers, is_used, strict=True)}
        for b in range(n_prompts)
    ]


def slots_of(feed_forward: FeedForward, experts_of: Mapping[int, Ints], sites: Iterable[Site]) -> Slots:
    """The MLPs and experts at some sites that act on a prompt, in the order of the sites.

    experts_of: by layer that has some, the experts that act on it, ascending.
    """
    if not feed_forward.has_experts:
        sizes = feed_forward.neurons_by_layer
        return Slots.of_layers({site.layer: sizes[site.layer] for site in sites})
    layer, expert, size = [], [], []
    for site in sites:
        own = feed_forward.layer_neurons[site.layer]
        if site.is_experts:
            experts = experts_of[site.layer].tolist()
            layer += [site.layer] * len(experts)
            expert += experts
            size += [own.n_of_expert] * len(experts)
        elif site.part == 0:
            # Several MLPs of a layer, whose neurons are numbered through, are one here.
            layer.append(site.layer)
            expert.append(ALWAYS_ON if own.n_experts else own.mlps[0][0])
            size.append(own.n_mlp)
    return Slots(np.array(layer, np.int64), np.array(expert, np.int64), np.array(size, np.int64))


@dataclass(frozen=True)
class TokenExperts:
    """Which experts each of some tokens of a prompt uses: the first is the one that is shifted, mostly its last one.

    expert_sk: by layer that has some [S, k], ascending, identities among them last, on the CPU.
    """

    feed_forward: FeedForward
    expert_sk: dict[int, Tensor]

    @classmethod
    def of(cls, feed_forward: FeedForward, seen: Mapping[nn.Module, Routing], place_s: Tensor) -> TokenExperts:
        """Of the tokens at some places of a pass."""
        layers = {layer: own.module for layer, own in enumerate(feed_forward.experts) if own is not None}
        chosen = [seen[module].expert_tk[sent(place_s, seen[module].expert_tk.device)] for module in layers.values()]
        return cls(feed_forward, dict(zip(layers, fetched(chosen), strict=True)))

    @cached_property
    def experts(self) -> dict[int, Ints]:
        """By layer those that any of them uses, ascending, without identities."""
        return {layer: np.unique(self._with_neurons(layer, own_sk)) for layer, own_sk in self.expert_sk.items()}

    def _with_neurons(self, layer: int, chosen: Tensor) -> Ints:
        """Of what tokens chose the experts, one after the other."""
        experts = self.feed_forward.experts[layer]
        assert experts is not None
        found: Ints = chosen[chosen < experts.n_experts].numpy()
        return found

    def used(self) -> UsedExperts:
        """The same, as gradients take it."""
        found = {}
        for layer, experts in self.experts.items():
            own = self.feed_forward.experts[layer]
            assert own is not None
            is_used_x = torch.zeros(own.n_experts, dtype=torch.bool)
            is_used_x[torch.from_numpy(experts)] = True
            found[own.module] = sent(is_used_x[None], next(own.module.parameters()).device)
        return found

    def are_used(self, neurons: NeuronSet, tokens: Sequence[int]) -> NDArray[np.bool_]:
        """Of which neurons some of the tokens use the expert [n]; of MLPs of all."""
        n_experts = max((own.n_experts for own in self.feed_forward.layer_neurons), default=0)
        is_used_lx = np.zeros((self.feed_forward.n_layers, n_experts + 1), bool)
        for layer, own_sk in self.expert_sk.items():
            is_used_lx[layer, self._with_neurons(layer, own_sk[list(tokens)])] = True
        return (neurons.expert < 0) | is_used_lx[neurons.layer, np.maximum(neurons.expert, 0)]

    def spread(self, layer: int, activation_f: Tensor) -> Tensor:
        """The first token's neurons [k·N] among those of the experts that any token uses [U·N], 0 of all others."""
        chosen_k = self.expert_sk[layer][0]
        experts, first_k = torch.from_numpy(self.experts[layer]), torch.from_numpy(self._with_neurons(layer, chosen_k))
        own_kn = activation_f.view(len(chosen_k), -1)[: len(first_k)]
        place_k = sent(torch.searchsorted(experts, first_k), activation_f.device)
        return own_kn.new_zeros(len(experts), own_kn.shape[1]).index_copy(0, place_k, own_kn).flatten()

    def is_other(
        self, layer: int, seen: Mapping[nn.Module, Routing], place_rs: Tensor, device: torch.device,
        token_s: Sequence[int] | None = None,
    ) -> Tensor:  # fmt: skip
        """Whether a layer used others at some places of a pass, []; token_s: which of the tokens these are."""
        experts = self.feed_forward.experts[layer]
        if experts is None:
            return torch.zeros((), dtype=torch.bool, device=device)
        chosen_tk, expected_sk = seen[experts.module].expert_tk, self.expert_sk[layer]
        if token_s is not None:
            expected_sk = expected_sk[list(token_s)]
        # Where rows grew behind the experts, these ran for one row alone.
        place_rs = place_rs if len(chosen_tk) > int(place_rs.max()) else place_rs[:1]
        chosen_rsk = chosen_tk[sent(place_rs, chosen_tk.device)]
        return (chosen_rsk != sent(expected_sk, chosen_rsk.device)).any().to(device)


def require_same_experts(who: str, other_experts: Mapping[int, Tensor]) -> None:
    """See that layers used the experts whose neurons are counted: in another batch rounding may choose others.

    Raises:
        NonFiniteError: a layer did not; `who` names the prompt.
    """
    layers = list(other_experts)
    (is_other,) = fetched([torch.stack(list(other_experts.values()))])
    for place in is_other.nonzero()[:1, 0].tolist():
        raise NonFiniteError(
            f"{who}: rounding has layer {layers[place]} choose other experts in another batch; use model.dtype=float32"
        )
