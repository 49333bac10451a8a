"""The measure `votes`: of chosen neurons, what each says about a prompt's labels; bytes in the place of gradients.

Of each prompt and neuron: the sign of its NeurGrad for each label, and the label of the largest and of the smallest
NeurGrad, the lower one of equals. Every probe of skill neurons can be computed from these, see `probing/probes.py`. The
activation is kept for the baseline that uses it. Neurons are chosen for each task, because each has skill neurons of
its own.

Axes: P prompts, K labels, S chosen neurons.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from neg_service import schema
from neg_service.config import NeuronsConfig, basis_setting, checked_layers
from neg_service.errors import ConfigurationError
from neg_service.measures.base import Cost, Measure, ShardInput, Sizes
from neg_service.measures.tables import prompt_row
from neg_service.measures.targets import check_answers
from neg_service.prompts.prompt import Prompt
from neg_service.prompts.tasks import task_of
from neg_service.schema import Table

if TYPE_CHECKING:
    from neg_service.models.inspection import ModelInfo

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class PromptPredictions:
    """What S neurons say about one prompt.

    sign_ks: -1, 0 or 1, of NeurGrad for each label. largest_s, smallest_s: a label each. activation_s: dimensionless.
    """

    sign_ks: NDArray[np.int8]
    largest_s: NDArray[np.int8]
    smallest_s: NDArray[np.int8]
    activation_s: Floats


def predictions_of(neurgrad_ks: Floats, activation_s: Floats) -> PromptPredictions:
    """The predictions of neurons with these values; `argmax` and `argmin` take the lower label of equals."""
    return PromptPredictions(
        sign_ks=np.sign(neurgrad_ks).astype(np.int8),
        largest_s=neurgrad_ks.argmax(0).astype(np.int8),
        smallest_s=neurgrad_ks.argmin(0).astype(np.int8),
        activation_s=np.ascontiguousarray(activation_s),
    )


def predictions_row(prompt_id: str, predictions: PromptPredictions) -> dict[str, Any]:
    """A row of the table `votes`."""
    return {
        "prompt_id": prompt_id,
        "sign": predictions.sign_ks.ravel(),
        "largest": predictions.largest_s,
        "smallest": predictions.smallest_s,
        "activation": predictions.activation_s,
    }


@dataclass
class NeuronPredictionsOptions:
    """chosen: for each task the numbers of its neurons, layer·N + index, ascending, in a text with spaces between.

    Texts, because lists of thousands of numbers are slow in a configuration.
    """

    name: str = "votes"
    basis: str = basis_setting()
    chosen: dict[str, str] = field(default_factory=dict)


def as_text(neurons: NDArray[np.int64]) -> str:
    """Numbers of neurons as `NeuronPredictionsOptions.chosen` has them."""
    return " ".join(map(str, neurons.tolist()))


def from_text(text: str) -> NDArray[np.int64]:
    """The numbers in such a text."""
    return np.array(text.split(), np.int64)


class NeuronPredictions(Measure[NeuronPredictionsOptions]):
    """What chosen neurons say about a prompt's labels."""

    Options = NeuronPredictionsOptions
    NAMES = ("votes",)

    def validate(self, info: ModelInfo, neurons: NeuronsConfig, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts of a task without neurons, and neurons that do not exist, too."""
        super().validate(info, neurons, prompts)
        check_answers(self.name, prompts)
        in_all = info.n_layers * info.n_neurons
        for task in {task_of(prompt.id) for prompt in prompts}:
            own = from_text(self.options.chosen.get(task, ""))
            if not len(own):
                raise ConfigurationError(f"measure.chosen has no neurons for the task {task!r}")
            if own[0] < 0 or own[-1] >= in_all or np.any(np.diff(own) <= 0):
                raise ConfigurationError(f"measure.chosen of {task!r} must be ascending and from 0 to {in_all - 1}")

    def tables(self, sizes: Sizes) -> dict[str, Table]:
        """`prompts` and `votes`."""
        return {"prompts": Table(schema.PROMPTS), "votes": Table(schema.VOTES, "predictions of neurons")}

    def cost(self, info: ModelInfo, neurons: NeuronsConfig, n_targets: float) -> Cost:
        """A byte for each label, two for the extremes, four for the activation."""
        most = max((own.count(" ") + 1 for own in self.options.chosen.values()), default=1)
        return Cost({"prompts": 1024, "votes": int(most * (6 + n_targets))}, n_targets)

    def rows(self, shard: ShardInput) -> Iterator[tuple[int, dict[str, pa.Table]]]:
        """One row for each prompt; layers without a chosen neuron are not differentiated."""
        from neg_service.measures.gradients import gradients

        model, prompts = shard.model, shard.prompts
        n = model.feed_forward.n_neurons
        chosen = {task: from_text(own) for task, own in self.options.chosen.items()}
        needed = {task_of(prompt.prompt.id) for prompt in prompts}
        layers = sorted({int(layer) for task in needed for layer in np.unique(chosen[task] // n)})
        checked_layers(NeuronsConfig(layers), model.feed_forward.n_layers)
        place = {layer: i for i, layer in enumerate(layers)}
        columns = {task: np.array([place[int(f // n)] * n + f % n for f in chosen[task]]) for task in needed}
        wanted = [range(len(prompt.target_ids)) for prompt in prompts]
        for index, found in gradients(model, prompts, wanted, self.options.basis, layers, shard.budget):
            prompt_id = prompts[index].prompt.id
            own = columns[task_of(prompt_id)]
            neurgrad_ks = found.neurgrad_kln.reshape(len(found.targets), -1)[:, own]
            row = predictions_row(prompt_id, predictions_of(neurgrad_ks, found.activation_ln.ravel()[own]))
            table = pa.Table.from_pylist([row], schema.VOTES)
            yield index, {"prompts": prompt_row(prompts[index], found.probability_k), "votes": table}
