"""How exact a sweep is: its noise, measured against a higher precision on a few neurons before it starts.

Which NEGs mean anything depends on how rows are run. With w_s the weights with which a curve is summed up to its NEG
(Σ_s w_s·Δp_s), in probability per activation unit, a NEG below its resolution has no known sign:

*By difference arithmetic* an error is a share ε of what it is an error of. It is measured as that of Δ log p against
ρ, the root mean square of what a row's logits moved by, and is about the same for weak and strong neurons. Errors of
one neuron's rows come from what they have in common, and are taken to add up:

    resolution = 2 · p · ε · Σ_s |w_s|·ρ_s

*By rows that are subtracted* what is left of rounding has about the same size in all rows, σ in Δ log p:

    resolution = 2 · p · σ · √(Σ_s w_s² + (Σ_s w_s)²)      which is 2·p·σ/√(Σ_s δ_s²) where all shifts of a symmetric
                                                           grid are run

The second sum is the baseline row's error, which all shifts of a curve share; over a symmetric grid it cancels.
Measured on SmolLM2-135M (80 neurons of five layers, two prompts, two targets, float32 against float64, 2026-11), half
of σ² is that row's, and 95 to 98 % of NEGs are off by less than their resolution, with symmetric, one-sided and skewed
grids and with a single shift; without it, 75 % with shifts 0.1 to 2.0.

The reference is float64 over the same weights; for rows in low precision, which are far from it, float32.

Axes: n neurons, S shifts, K targets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from neg_service.config import NeuronsConfig
from neg_service.errors import NonFiniteError, OutOfMemory
from neg_service.measures.adaptive import RowNoise, row_gain
from neg_service.measures.batching import budget_of, named
from neg_service.measures.choice import chosen_neurons
from neg_service.measures.curves import Sites, curves
from neg_service.measures.interventions import Interventions
from neg_service.measures.linearity import linearity
from neg_service.measures.shifts import AdaptiveGrid, Grid, Sweep, adaptive_grid
from neg_service.models.batches import Budget
from neg_service.models.engines.comparisons import check_ids
from neg_service.models.language_model import LanguageModel
from neg_service.models.precision import in_precision
from neg_service.neurons import NeuronSet
from neg_service.prompts.prompt import EncodedPrompt, Prompt

_LAYERS, _NEURONS_A_LAYER = 4, 4
# Of calls of the library: targets whose errors are measured, and what was found, by model and basis.
_TARGETS = 3
_KNOWN: WeakKeyDictionary[LanguageModel, dict[str, RowNoise]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Noise:
    """Of a sweep in `dtype` against `reference`, over `n_neurons` neurons on `n_prompts` prompts, all targets.

    sigma: standard deviation of the error of Δ log p, where `is_per_row` as a share of how far a row's logits spread.
    neg_error: median relative error of NEG. resolved: share of NEGs above the resolution; signs_agree: share of these
    whose sign is the reference's. None where there are none.
    """

    dtype: str
    reference: str
    n_neurons: int
    n_prompts: int
    sigma: float
    neg_error: float | None
    resolved: float
    signs_agree: float | None
    is_per_row: bool = False


def resolution(grid: Grid, sigma: float) -> float:
    """The smallest NEG whose sign is known, in units of the target's probability: times p it is a NEG."""
    return 2 * sigma * grid.noise_gain


def row_resolution(row_gain_n: Tensor, sigma: float) -> Tensor:
    """The same where errors are a share of each row's spread [n]; `row_gain_n` is `row_gain`'s."""
    return 2 * sigma * row_gain_n


