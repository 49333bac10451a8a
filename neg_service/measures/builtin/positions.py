"""The measure `positions`: NeurGrad at every token of a prompt, summed up over each layer. Formula: one level up.

Axes: K targets, T tokens, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from neg_service import schema
from neg_service.config import NeuronsConfig, checked_layers
from neg_service.measures.base import Cost, Measure, ShardInput, Sizes, has_experts, prompt_bytes
from neg_service.measures.tables import key_columns, mlp_columns, prompt_tables, table_of
from neg_service.schema import Table
from neg_service.settings import basis_setting

if TYPE_CHECKING:
    from neg_service.measures.positions import PositionMap
    from neg_service.models.inspection import ModelInfo
    from neg_service.prompts.prompt import EncodedPrompt

# About how many tokens a prompt has, and what a row takes beside what repeats.
_TOKENS, _ROW = 30, 14


@dataclass
class PositionsOptions:
    """See `conf/measure/positions.yaml`."""

    name: str = "positions"
    basis: str = basis_setting()


class Positions(Measure[PositionsOptions]):
    """NeurGrad by layer and token."""

    Options = PositionsOptions
    NAMES = ("positions",)

    def tables(self, sizes: Sizes) -> dict[str, Table]:
        """`prompts` and `positions`."""
        note = "Of each layer and token the strongest neuron; `total` adds up the sizes of all."
        table = Table(schema.POSITIONS, "NeurGrad", schema.PER_MAGNITUDE, "neurgrad", note)
        return {**schema.prompt_tables(has_experts(sizes)), "positions": table}

    def cost(self, info: ModelInfo, neurons: NeuronsConfig, n_targets: float) -> Cost:
        """A backward pass over the whole prompt for each target."""
        n = len(checked_layers(neurons, info.n_layers)) * _TOKENS * n_targets
        return Cost({**prompt_bytes(info), "positions": int(_ROW * n)}, _TOKENS * n_targets)

    def rows(self, shard: ShardInput) -> Iterator[tuple[int, dict[str, pa.Table]]]:
        """Prompt by prompt, for each has a graph of all its tokens."""
        from neg_service.measures.positions import position_map

        model = shard.model
        for index, prompt in enumerate(shard.prompts):
            found = position_map(model, prompt, self.options.basis, shard.layers)
            tokens = [model.tokenizer.decode([token]) for token in prompt.ids]
            of_prompt = prompt_tables(prompt, found.probability_k, found.routing, model.feed_forward.has_experts)
            yield index, {**of_prompt, "positions": _table(prompt, found, tokens, self.options.basis)}


def _table(prompt: EncodedPrompt, found: PositionMap, tokens: Sequence[str], basis: str) -> pa.Table:
    """Rows by target, then token, then layer."""
    k, t, n_layers = found.total_ktl.shape
    return table_of(
        schema.POSITIONS,
        k * t * n_layers,
        **key_columns(prompt, np.repeat(np.arange(k), t * n_layers)),
        **mlp_columns(np.tile(found.layers, k * t), found.expert_ktl.ravel()),
        neuron=found.neuron_ktl.ravel(),
        basis=basis,
        probability=np.repeat(found.probability_k, t * n_layers),
        position=np.tile(np.repeat(np.arange(t), n_layers), k),
        token=np.tile(np.repeat(np.array(tokens, dtype=object), n_layers), k),
        neurgrad=found.strongest_ktl.ravel(),
        total=found.total_ktl.ravel(),
    )
