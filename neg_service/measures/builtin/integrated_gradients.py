"""The measure `integrated_gradients`: of every neuron, for every target. What is computed: one level up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from neg_service import schema
from neg_service.config import NeuronsConfig, checked_layers
from neg_service.measures.base import (
    Cost,
    Measure,
    ShardInput,
    Sizes,
    has_experts,
    layers_of_model,
    n_slots,
    prompt_bytes,
)
from neg_service.measures.tables import prompt_tables, target_layer_rows
from neg_service.measures.targets import KEEP, check_keep, kept_targets, wanted_targets
from neg_service.prompts.prompt import Prompt
from neg_service.schema import Table
from neg_service.settings import basis_setting, setting

if TYPE_CHECKING:
    from neg_service.models.inspection import ModelInfo

_NAME = "integrated_gradients"


@dataclass
class IntegratedGradientsOptions:
    """`keep`: the values of all targets, or those of the right answer only. `steps`: m, the points of the sum."""

    name: str = _NAME
    basis: str = basis_setting()
    keep: str = setting("all", "values of all targets, or of the right answer only", allowed=KEEP)
    steps: int = setting(20, "points between zero and the activations that are summed over", least=1)


class IntegratedGradients(Measure[IntegratedGradientsOptions]):
    """What each neuron brings while its layer grows from zero to what it is."""

    Options = IntegratedGradientsOptions
    NAMES = (_NAME,)
    TAKES_SEQUENCES = True
    TAKES_PLACES = True

    def validate(self, info: ModelInfo, neurons: NeuronsConfig, prompts: Sequence[Prompt]) -> None:
        """Refuse to keep answers that there are not, too."""
        super().validate(info, neurons, prompts)
        check_keep(self.options.keep, KEEP, prompts)

    def tables(self, sizes: Sizes) -> dict[str, Table]:
        """`prompts` and `integrated_gradients`."""
        values = Table(schema.integrated_gradients(layers_of_model(sizes)), *schema.ESTIMATES[_NAME], _NAME)
        return {**schema.prompt_tables(has_experts(sizes)), _NAME: values}

    def cost(self, info: ModelInfo, neurons: NeuronsConfig, n_targets: float) -> Cost:
        """Four bytes for each value, which hardly compress; in each layer a row for each point, and back for each
        target."""
        layers = checked_layers(neurons, info.n_layers)
        kept = kept_targets(self.options.keep, n_targets)
        values = int(4 * n_slots(info, layers) * kept)
        # There and back through the layers from its own on.
        return Cost({**prompt_bytes(info), _NAME: values}, self.options.steps * len(layers) * kept, passes=1.0)

    def rows(self, shard: ShardInput) -> Iterator[tuple[int, dict[str, pa.Table]]]:
        """Rows by target, then layer."""
        from neg_service.measures.integrated_gradients import integrals

        options, layers = self.options, shard.layers
        sizes = shard.model.feed_forward
        table_schema = schema.integrated_gradients(layers_of_model(sizes))
        wanted = [wanted_targets(prompt.prompt, options.keep) for prompt in shard.prompts]
        found_of = integrals(shard.model, shard.prompts, wanted, options.basis, layers, options.steps, shard.budget)
        for index, found in found_of:
            prompt, p_k = shard.prompts[index], found.probability_k
            values = target_layer_rows(
                table_schema, prompt, found.targets, found.slots, options.basis, p_k, found.integral_km
            )
            of_prompt = prompt_tables(prompt, p_k, found.routing, has_experts(sizes), found.token_log_p)
            yield index, {**of_prompt, _NAME: values}