def measure_noise(
    model: LanguageModel, prompts: Sequence[EncodedPrompt], neurons: NeuronSet, sweep: Sweep, budget: Budget
) -> Noise:
    """Sweep a few of `neurons` on `prompts` twice: as asked, and in the reference's precision.

    A prompt that gives NaN or infinity, or that does not fit into memory in either precision, is left out: it costs its
    own shard, not the run.

    Raises:
        NonFiniteError, OutOfMemory: no prompt is left; what was wrong with the last one.
    """
    if isinstance(sweep.grid, AdaptiveGrid):
        sweep = replace(sweep, grid=sweep.grid.calibration)
    assert isinstance(sweep.grid, Grid)
    own_dtype = model.dtype
    has_differences = model.engine.refines is not None and not any(prompt.is_tree for prompt in prompts)
    is_exact = own_dtype in (torch.float32, torch.float64) or has_differences
    reference = torch.float64 if is_exact else torch.float32
    n_neurons = 0
    errors: list[Tensor] = []
    row_gains: list[Tensor] = []
    negs: list[tuple[Tensor, Tensor]] = []
    for place, prompt in enumerate(prompts):
        try:
            few = _few_that_act(model, prompt, neurons, sweep.basis)
            own_nsk, spread_ns, _, own_acts_n = _delta_log_p(model, prompt, few, sweep, own_dtype, budget)
            true_nsk, _, p_k, true_acts_n = _delta_log_p(model, prompt, few, sweep, reference, budget)
        except (NonFiniteError, OutOfMemory):
            if errors or place + 1 < len(prompts):
                continue
            raise
        # In low precision rounding may have other experts chosen; what exists in one alone compares with nothing.
        acts_n = own_acts_n & true_acts_n
        if not acts_n.any():
            if errors or place + 1 < len(prompts):
                continue
            raise NonFiniteError(
                f"{named(prompt, model)}: rounding has other experts chosen than in {_name(reference)}, so that the "
                "noise cannot be measured; try model.dtype=float32"
            )
        own_nsk, true_nsk = own_nsk[acts_n], true_nsk[acts_n]
        n_neurons = max(n_neurons, len(own_nsk))
        error_nsk = own_nsk - true_nsk
        if prompt.is_tree:
            error_nsk = _of_a_token(error_nsk, prompt)
        if spread_ns is not None:
            # A neuron that moves no logit has no error either.
            error_nsk = torch.where(spread_ns[acts_n][..., None] > 0, error_nsk / spread_ns[acts_n][..., None], 0.0)
            row_gains.append(row_gain(sweep.grid, spread_ns[acts_n]).repeat_interleave(own_nsk.shape[2]))
        errors.append(error_nsk.flatten())
        # In units of p, so that prompts and targets compare.
        own_nk, true_nk = (linearity(sweep.grid, (p_k * x.expm1()).mT).neg / p_k for x in (own_nsk, true_nsk))
        negs.append((own_nk.flatten(), true_nk.flatten()))
    own, true = (torch.cat(parts) for parts in zip(*negs, strict=True))
    sigma = float(torch.cat(errors).square().mean().sqrt())
    neg_error = float(((own - true) / true).abs().nanmedian())
    least = row_resolution(torch.cat(row_gains), sigma) if row_gains else resolution(sweep.grid, sigma)
    is_resolved = own.abs() > least
    agree = (own.sign() == true.sign())[is_resolved]
    return Noise(
        _name(own_dtype), _name(reference), n_neurons, len(errors), sigma,
        neg_error=neg_error if math.isfinite(neg_error) else None,
        resolved=float(is_resolved.double().mean()),
        signs_agree=float(agree.double().mean()) if len(agree) else None,
        is_per_row=bool(row_gains),
    )  # fmt: skip


def _of_a_token(error_nsk: Tensor, prompt: EncodedPrompt) -> Tensor:
    """Of targets of several tokens [n, S, 1]: errors of tokens are taken to add up, and the worst target counts."""
    error_nsk = error_nsk / torch.tensor([len(own) for own in prompt.target_tokens])
    worst = int(error_nsk.square().sum((0, 1)).argmax())
    return error_nsk[..., worst : worst + 1]


