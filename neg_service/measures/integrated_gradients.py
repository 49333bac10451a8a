"""Integrated gradients: what each neuron brings to a probability while its layer grows from zero to what it is.

For target k, layer l and neuron n at the readout position, with all of the layer's activations scaled together:

    IG[k, l, n] = a[l, n] · (1/m) · Σ_{j=1..m}  ∂ p[k] / ∂ a[l, n]  at  a_l · j/m

in probability. One layer at a time: the layers below stay as they are, those above follow. A right Riemann sum, so that
over a layer's neurons it adds up to p[k] less p[k] with the layer at zero, with an error that shrinks as 1/m. It is
log p that is differentiated, in float32 or better, and multiplied by the p of the same scaled point. In a gated MLP
all three bases have the same integrated gradients: scaling any factor of a product scales the product.

A layer's m scaled points are rows over one prefix that begin at the layer (`interventions.py`). As many prompts run
together as have room in a batch with all of their points (`rows_together.py`).

Source: Dai et al., "Knowledge Neurons in Pretrained Transformers", ACL 2022 (arXiv 2104.08696).

A layer's experts and its MLP are scaled together; which experts were chosen does not depend on that.

Neurons may be at an earlier token, and targets several tokens, whose p is the product over them (`sequences.py`):
neurons are scaled at one token all the same, the one that is shifted.

Axes: P prompts, B of them that run together, K targets of a prompt, L chosen layers, N neurons of a layer, M neurons of
several layers, J scaled points of a batch, R rows of all prompts, F features, S tokens that are read, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neg_service.config import NeuronsConfig
from neg_service.errors import ConfigurationError, NonFiniteError, told_by_parameters
from neg_service.measures.batching import budget_of, in_joint_parts, in_parts, named
from neg_service.measures.choice import layers_with_neurons
from neg_service.measures.neurgrad import encoded_texts, slots_by_layer
from neg_service.measures.routing import PromptRouting
from neg_service.measures.rows_together import RowsTogether, rows_join
from neg_service.measures.sequences import TokenLogP
from neg_service.measures.signs import Floats
from neg_service.measures.tables import tell_of_underflow
from neg_service.models.batches import Budget
from neg_service.models.engines.base import RowSizes
from neg_service.models.feed_forward import Site
from neg_service.models.head import log_softmax
from neg_service.models.language_model import LanguageModel
from neg_service.models.precision import at_least_float32
from neg_service.models.transfer import indices
from neg_service.prompts.prompt import Asked, At, EncodedPrompt
from neg_service.slots import Slots

# So many targets are differentiated at once.
_TARGETS_TOGETHER = 32
# So many prompts run together at the most.
_MOST_TOGETHER = 64


@dataclass(frozen=True)
class IntegratedGradientsResult:
    """Integrated gradients of a list of prompts; prompts with fewer targets than K are padded with NaN.

    probability: [P, K] float32, 0..1.
    integrated_gradients: [P, K, L, N] float32, probability.
    activation: [P, L, N] float32, at each prompt's readout position, or at the token that `neurons_at` says.
    n_targets: [P], how many of the K are real.
    layers: the layer numbers along L. expert, neuron: what stands along N of models with experts; `NeurGradResult`.
    """

    probability: Floats
    integrated_gradients: Floats
    activation: Floats
    n_targets: NDArray[np.int64]
    layers: tuple[int, ...]
    expert: NDArray[np.int64] | None = None
    neuron: NDArray[np.int64] | None = None


@told_by_parameters(
    model__source="model",
    dataset__source="prompts",
    dataset__chat_template="model.tokenizer.chat_template",
    measure__steps="m",
)
def integrated_gradients(
    model: LanguageModel,
    prompts: Sequence[Asked],
    targets: Sequence[Sequence[str]],
    *,
    basis: str = "paper",
    layers: Sequence[int] | None = None,
    m: int = 20,
    batch_bytes: int | None = None,
    batch_tokens: int | None = None,
    not_one_token: str = "error",
    neurons_at: Sequence[At | None] | None = None,
) -> IntegratedGradientsResult:
    """Integrated gradients of every feed-forward neuron for every target of every prompt, at its readout position.

    Formula, units and source: this module's header.

    Args:
        model: from `load_model`.
        prompts: P texts; or lists of messages, `{"role": ..., "content": ...}`, for the model's chat template.
        targets: for each prompt, texts that follow it verbatim; each must be one token there, unless `not_one_token`
            is `sequence`: then the probability of a target is the product over its tokens.
        neurons_at: where neurons are, if not at the readout position: for each prompt a text of it, whose last token
            is meant, a range of characters, or a token's place from either end.
        basis: which tensor is "the neuron": `paper`, `hidden` or `gate`.
        layers: layer numbers from 0; all layers if not given.
        m: how many points between zero (not one of them) and the activations (the last) are summed over.
        batch_bytes: memory that a batch may take; if not given, what keeps the device busy and fits it. Halved by
            itself when memory ends, and recovers; never changes the results. batch_tokens: its old name and unit.

    Returns:
        Arrays on the CPU, in the order of `prompts`.

    Raises:
        PromptError: an empty prompt, one beyond the model's context, or a target that is not one token.
        ConfigurationError: an unknown basis or layer, or m below 1.
        ModelError: the model fails its self-check, which runs once, before the first measurement.
        NonFiniteError: NaN or infinity in logits or gradients, of the prompt or of a scaled point.
        DoesNotFit: one scaled point of a prompt does not fit.
    """
    check_steps(m)
    encoded = encoded_texts(model, prompts, targets, not_one_token, neurons_at)
    chosen = layers_with_neurons(
        NeuronsConfig("all" if layers is None else list(layers)), model.feed_forward.layer_neurons
    )
    model.ensure_checked()
    budget = budget_of(model, batch_bytes, batch_tokens)
    wanted = [tuple(range(len(prompt.target_ids))) for prompt in encoded]

    p, k, slots = len(encoded), max(map(len, wanted)), slots_by_layer(model, p=len(encoded), layers=chosen)
    result = IntegratedGradientsResult(
        probability=np.full((p, k), np.nan, np.float32),
        integrated_gradients=np.full((p, k, len(chosen), slots.n), np.nan, np.float32),
        activation=np.full((p, len(chosen), slots.n), np.nan, np.float32),
        n_targets=np.array([len(own) for own in wanted]),
        layers=tuple(chosen),
        expert=slots.expert,
        neuron=slots.neuron,
    )
    for index, found in integrals(model, encoded, wanted, basis, chosen, m, budget):
        tell_of_underflow(f"prompts[{index}]", found.token_log_p)
        place = slots.places(index, found.slots)
        result.probability[index, : len(found.targets)] = found.probability_k
        result.integrated_gradients[index][: len(found.targets), *place] = found.integral_km
        result.activation[index, *place] = found.activation_m
    return result


@dataclass(frozen=True)
class PromptIntegrals:
    """One prompt's integrated gradients.

    targets: indices of the targets along the first axis of `integral_km`.
    probability_k: of *all* targets of the prompt, 0..1.
    integral_km: probability.
    activation_m: the neurons' activations at the readout position.
    slots: which neurons stand along M. routing: the experts that were chosen, of all layers. token_log_p: of each
    target its tokens' log p, where any is several tokens.
    """

    targets: tuple[int, ...]
    probability_k: Floats
    integral_km: Floats
    activation_m: Floats
    slots: Slots
    routing: PromptRouting
    token_log_p: TokenLogP = None


def integrals(
    model: LanguageModel,
    prompts: Sequence[EncodedPrompt],
    wanted: Sequence[Sequence[int]],
    basis: str,
    layers: Sequence[int],
    m: int,
    budget: Budget,
) -> Iterator[tuple[int, PromptIntegrals]]:
    """Measure prompts, those with a common prefix together; yields (index, result), each index once.

    `wanted[i]` are the indices of the targets of prompt i to integrate for; probabilities cover all targets.
    """
    of_batch = _Integrated(model, basis, layers, m, budget)

    def kind_of(index: int) -> int | None:
        # The ways back of as many targets are run for all prompts that run together.
        return len(wanted[index]) if rows_join(model, prompts[index]) else None

    def cost_of(index: int, longest: int, n_shared: int) -> int:
        return of_batch.cost(longest, n_shared, len(wanted[index]))

    def run(members: list[int], shared: tuple[int, ...]) -> list[PromptIntegrals]:
        return of_batch.integrals([prompts[i] for i in members], [tuple(wanted[i]) for i in members], shared)

    yield from in_joint_parts(model, prompts, kind_of, cost_of, run, budget, _MOST_TOGETHER)


@dataclass(frozen=True)
class _Integrated:
    """How prompts that run together are measured; see `integrals`."""

    model: LanguageModel
    basis: str
    layers: Sequence[int]
    m: int
    budget: Budget

    def cost(self, n: int, n_shared: int, n_targets: int) -> int:
        """What a prompt of n tokens takes of a batch's memory with all points of a layer."""
        engine = self.model.engine
        return engine.cost(n, n_shared, 1, 1) + self.m * _point_bytes(engine.row_sizes(n), n_targets)

    def integrals(
        self, prompts: Sequence[EncodedPrompt], wanted: Sequence[tuple[int, ...]], shared: tuple[int, ...]
    ) -> list[PromptIntegrals]:
        """Of some prompts that begin with shared tokens, in their order."""
        together = RowsTogether.of(self.model, prompts, self.basis, shared)
        members = together.members
        paths = [[own.paths[k] for k in targets] for own, targets in zip(members, wanted, strict=True)]
        # Some layers of a hybrid have no neurons.
        integrated = [layer for layer in self.layers if members[0].sites([layer])]
        by_layer = [_integral(together, layer, paths, self.m, self.budget) for layer in integrated]
        found = []
        for b, (own, targets) in enumerate(zip(members, wanted, strict=True)):
            of_prompt = [of_layer[b] for of_layer in by_layer]
            is_finite = [bool(of_layer.isfinite().all()) for of_layer in of_prompt]
            if not all(is_finite):
                raise NonFiniteError(
                    f"{named(own.prompt, self.model)}: NaN or infinity in logits or gradients with the neurons of "
                    f"layer {integrated[is_finite.index(False)]} between zero and what they are; try another "
                    "model.dtype"
                )
            sites = own.sites(self.layers)
            found.append(
                PromptIntegrals(
                    targets=targets,
                    probability_k=own.probability_k.float().cpu().numpy(),
                    integral_km=torch.cat([of_layer.float().cpu() for of_layer in of_prompt], 1).numpy(),
                    activation_m=torch.cat([own.activation[site].float().cpu() for site in sites]).numpy(),
                    slots=own.slots(sites),
                    routing=own.routing,
                    token_log_p=own.token_log_p,
                )
            )
        return found


