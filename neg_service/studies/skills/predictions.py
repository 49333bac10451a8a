"""What chosen neurons say about prompts, each alone: which label has the largest and the smallest NeurGrad, and signs.

They come from a run of `measure=neuron_predictions`, or from the stored gradients of a run of `measure=neurgrad`.

Axes: P prompts, K labels, S neurons that predictions are known of.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from neg_service.errors import ConfigurationError
from neg_service.measures.builtin.neuron_predictions import PromptPredictions, from_texts, predictions_of
from neg_service.prompts.tasks import task_of
from neg_service.storage.reader import Run, reading
from neg_service.studies.skills.numbering import Numbering
from neg_service.studies.skills.parts import (
    ActivationPart,
    GradientPart,
    Ints,
    ShardParts,
    in_order,
    parts_of_shards,
    read_part,
)


@dataclass(frozen=True)
class NeuronPredictions:
    """What S neurons say about P prompts of one task; see `measures/builtin/neuron_predictions.py`.

    neurons: [S] numbers through all layers. probability_pk: of the labels, by the model. A neuron whose expert a prompt
    does not use has signs of 0, and -1 for labels.
    """

    neurons: Ints
    prompt_ids: tuple[str, ...]
    answer_p: Ints
    probability_pk: NDArray[np.float32]
    sign_pks: NDArray[np.int8]
    largest_ps: NDArray[np.int8]
    smallest_ps: NDArray[np.int8]
    activation_ps: NDArray[np.float32]

    @property
    def n_labels(self) -> int:
        """K."""
        return int(self.probability_pk.shape[1])

    def columns(self, neurons: Ints) -> Ints:
        """Where neurons are along S.

        Raises:
            ConfigurationError: predictions of one of them are not known.
        """
        order = np.argsort(self.neurons)
        places = np.searchsorted(self.neurons, neurons, sorter=order)
        columns: Ints = order[np.minimum(places, len(order) - 1)]
        if not np.array_equal(self.neurons[columns], neurons):
            raise ConfigurationError(
                f"predictions are known of {len(self.neurons)} neurons, not of all that were asked for"
            )
        return columns


def read_predictions(run: Run, task: str, neurons: Ints) -> NeuronPredictions:
    """The predictions of `neurons` on a task's prompts, from a run of `neuron_predictions` or of `neurgrad`.

    Raises:
        ConfigurationError: the run does not know them.
        StorageError: its parts cannot be read.
    """
    with reading(run):
        asked = run.table("prompts", ["prompt_id", "answer", "probabilities"]).to_table()
        mine = asked.filter(pa.array([task_of(own) == task for own in asked["prompt_id"].to_pylist()]))
        rows = dict(
            _summed(run, task, neurons) if "neuron_predictions" in run.tables else _computed(run, task, neurons)
        )
    ids = mine["prompt_id"].to_pylist()
    if missing := next((own for own in ids if own not in rows), None):
        raise ConfigurationError(f"{run.uri} has no predictions of {missing!r}; run it again, parts are missing")
    predictions = [rows[own] for own in ids]
    return NeuronPredictions(
        neurons=neurons,
        prompt_ids=tuple(ids),
        answer_p=mine["answer"].to_numpy().astype(np.int64),
        probability_pk=np.array(mine["probabilities"].to_pylist(), np.float32),
        sign_pks=np.stack([own.sign_ks for own in predictions]),
        largest_ps=np.stack([own.largest_s for own in predictions]),
        smallest_ps=np.stack([own.smallest_s for own in predictions]),
        activation_ps=np.stack([own.activation_s for own in predictions]),
    )


def _summed(run: Run, task: str, neurons: Ints) -> Iterator[tuple[str, PromptPredictions]]:
    numbering = Numbering.of_run(run)
    # A run of an earlier version has texts.
    texts = run.config["measure"].get("chosen")
    chosen = from_texts(texts, int(run.about["model"]["neurons_a_layer"])) if texts else run.listed_neurons()
    assert chosen is not None
    stored = numbering.of_set(chosen.of_task(task))
    places = np.searchsorted(stored, neurons)
    if not np.array_equal(stored[np.minimum(places, len(stored) - 1)], neurons):
        raise ConfigurationError(f"{run.uri} has predictions of other neurons than those asked for")
    # Parts are in the order of tasks, so that most are told from their statistics to hold none of this one's rows.
    begin = pc.field("prompt_id")
    for batch in run.table("neuron_predictions", filter=(begin >= f"{task}/") & (begin < f"{task}0")).to_batches():
        for i in range(batch.num_rows):
            sign, largest, smallest, activation = (batch.column(c)[i].values.to_numpy() for c in range(1, 5))
            own = sign.reshape(-1, len(stored))[:, places]
            predicted = PromptPredictions(own, largest[places], smallest[places], activation[places])
            yield batch.column(0)[i].as_py(), predicted


def _computed(run: Run, task: str, neurons: Ints) -> Iterator[tuple[str, PromptPredictions]]:
    within = (pc.field("prompt_id") >= f"{task}/") & (pc.field("prompt_id") < f"{task}0")

    row_s3 = Numbering.of_run(run).rows(neurons)
    mlps = [(layer, expert) for layer, expert in np.unique(row_s3[:, :2], axis=0).tolist()]
    columns = {mlp: np.flatnonzero((row_s3[:, :2] == mlp).all(1)) for mlp in mlps}

    def of_shard(parts: ShardParts) -> list[tuple[str, PromptPredictions]]:
        gradients, activations = parts.fragments
        table = read_part(gradients, GradientPart.COLUMNS, within)
        if not table.num_rows:
            return []
        part = GradientPart(table)
        ids, there = part.prompt_ids(task), set(part.mlps(task))
        activation_part = ActivationPart(read_part(activations, ActivationPart.COLUMNS, within))
        shape = (len(ids), part.n_labels(task), len(neurons))
        neurgrad_pks, activation_ps = np.zeros(shape, np.float32), np.zeros((len(ids), len(neurons)), np.float32)
        is_routed_ps = np.zeros(activation_ps.shape, bool)
        for mlp, own in columns.items():
            if mlp not in there:
                continue
            used, values_pkn = part.values(task, mlp)
            neuron = row_s3[own, 2]
            neurgrad_pks[used[:, None], :, own] = values_pkn[:, :, neuron].swapaxes(1, 2)
            activation_ps[:, own] = activation_part.values(ids, mlp)[:, neuron]
            is_routed_ps[used[:, None], own] = True
        return [
            (id_, predictions_of(neurgrad_pks[i], activation_ps[i], is_routed_ps[i])) for i, id_ in enumerate(ids)
        ]  # fmt: skip

    parts = parts_of_shards(run, "neurgrad", "activations")
    for own in in_order(of_shard, parts, lambda own: own.size):
        yield from own
