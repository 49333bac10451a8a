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
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neg_service.config import NeuronsConfig, checked_layers
from neg_service.errors import ConfigurationError, told_by_parameters
from neg_service.measures.batching import budget_of
from neg_service.measures.gradients import Floats, gradients
from neg_service.models.language_model import LanguageModel
from neg_service.prompts.prompt import EncodedPrompt, Prompt, check_prompts, check_texts
from neg_service.prompts.tokens import encode


@dataclass(frozen=True)
class NeurGradResult:
    """NeurGrad of a list of prompts; prompts with fewer targets than K are padded with NaN.

    probability: [P, K] float32, 0..1.
    neurgrad: [P, K, L, N] float32, probability per unit of |activation|.
    activation: [P, L, N] float32, at each prompt's last token.
    n_targets: [P], how many of the K are real.
    layers: the layer numbers along L.
    """

    probability: Floats
    neurgrad: Floats
    activation: Floats
    n_targets: NDArray[np.int64]
    layers: tuple[int, ...]


@told_by_parameters(model__source="model", dataset__source="prompts")
def neurgrad(
    model: LanguageModel,
    prompts: Sequence[str],
    targets: Sequence[Sequence[str]],
    *,
    basis: str = "paper",
    layers: Sequence[int] | None = None,
    batch_bytes: int | None = None,
    batch_tokens: int | None = None,
) -> NeurGradResult:
    """NeurGrad of every feed-forward neuron for every target of every prompt, at the prompt's last token.

    Formula, units and source: this module's header.

    Args:
        model: from `load_model`.
        prompts: P texts.
        targets: for each prompt, texts that follow it verbatim; each must be one token there.
        basis: which tensor is "the neuron": `paper`, `hidden` or `gate`.
        layers: layer numbers from 0; all layers if not given.
        batch_bytes: memory that a batch may take; if not given, what keeps the device busy and fits it. Halved by
            itself when memory ends, and recovers; never changes the results. batch_tokens: its old name and unit.

    Returns:
        Arrays on the CPU, in the order of `prompts`.

    Raises:
        PromptError: an empty prompt, one beyond the model's context, or a target that is not one token.
        ConfigurationError: an unknown basis or layer.
        ModelError: the model fails its self-check, which runs once, before the first measurement.
        NonFiniteError: NaN or infinity in a prompt's logits.
    """
    encoded = encoded_texts(model, prompts, targets)
    chosen = checked_layers(NeuronsConfig("all" if layers is None else list(layers)), model.feed_forward.n_layers)
    model.ensure_checked()
    budget = budget_of(model, batch_bytes, batch_tokens)
    wanted = [tuple(range(len(prompt.target_ids))) for prompt in encoded]

    p, k, n = len(encoded), max(map(len, wanted)), model.feed_forward.n_neurons
    result = NeurGradResult(
        probability=np.full((p, k), np.nan, np.float32),
        neurgrad=np.full((p, k, len(chosen), n), np.nan, np.float32),
        activation=np.empty((p, len(chosen), n), np.float32),
        n_targets=np.array([len(own) for own in wanted]),
        layers=tuple(chosen),
    )
    for index, found in gradients(model, encoded, wanted, basis, chosen, budget):
        result.probability[index, : len(found.targets)] = found.probability_k
        result.neurgrad[index, : len(found.targets)] = found.neurgrad_kln
        result.activation[index] = found.activation_ln
    return result


def encoded_texts(
    model: LanguageModel, prompts: Sequence[str], targets: Sequence[Sequence[str]]
) -> list[EncodedPrompt]:
    """Texts with targets that follow them, as tokens; a prompt's id is its number.

    Raises:
        PromptError: an empty prompt, one beyond the model's context, or a target that is not one token.
        ConfigurationError: not as many lists of targets as prompts.
    """
    check_texts(prompts, targets)
    if len(prompts) != len(targets):
        raise ConfigurationError(
            f"{len(prompts)} prompts, but targets for {len(targets)}; one list for each prompt is needed"
        )
    asked = [Prompt(str(i), text, tuple(own)) for i, (text, own) in enumerate(zip(prompts, targets, strict=True))]
    check_prompts(asked)
    return list(encode(model.tokenizer, asked, model.context_length, model.mask_token, model=model))
