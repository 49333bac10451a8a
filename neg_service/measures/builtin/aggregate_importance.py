"""The measure `aggregate_importance`: how important each neuron is over a data set, as sums without gradients.

A neuron's importance on a prompt is its largest |NeurGrad| over the prompt's targets. A shard adds that up over its
prompts, so a data set of any size leaves a few numbers for each neuron and shard; `total` adds up the shards. This is
what `neurons.choose=top neurons.over=dataset` ranks by.

Axes: K targets, L layers, N neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from neg_service import schema
from neg_service.config import NeuronsConfig, checked_layers
from neg_service.measures.base import Cost, Measure, ShardInput, Sizes
from neg_service.measures.tables import fixed_size, table_of
from neg_service.schema import Table
from neg_service.settings import basis_setting

if TYPE_CHECKING:
    from neg_service.models.inspection import ModelInfo


@dataclass
class AggregateImportanceOptions:
    """See `conf/measure/aggregate_importance.yaml`."""

    name: str = "aggregate_importance"
    basis: str = basis_setting()


class AggregateImportance(Measure[AggregateImportanceOptions]):
    """Sums of each prompt's largest |NeurGrad|."""

    Options = AggregateImportanceOptions
    NAMES = ("aggregate_importance",)

    def tables(self, sizes: Sizes) -> dict[str, Table]:
        """`aggregate_importance`."""
        note = "The mean over prompts of the largest |NeurGrad| over a prompt's targets."
        return {
            "aggregate_importance": Table(
                schema.aggregate_importance(sizes.neurons_by_layer),
                "aggregate importance",
                schema.PER_MAGNITUDE,
                "aggregate_importance",
                note,
            )
        }

    def cost(self, info: ModelInfo, neurons: NeuronsConfig, n_targets: float) -> Cost:
        """A shard's sums are spread over its prompts, of which there are mostly many."""
        layers = len(checked_layers(neurons, info.n_layers))
        return Cost({"aggregate_importance": layers * info.n_neurons // 8}, n_targets)

    def measure(self, shard: ShardInput) -> dict[str, pa.Table]:
        """One shard's sums, in float64, where the order of the prompts hardly changes them."""
        from neg_service.measures.gradients import gradients

        model, layers, basis = shard.model, shard.layers, self.options.basis
        wanted = [range(len(prompt.target_ids)) for prompt in shard.prompts]
        importance_ln = np.zeros((len(layers), model.feed_forward.n_neurons))
        for _, found in gradients(model, shard.prompts, wanted, basis, layers, shard.budget):
            # The sign that makes a gradient a NeurGrad does not change its magnitude.
            importance_ln += np.abs(found.gradient_kln).max(0)
        table = table_of(
            schema.aggregate_importance(model.feed_forward.n_neurons),
            len(layers),
            layer=np.array(layers),
            basis=basis,
            n_prompts=np.full(len(layers), len(shard.prompts)),
            aggregate_importance=fixed_size(importance_ln),
        )
        return {"aggregate_importance": table}


def total(tables: Iterable[pa.Table]) -> tuple[list[int], list[NDArray[np.float64]]]:
    """Layers, and the importance [N] of the neurons of each, from the rows of all shards, a part held at a time."""
    importance: dict[int, NDArray[np.float64]] = {}
    for table in tables:
        layer_r = table["layer"].to_pylist()
        importance_rn = table["aggregate_importance"].combine_chunks().flatten().to_numpy().reshape(len(layer_r), -1)
        for layer, importance_n in zip(layer_r, importance_rn, strict=True):
            importance[layer] = importance_n + importance.get(layer, 0.0)
        # Not to be held while the next one is read.
        del table, importance_rn
    return sorted(importance), [importance[layer] for layer in sorted(importance)]
