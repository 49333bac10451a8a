"""The measure `positions`: NeurGrad at every token of a prompt, summed up over each layer. Formula: one level up.

Axes: K targets, T tokens of one of them, L layers.
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
    TAKES_SEQUENCES = True
    # It has all tokens.
    TAKES_PLACES = False

    def tables(self, sizes: Sizes) -> dict[str, Table]:
        """`prompts` and `positions`."""
        note = "Of each layer and token the strongest neuron; `total` adds up the sizes of all."
        table = Table(schema.POSITIONS, "NeurGrad", schema.PER_MAGNITUDE, "neurgrad", note)
        return {**schema.prompt_tables(has_experts(sizes)), "positions": table}

    def cost(self, info: ModelInfo, neurons: NeuronsConfig, n_targets: float) -> Cost:
        """A backward pass over the whole prompt for each target; one of several tokens makes it a little longer."""
        n = len(checked_layers(neurons, info.n_layers)) * _TOKENS * n_targets
        return Cost({**prompt_bytes(info), "positions": int(_ROW * n)}, _TOKENS * n_targets)

    def rows(self, shard: ShardInput) -> Iterator[tuple[int, dict[str, pa.Table]]]:
        """Prompt by prompt, for each has a graph of all its tokens."""
        from neg_service.measures.positions import position_map

        model = shard.model
        for index, prompt in enumerate(shard.prompts):
            found = position_map(model, prompt, self.options.basis, shard.layers)
            of_prompt = prompt_tables(
                prompt, found.probability_k, found.routing, model.feed_forward.has_experts, found.token_log_p
            )
            maps = [
                _table(prompt, found, k, [model.tokenizer.decode([token]) for token in own.ids_t], self.options.basis)
                for k, own in enumerate(found.targets)
            ]
            yield index, {**of_prompt, "positions": pa.concat_tables(maps)}


def _table(prompt: EncodedPrompt, found: PositionMap, k: int, token_t: Sequence[str], basis: str) -> pa.Table:
    """Rows of one target by token, then layer."""
    own = found.targets[k]
    t, n_layers = own.total_tl.shape
    return table_of(
        schema.POSITIONS,
        t * n_layers,
        **key_columns(prompt, np.repeat(k, t * n_layers)),
        **mlp_columns(np.tile(found.layers, t), own.expert_tl.ravel()),
        neuron=own.neuron_tl.ravel(),
        basis=basis,
        probability=np.repeat(found.probability_k[k], t * n_layers),
        position=np.repeat(np.arange(t), n_layers),
        token=np.repeat(np.array(token_t, dtype=object), n_layers),
        neurgrad=own.strongest_tl.ravel(),
        total=own.total_tl.ravel(),
    )
