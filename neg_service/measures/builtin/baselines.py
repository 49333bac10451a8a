"""What else might stand for NEG: baselines that NeurGrad is compared with, each a measure of its own name.

For target k, layer l and neuron n at the readout position:

    gradient               d p[k] / d a[l, n]              probability per activation unit
    gradient_x_activation  a[l, n] · d p[k] / d a[l, n]    probability
    activation             a[l, n], the same for all k     no unit
    random                 a draw from N(0, 1)             no unit

The table has the measure's name and a value of each neuron for every (prompt, target, layer), as that of NeurGrad. A
random draw follows from the seed, the prompt's id, the target, the layer and the expert alone, not from batches
or shards.

Axes: K targets of a prompt, L chosen layers, N neurons of a layer, M neurons that act on a prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from neg_service import schema
from neg_service.config import NeuronsConfig, checked_layers
from neg_service.layer_neurons import NO_EXPERT
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
    from neg_service.measures.gradients import PromptGradients
    from neg_service.models.inspection import ModelInfo

Floats = NDArray[np.float32]


@dataclass
class BaselineOptions:
    """`keep`: the values of all targets, or those of the right answer only. `seed`: of `random` alone."""

    name: str = "gradient"
    basis: str = basis_setting()
    keep: str = setting("all", "values of all targets, or of the right answer only", allowed=KEEP)
    seed: int = setting(0, "of the draw", least=0)


def random_draw(seed: int, prompt_id: str, target: str, layer: int, n_neurons: int, expert: int = NO_EXPERT) -> Floats:
    """The `random` baseline of the neurons [N] of a layer's MLP or of one of its experts, for a prompt and a target."""
    key = "\0".join((str(seed), prompt_id, target, str(layer), *([] if expert == NO_EXPERT else [str(expert)])))
    digest = hashlib.sha256(key.encode()).digest()
    draw = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    return draw.standard_normal(n_neurons, dtype=np.float32)


class BaselineEstimate(Measure[BaselineOptions]):
    """One of the baselines, by its name."""

    Options = BaselineOptions
    NAMES = ("gradient", "gradient_x_activation", "activation", "random")
    TAKES_SEQUENCES = True
    TAKES_PLACES = True

    def validate(self, info: ModelInfo, neurons: NeuronsConfig, prompts: Sequence[Prompt]) -> None:
        """Refuse to keep answers that there are not, too."""
        super().validate(info, neurons, prompts)
        check_keep(self.options.keep, KEEP, prompts)

    def fingerprint_inputs(self) -> dict[str, Any]:
        """The seed decides nothing but random draws."""
        given = self.configuration()
        if self.name != "random":
            del given["seed"]
        return given

    def tables(self, sizes: Sizes) -> dict[str, Table]:
        """`prompts`, and the values under the measure's name."""
        title, unit = schema.ESTIMATES[self.name]
        values = Table(schema.baseline(self.name, layers_of_model(sizes)), title, unit, self.name)
        return {**schema.prompt_tables(has_experts(sizes)), self.name: values}

    def cost(self, info: ModelInfo, neurons: NeuronsConfig, n_targets: float) -> Cost:
        """Four bytes for each value; a row for each target, differentiated even where the activation alone is kept."""
        kept = kept_targets(self.options.keep, n_targets)
        values = int(4 * n_slots(info, checked_layers(neurons, info.n_layers)) * kept)
        return Cost({**prompt_bytes(info), self.name: values}, kept)

    def rows(self, shard: ShardInput) -> Iterator[tuple[int, dict[str, pa.Table]]]:
        """Rows by target, then layer."""
        from neg_service.measures.gradients import gradients

        model, layers, basis = shard.model, shard.layers, self.options.basis
        sizes = model.feed_forward
        table_schema = schema.baseline(self.name, layers_of_model(sizes))
        wanted = [wanted_targets(prompt.prompt, self.options.keep) for prompt in shard.prompts]
        for index, found in gradients(model, shard.prompts, wanted, basis, layers, shard.budget):
            prompt, p_k = shard.prompts[index], found.probability_k
            values_km = _values(self.options, prompt.prompt, found)
            of_prompt = prompt_tables(prompt, p_k, found.routing, has_experts(sizes), found.token_log_p)
            own = target_layer_rows(table_schema, prompt, found.targets, found.slots, basis, p_k, values_km)
            yield index, {**of_prompt, self.name: own}


def _values(options: BaselineOptions, prompt: Prompt, found: PromptGradients) -> Floats:
    if options.name == "gradient":
        return found.gradient_km
    if options.name == "gradient_x_activation":
        return found.gradient_km * found.activation_m
    if options.name == "activation":
        return np.ascontiguousarray(np.broadcast_to(found.activation_m, found.gradient_km.shape))
    slots = found.slots
    mlps = list(zip(slots.layer.tolist(), slots.expert.tolist(), slots.size.tolist(), strict=True))
    return np.stack(
        [
            np.concatenate([random_draw(options.seed, prompt.id, text, layer, n, expert) for layer, expert, n in mlps])
            for text in (prompt.targets[target] for target in found.targets)
        ]
    )