def row_noise(model: LanguageModel, basis: str, budget: Budget | None = None, *, sequences: bool = False) -> RowNoise:
    """How far rows are off, for calls of the library; measured once for a model and basis.

    sequences: those of targets of several tokens, which are never differences, and whose noise is of each token.

    On the tokens of the self-check, so that no result depends on what was asked before. In float64 there is no finer
    reference, and it is 0.

    Raises:
        NonFiniteError, OutOfMemory: as `measure_noise`.
    """
    if model.dtype == torch.float64:
        return RowNoise()
    known = _KNOWN.setdefault(model, {})
    key = f"{basis}, sequences" if sequences else basis
    if key not in known:
        ids = check_ids(model.engine.model)
        targets = ids[:_TARGETS]
        # Of one token, of two and of three.
        following = tuple(ids[_TARGETS : _TARGETS + n] for n in range(len(targets))) if sequences else ()
        prompt = EncodedPrompt(Prompt("of the self-check", "-", ("-",) * len(targets)), ids, targets, following)
        neurons = chosen_neurons(NeuronsConfig(), model.feed_forward.layer_neurons)
        sweep = Sweep(adaptive_grid(), basis)
        found = measure_noise(model, [prompt], neurons, sweep, budget or budget_of(model))
        known[key] = RowNoise(found.sigma, found.is_per_row)
    return known[key]


def _delta_log_p(
    model: LanguageModel, prompt: EncodedPrompt, neurons: NeuronSet, sweep: Sweep, dtype: torch.dtype, budget: Budget
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Δ log p [n, S, K], how far logits spread [n, S], p [K] and whether neurons act on the prompt [n].

    In float64 on the CPU; the model computes in `dtype`. Spreads are None where errors do not depend on them.
    """
    layers = model.feed_forward.layers
    with nullcontext() if dtype == model.dtype else in_precision(model.model, layers, dtype):
        interventions = Interventions(model, prompt, sweep.basis)
        sites = Sites.of(interventions, neurons.layers)
        place_n = interventions.slots(sites.sites).places_of(neurons)
        p_k = interventions.probability_k.double().cpu()
        found_nsk = torch.zeros(len(neurons), len(sweep.grid.shifts), len(p_k), dtype=torch.float64)
        spread_ns: Tensor | None = None
        in_order = np.argsort(place_n, kind="stable")
        in_order = in_order[place_n[in_order] >= 0]
        if len(in_order):
            own_nsk, _, _, own_ns = curves(interventions, sites, place_n[in_order], sweep, budget)
            found_nsk[in_order] = own_nsk.cpu().double()
            if own_ns is not None:
                spread_ns = found_nsk.new_zeros(found_nsk.shape[:2])
                spread_ns[in_order] = own_ns.cpu().double()
        return found_nsk, spread_ns, p_k, torch.from_numpy(place_n >= 0)


def _few_that_act(model: LanguageModel, prompt: EncodedPrompt, neurons: NeuronSet, basis: str) -> NeuronSet:
    """A few of the neurons whose experts the prompt's readout token uses; of all such in their layers if none does."""
    if not model.feed_forward.has_experts:
        return _few(neurons)
    interventions = Interventions(model, prompt, basis)
    slots = interventions.slots(interventions.sites(neurons.layers))
    acting = neurons.take(np.flatnonzero(slots.places_of(neurons) >= 0))
    return _few(acting if len(acting) else NeuronSet.distinct(slots.rows_at(np.arange(slots.m)))[0])


def _few(neurons: NeuronSet) -> NeuronSet:
    """A few of the neurons in layers that are spread evenly, drawn with a fixed seed, ordered by layer and index."""
    layers = neurons.layers
    spread = np.unique(np.linspace(0, len(layers) - 1, _LAYERS).round().astype(int))
    draw = np.random.default_rng(0)
    few = []
    for place in spread:
        own = np.flatnonzero(neurons.layer == layers[place])
        few.append(own[np.sort(draw.choice(len(own), min(_NEURONS_A_LAYER, len(own)), replace=False))])
    return neurons.take(np.concatenate(few))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
