"""Gradients of target probabilities at every feed-forward neuron, for batches of prompts of unequal length.

For target k and neuron m at the readout position (the prompt's last token):

    gradient[k, m] = d p[k] / d a[m] = p[k] * d log p[k] / d a[m]

in probability per activation unit. log p is what is differentiated, in float32: the tail of a low-precision
softmax is zero. How one backward pass gives all of it: `models/engines/backward.py`.

NeurGrad is the gradient times the sign of the activation, +1 at zero: a silent neuron can only grow.

Axes: B prompts of a batch, K targets of a prompt, M neurons that act on it in the chosen layers, R rows: (prompt,
target), V vocabulary;
where all layers have the same number of neurons and no experts, L layers of N neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neg_service.errors import ModelError
from neg_service.layer_neurons import NO_EXPERT
from neg_service.measures.batches_of_gradients import BatchGradients, columns_of_prompts
from neg_service.measures.batching import in_batches, named
from neg_service.measures.outputs import Output
from neg_service.measures.readouts import PLAIN, Readouts
from neg_service.measures.routing import PromptRouting, experts_of_prompts, routing_of_rows, slots_of
from neg_service.measures.sequences import TokenLogP, differentiated_sequences
from neg_service.measures.signs import Floats, sign
from neg_service.models.batches import Budget
from neg_service.models.engines.backward import TargetGradients, target_gradients
from neg_service.models.feed_forward import Point, Site
from neg_service.models.language_model import LanguageModel
from neg_service.models.transfer import indices, sent
from neg_service.prompts.prompt import EncodedPrompt
from neg_service.slots import Slots

T = TypeVar("T")

# A product of fewer rows than that sums in another order on the CPU than one of many does. Where a text says the same
# again and again, its last token and those before it are then rounded apart, which the model may magnify a thousand
# times: on one word said 1,201 times gradients were 1.8e-4 off in float32, with as many rows as this 1.6e-5.
_LEAST_ROWS_ON_CPU = 4


@dataclass(frozen=True)
class PromptGradients:
    """One prompt's gradients.

    targets: indices of the differentiated targets, along the first axis of `gradient_km`.
    probability_k: of *all* targets of the prompt, 0..1.
    gradient_km: probability per activation unit.
    activation_m: the neurons' activations at the readout position.
    slots: which neurons stand along M. routing: the experts that were chosen, of all layers. token_log_p: of each
    target its tokens' log p, where any is several tokens.
    """

    targets: tuple[int, ...]
    probability_k: Floats
    gradient_km: Floats
    activation_m: Floats
    slots: Slots
    routing: PromptRouting
    token_log_p: TokenLogP = None

    @property
    def neurgrad_km(self) -> Floats:
        """NeurGrad, probability per unit of |activation|."""
        return self.gradient_km * sign(self.activation_m)

    @property
    def gradient_kln(self) -> Floats:
        """Of layers of equal size without experts, the gradients by layer."""
        self._require_layers()
        return self.gradient_km.reshape(len(self.gradient_km), len(self.slots.size), -1)

    @property
    def activation_ln(self) -> Floats:
        """Of layers of equal size without experts, the activations by layer."""
        self._require_layers()
        return self.activation_m.reshape(len(self.slots.size), -1)

    def _require_layers(self) -> None:
        if (self.slots.expert != NO_EXPERT).any() or len(set(self.slots.size.tolist())) > 1:
            raise ModelError(
                "its layers have experts, or unequal numbers of neurons: a measure finds each neuron by `slots`, along "
                "`gradient_km` and `activation_m`"
            )


def gradients(
    model: LanguageModel,
    prompts: Sequence[EncodedPrompt],
    wanted: Sequence[Sequence[int]],
    basis: str,
    layers: Sequence[int],
    budget: Budget,
    each: bool = False,
) -> Iterator[tuple[int, PromptGradients]]:
    """Measure prompts in whatever order is cheapest; yields (index, result), each index once.

    `wanted[i]` are the indices of the targets of prompt i to differentiate; probabilities cover all targets. each: see
    `differentiated_sequences`.

    Raises:
        NonFiniteError: NaN or infinity in a prompt's logits or gradients.
        DoesNotFit: a prompt does not fit even alone.
    """
    points = model.feed_forward.sites(basis, layers)

    def finish(batch: BatchGradients, _indices: Sequence[int]) -> list[PromptGradients]:
        found = batch.fetched([batch.gradient_rm, batch.activation_bm])
        gradient_rm, activation_bm = (own.numpy() for own in found.tensors)
        # Copies: a view would keep the whole batch's array for as long as one prompt's result.
        return [
            PromptGradients(
                targets,
                probability_k,
                gradient_rm[rows, batch.columns_of(b)].copy(),
                activation_bm[b, batch.columns_of(b)].copy(),
                batch.slots[b],
                routing,
                found.log_p_b[b],
            )
            for b, (targets, rows, probability_k, routing) in enumerate(
                zip(batch.targets, batch.rows, found.probability_bk, batch.routings, strict=True)
            )
        ]

    return _batches(model, prompts, wanted, points, budget, finish, PLAIN, each)


@dataclass(frozen=True)
class PromptReduced:
    """What a reduction left of one prompt's gradients: `values` as it gave them; for the rest see `PromptGradients`."""

    targets: tuple[int, ...]
    probability_k: Floats
    values: tuple[NDArray[Any], ...]
    slots: Slots
    routing: PromptRouting
    token_log_p: TokenLogP = None


