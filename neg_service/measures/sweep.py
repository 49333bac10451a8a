"""NEG, the neuron empirical gradient, measured: shift one neuron at a time and see what the output does.

For shifts δ_1..δ_S of a neuron's magnitude, a -> a + δ·sgn(a) with sgn(0) = +1, and Δp(δ) the target's probability
with the shift minus without it:

    NEG = Σ_s δ_s·Δp_s / Σ_s δ_s²          least squares through the origin, probability per unit of |activation|
    r   = Pearson correlation of (δ_s, Δp_s); 0 where all Δp are equal; |r| >= 0.95 counts as linear
    R²  = 1 - Σ_s (Δp_s - NEG·δ_s)² / Σ_s Δp_s²     of that fit; 0 where all Δp are 0

With `shift="signed"` the neuron moves by δ itself, and NEG compares with the plain gradient. How a shift's effect is
had at the price of the remaining layers, and without subtracting probabilities: `interventions.py`.

Source: Zhao, Jiang, Yoshinaga, "Neuron Empirical Gradient", ACL 2025 (arXiv 2412.18053).

Axes: n neurons asked for, S shifts, N neurons of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from neg_service.errors import ConfigurationError
from neg_service.measures.interventions import Interventions
from neg_service.models.language_model import LanguageModel
from neg_service.prompts.prompt import EncodedPrompt, Prompt, check_prompts, encode

Doubles = NDArray[np.float64]

SHIFTS = ("magnitude", "signed")
# Memory for the rows of a batch; larger batches are no faster from a few hundred rows on.
BATCH_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Linearity:
    """What a curve of Δp over shifts says; each [n] float64, formulas in the module's header."""

    neg: Doubles
    r: Doubles
    r2: Doubles
    largest: Doubles


@dataclass(frozen=True)
class NegResult:
    """NEG of neurons for one target of one prompt.

    neurons: [n, 2] layer and index. shifts: [S] activation units. delta_p: [n, S] probability.
    neg, r, r2: [n]. activation: [n] at the readout position. probability: without a shift, 0..1.
    """

    neurons: NDArray[np.int64]
    shifts: Doubles
    delta_p: Doubles
    neg: Doubles
    r: Doubles
    r2: Doubles
    activation: Doubles
    probability: float


def neg(
    model: LanguageModel,
    prompt: str,
    target: str,
    neurons: Sequence[tuple[int, int]] | Literal["all"] = "all",
    shifts: Sequence[float] | None = None,
    basis: str = "paper",
    shift: str = "magnitude",
    batch_bytes: int = BATCH_BYTES,
) -> NegResult:
    """Measure NEG by intervention at the prompt's last token; formulas, units and source in the module's header.

    Args:
        model: from `load_model`.
        prompt: a text.
        target: what follows it verbatim; one token there.
        neurons: (layer, index) pairs, or `all`.
        shifts: the grid; +-0.1, +-0.2, ... +-2.0 if not given.
        basis: which tensor is "the neuron": `paper`, `hidden` or `gate`.
        shift: `magnitude` or `signed`.
        batch_bytes: memory for a batch's rows; never changes the results.

    Raises:
        PromptError: the prompt or the target is unusable.
        ConfigurationError: a neuron that does not exist, none at all, a bad grid, or no memory for two rows.
        NonFiniteError: NaN or infinity in the prompt's logits.
    """
    asked = [Prompt("0", prompt, (target,))]
    check_prompts(asked)
    grid = checked_shifts(shift_grid() if shifts is None else shifts)
    if shift not in SHIFTS:
        raise ConfigurationError(f"measure.shift={shift} is unknown; known are {', '.join(SHIFTS)}")
    found = model.feed_forward
    if isinstance(neurons, str):
        if neurons != "all":
            raise ConfigurationError(f"neurons={neurons!r}: must be 'all' or a list of (layer, index)")
        neurons = [(layer, index) for layer in range(found.n_layers) for index in range(found.n_neurons)]
    chosen = checked_neurons(neurons, found.n_layers, found.n_neurons)
    (encoded,) = encode(model.tokenizer, asked, model.context_length)
    model.ensure_checked()
    interventions = Interventions(model, encoded, basis)
    log_p_ns = torch.empty(len(chosen), len(grid), dtype=torch.float64)
    activation_n = torch.empty(len(chosen), dtype=torch.float64)
    for layer in sorted(set(chosen[:, 0].tolist())):
        places = np.flatnonzero(chosen[:, 0] == layer)
        own = torch.from_numpy(chosen[places, 1])
        delta_nsk = curves(interventions, layer, own, grid, shift, rows_that_fit(model, encoded, batch_bytes))
        log_p_ns[places] = delta_nsk[..., 0].double().cpu()
        activation_n[places] = interventions.activation_ln[layer].cpu()[own].double()
    probability = float(interventions.probability_k[0])
    delta_p = (probability * log_p_ns.expm1()).numpy()
    measured = linearity(grid, delta_p)
    return NegResult(
        neurons=chosen,
        shifts=grid,
        delta_p=delta_p,
        neg=measured.neg,
        r=measured.r,
        r2=measured.r2,
        activation=activation_n.numpy(),
        probability=probability,
    )


