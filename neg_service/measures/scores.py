"""The measure `scores`: how well each neuron tells right labels from wrong ones, as sums that need no stored gradients.

Over the prompts i of a task with right labels y_i, with g[i, k, n] the NeurGrad of neuron n for label k:

    polarity[n]  = Σ_i (2·sgn g[i, y_i, n] - Σ_k sgn g[i, k, n])
    magnitude[n] = Σ_i Σ_k sgn(g[i, y_i, n] - g[i, k, n])
    fires/b[n]   = Σ_i ±1, +1 where neuron n is active beyond its mean exactly if bit b of y_i is set
    activation[n] = Σ_i a[i, n]

All but the last are whole numbers, and all add up over shards: one pass over any number of prompts leaves a few numbers
a neuron and shard. `fires` is for the baseline of activations, which tells two sets of labels apart; with more than two
labels their numbers are written in binary, and each bit splits them in halves. A neuron's mean there is that over the
shard's prompts, so that one pass does.

Source: Zhao, Jiang, Yoshinaga, "Neuron Empirical Gradient", ACL 2025 (arXiv 2412.18053); activations: Wang et al.,
"Finding Skill Neurons in Pre-trained Transformer-based Language Models", EMNLP 2022 (arXiv 2211.07349).

Axes: P prompts, K labels, L layers, N neurons of a layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from neg_service import schema
from neg_service.config import NeuronsConfig, checked_layers
from neg_service.errors import ConfigurationError
from neg_service.measures import Cost, nothing_to_calibrate
from neg_service.measures.choice import check_whole_layers
from neg_service.measures.gradients import Floats, gradients
from neg_service.measures.neurgrad import sign
from neg_service.measures.tables import fixed_size, prompt_row, table_of
from neg_service.models.batches import Budget
from neg_service.models.feed_forward import check_basis
from neg_service.models.inspection import ModelInfo
from neg_service.models.language_model import LanguageModel
from neg_service.prompts.prompt import EncodedPrompt, Prompt
from neg_service.prompts.tasks import task_of

Scores = dict[str, NDArray[np.floating[Any]]]


def n_bits(n_labels: int) -> int:
    """How many bits the numbers of the labels have."""
    return max(1, (n_labels - 1).bit_length())


def gradient_scores(neurgrad_pkn: Floats, answer_p: NDArray[np.int64]) -> Scores:
    """`polarity` and `magnitude` [N], each a whole number, of prompts with K labels."""
    prompts = np.arange(len(answer_p))
    answer_pn = neurgrad_pkn[prompts, answer_p]
    # Of a row +1 where it is the right label's, and -1 elsewhere: 2·sgn(right) - Σ sgn(all).
    weight_pk = np.full(neurgrad_pkn.shape[:2], -1, np.float32)
    weight_pk[prompts, answer_p] = 1
    n = neurgrad_pkn.shape[2]
    # Sums of at most a few thousand ones are exact in float32.
    polarity = weight_pk.ravel() @ np.sign(neurgrad_pkn).reshape(-1, n)
    ahead = np.zeros(n, np.int32)
    for k in range(neurgrad_pkn.shape[1]):
        own = neurgrad_pkn[:, k]
        ahead += np.count_nonzero(answer_pn > own, axis=0).astype(np.int32)
        ahead -= np.count_nonzero(answer_pn < own, axis=0).astype(np.int32)
    return {"polarity": polarity.astype(np.float64), "magnitude": ahead.astype(np.float64)}


def activation_scores(activation_pn: Floats, answer_p: NDArray[np.int64], n_labels: int) -> Scores:
    """`activation` and `fires/b` [N] of the prompts of a shard."""
    total = activation_pn.sum(0, dtype=np.float64)
    fires_pn = activation_pn > total / len(answer_p)
    # As it is stored, so that sums of stored gradients are the same.
    scores: Scores = {"activation": total.astype(np.float32)}
    for bit in range(n_bits(n_labels)):
        is_set_p = (answer_p >> bit & 1).astype(bool)
        agree = np.count_nonzero(fires_pn == is_set_p[:, None], axis=0)
        scores[f"fires/{bit}"] = 2.0 * agree - len(answer_p)
    return scores


@dataclass
class Options:
    """See `conf/measure/scores.yaml`."""

    name: str = "scores"
    basis: str = "paper"


def read(options: Options) -> Options:
    """No files."""
    return options


def check(options: Options, neurons: NeuronsConfig, info: ModelInfo, prompts: Sequence[Prompt]) -> None:
    """Refuse prompts without answers, and bad options.

    Raises:
        ConfigurationError: naming the key, its value, and what it may be.
    """
    check_basis(options.basis, info.is_gated, info.architecture)
    check_whole_layers(neurons, options.name)
    checked_layers(neurons, info.n_layers)
    check_answers(options.name, prompts)


def check_answers(measure: str, prompts: Sequence[Prompt]) -> None:
    """Refuse prompts without a right label, and a task whose prompts differ in their number of labels.

    Raises:
        ConfigurationError: naming the prompt.
    """
    n_labels: dict[str, int] = {}
    for prompt in prompts:
        if prompt.answer is None:
            raise ConfigurationError(f"measure={measure}: prompt {prompt.id!r} has no answer (dataset.source)")
        known = n_labels.setdefault(task_of(prompt.id), len(prompt.targets))
        if known != len(prompt.targets):
            raise ConfigurationError(
                f"measure={measure}: prompt {prompt.id!r} has {len(prompt.targets)} targets, others of its task have "
                f"{known} (dataset.source)"
            )


def identity(options: Options) -> dict[str, Any]:
    """All of them."""
    return asdict(options)


def tables(options: Options, info: ModelInfo) -> dict[str, pa.Schema]:
    """`prompts` and `scores`."""
    return {"prompts": schema.PROMPTS, "scores": schema.scores(info.n_neurons)}


def cost_a_prompt(options: Options, neurons: NeuronsConfig, info: ModelInfo, n_targets: float) -> Cost:
    """A shard's sums are spread over its prompts, of which there are mostly many."""
    layers = len(checked_layers(neurons, info.n_layers))
    return Cost({"prompts": 1024, "scores": layers * info.n_neurons}, n_targets)


