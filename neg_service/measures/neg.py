"""NEG, the neuron empirical gradient, measured: shift one neuron at a time and see what the output does.

The shift moves the neuron's magnitude, a -> a + δ·sgn(a) with sgn(0) = +1: a silent neuron can only grow. With
`shift="signed"` the neuron moves by δ itself, and NEG compares with the plain gradient. What is made of a curve:
`linearity.py`. How a shift's effect is had at the price of the remaining layers: `interventions.py`.

Source: Zhao, Jiang, Yoshinaga, "Neuron Empirical Gradient", ACL 2025 (arXiv 2412.18053).

Where a layer has experts, its neurons exist for a prompt whose readout token the router gave to their expert; others do
nothing, so that their NEG is 0. A shift may have layers above choose other experts: `routing_changed` says for which
share of a neuron's shifts.

Axes: n neurons asked for, S shifts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from neg_service.batch_size import check_batch_bytes
from neg_service.errors import ConfigurationError, PromptError, told_by_parameters
from neg_service.layer_neurons import ALWAYS_ON, LayerNeurons
from neg_service.measures.batching import budget_of, encoded_prompts
from neg_service.measures.choice import checked_neurons
from neg_service.measures.curves import SweepResult, sweep_prompt
from neg_service.measures.interventions import Interventions
from neg_service.measures.noise import row_noise
from neg_service.measures.outputs import Output
from neg_service.measures.readouts import Readouts, check_logits
from neg_service.measures.shifts import TOLERANCE, Doubles, Sweep, check_shift, chosen_grid
from neg_service.measures.targets import check_at, check_each
from neg_service.models.language_model import LanguageModel
from neg_service.neurons import Ints, Neurons, NeuronSet
from neg_service.prompts.chat import prompts_of
from neg_service.prompts.prompt import Asked, At, check_prompts, is_conversation


@dataclass(frozen=True)
class NegResult:
    """NEG of neurons for one target of one prompt.

    Of another readout than the probability all that is in units of probability is in its unit, but for `probability`.

    neurons: [n, 2] layer and index, as they were asked for; of a model with experts [n, 3], with the expert behind, -1
    of an MLP that every token uses. shifts: [S] activation units. delta_p: [n, S] probability; of the adaptive grid as
    measured at the shifts that were run, and as fitted between them.
    neg, r, r2: [n]. activation: [n] at the readout position. probability: without a shift, 0..1.
    is_routed: [n], whether the readout token used the neuron's expert, or any token at which it is moved.
    routing_changed: [n], the share of its shifts for which a layer above chose other experts, 0..1.
    error: [n], how far NEG may be off that of the whole grid without rounding, an estimate: of the shifts that were
    left out, or three standard deviations of the noise, whichever is larger. n_shifts: [n], how many were run.
    """

    neurons: Ints
    shifts: Doubles
    delta_p: Doubles
    neg: Doubles
    r: Doubles
    r2: Doubles
    activation: Doubles
    probability: float
    is_routed: NDArray[np.bool_]
    routing_changed: Doubles
    error: Doubles
    n_shifts: Ints


@told_by_parameters(
    model__source="model",
    dataset__source="prompt",
    neurons__list="neurons",
    dataset__chat_template="model.tokenizer.chat_template",
)
def neg(
    model: LanguageModel,
    prompt: Asked,
    target: str,
    neurons: Sequence[Sequence[int | None]] | Literal["all"] = "all",
    shifts: Sequence[float] | None = None,
    basis: str = "paper",
    shift: str = "magnitude",
    batch_bytes: int | None = None,
    grid: str = "adaptive",
    tolerance: float = TOLERANCE,
    readout: str = "probability",
    against: str | None = None,
    not_one_token: str = "error",
    at: str = "readout",
    neurons_at: At | None = None,
) -> NegResult:
    """Measure NEG by intervention at the prompt's readout position; formulas, units and source in the module's header.

    Args:
        model: from `load_model`.
        prompt: a text; or a list of messages, `{"role": ..., "content": ...}`, for the model's chat template.
        target: what follows it verbatim; one token there, unless `not_one_token` is `sequence`: then its probability is
            the product over its tokens.
        at: `each` moves neurons at every token that predicts one of such a target's, and not at the readout position
            alone.
        neurons_at: where neurons are, if not at the readout position: a text of the prompt, whose last token is
            meant, a range of characters, or a token's place from either end.
        neurons: (layer, index) pairs, or (layer, index, expert) triples where a layer has experts, -1 for its MLP that
            is always on; or `all` that act on the prompt.
        shifts: a grid of your own, all of which are run; +-0.1, +-0.2, ... +-2.0 if not given.
        basis: which tensor is "the neuron": `paper`, `hidden` or `gate`.
        shift: `magnitude` or `signed`.
        batch_bytes: memory that a batch may take; if not given, what keeps the device busy and fits it. Halved by
            itself when memory ends, and recovers; never changes the results.
        grid: `adaptive`: of the full grid as many shifts as each neuron needs, 2 for most; `full`; or `coarse`: 4
            shifts, from which NEG, r and R² of the full grid are interpolated.
        tolerance: of the adaptive grid, the share of |NEG| that it may be off; or the resolution, if that is larger.
        readout: what of the target is measured: `probability`, `log_probability`, `log_odds` or `logit`; `outputs.py`.
        against: of the latter two, the target that it is compared with; what follows the prompt as it does.

    Raises:
        PromptError: the prompt or the target is unusable.
        ConfigurationError: a neuron that does not exist, none at all, a bad grid, or no memory for two rows.
        ModelError: the model fails its self-check, which runs once, before the first measurement.
        NonFiniteError: NaN or infinity in the prompt's logits.
    """
    is_chat = is_conversation(prompt) and all(isinstance(message, Mapping) for message in prompt)
    if not (isinstance(prompt, str) or is_chat) or not isinstance(target, str):
        raise PromptError("neg takes one prompt and one target, each a text; neurgrad and intervene take lists")
    readouts = Readouts.checked(readout, against)
    if against is not None and (against == target or not isinstance(against, str)):
        raise ConfigurationError(setting="against", value=repr(against), allowed="a text that is not the target's")
    asked = prompts_of(model, [prompt], [[target] if against is None else [target, against]], neurons_at=[neurons_at])
    check_prompts(asked)
    check_shift(shift)
    check_at(at, "at")
    sweep = Sweep(chosen_grid(grid, shifts, tolerance=tolerance), basis, shift, at == "each")
    asked_rows = _asked_rows(neurons, model.feed_forward.layer_neurons)
    (encoded,) = encoded_prompts(model, asked, not_one_token)
    check_logits(readouts, [encoded])
    check_each(at, [encoded])
    model.ensure_checked()
    if batch_bytes is not None:
        check_batch_bytes("batch_bytes", batch_bytes, 2 * 4 * model.row_values)
    budget = budget_of(model, batch_bytes)
    interventions = Interventions(model, encoded, basis, each=shift if sweep.each else None)
    if asked_rows is None:
        slots = interventions.slots(list(interventions.points))
        asked_rows = slots.rows_at(np.arange(slots.m))
    chosen, place_n = NeuronSet.distinct(asked_rows)
    noise = row_noise(model, basis, budget, sequences=encoded.is_tree)
    output = Output(readouts, len(encoded.target_ids), None if against is None else 1)
    swept = sweep_prompt(interventions, chosen, sweep, budget, keep_curves=True, noise=noise, output=output)
    return _result(swept, interventions, chosen, sweep, noise.sigma * interventions.noise_of(output), place_n)


def _result(
    swept: SweepResult, interventions: Interventions, chosen: NeuronSet, sweep: Sweep, noise_k: Tensor, place_n: Ints
) -> NegResult:
    """Of a sweep for one target; `place_n` says for each neuron that was asked for which of `chosen` it is."""
    found, probability = swept.evaluated, interventions.probability_k.double()
    assert found.curve_nsk is not None
    names_n3 = np.stack([chosen.layer, chosen.neuron, np.maximum(chosen.expert, ALWAYS_ON)], 1)

    def column(values: Tensor) -> NDArray[Any]:
        ours: NDArray[Any] = (values[:, 0] if values.ndim > 1 else values).cpu().numpy()[place_n]
        return ours

    return NegResult(
        neurons=(names_n3 if interventions.has_experts else names_n3[:, :2])[place_n],
        shifts=sweep.grid.shifts,
        delta_p=found.curve_nsk[..., 0].cpu().numpy()[place_n],
        neg=column(found.linearity_nk.neg),
        r=column(found.linearity_nk.r),
        r2=column(found.linearity_nk.r2),
        activation=column(swept.activation_n),
        probability=float(probability[0]),
        is_routed=swept.is_routed_nc[place_n, 0],
        routing_changed=column(found.routing_changed_n),
        error=column(found.error(noise_k, interventions.row_dtype)),
        n_shifts=column(found.n_shifts_n),
    )


def _asked_rows(neurons: Any, layer_neurons: Sequence[LayerNeurons]) -> Neurons | None:
    """The neurons that were asked for as rows (layer, expert, neuron); None for all."""
    if not isinstance(neurons, str):
        return checked_neurons(neurons, layer_neurons)
    if neurons != "all":
        raise ConfigurationError(setting="neurons", value=repr(neurons), allowed="'all' or a list of (layer, index)")
    return None