# Of a target (place among the tokens that are read, token that is predicted behind it), token by token.
Path = Sequence[tuple[int, int]]


def _point_bytes(sizes: RowSizes, n_targets: int) -> int:
    """A point's row keeps a graph through the layers; the ways back of several targets are run together."""
    return sizes.graph + min(n_targets, _TARGETS_TOGETHER) * sizes.slope


def _integral(
    together: RowsTogether, layer: int, paths: Sequence[Sequence[Path]], m: int, budget: Budget
) -> list[Tensor]:
    """Integrated gradients [K, M] of one layer, of each prompt, in float32 or better; what did not fit shrinks the
    budget."""

    def run(part: range) -> Tensor:
        return _summed_slopes(together, layer, paths, range(1, m + 1)[part.start : part.stop], m)

    members = together.members
    most = max(map(len, paths))
    point = sum(_point_bytes(own.sizes, most) for own in members)
    # Several that do not fit are tried again in smaller parts.
    naming = members[0].naming_memory(f"one scaled point of layer {layer} does") if len(members) == 1 else nullcontext()
    with naming:
        parts = [found for _, found in in_parts([point] * m, run, budget)]
    slopes_bkm = torch.stack(parts).sum(0)
    found = []
    for own, slopes_km, of_prompt in zip(members, slopes_bkm, paths, strict=True):
        activation_m = torch.cat([own.activation[site] for site in own.sites([layer])])
        found.append(at_least_float32(activation_m) * slopes_km[: len(of_prompt)] / m)
    return found


