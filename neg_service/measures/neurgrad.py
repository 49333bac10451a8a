"""NeurGrad: the estimate of every neuron's empirical gradient from one backward pass.

For target k, layer l and neuron n at the readout position (the prompt's last token):

    NeurGrad[k, l, n] = d p[k] / d a[l, n] * sgn(a[l, n]),   sgn(0) = +1

in probability per unit of |activation|: positive means that a larger magnitude makes the target more probable.
A silent neuron can only grow, hence sgn(0) = +1. How the gradients are had: `gradients.py`.

Source: Zhao, Jiang, Yoshinaga, "Neuron Empirical Gradient", ACL 2025 (arXiv 2412.18053).

Axes: P prompts, K targets of a prompt, L chosen layers, N neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from neg_service.config import NeuronsConfig
from neg_service.errors import ConfigurationError, told_by_parameters
from neg_service.layer_neurons import ALWAYS_ON
from neg_service.measures.batching import budget_of, encoded_prompts
from neg_service.measures.choice import layers_with_neurons
from neg_service.measures.gradients import reduced_gradients
from neg_service.measures.readouts import Readouts, check_logits, check_readouts
from neg_service.measures.reductions import all_neurons
from neg_service.measures.sequences import tokens_moved
from neg_service.measures.signs import Floats
from neg_service.measures.tables import tell_of_underflow
from neg_service.measures.targets import check_at, check_each
from neg_service.models.language_model import LanguageModel
from neg_service.prompts.chat import prompts_of
from neg_service.prompts.prompt import Asked, At, EncodedPrompt, check_prompts, check_texts
from neg_service.slots import Slots

_NO_SLOT = -2


@dataclass(frozen=True)
class NeurGradResult:
    """NeurGrad of a list of prompts; prompts with fewer targets than K are padded with NaN.

    probability: [P, K] float32, 0..1.
    neurgrad: [P, K, L, N] float32, probability per unit of |activation|; of another readout, in its unit.
    activation: [P, L, N] float32, at each prompt's last token.
    n_targets: [P], how many of the K are real.
    layers: the layer numbers along L.

    Of a model with experts N is F, the slots of a token: the neurons of its chosen experts, these in ascending order,
    then those of the layer's MLP that is always on; with `at="each"` of all experts that any of the tokens uses at
    which neurons are moved, where activations are 0 of those that the readout token does not use. What they are say
    expert: [P, L, F], -1 of an always-on MLP, and neuron: [P, L, F], its number there; both are -2, and values NaN,
    where a layer has fewer slots. Of models without experts both are None.
    """

    probability: Floats
    neurgrad: Floats
    activation: Floats
    n_targets: NDArray[np.int64]
    layers: tuple[int, ...]
    expert: NDArray[np.int64] | None = None
    neuron: NDArray[np.int64] | None = None


@told_by_parameters(
    model__source="model", dataset__source="prompts", dataset__chat_template="model.tokenizer.chat_template"
)
def neurgrad(
    model: LanguageModel,
    prompts: Sequence[Asked],
    targets: Sequence[Sequence[str]],
    *,
    basis: str = "paper",
    layers: Sequence[int] | None = None,
    batch_bytes: int | None = None,
    batch_tokens: int | None = None,
    readout: str = "probability",
    against: int | str | None = None,
    not_one_token: str = "error",
    at: str = "readout",
    neurons_at: Sequence[At | None] | None = None,
) -> NeurGradResult:
    """NeurGrad of every feed-forward neuron for every target of every prompt, at the prompt's last token.

    Formula, units and source: this module's header.

    Args:
        model: from `load_model`.
        prompts: P texts; or lists of messages, `{"role": ..., "content": ...}`, for the model's chat template.
        targets: for each prompt, texts that follow it verbatim; each must be one token there, unless `not_one_token`
            is `sequence`: then the probability of a target is the product over its tokens.
        at: `each` moves neurons at every token that predicts one of such a target's, and not at the readout position
            alone.
        neurons_at: where neurons are, if not at the readout position: for each prompt a text of it, whose last token
            is meant, a range of characters, or a token's place from either end.
        basis: which tensor is "the neuron": `paper`, `hidden` or `gate`.
        layers: layer numbers from 0; all layers if not given.
        batch_bytes: memory that a batch may take; if not given, what keeps the device busy and fits it. Halved by
            itself when memory ends, and recovers; never changes the results. batch_tokens: its old name and unit.
        readout: what of a target is measured: `probability`, `log_probability`, `log_odds` or `logit`; `outputs.py`.
        against: of the latter two, what each target is compared with: `others`, all other targets of its prompt; or
            one of them, by its place or its text.

    Returns:
        Arrays on the CPU, in the order of `prompts`. NaN of the target that others are compared with.

    Raises:
        PromptError: an empty prompt, one beyond the model's context, or a target that is not one token.
        ConfigurationError: an unknown basis or layer.
        ModelError: the model fails its self-check, which runs once, before the first measurement.
        NonFiniteError: NaN or infinity in a prompt's logits.
    """
    check_at(at, "at")
    readouts = Readouts.checked(readout, against)
    encoded = encoded_texts(model, prompts, targets, not_one_token, neurons_at)
    check_each(at, encoded)
    check_readouts(readouts, [prompt.prompt for prompt in encoded])
    check_logits(readouts, encoded)
    chosen = layers_with_neurons(
        NeuronsConfig("all" if layers is None else list(layers)), model.feed_forward.layer_neurons
    )
    model.ensure_checked()
    budget = budget_of(model, batch_bytes, batch_tokens)
    wanted = [tuple(range(len(prompt.target_ids))) for prompt in encoded]

    n_tokens = max(tokens_moved(prompt, each=at == "each") for prompt in encoded)
    p, k, slots = len(encoded), max(map(len, wanted)), slots_by_layer(model, len(encoded), chosen, n_tokens)
    result = NeurGradResult(
        probability=np.full((p, k), np.nan, np.float32),
        neurgrad=np.full((p, k, len(chosen), slots.n), np.nan, np.float32),
        activation=np.full((p, len(chosen), slots.n), np.nan, np.float32),
        n_targets=np.array([len(own) for own in wanted]),
        layers=tuple(chosen),
        expert=slots.expert,
        neuron=slots.neuron,
    )
    for index, found in reduced_gradients(
        model, encoded, wanted, basis, chosen, budget, all_neurons, readouts, each=at == "each"
    ):
        tell_of_underflow(f"prompts[{index}]", found.token_log_p, readout, "")
        neurgrad_km, activation_m = found.values
        place = slots.places(index, found.slots)
        result.probability[index, : len(wanted[index])] = found.probability_k
        for k, own_m in zip(found.targets, neurgrad_km, strict=True):
            result.neurgrad[index][k, *place] = own_m
        result.activation[index, *place] = activation_m
    return result if n_tokens == 1 else _without_empty_slots(result)


def _without_empty_slots(result: NeurGradResult) -> NeurGradResult:
    """How many experts some tokens use together is known only when they have run."""
    if result.neuron is None or result.expert is None:
        return result
    n = int((result.neuron != _NO_SLOT).sum(-1).max())
    return replace(
        result,
        neurgrad=result.neurgrad[..., :n].copy(),
        activation=result.activation[..., :n].copy(),
        expert=result.expert[..., :n].copy(),
        neuron=result.neuron[..., :n].copy(),
    )


@dataclass(frozen=True)
class SlotsByLayer:
    """Arrays by prompt, layer and slot; see `NeurGradResult`.

    n: slots of a layer, the most of the layers. expert, neuron: [P, L, n], which are filled prompt by prompt.
    """

    layers: tuple[int, ...]
    n: int
    expert: NDArray[np.int64] | None
    neuron: NDArray[np.int64] | None

    def places(self, index: int, slots: Slots) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where a prompt's neurons go along the axes of layers and slots, noting which these are."""
        place = slots.grid(self.layers)
        if self.expert is not None and self.neuron is not None:
            _, expert_m, neuron_m = slots.rows_at(np.arange(slots.m)).T
            # The only MLP of a layer is always on as well.
            self.expert[index, *place] = np.maximum(expert_m, ALWAYS_ON)
            self.neuron[index, *place] = neuron_m
        return place


