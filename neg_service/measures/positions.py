"""NeurGrad at every token of a prompt: where along it neurons say something about the answer.

For target k, read at the prompt's readout position, layer l, neuron n and token t,

    NeurGrad[k, t, l, n] = d p[k] / d a[t, l, n] * sgn(a[t, l, n]),   sgn(0) = +1

in probability per unit of |activation|. At the readout position itself it is what `neurgrad.py` has; at tokens before
it, a neuron acts through the attention of later ones. The whole prompt runs as a plain pass of the model's own code,
with one backward pass for each target, whatever the engine.

A target of several tokens has a pass of its own, over the prompt and all of it but its last token; p is the product
over its tokens (`sequences.py`), and the map goes on along the target.

Axes: K targets, T tokens of a pass, S tokens that are read, L layers, N neurons, M neurons of a token's slots, V
vocabulary.
"""

from __future__ import annotations

import math
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
from neg_service.measures.sequences import TokenLogP, chain_of
from neg_service.measures.signs import signed_by
from neg_service.models.engines.base import Rows
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
class TargetMap:
    """NeurGrad of one target by token and layer, summed up over each layer's neurons.

    ids_t: the prompt's tokens, and of a target of several all of its tokens but the last. total_tl: Σ_n |NeurGrad|.
    strongest_tl: NeurGrad of the neuron where it is largest; which one: expert_tl (see `Slots`) and neuron_tl.
    """

    ids_t: tuple[int, ...]
    total_tl: NDArray[np.float32]
    strongest_tl: NDArray[np.float32]
    expert_tl: NDArray[np.int64]
    neuron_tl: NDArray[np.int64]


@dataclass(frozen=True)
class PositionMap:
    """The maps of one prompt's targets.

    probability_k: of the targets, 0..1. layers: the L layers. routing: the readout token's. token_log_p: of each target
    its tokens' log p, where any is several tokens.
    """

    probability_k: NDArray[np.float32]
    layers: tuple[int, ...]
    targets: tuple[TargetMap, ...]
    routing: PromptRouting
    token_log_p: TokenLogP = None


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
        found = [_differentiated(model, own, points) for own in _passes(model, prompt)]
    log_p = [values for own in found for values in own.log_p]
    maps = [target for own in found for target in own.targets]
    is_finite = [np.isfinite(values).all() for values in log_p] + [np.isfinite(own.total_tl).all() for own in maps]
    if not all(is_finite):
        raise NonFiniteError(f"{named(prompt, model)}: NaN or infinity in logits or gradients; try another model.dtype")
    return PositionMap(
        np.array([math.exp(float(values.sum())) for values in log_p], np.float32),
        tuple(dict.fromkeys(site.layer for site in points)),
        tuple(maps),
        found[0].routing,
        tuple(log_p) if prompt.has_sequences else None,
    )


@dataclass(frozen=True)
class _Pass:
    """A plain pass over some tokens, and the targets that it reads: of each (place among those read, token) [S]."""

    rows: Rows
    ids: tuple[int, ...]
    paths: Sequence[Sequence[tuple[int, int]]]


def _passes(model: LanguageModel, prompt: EncodedPrompt) -> Iterator[_Pass]:
    """One for all targets of one token, or one for each target."""
    if not prompt.has_sequences:
        yield _Pass(model.whole_prompt(prompt.ids), prompt.ids, [[(0, token)] for token in prompt.target_ids])
        return
    for tokens in prompt.target_tokens:
        rows = model.whole_prompt(prompt.ids, chain_of(prompt, tokens))
        yield _Pass(rows, (*prompt.ids, *tokens[:-1]), [list(enumerate(tokens))])


@dataclass(frozen=True)
class _Found:
    """What a pass says: its targets' maps, their tokens' log p, float64, and the readout token's routing."""

    targets: list[TargetMap]
    log_p: list[NDArray[np.float64]]
    routing: PromptRouting


def _differentiated(model: LanguageModel, own: _Pass, points: dict[Site, Point]) -> _Found:
    leaves: dict[Site, Tensor] = {}

    def capture(site: Site, x: Tensor) -> Tensor:
        # Nothing frozen requires a gradient; the lowest layer's neurons are where the graph begins.
        leaves[site] = x if x.requires_grad else x.detach().requires_grad_()
        return leaves[site]

    with torch.enable_grad(), watching_routing() as routing, hooks(points, capture):
        log_p_sv = log_softmax(at_least_float32(own.rows.run([1])))
    activation = {site: points[site].neurons(flat(leaf.detach())) for site, leaf in leaves.items()}
    slots_t = _slots(model, points, routing, len(own.ids))
    layers = tuple(dict.fromkeys(site.layer for site in points))
    values: list[Tensor] = []
    for number, path in enumerate(own.paths):
        log_p_s = torch.stack([log_p_sv[place, token] for place, token in path])
        slopes = torch.autograd.grad(
            log_p_s.sum(), [leaves[site] for site in points], retain_graph=number < len(own.paths) - 1,
            materialize_grads=True,
        )  # fmt: skip
        p = log_p_s.detach().sum().exp()
        neurgrad = {
            site: signed_by(activation[site], points[site].neurons(flat(slope)).float()) * p.to(slope.device)
            for site, slope in zip(points, slopes, strict=True)
        }
        values += [log_p_s.detach(), *_by_layer(neurgrad, layers)]
    on_cpu = [value.numpy() for value in fetched(values)]
    targets, columns = [], _columns(points, slots_t)
    for total_tl, strongest_tl, place_tl in zip(on_cpu[1::4], on_cpu[2::4], on_cpu[3::4], strict=True):
        names = _named(place_tl.astype(np.int64), slots_t, columns)
        targets.append(TargetMap(own.ids, total_tl, strongest_tl, *names))
    of_readout = routing_of_rows(model.feed_forward, routing, own.rows.positions([1]))[0]
    return _Found(targets, [values.astype(np.float64) for values in on_cpu[::4]], of_readout)


def _by_layer(neurgrad: dict[Site, Tensor], layers: Sequence[int]) -> list[Tensor]:
    """Σ|NeurGrad|, the largest NeurGrad, and where along its layer's slots it is: [T, L] each, float32."""
    found = []
    for layer in layers:
        own_tm = torch.cat([values for site, values in neurgrad.items() if site.layer == layer], 1)
        place_t1 = own_tm.abs().argmax(1, keepdim=True)
        # A place along a layer's slots is far below 2²⁴.
        found.append((own_tm.abs().sum(1), own_tm.gather(1, place_t1)[:, 0], place_t1[:, 0].float()))
    return [torch.stack([values_t.to(own[0].device) for values_t in own], 1) for own in zip(*found, strict=True)]


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


def _named(place_tl: Ints, slots_t: Sequence[Slots], columns: tuple[Ints, list[Ints] | None]) -> tuple[Ints, Ints]:
    """Expert and number of the neurons at places along their layers' columns."""
    first_l, columns_t = columns
    expert_tl, neuron_tl = np.empty_like(place_tl), np.empty_like(place_tl)
    for t, slots in enumerate(slots_t):
        place_l = place_tl[t] + first_l
        if columns_t is not None:
            # Not of identities, unless all of a layer's neurons are silent.
            place_l = np.minimum(np.searchsorted(columns_t[t], place_l), slots.m - 1)
        rows = slots.rows_at(place_l)
        expert_tl[t], neuron_tl[t] = rows[:, 1], rows[:, 2]
    return expert_tl, neuron_tl
