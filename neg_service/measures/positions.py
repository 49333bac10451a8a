"""NeurGrad at every token of a prompt: where along it neurons say something about the answer.

For target k, read at the prompt's readout position, layer l, neuron n and token t,

    NeurGrad[k, t, l, n] = d p[k] / d a[t, l, n] * sgn(a[t, l, n]),   sgn(0) = +1

in probability per unit of |activation|. At the readout position itself it is what `neurgrad.py` has; at tokens before
it, a neuron acts through the attention of later ones. The whole prompt runs as a plain pass of the model's own code,
with one backward pass for each target, whatever the engine.

Axes: K targets, T tokens, L layers, N neurons, M neurons of a token's slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from neg_service.errors import NonFiniteError
from neg_service.measures.batches_of_gradients import columns_of_prompts
from neg_service.measures.batching import named, naming_memory
from neg_service.measures.routing import PromptRouting, routing_of_rows, slots_of
from neg_service.measures.signs import signed_by
from neg_service.models.experts_function import Routing, watching_routing
from neg_service.models.feed_forward import Point, Site, hooks
from neg_service.models.head import log_softmax
from neg_service.models.language_model import LanguageModel
from neg_service.models.precision import at_least_float32
from neg_service.models.start_at_layer import flat
from neg_service.models.transfer import fetched
from neg_service.neurons import Ints
from neg_service.prompts.prompt import EncodedPrompt
from neg_service.slots import Slots


@dataclass(frozen=True)
class PositionMap:
    """NeurGrad of one prompt by token and layer, summed up over each layer's neurons.

    probability_k: of the targets, 0..1. layers: the L layers. total_ktl: Σ_n |NeurGrad|. strongest_ktl: NeurGrad of the
    neuron where it is largest; which one: expert_ktl (see `Slots`) and neuron_ktl. routing: the readout token's.
    """

    probability_k: NDArray[np.float32]
    layers: tuple[int, ...]
    total_ktl: NDArray[np.float32]
    strongest_ktl: NDArray[np.float32]
    expert_ktl: NDArray[np.int64]
    neuron_ktl: NDArray[np.int64]
    routing: PromptRouting


def position_map(
    model: LanguageModel, prompt: EncodedPrompt, basis: str, layers: Sequence[int] | None = None
) -> PositionMap:
    """The map of one prompt.

    Raises:
        NonFiniteError: NaN or infinity in logits or gradients.
        DoesNotFit: the prompt's graph does not fit into memory.
        ModelError: the model fails its self-check.
    """
    model.ensure_checked()
    points = model.feed_forward.sites(basis, layers)
    what, advice = "the gradients of all its tokens do not fit", "use a larger device, or fewer neurons.layers"
    with naming_memory(named(prompt, model), model.device, what, advice):
        return _map(model, prompt, points)


def _map(model: LanguageModel, prompt: EncodedPrompt, points: dict[Site, Point]) -> PositionMap:
    rows = model.whole_prompt(prompt.ids)
    leaves: dict[Site, Tensor] = {}

    def capture(site: Site, x: Tensor) -> Tensor:
        # Nothing frozen requires a gradient; the lowest layer's neurons are where the graph begins.
        leaves[site] = x if x.requires_grad else x.detach().requires_grad_()
        return leaves[site]

    with torch.enable_grad(), watching_routing() as routing, hooks(points, capture):
        log_p_v = log_softmax(at_least_float32(rows.run([1])))[0]
    activation = {site: points[site].neurons(flat(leaf.detach())) for site, leaf in leaves.items()}
    p_k = log_p_v.detach()[list(prompt.target_ids)].exp()
    slots_t = _slots(model, points, routing, len(prompt.ids))
    layers = tuple(dict.fromkeys(site.layer for site in points))
    found = []
    for place, target in enumerate(prompt.target_ids):
        is_last = place == len(prompt.target_ids) - 1
        slopes = torch.autograd.grad(
            log_p_v[target], [leaves[site] for site in points], retain_graph=not is_last, materialize_grads=True
        )
        neurgrad = {
            site: signed_by(activation[site], points[site].neurons(flat(slope)).float()) * p_k[place].to(slope.device)
            for site, slope in zip(points, slopes, strict=True)
        }
        found += list(_by_layer(neurgrad, layers))
    on_cpu = fetched([p_k.float(), *found])
    if not all(own.isfinite().all() for own in on_cpu):
        raise NonFiniteError(f"{named(prompt, model)}: NaN or infinity in logits or gradients; try another model.dtype")
    total, strongest, at = (
        torch.stack(on_cpu[1 + i :: 3]).view(len(p_k), len(layers), -1).transpose(1, 2).numpy() for i in range(3)
    )
    expert_ktl, neuron_ktl = _named(at.astype(np.int64), slots_t, _columns(points, slots_t), layers)
    return PositionMap(
        on_cpu[0].numpy(), layers, np.ascontiguousarray(total), np.ascontiguousarray(strongest), expert_ktl,
        neuron_ktl, routing_of_rows(model.feed_forward, routing, rows.positions([1]))[0],
    )  # fmt: skip


def _by_layer(neurgrad: dict[Site, Tensor], layers: Sequence[int]) -> Iterator[Tensor]:
    """For each layer Σ|NeurGrad|, the largest NeurGrad, and where along the layer's slots it is; [T] each, float32."""
    for layer in layers:
        own_tm = torch.cat([values for site, values in neurgrad.items() if site.layer == layer], 1)
        place_t = own_tm.abs().argmax(1)
        yield own_tm.abs().sum(1)
        yield own_tm.gather(1, place_t[:, None])[:, 0]
        # A place along a layer's slots is far below 2²⁴.
        yield place_t.float()


def _slots(
    model: LanguageModel, points: dict[Site, Point], routing: dict[nn.Module, Routing], n_tokens: int
) -> list[Slots]:
    """Which neurons each token uses."""
    if not model.feed_forward.has_experts:
        return [slots_of(model.feed_forward, {}, points)] * n_tokens
    of_tokens = routing_of_rows(model.feed_forward, routing, torch.arange(n_tokens))
    return [slots_of(model.feed_forward, own.experts, points) for own in of_tokens]


def _columns(points: dict[Site, Point], slots_t: Sequence[Slots]) -> tuple[Ints, list[Ints] | None]:
    """Where each layer's first column is among those of all, and which of these are each token's neurons."""
    width_of = {site: point.size for site, point in points.items()}
    layer_w = np.repeat([site.layer for site in width_of], list(width_of.values()))
    first_l = np.unique(layer_w, return_index=True)[1]
    return first_l, columns_of_prompts(points, list(width_of.values()), slots_t)


def _named(
    place_ktl: Ints, slots_t: Sequence[Slots], columns: tuple[Ints, list[Ints] | None], layers: Sequence[int]
) -> tuple[Ints, Ints]:
    """Expert and number of the neurons at places along their layers' columns."""
    first_l, columns_t = columns
    expert_ktl, neuron_ktl = np.empty_like(place_ktl), np.empty_like(place_ktl)
    for t, slots in enumerate(slots_t):
        place_kl = place_ktl[:, t] + first_l
        if columns_t is not None:
            # Not of identities, unless all of a layer's neurons are silent.
            place_kl = np.minimum(np.searchsorted(columns_t[t], place_kl), slots.m - 1)
        rows = slots.rows_at(place_kl.ravel())
        expert_ktl[:, t], neuron_ktl[:, t] = (rows[:, i].reshape(-1, len(layers)) for i in (1, 2))
    return expert_ktl, neuron_ktl