# Of the prompt with an index, from its slots, its gradients [K, M] and activations [M] where the model computed them.
Reduction = Callable[[int, Slots, Tensor, Tensor], Sequence[Tensor]]


def reduced_gradients(
    model: LanguageModel,
    prompts: Sequence[EncodedPrompt],
    wanted: Sequence[Sequence[int]],
    basis: str,
    layers: Sequence[int],
    budget: Budget,
    reduce: Reduction,
    readouts: Readouts = PLAIN,
    *,
    each: bool = False,
) -> Iterator[tuple[int, PromptReduced]]:
    """The same for measures that need less of a prompt than its gradients, and of other readouts, too.

    What `reduce` gives is all that is fetched. It runs where the model does; on an accelerator a prompt's gradients
    would take longer to fetch, and to be reduced by the CPU, than to compute. each: see `differentiated_sequences`.
    """
    points = model.feed_forward.sites(basis, layers)

    def finish(batch: BatchGradients, indices: Sequence[int]) -> list[PromptReduced]:
        values_b = [
            tuple(reduce(index, batch.slots[b], *batch.of_prompt(b, rows)))
            for b, (index, rows) in enumerate(zip(indices, batch.rows, strict=True))
        ]
        found = batch.fetched([value for own in values_b for value in own])
        on_cpu = iter(found.tensors)
        return [
            PromptReduced(
                batch.targets[b],
                found.probability_bk[b],
                tuple(_alone(next(on_cpu), value) for value in values_b[b]),
                batch.slots[b],
                batch.routings[b],
                found.log_p_b[b],
            )
            for b in range(len(indices))
        ]

    return _batches(model, prompts, wanted, points, budget, finish, readouts, each)


def _batches(
    model: LanguageModel,
    prompts: Sequence[EncodedPrompt],
    wanted: Sequence[Sequence[int]],
    points: dict[Site, Point],
    budget: Budget,
    finish: Callable[[BatchGradients, Sequence[int]], list[T]],
    readouts: Readouts,
    each: bool,
) -> Iterator[tuple[int, T]]:
    def run(indices: Sequence[int], shared: tuple[int, ...]) -> list[T]:
        own, own_wanted = [prompts[i] for i in indices], [wanted[i] for i in indices]
        batch = batch_gradients(model, own, own_wanted, points, shared, readouts, each)
        return finish(batch, indices)

    # What a target is compared with is differentiated, too.
    n_targets = [
        len(prompt.target_ids) if readouts.is_contrast else len(own)
        for prompt, own in zip(prompts, wanted, strict=True)
    ]
    shares_rows = model.engine.targets_share_rows
    counts = [1 if shares_rows and not prompt.is_tree else n for prompt, n in zip(prompts, n_targets, strict=True)]
    return in_batches(model, prompts, counts, run, budget, n_targets)


