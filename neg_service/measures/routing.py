"""Which experts a prompt's readout token used, and the neurons that act on the prompt because of that.

Axes: E layers with experts, k chosen experts, R rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from neg_service import schema
from neg_service.errors import NonFiniteError
from neg_service.layer_neurons import ALWAYS_ON
from neg_service.models.experts_function import Routing
from neg_service.models.feed_forward import FeedForward, Site
from neg_service.models.transfer import fetched, sent
from neg_service.neurons import Ints
from neg_service.slots import Slots


@dataclass(frozen=True)
class PromptRouting:
    """The experts that one prompt's readout token used.

    layer: [E]. expert: [E] arrays [k], ascending. weight: [E] arrays [k], the router's; of Llama 4, whose router scales
    what experts read, 1.
    """

    layer: tuple[int, ...] = ()
    expert: tuple[Ints, ...] = ()
    weight: tuple[NDArray[np.float32], ...] = ()

    def of_layer(self, layer: int) -> Ints:
        """The experts of a layer that has some."""
        return self.expert[self.layer.index(layer)]

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
    for layer, own in enumerate(feed_forward.experts):
        if own is not None:
            routing = seen[own.module]
            place_r = sent(position_r, routing.expert_tk.device)
            layers.append(layer)
            chosen += [routing.expert_tk[place_r], routing.weight_tk[place_r].float()]
    values = [own.numpy() for own in fetched(chosen)]
    experts, weights = values[::2], values[1::2]
    return [
        PromptRouting(tuple(layers), tuple(own[r] for own in experts), tuple(own[r] for own in weights))
        for r in range(len(position_r))
    ]


def routing_changed(
    feed_forward: FeedForward, layer: int, seen: Mapping[nn.Module, Routing], position_rs: Tensor, device: torch.device
) -> Tensor | None:
    """Whether layers above one chose other experts for a row than for the first, which is not shifted [R - 1].

    position_rs: where each row's tokens are that count, those that are read. None of a model without experts.
    """
    if not feed_forward.has_experts:
        return None
    n_rows = len(position_rs)
    changed = torch.zeros(n_rows - 1, dtype=torch.bool, device=device)
    for experts in feed_forward.experts[layer + 1 :]:
        if experts is not None:
            chosen = seen[experts.module].expert_tk
            chosen_rk = chosen[sent(position_rs.flatten(), chosen.device)].view(n_rows, -1)
            changed |= (chosen_rk[1:] != chosen_rk[:1]).any(-1).to(device)
    return changed


def slots_of(feed_forward: FeedForward, routing: PromptRouting, sites: Iterable[Site]) -> Slots:
    """The MLPs and experts at some sites that act on a prompt, in the order of the sites."""
    if not feed_forward.has_experts:
        sizes = feed_forward.neurons_by_layer
        return Slots.of_layers({site.layer: sizes[site.layer] for site in sites})
    layer, expert, size = [], [], []
    for site in sites:
        own = feed_forward.layer_neurons[site.layer]
        if site.is_experts:
            experts = routing.of_layer(site.layer).tolist()
            layer += [site.layer] * len(experts)
            expert += experts
            size += [own.n_of_expert] * len(experts)
        else:
            layer.append(site.layer)
            expert.append(ALWAYS_ON if own.n_experts else own.mlps[0][0])
            size.append(own.n_mlp)
    return Slots(np.array(layer, np.int64), np.array(expert, np.int64), np.array(size, np.int64))


def other_experts(
    feed_forward: FeedForward, known: PromptRouting, layer: int, seen: Mapping[nn.Module, Routing], position_r: Tensor,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """Whether a layer used other experts at some positions of a pass than those whose neurons are counted, []."""
    experts = feed_forward.experts[layer]
    if experts is None:
        return torch.zeros((), dtype=torch.bool, device=device)
    chosen_tk = seen[experts.module].expert_tk
    # Where rows grew behind the experts, these ran for one row alone.
    place_r = position_r if len(chosen_tk) > int(position_r[-1]) else position_r[:1]
    chosen_rk = chosen_tk[sent(place_r, chosen_tk.device)]
    expected_k = sent(torch.from_numpy(known.of_layer(layer)), chosen_rk.device)
    return (chosen_rk != expected_k).any().to(device)


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
