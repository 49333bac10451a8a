"""The measure `neurgrad`: NeurGrad of every neuron for every target, as values, or as the strongest neurons alone.

Formula, units and source: `measures/neurgrad.py`.

Axes: K targets of a prompt, L chosen layers, N neurons of a layer, T strongest neurons of a target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from neg_service import schema
from neg_service.config import NeuronsConfig, checked_layers
from neg_service.errors import ConfigurationError
from neg_service.layer_neurons import LayerNeurons
from neg_service.measures import targets
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
from neg_service.measures.readouts import Readouts, against_setting, check_readouts, readout_setting
from neg_service.measures.tables import key_columns, lists, mlp_columns, prompt_tables, table_of, target_layer_rows
from neg_service.measures.targets import check_at, check_keep, kept_targets, wanted_targets
from neg_service.prompts.prompt import EncodedPrompt, Prompt
from neg_service.schema import Table
from neg_service.settings import at_setting, basis_setting, setting

if TYPE_CHECKING:
    from neg_service.measures.gradients import PromptReduced
    from neg_service.models.inspection import ModelInfo

KEEP = (*targets.KEEP, "top_k")


@dataclass
class NeurGradOptions:
    """`keep`: all values, those of the right answer only, or the `top_k` strongest neurons of each target."""

    name: str = "neurgrad"
    basis: str = basis_setting()
    at: str = at_setting()
    keep: str = setting(
        "all",
        "all values, those of the right answer only, or the `top_k` strongest neurons of each target",
        allowed=KEEP,
    )
    top_k: int = setting(100, "neurons of each (prompt, target), for keep: top_k", least=1)
    readout: str = readout_setting()
    against: Any = against_setting()


class NeurGrad(Measure[NeurGradOptions]):
    """NeurGrad from one backward pass."""

    Options = NeurGradOptions
    NAMES = ("neurgrad",)
    TAKES_SEQUENCES = True
    TAKES_PLACES = True

    def validate(self, info: ModelInfo, neurons: NeuronsConfig, prompts: Sequence[Prompt]) -> None:
        """Refuse to keep answers that there are not, or more neurons than there are, too."""
        super().validate(info, neurons, prompts)
        check_at(self.options.at)
        check_keep(self.options.keep, KEEP, prompts)
        check_readouts(self._readouts, prompts, self.options.keep)
        in_all = n_slots(info, checked_layers(neurons, info.n_layers))
        if self._is_top_k and self.options.top_k > in_all:
            raise ConfigurationError(
                setting="measure.top_k",
                value=self.options.top_k,
                allowed=f"at most {in_all}, the neurons of the chosen layers that act on a prompt",
            )

    def fingerprint_inputs(self) -> dict[str, Any]:
        """`top_k` decides nothing where values are kept."""
        given = self.configuration()
        if not self._is_top_k:
            del given["top_k"]
        del given["readout"], given["against"]
        if self.options.at == "readout":
            del given["at"]
        return given | self._readouts.fingerprint()

    def tables(self, sizes: Sizes) -> dict[str, Table]:
        """`prompts`, then values: `activations` and `neurgrad`, or `top_neurons`."""
        (title, unit), readouts = schema.ESTIMATES["neurgrad"], self._readouts
        title, unit = readouts.title(title), readouts.unit(unit)
        if self._is_top_k:
            top = Table(schema.top_neurons(readouts.is_plain), title, unit, "neurgrad")
            return {**schema.prompt_tables(has_experts(sizes)), "top_neurons": top}
        note = f"A neuron that fires by one unit stronger changes the {readouts.words} by about so much."
        activations = schema.activations(layers_of_model(sizes))
        return {
            **schema.prompt_tables(has_experts(sizes)),
            "activations": Table(activations, *schema.ESTIMATES["activation"], "activation"),
            "neurgrad": Table(
                schema.neurgrad(layers_of_model(sizes), readouts.is_plain), title, unit, "neurgrad", note
            ),
        }

    def cost(self, info: ModelInfo, neurons: NeuronsConfig, n_targets: float) -> Cost:
        """Four bytes for each value; float32 of trained models hardly compresses. A row for each target."""
        text = prompt_bytes(info)
        if self._is_top_k:
            # A row is rank, layer, neuron, value, activation and, mostly repeated, the key.
            return Cost({**text, "top_neurons": int(20 * self.options.top_k * n_targets)}, n_targets)
        kept = kept_targets(self.options.keep, n_targets)
        values = 4 * n_slots(info, checked_layers(neurons, info.n_layers))
        return Cost({**text, "activations": values, "neurgrad": int(values * kept)}, kept)

    def rows(self, shard: ShardInput) -> Iterator[tuple[int, dict[str, pa.Table]]]:
        """Reduced at once, so that `top_k` never holds a shard's full gradients."""
        from neg_service.measures import reductions
        from neg_service.measures.gradients import reduced_gradients

        layers, basis = shard.layers, self.options.basis
        wanted = [wanted_targets(prompt.prompt, self.options.keep) for prompt in shard.prompts]
        tables, sizes = _strongest if self._is_top_k else _values, shard.model.feed_forward
        reduce = reductions.strongest(self.options.top_k) if self._is_top_k else reductions.all_neurons
        for index, found in reduced_gradients(
            shard.model, shard.prompts, wanted, basis, layers, shard.budget, reduce, self._readouts,
            each=self.options.at == "each",
        ):  # fmt: skip
            prompt = shard.prompts[index]
            own = tables(prompt, found, layers_of_model(sizes), self.options, self._readouts)
            of_prompt = prompt_tables(
                prompt, found.probability_k, found.routing, has_experts(sizes), found.token_log_p,
                self._readouts.readout,
            )  # fmt: skip
            yield index, {**of_prompt, **own}

    @property
    def _readouts(self) -> Readouts:
        return Readouts.checked(self.options.readout, self.options.against)

    @property
    def _is_top_k(self) -> bool:
        return self.options.keep == "top_k"


