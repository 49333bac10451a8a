"""The measure `votes`: of chosen neurons, what each says about a prompt's labels; bytes in the place of gradients.

Of each prompt and neuron: the sign of its NeurGrad for each label, and the label of the largest and of the smallest
NeurGrad, the lower one of equals. Every probe of skill neurons can be computed from these, see `probing/probes.py`. The
activation is kept for the baseline that uses it. Neurons are chosen for each task, because each has skill neurons of
its own.

Axes: P prompts, K labels, S chosen neurons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
from neg_service.measures.scores import check_answers
from neg_service.measures.tables import prompt_row
from neg_service.models.batches import Budget
from neg_service.models.feed_forward import check_basis
from neg_service.models.inspection import ModelInfo
from neg_service.models.language_model import LanguageModel
from neg_service.prompts.prompt import EncodedPrompt, Prompt
from neg_service.prompts.tasks import task_of


@dataclass(frozen=True)
class PromptVotes:
    """What S neurons say about one prompt.

    sign_ks: -1, 0 or 1, of NeurGrad for each label. largest_s, smallest_s: a label each. activation_s: dimensionless.
    """

    sign_ks: NDArray[np.int8]
    largest_s: NDArray[np.int8]
    smallest_s: NDArray[np.int8]
    activation_s: Floats


def votes_of(neurgrad_ks: Floats, activation_s: Floats) -> PromptVotes:
    """The votes of neurons with these values; `argmax` and `argmin` take the lower label of equals."""
    return PromptVotes(
        sign_ks=np.sign(neurgrad_ks).astype(np.int8),
        largest_s=neurgrad_ks.argmax(0).astype(np.int8),
        smallest_s=neurgrad_ks.argmin(0).astype(np.int8),
        activation_s=np.ascontiguousarray(activation_s),
    )


def votes_row(prompt_id: str, votes: PromptVotes) -> dict[str, Any]:
    """A row of the table `votes`."""
    return {
        "prompt_id": prompt_id,
        "sign": votes.sign_ks.ravel(),
        "largest": votes.largest_s,
        "smallest": votes.smallest_s,
        "activation": votes.activation_s,
    }


@dataclass
class Options:
    """chosen: for each task the numbers of its neurons, layer·N + index, ascending, in a text with spaces between.

    Texts, because lists of thousands of numbers are slow in a configuration.
    """

    name: str = "votes"
    basis: str = "paper"
    chosen: dict[str, str] = field(default_factory=dict)


def as_text(neurons: NDArray[np.int64]) -> str:
    """Numbers of neurons as `Options.chosen` has them."""
    return " ".join(map(str, neurons.tolist()))


def from_text(text: str) -> NDArray[np.int64]:
    """The numbers in such a text."""
    return np.array(text.split(), np.int64)


def read(options: Options) -> Options:
    """No files."""
    return options


def check(options: Options, neurons: NeuronsConfig, info: ModelInfo, prompts: Sequence[Prompt]) -> None:
    """Refuse prompts of a task without neurons, and neurons that do not exist.

    Raises:
        ConfigurationError: naming the task.
    """
    check_basis(options.basis, info.is_gated, info.architecture)
    check_whole_layers(neurons, options.name)
    check_answers(options.name, prompts)
    for task in {task_of(prompt.id) for prompt in prompts}:
        own = from_text(options.chosen.get(task, ""))
        if not len(own):
            raise ConfigurationError(f"measure.chosen has no neurons for the task {task!r}")
        if own[0] < 0 or own[-1] >= info.n_layers * info.n_neurons or np.any(np.diff(own) <= 0):
            raise ConfigurationError(
                f"measure.chosen of {task!r} must be ascending and from 0 to {info.n_layers * info.n_neurons - 1}"
            )


def identity(options: Options) -> dict[str, Any]:
    """All of them."""
    return {"name": options.name, "basis": options.basis, "chosen": dict(options.chosen)}


def tables(options: Options, info: ModelInfo) -> dict[str, pa.Schema]:
    """`prompts` and `votes`."""
    return {"prompts": schema.PROMPTS, "votes": schema.VOTES}


def cost_a_prompt(options: Options, neurons: NeuronsConfig, info: ModelInfo, n_targets: float) -> Cost:
    """A byte a label, two for the extremes, four for the activation."""
    most = max((own.count(" ") + 1 for own in options.chosen.values()), default=1)
    return Cost({"prompts": 1024, "votes": int(most * (6 + n_targets))}, n_targets)


calibrate = nothing_to_calibrate


def measure(
    model: LanguageModel,
    prompts: Sequence[EncodedPrompt],
    options: Options,
    neurons: NeuronsConfig,
    budget: Budget,
    calibration: Mapping[str, Any],
) -> dict[str, pa.Table]:
    """One shard's tables; layers without a chosen neuron are not differentiated."""
    n = model.feed_forward.n_neurons
    chosen = {task: from_text(own) for task, own in options.chosen.items()}
    needed = {task_of(prompt.prompt.id) for prompt in prompts}
    layers = sorted({int(layer) for task in needed for layer in np.unique(chosen[task] // n)})
    checked_layers(NeuronsConfig(layers), model.feed_forward.n_layers)
    place = {layer: i for i, layer in enumerate(layers)}
    columns = {task: np.array([place[int(f // n)] * n + f % n for f in chosen[task]]) for task in needed}
    wanted = [range(len(prompt.target_ids)) for prompt in prompts]
    prompt_rows: dict[int, pa.Table] = {}
    rows: dict[int, dict[str, Any]] = {}
    for index, found in gradients(model, prompts, wanted, options.basis, layers, budget):
        own = columns[task_of(prompts[index].prompt.id)]
        activation_s = found.activation_ln.ravel()[own]
        neurgrad_ks = found.gradient_kln.reshape(len(found.targets), -1)[:, own] * sign(activation_s)
        prompt_rows[index] = prompt_row(prompts[index], found.probability_k)
        rows[index] = votes_row(prompts[index].prompt.id, votes_of(neurgrad_ks, activation_s))
    order = range(len(prompts))
    return {
        "prompts": pa.concat_tables(prompt_rows[i] for i in order),
        "votes": pa.Table.from_pylist([rows[i] for i in order], schema.VOTES),
    }
