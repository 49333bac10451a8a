"""Two measures of one's own: the loudest neuron of each layer, a row each, and how loud neurons are over a data set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from neg_service.config import NeuronsConfig
from neg_service.measures.base import Cost, Measure, ShardInput, Sizes
from neg_service.measures.gradients import PromptGradients, gradients
from neg_service.measures.tables import fixed_size, key_columns, prompt_row, table_of
from neg_service.schema import PROMPTS, Table

if TYPE_CHECKING:
    from neg_service.models.inspection import ModelInfo

LOUDEST = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("target_index", pa.int16(), nullable=False),
        pa.field("target", pa.string(), nullable=False),
        pa.field("is_answer", pa.bool_()),
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("neuron", pa.int32(), nullable=False),
        pa.field("loudness", pa.float32(), nullable=False),
    ]
)


@dataclass
class LoudnessOptions:
    """Nothing to set."""

    name: str = "loudness"


class Loudest(Measure[LoudnessOptions]):
    """A row for each target and layer."""

    Options = LoudnessOptions

    def tables(self, sizes: Sizes) -> dict[str, Table]:
        """`prompts` and `loudest`."""
        return {"prompts": Table(PROMPTS), "loudest": Table(LOUDEST, "loudness", "decibels", "loudness")}

    def cost(self, info: ModelInfo, neurons: NeuronsConfig, n_targets: float) -> Cost:
        """Little."""
        return Cost({"prompts": 256, "loudest": 16 * info.n_layers}, n_targets)

    def rows(self, shard: ShardInput) -> Iterator[tuple[int, dict[str, pa.Table]]]:
        """By target, then layer."""
        for index, found in _passes(shard):
            prompt, loud_ln = shard.prompts[index], np.abs(found.activation_ln)
            k, layers = len(found.targets), shard.layers
            table = table_of(
                LOUDEST,
                k * len(layers),
                **key_columns(prompt, np.repeat(found.targets, len(layers))),
                layer=np.tile(layers, k),
                neuron=np.tile(loud_ln.argmax(1), k),
                loudness=np.tile(loud_ln.max(1), k),
            )
            yield index, {"prompts": prompt_row(prompt, found.probability_k), "loudest": table}


class Loudness(Measure[LoudnessOptions]):
    """A row for each layer and shard."""

    Options = LoudnessOptions

    def tables(self, sizes: Sizes) -> dict[str, Table]:
        """`loudness` alone."""
        fields = [("layer", pa.int16()), ("n_prompts", pa.int32()), ("summed", pa.list_(pa.float64(), sizes.n_neurons))]
        return {"loudness": Table(pa.schema(fields), "loudness", "decibels", "summed")}

    def cost(self, info: ModelInfo, neurons: NeuronsConfig, n_targets: float) -> Cost:
        """Little."""
        return Cost({"loudness": info.n_layers * info.n_neurons}, n_targets)

    def measure(self, shard: ShardInput) -> dict[str, pa.Table]:
        """Sums over prompts."""
        loud_ln = sum(np.abs(found.activation_ln).astype(np.float64) for _, found in _passes(shard))
        n = len(shard.layers)
        columns: dict[str, Any] = {"n_prompts": np.full(n, len(shard.prompts)), "summed": fixed_size(np.array(loud_ln))}
        table_schema = self.tables(shard.model.feed_forward)["loudness"].schema
        return {"loudness": table_of(table_schema, n, layer=np.array(shard.layers), **columns)}


def _passes(shard: ShardInput) -> Iterator[tuple[int, PromptGradients]]:
    wanted = [range(len(prompt.target_ids)) for prompt in shard.prompts]
    return gradients(shard.model, shard.prompts, wanted, "paper", shard.layers, shard.budget)