def _values(
    prompt: EncodedPrompt,
    found: PromptReduced,
    layer_neurons: Sequence[LayerNeurons],
    options: NeurGradOptions,
    readouts: Readouts,
) -> dict[str, pa.Table]:
    (neurgrad_km, activation_m), slots = found.values, found.slots
    of_activations = schema.activations(layer_neurons)
    activations = table_of(
        of_activations,
        len(slots.size),
        prompt_id=prompt.prompt.id,
        **mlp_columns(slots.layer, slots.expert),
        basis=options.basis,
        activation=lists(activation_m, slots.size, of_activations.field("activation").type),
    )
    of_neurgrad, p_k = schema.neurgrad(layer_neurons, readouts.is_plain), found.probability_k
    neurgrad = target_layer_rows(
        of_neurgrad, prompt, found.targets, slots, options.basis, p_k, neurgrad_km, readout=readouts.label
    )
    return {"activations": activations, "neurgrad": neurgrad}


def _strongest(
    prompt: EncodedPrompt,
    found: PromptReduced,
    _layer_neurons: Sequence[LayerNeurons],
    options: NeurGradOptions,
    readouts: Readouts,
) -> dict[str, pa.Table]:
    (best_kt, neurgrad_kt, activation_kt), k = found.values, len(found.targets)
    layer, expert, neuron = found.slots.rows_at(best_kt.ravel()).T
    table = table_of(
        schema.top_neurons(readouts.is_plain),
        best_kt.size,
        **key_columns(prompt, np.repeat(found.targets, options.top_k)),
        rank=np.tile(np.arange(options.top_k), k),
        **mlp_columns(layer, expert),
        neuron=neuron,
        basis=options.basis,
        readout=readouts.label,
        probability=np.repeat(found.probability_k[list(found.targets)], options.top_k),
        neurgrad=neurgrad_kt.ravel(),
        activation=activation_kt.ravel(),
    )
    return {"top_neurons": table}