calibrate = nothing_to_calibrate


def measure(
    model: LanguageModel,
    prompts: Sequence[EncodedPrompt],
    options: Options,
    neurons: NeuronsConfig,
    budget: Budget,
    calibration: Mapping[str, Any],
) -> dict[str, pa.Table]:
    """One shard's sums, a set for each of its tasks."""
    layers = checked_layers(neurons, model.feed_forward.n_layers)
    wanted = [range(len(prompt.target_ids)) for prompt in prompts]
    rows: dict[int, pa.Table] = {}
    activations: dict[int, Floats] = {}
    scores: dict[str, Scores] = defaultdict(dict)
    for index, found in gradients(model, prompts, wanted, options.basis, layers, budget):
        prompt = prompts[index]
        rows[index] = prompt_row(prompt, found.probability_k)
        # A copy, so that nothing else of the batch stays in memory.
        activations[index] = found.activation_ln.copy()
        neurgrad_kln = found.gradient_kln * sign(found.activation_ln)
        answer_p = np.array([prompt.prompt.answer])
        own = gradient_scores(neurgrad_kln.reshape(1, len(neurgrad_kln), -1), answer_p)
        _add(scores[task_of(prompt.prompt.id)], own)
    for task, own in scores.items():
        members = [i for i, prompt in enumerate(prompts) if task_of(prompt.prompt.id) == task]
        answer_p = np.array([prompts[i].prompt.answer for i in members])
        activation_pm = np.stack([activations[i].ravel() for i in members])
        own |= activation_scores(activation_pm, answer_p, len(prompts[members[0]].target_ids))
    n_prompts = {task: sum(task_of(prompt.prompt.id) == task for prompt in prompts) for task in scores}
    parts = [
        table_of(
            schema.scores(model.feed_forward.n_neurons),
            len(layers),
            task=task,
            n_prompts=np.full(len(layers), n_prompts[task]),
            layer=np.array(layers),
            basis=options.basis,
            score=name,
            values=fixed_size(values.reshape(len(layers), -1)),
        )
        for task, own in scores.items()
        for name, values in own.items()
    ]
    return {"prompts": pa.concat_tables(rows[i] for i in range(len(prompts))), "scores": pa.concat_tables(parts)}


def _add(to: Scores, more: Scores) -> None:
    for name, values in more.items():
        to[name] = to[name] + values if name in to else values
