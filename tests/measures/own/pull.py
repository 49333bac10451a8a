"""A measure of one's own with a value of every neuron: the gradient for each target, times a factor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from neg_service.config import NeuronsConfig
from neg_service.measures.base import Cost, Measure, ShardInput, Sizes
from neg_service.measures.tables import fixed_size, key_columns, prompt_row, table_of
from neg_service.schema import PROMPTS, Table

if TYPE_CHECKING:
    from neg_service.models.inspection import ModelInfo


@dataclass
class PullOptions:
    """See `conf/measure/pull.yaml`."""

    name: str = "pull"
    factor: float = 1.0


def pulls(n_neurons: int) -> pa.Schema:
    """A row for each prompt, target and layer."""
    return pa.schema(
        [
            pa.field("prompt_id", pa.string(), nullable=False),
            pa.field("target_index", pa.int16(), nullable=False),
            pa.field("target", pa.string(), nullable=False),
            pa.field("is_answer", pa.bool_()),
            pa.field("layer", pa.int16(), nullable=False),
            pa.field("pull", pa.list_(pa.float32(), n_neurons), nullable=False),
        ]
    )


class Pull(Measure[PullOptions]):
    """How hard each neuron pulls."""

    Options = PullOptions

    def tables(self, sizes: Sizes) -> dict[str, Table]:
        """`prompts` and `pulls`."""
        said = Table(pulls(sizes.n_neurons), "pull", "newtons", "pull", note="Pulled by so much.")
        return {"prompts": Table(PROMPTS), "pulls": said}

    def cost(self, info: ModelInfo, neurons: NeuronsConfig, n_targets: float) -> Cost:
        """Four bytes for each value."""
        return Cost({"prompts": 256, "pulls": int(4 * info.n_layers * info.n_neurons * n_targets)}, n_targets, "tugs")

    def rows(self, shard: ShardInput) -> Iterator[tuple[int, dict[str, pa.Table]]]:
        """By target, then layer."""
        from neg_service.measures.gradients import gradients

        wanted = [range(len(prompt.target_ids)) for prompt in shard.prompts]
        layers = shard.layers
        for index, found in gradients(shard.model, shard.prompts, wanted, "paper", layers, shard.budget):
            prompt, k = shard.prompts[index], len(found.targets)
            table = table_of(
                pulls(found.activation_ln.shape[-1]),
                k * len(layers),
                **key_columns(prompt, np.repeat(found.targets, len(layers))),
                layer=np.tile(layers, k),
                pull=fixed_size(np.float32(self.options.factor) * found.gradient_kln),
            )
            yield index, {"prompts": prompt_row(prompt, found.probability_k), "pulls": table}