def _summed_slopes(together: RowsTogether, layer: int, paths: Sequence[Sequence[Path]], steps: range, m: int) -> Tensor:
    """Σ_j ∂p[k] / ∂a [B, K, M] of the scaled points `steps` of a layer, of as many targets as any prompt has.

    A point is one row for all targets, and only the way back is run for each, vectorised. On SmolLM2 on one core, with
    20 points, 4 targets and all layers, that takes 7 s; a row for each point and target takes 10 s, and a backward pass
    after another for each target 11 s.
    """
    sites = together.members[0].sites([layer])
    activations = {site: together.activation(site) for site in sites}
    device, n_prompts = activations[sites[0]].device, len(together.members)
    factor_j1 = torch.tensor(steps, dtype=torch.float64, device=device)[:, None] / m
    shifts: dict[Site, Tensor] = {}

    def scale(site: Site, x_tf: Tensor, place_rq: Tensor) -> Tensor:
        activation_b1n = activations[site][:, None]
        scaled_rn = (activation_b1n * factor_j1).to(activation_b1n.dtype).flatten(0, 1)
        # Nothing frozen requires a gradient; a shift by zero of the scaled points does.
        shifts[site] = x_tf.new_zeros(len(scaled_rn), x_tf.shape[1], requires_grad=True)
        for place_r in place_rq.T:
            together.points[site].neurons(x_tf)[place_r, : scaled_rn.shape[1]] = scaled_rn
        for place_r in place_rq.T:
            x_tf = x_tf.index_add(0, place_r, shifts[site])
        return x_tf

    with torch.enable_grad():
        logits_mv = together.run_from(layer, len(steps), {site: partial(scale, site) for site in sites})
        log_p_bjsv = log_softmax(at_least_float32(logits_mv)).view(n_prompts, len(steps), -1, logits_mv.shape[-1])
        log_p_bkj = _log_p_of_targets(log_p_bjsv, paths)
        slopes = []
        # Rows of other prompts and points do not depend on each other, so that a sum has the gradients of all.
        for summed_k in torch.split(log_p_bkj.sum((0, 2)), _TARGETS_TOGETHER):
            one_each = torch.eye(len(summed_k), dtype=summed_k.dtype, device=summed_k.device)
            slopes_skrf = torch.autograd.grad(
                summed_k, list(shifts.values()), grad_outputs=one_each, is_grads_batched=True, retain_graph=True
            )
            by_site = dict(zip(shifts, slopes_skrf, strict=True))
            own = [together.points[site].neurons(by_site[site])[..., : activations[site].shape[1]] for site in sites]
            slopes.append(at_least_float32(torch.cat(own, -1)))
    slopes_kbjm = torch.unflatten(torch.cat(slopes), 1, (n_prompts, -1))
    p_kbj1 = log_p_bkj.detach().exp().transpose(0, 1)[..., None].to(device)
    return (p_kbj1 * slopes_kbjm).sum(2).transpose(0, 1)


def _log_p_of_targets(log_p_bjsv: Tensor, paths: Sequence[Sequence[Path]]) -> Tensor:
    """Of each target the sum over its tokens [B, K, J]; 0 of targets that a prompt does not have."""
    b, j, most = len(paths), log_p_bjsv.shape[1], max(map(len, paths))
    of_tokens = [
        (b, b * most + k, place, token)
        for b, of_prompt in enumerate(paths)
        for k, path in enumerate(of_prompt)
        for place, token in path
    ]
    prompt_a, target_a, place_a, token_a = (indices(own, log_p_bjsv.device) for own in zip(*of_tokens, strict=True))
    log_p_aj = log_p_bjsv.transpose(1, 2)[prompt_a, place_a, :, token_a]
    return log_p_aj.new_zeros(b * most, j).index_add(0, target_a, log_p_aj).view(b, most, j)


def check_steps(steps: int) -> None:
    """Refuse fewer points than one."""
    if steps < 1:
        raise ConfigurationError(
            setting="measure.steps", value=steps, allowed="at least 1, the number of points that are summed over"
        )