def curves(
    interventions: Interventions, layer: int, neurons_n: torch.Tensor, grid: Doubles, shift: str, batch_rows: int
) -> torch.Tensor:
    """Δ log p [n, S, K] of neurons of one layer over a grid of shifts; batches are filled across neurons."""
    sign_n = torch.ones(len(neurons_n), dtype=torch.float64)
    if shift == "magnitude":
        # A silent neuron can only grow: the sign of zero is plus one.
        sign_n[interventions.activation_ln[layer].cpu()[neurons_n] < 0] = -1
    moved_ns = sign_n[:, None] * torch.from_numpy(grid)[None]
    delta_ik = interventions.delta_log_p(layer, neurons_n.repeat_interleave(len(grid)), moved_ns.flatten(), batch_rows)
    return delta_ik.view(len(neurons_n), len(grid), -1)


def linearity(shifts_s: Doubles, delta_p_ns: Doubles) -> Linearity:
    """NEG, Pearson r, R² through the origin and the largest |Δp| of each curve."""
    square = float(shifts_s @ shifts_s)
    neg_n = delta_p_ns @ shifts_s / square
    centred_s = shifts_s - shifts_s.mean()
    centred_ns = delta_p_ns - delta_p_ns.mean(1, keepdims=True)
    spread_n = np.sqrt((centred_ns**2).sum(1) * (centred_s @ centred_s))
    # Rounding leaves equal values a hair apart; what is that small against the values is no correlation.
    is_flat = np.ptp(delta_p_ns, axis=1) <= 1e-14 * np.abs(delta_p_ns).max(1, initial=0)
    r_n = np.divide(centred_ns @ centred_s, spread_n, out=np.zeros(len(spread_n)), where=~is_flat & (spread_n > 0))
    total_n = (delta_p_ns**2).sum(1)
    left_n = ((delta_p_ns - neg_n[:, None] * shifts_s) ** 2).sum(1)
    r2_n = 1 - np.divide(left_n, total_n, out=np.ones(len(total_n)), where=total_n > 0)
    return Linearity(neg_n, np.clip(r_n, -1, 1), r2_n, np.abs(delta_p_ns).max(1, initial=0))


def shift_grid(max_shift: float = 2.0, step: float = 0.1) -> Doubles:
    """Shifts from -max_shift to max_shift without zero; the default has the paper's 40.

    Raises:
        ConfigurationError: a step or a range that is not positive and finite, or a step larger than the range.
    """
    if not (math.isfinite(max_shift) and math.isfinite(step) and 0 < step <= max_shift):
        raise ConfigurationError(
            f"measure.step={step}, measure.max_shift={max_shift}: both must be finite, and 0 < step <= max_shift"
        )
    up = step * np.arange(1, math.floor(max_shift / step + 1e-9) + 1)
    return np.concatenate([-up[::-1], up])


def checked_shifts(shifts: Sequence[float] | Doubles) -> Doubles:
    """Shifts as an array.

    Raises:
        ConfigurationError: none, one that is zero or not finite, or one given twice.
    """
    grid = np.asarray(shifts, dtype=np.float64)
    if grid.ndim != 1 or not len(grid):
        raise ConfigurationError("measure.shifts: at least one shift is needed")
    for value in grid:
        if not math.isfinite(value) or value == 0:
            raise ConfigurationError(f"measure.shifts: {value:g} is no shift; shifts must be finite and not 0")
    values, counts = np.unique(grid, return_counts=True)
    if counts.max() > 1:
        raise ConfigurationError(f"measure.shifts: {values[counts.argmax()]:g} is given {counts.max()} times")
    return grid


def checked_neurons(neurons: Sequence[tuple[int, int]], n_layers: int, n_neurons: int) -> NDArray[np.int64]:
    """(layer, index) pairs as an array [n, 2].

    Raises:
        ConfigurationError: none, or one that does not exist.
    """
    chosen = np.asarray(neurons)
    if chosen.size == 0:
        raise ConfigurationError("neurons: the choice is empty; at least one neuron is needed")
    if chosen.ndim != 2 or chosen.shape[1] != 2 or not np.issubdtype(chosen.dtype, np.integer):
        raise ConfigurationError("neurons: must be 'all' or a list of (layer, index)")
    for layer, index in chosen:
        if not (0 <= layer < n_layers and 0 <= index < n_neurons):
            raise ConfigurationError(
                f"neurons: ({layer}, {index}) does not exist; the model has layers 0 to {n_layers - 1} "
                f"and neurons 0 to {n_neurons - 1}"
            )
    return chosen.astype(np.int64)


def rows_that_fit(model: LanguageModel, prompt: EncodedPrompt, batch_bytes: int) -> int:
    """How many rows of a batch fit into a memory budget.

    Raises:
        ConfigurationError: not even two, the unshifted row and one intervention.
    """
    config = model.model.config.get_text_config()
    # Logits and their differences, a layer's neurons, hidden states, and attention weights, each with a copy or two.
    values = 3 * config.vocab_size + 6 * model.feed_forward.n_neurons + 12 * config.hidden_size
    values += 3 * config.num_attention_heads * len(prompt.ids)
    rows = batch_bytes // (4 * values)
    if rows < 2:
        raise ConfigurationError(
            f"a budget of {batch_bytes} bytes holds {rows} rows of {4 * values} bytes, at least 2 are needed: "
            f"raise measure.batch_bytes"
        )
    return int(rows)