def slots_by_layer(model: LanguageModel, p: int, layers: Sequence[int], n_tokens: int = 1) -> SlotsByLayer:
    """Arrays for `p` prompts and some layers of a model, of neurons that act on any of some tokens."""
    n = max(model.feed_forward.layer_neurons[layer].n_slots_of(n_tokens) for layer in layers)
    if not model.feed_forward.has_experts:
        return SlotsByLayer(tuple(layers), n, None, None)
    expert, neuron = (np.full((p, len(layers), n), _NO_SLOT, np.int64) for _ in range(2))
    return SlotsByLayer(tuple(layers), n, expert, neuron)


def encoded_texts(
    model: LanguageModel,
    prompts: Sequence[Asked],
    targets: Sequence[Sequence[str]],
    not_one_token: str = "error",
    neurons_at: Sequence[At | None] | None = None,
) -> list[EncodedPrompt]:
    """Texts or messages with targets that follow them, as tokens; a prompt's id is its number.

    Raises:
        PromptError: an empty prompt, one beyond the model's context, or a target that is not one token.
        ConfigurationError: not as many lists of targets as prompts.
    """
    check_texts(prompts, targets)
    if len(prompts) != len(targets):
        raise ConfigurationError(
            f"{len(prompts)} prompts, but targets for {len(targets)}; one list for each prompt is needed"
        )
    asked = prompts_of(model, prompts, targets, neurons_at=neurons_at)
    check_prompts(asked)
    return encoded_prompts(model, asked, not_one_token)