def batch_gradients(
    model: LanguageModel,
    prompts: Sequence[EncodedPrompt],
    wanted: Sequence[Sequence[int]],
    points: dict[Site, Point],
    shared: tuple[int, ...],
    readouts: Readouts = PLAIN,
    each: bool = False,
) -> BatchGradients:
    """Differentiate some targets of prompts that all begin with the tokens `shared`, and that one engine runs."""
    outputs = [Output.of(readouts, prompt.prompt) for prompt in prompts]
    wanted = [[k for k in own if k in output.kept] for own, output in zip(wanted, outputs, strict=True)]
    run_of = [range(len(prompt.target_ids)) for prompt in prompts] if readouts.is_contrast else wanted
    ends = np.cumsum([0, *map(len, run_of)]).tolist()
    of_logits = outputs[0].differentiates_logits
    run = _differentiated_trees if prompts[0].is_tree else _differentiated
    found, p_r1, log_p_r, rest_r, probability_bk, tokens_bks = run(
        model, prompts, run_of, points, shared, readouts, each, of_logits
    )
    device = found.log_p_rv.device
    first_b, widths = indices(ends[:-1], device), [own.shape[1] for own in found.gradient_srn]
    parts = [slice(*own) for own in pairwise(ends)]
    if readouts.is_plain:
        gradient_rm, finite_r = _joined(found, p_r1)
    else:
        slope_rm, finite_r = _joined(found, torch.ones_like(p_r1))
        finite_r = torch.cat([finite_r[own].all().expand(len(of)) for own, of in zip(parts, wanted, strict=True)])
        gradient_rm = torch.cat(
            [
                output.gradients(slope_rm[own], _compared(log_p_r[own], readouts), rest_r[own])[_places(of, output)]
                for own, of, output in zip(parts, wanted, outputs, strict=True)
            ]
        )
        finite_r &= gradient_rm.sum(-1).isfinite()
        parts = [slice(*own) for own in pairwise(np.cumsum([0, *map(len, wanted)]).tolist())]
    routings = routing_of_rows(model.feed_forward, found.routing, found.place_r[ends[:-1]])
    experts_b = [routing.experts for routing in routings]
    if found.used:
        experts_b = experts_of_prompts(model.feed_forward, found.used, len(prompts))
    if model.feed_forward.has_experts:
        slots = [slots_of(model.feed_forward, experts, points) for experts in experts_b]
    else:
        slots = [slots_of(model.feed_forward, {}, points)] * len(prompts)
    first_of = {own.device: sent(first_b, own.device) for own in found.activation_srn}
    return BatchGradients(
        who=[named(prompt, model) for prompt in prompts],
        targets=[tuple(own) for own in wanted],
        rows=parts,
        n_tokens=[[len(tokens) for tokens in prompt.target_tokens] for prompt in prompts],
        gradient_rm=gradient_rm,
        activation_bm=torch.cat([own[first_of[own.device]].float().to(device) for own in found.activation_srn], 1),
        finite_r=finite_r,
        probability_bk=probability_bk,
        log_p_bks=tokens_bks,
        slots=slots,
        routings=routings,
        columns=columns_of_prompts(points, widths, slots),
    )


class _Differentiated(NamedTuple):
    """Gradients of targets, and what else is needed of their probabilities; [R] float64, but for p [R, 1]."""

    found: TargetGradients
    p_r1: Tensor
    log_p_r: Tensor
    rest_r: Tensor
    probability_bk: Tensor
    tokens_bks: Tensor | None


