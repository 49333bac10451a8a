"""The measure `neuron_predictions`: what chosen neurons say about a prompt's labels, in bytes and not gradients.

Of each prompt and neuron: the sign of its NeurGrad for each label, and the label of the largest and of the smallest
NeurGrad, the lower one of equals. Every probe of skill neurons can be computed from these, see
`studies/skills/probes.py`. The activation is kept for the baseline that uses it. Neurons are chosen for each task,
because each has skill neurons of its own.

Axes: P prompts, K labels, S chosen neurons.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from neg_service import schema
from neg_service.config import NeuronsConfig
from neg_service.errors import ConfigurationError
from neg_service.measures.base import Cost, Measure, ShardInput, Sizes, has_experts, layers_of_model, prompt_bytes
from neg_service.measures.choice import check_whole_layers, set_of
from neg_service.measures.tables import prompt_tables
from neg_service.measures.targets import check_answers
from neg_service.neurons import NeuronSet
from neg_service.prompts.prompt import Prompt
from neg_service.prompts.tasks import task_of
from neg_service.schema import Table
from neg_service.settings import basis_setting
from neg_service.slots import Slots

if TYPE_CHECKING:
    from neg_service.models.inspection import ModelInfo

Floats = NDArray[np.float32]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptPredictions:
    """What S neurons say about one prompt.

    sign_ks: -1, 0 or 1, of NeurGrad for each label. largest_s, smallest_s: a label each. activation_s: dimensionless.
    A neuron whose expert the prompt does not use says nothing: 0, -1, -1 and 0.
    """

    sign_ks: NDArray[np.int8]
    largest_s: NDArray[np.int8]
    smallest_s: NDArray[np.int8]
    activation_s: Floats


def predictions_of(
    neurgrad_ks: Floats, activation_s: Floats, is_routed_s: NDArray[np.bool_] | None = None
) -> PromptPredictions:
    """The predictions of neurons with these values; `argmax` and `argmin` take the lower label of equals."""
    is_there_s = np.ones(len(activation_s), bool) if is_routed_s is None else is_routed_s
    return PromptPredictions(
        sign_ks=np.sign(neurgrad_ks).astype(np.int8),
        largest_s=np.where(is_there_s, neurgrad_ks.argmax(0), -1).astype(np.int8),
        smallest_s=np.where(is_there_s, neurgrad_ks.argmin(0), -1).astype(np.int8),
        activation_s=np.ascontiguousarray(activation_s),
    )


def predictions_row(prompt_id: str, predictions: PromptPredictions) -> dict[str, Any]:
    """A row of the table `neuron_predictions`."""
    return {
        "prompt_id": prompt_id,
        "sign": predictions.sign_ks.ravel(),
        "largest": predictions.largest_s,
        "smallest": predictions.smallest_s,
        "activation": predictions.activation_s,
    }


@dataclass
class NeuronPredictionsOptions:
    """chosen: deprecated, for each task the numbers of its neurons, layer·N + index, in a text with spaces between.

    Neurons are an object beside the configuration now; programs that still give texts are warned.
    """

    name: str = "neuron_predictions"
    basis: str = basis_setting()
    chosen: dict[str, str] = field(default_factory=dict)


def from_texts(chosen: Mapping[str, str], n_neurons: int) -> NeuronSet:
    """The neurons of each task from `NeuronPredictionsOptions.chosen`, of a model with `n_neurons` a layer.

    Raises:
        ConfigurationError: numbers that are not ascending, or below 0.
    """
    sets = {}
    for task, text in chosen.items():
        numbers = np.array(text.split(), np.int64)
        if np.any(np.diff(numbers, prepend=-1) <= 0):
            raise ConfigurationError(f"numbers of {task!r} must be ascending and from 0", setting="measure.chosen")
        sets[task] = from_numbers(numbers, n_neurons)
    return NeuronSet.by_task(sets)


def from_numbers(numbers: NDArray[np.int64], n_neurons: int) -> NeuronSet:
    """Neurons from their numbers through all layers of `n_neurons` each, layer·N + index."""
    layer_n, neuron_n = np.divmod(np.sort(numbers), n_neurons)
    return NeuronSet.of_layers({layer: neuron_n[layer_n == layer] for layer in np.unique(layer_n).tolist()})


class NeuronPredictions(Measure[NeuronPredictionsOptions]):
    """What chosen neurons say about a prompt's labels."""

    Options = NeuronPredictionsOptions
    NAMES = ("neuron_predictions",)
    MEASURES_SINGLE_NEURONS = True
    TAKES_NEURONS_BY_TASK = True

    def validate(self, info: ModelInfo, neurons: NeuronsConfig, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts of a task without neurons, and neurons that do not exist, too."""
        super().validate(info, neurons, prompts)
        check_answers(self.name, prompts)
        chosen = self._chosen(neurons, info)
        setting = "measure.chosen" if self.options.chosen else "neurons.list"
        for task in dict.fromkeys(task_of(prompt.id) for prompt in prompts):
            if not len(chosen.of_task(task)):
                raise ConfigurationError(f"there are no neurons for the task {task!r}", setting=setting)
        chosen.in_model(layers_of_model(info), setting)
        if self.options.chosen:
            log.warning("measure.chosen is deprecated: give neurons.list a NeuronSet by task in its place")

    def fingerprint_inputs(self) -> dict[str, Any]:
        """The options; neurons are part of a run's identity as those of every list."""
        given = self.configuration()
        if not given["chosen"]:
            del given["chosen"]
        return given

    def describe_neurons(self, info: ModelInfo, neurons: NeuronsConfig) -> str:
        """Those of the tasks."""
        chosen = self._chosen(neurons, info)
        return f"{len(chosen)} of {len(chosen.tasks)} tasks" if chosen.tasks else f"{len(chosen)} of each task"

    def _chosen(self, neurons: NeuronsConfig, sizes: Sizes) -> NeuronSet:
        """The neurons by task, or those of all tasks.

        Raises:
            ConfigurationError: none are listed.
        """
        if self.options.chosen:
            check_whole_layers(neurons, self.name)
            return from_texts(self.options.chosen, sizes.n_neurons)
        if neurons.choose != "list":
            reason = f"measure={self.name} takes a list, of other neurons for each task or of the same for all"
            raise ConfigurationError(reason, setting="neurons.choose", value=neurons.choose)
        return set_of(neurons).in_model(layers_of_model(sizes), "neurons.list")

    def tables(self, sizes: Sizes) -> dict[str, Table]:
        """`prompts` and `neuron_predictions`."""
        return {
            **schema.prompt_tables(has_experts(sizes)),
            "neuron_predictions": Table(schema.NEURON_PREDICTIONS, "predictions of neurons"),
        }

    def cost(self, info: ModelInfo, neurons: NeuronsConfig, n_targets: float) -> Cost:
        """A byte for each label, two for the extremes, four for the activation."""
        chosen = self._chosen(neurons, info)
        most = max((len(chosen.of_task(task)) for task in chosen.tasks), default=len(chosen))
        predictions = {"neuron_predictions": int(most * (6 + n_targets))}
        return Cost({**prompt_bytes(info, 1024), **predictions}, n_targets)

    def rows(self, shard: ShardInput) -> Iterator[tuple[int, dict[str, pa.Table]]]:
        """One row for each prompt; layers without a chosen neuron are not differentiated."""
        from neg_service.measures.gradients import reduced_gradients
        from neg_service.measures.reductions import at_places

        model, prompts = shard.model, shard.prompts
        sizes = model.feed_forward
        chosen = self._chosen(shard.neurons, sizes)
        own_sets = {task: chosen.of_task(task) for task in {task_of(prompt.prompt.id) for prompt in prompts}}
        layers = sorted({layer for own in own_sets.values() for layer in own.layers})
        wanted = [range(len(prompt.target_ids)) for prompt in prompts]

        def places(index: int, slots: Slots) -> NDArray[np.int64]:
            return slots.places_of(own_sets[task_of(prompts[index].prompt.id)])

        for index, found in reduced_gradients(
            model, prompts, wanted, self.options.basis, layers, shard.budget, at_places(places)
        ):
            prompt_id = prompts[index].prompt.id
            is_routed_s = places(index, found.slots) >= 0
            neurgrad_ks, activation_s = (np.where(is_routed_s, own, np.float32(0)) for own in found.values)
            row = predictions_row(prompt_id, predictions_of(neurgrad_ks, activation_s, is_routed_s))
            table = pa.Table.from_pylist([row], schema.NEURON_PREDICTIONS)
            of_prompt = prompt_tables(prompts[index], found.probability_k, found.routing, has_experts(sizes))
            yield index, {**of_prompt, "neuron_predictions": table}