def _differentiated(
    model: LanguageModel, prompts: Sequence[EncodedPrompt], run_of: Sequence[Sequence[int]], points: dict[Site, Point],
    shared: tuple[int, ...], readouts: Readouts, _each: bool, of_logits: bool,
) -> _Differentiated:  # fmt: skip
    """Of prompts whose rows are their last token."""
    target_ids = [[prompt.target_ids[k] for k in own] for prompt, own in zip(prompts, run_of, strict=True)]
    rows_of = model.rows([prompt.ids for prompt in prompts], shared)
    least_rows = _LEAST_ROWS_ON_CPU if model.device.type == "cpu" else 1
    found = target_gradients(rows_of, target_ids, points, of_logits=of_logits, least_rows=least_rows)
    device = found.log_p_rv.device
    first_b = indices(np.cumsum([0, *map(len, run_of)]).tolist()[:-1], device)
    p_r1 = found.log_p_rv.gather(1, indices([token for own in target_ids for token in own], device)[:, None]).exp()
    most = max(len(prompt.target_ids) for prompt in prompts)
    ids_bk = indices([[*prompt.target_ids, *[0] * (most - len(prompt.target_ids))] for prompt in prompts], device)
    log_p_r = rest_r = p_r1[:, 0].double().log()
    if readouts.uses_rest:
        # As exact as the probabilities are, also where one is nearly 1.
        rest_r = found.log_p_rv.exp().sum(1, dtype=torch.float64) - p_r1[:, 0].double()
    return _Differentiated(found, p_r1, log_p_r, rest_r, found.log_p_rv[first_b[:, None], ids_bk].exp(), None)


def _differentiated_trees(
    model: LanguageModel, prompts: Sequence[EncodedPrompt], run_of: Sequence[Sequence[int]], points: dict[Site, Point],
    shared: tuple[int, ...], readouts: Readouts, each: bool, of_logits: bool,
) -> _Differentiated:  # fmt: skip
    """Of prompts whose rows are several tokens."""
    found, tokens_bks = differentiated_sequences(
        model, prompts, run_of, points, shared, each, of_logits=of_logits, with_rest=readouts.uses_rest
    )
    log_p_r = found.log_p_rv.sum(1, dtype=torch.float64)
    rest_r = log_p_r if found.rest_r is None else found.rest_r
    return _Differentiated(found, log_p_r[:, None].exp().float(), log_p_r, rest_r, tokens_bks.sum(-1).exp(), tokens_bks)


def _compared(log_p_k: Tensor, readouts: Readouts) -> Tensor:
    """Probabilities [K], float64; where they are only compared with each other, over the largest of them."""
    return (log_p_k - log_p_k.max()).exp() if readouts.is_contrast else log_p_k.exp()


def _places(wanted: Sequence[int], output: Output) -> slice | list[int]:
    """Where the values of some targets stand among those that `Output.gradients` gives."""
    # Without a contrast only the wanted ones were differentiated.
    return [output.kept.index(k) for k in wanted] if output.readouts.is_contrast else slice(None)


def _alone(on_cpu: Tensor, value: Tensor) -> NDArray[Any]:
    """What was fetched of a value, keeping alive neither a batch, where it is a view, nor pinned memory."""
    is_whole = value is on_cpu and value.untyped_storage().nbytes() == value.nbytes
    found: NDArray[Any] = on_cpu.numpy()
    return found if is_whole else found.copy()


def _joined(found: TargetGradients, p_r1: Tensor) -> tuple[Tensor, Tensor]:
    """The sites' gradients of p side by side [R, M], and whether each row is finite, as its logits are.

    The slopes of log p are freed on the way. What they become takes less than the graph did, which is gone by now.
    """
    widths = [slopes.shape[1] for slopes in found.gradient_srn]
    finite_r = found.log_p_rv.isfinite().all(-1)
    gradient_rm = p_r1.new_empty(len(p_r1), sum(widths))
    for own_rn in torch.split(gradient_rm, widths, 1):
        slope_rn = found.gradient_srn.pop(0)
        torch.mul(slope_rn.float().to(p_r1.device), p_r1, out=own_rn)
    # One pass over them, in the place of four: sums of what is finite and at most 1 a unit or so are finite, too.
    return gradient_rm, finite_r & gradient_rm.sum(-1).isfinite()
