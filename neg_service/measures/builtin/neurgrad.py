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
from neg_service.measures import targets
from neg_service.measures.base import Cost, Measure, ShardInput, Sizes
from neg_service.measures.tables import fixed_size, key_columns, prompt_row, table_of, target_layer_rows
from neg_service.measures.targets import check_keep, kept_targets, wanted_targets
from neg_service.prompts.prompt import EncodedPrompt, Prompt
from neg_service.schema import Table
from neg_service.settings import basis_setting, setting

if TYPE_CHECKING:
    from neg_service.measures.gradients import PromptGradients
    from neg_service.models.inspection import ModelInfo

KEEP = (*targets.KEEP, "top_k")


@dataclass
class NeurGradOptions:
    """`keep`: all values, those of the right answer only, or the `top_k` strongest neurons of each target."""

    name: str = "neurgrad"
    basis: str = basis_setting()
    keep: str = setting(
        "all",
        "all values, those of the right answer only, or the `top_k` strongest neurons of each target",
        allowed=KEEP,
    )
    top_k: int = setting(100, "neurons of each (prompt, target), for keep: top_k", least=1)


class NeurGrad(Measure[NeurGradOptions]):
    """NeurGrad from one backward pass."""

    Options = NeurGradOptions
    NAMES = ("neurgrad",)

    def validate(self, info: ModelInfo, neurons: NeuronsConfig, prompts: Sequence[Prompt]) -> None:
        """Refuse to keep answers that there are not, or more neurons than there are, too."""
        super().validate(info, neurons, prompts)
        check_keep(self.options.keep, KEEP, prompts)
        in_all = len(checked_layers(neurons, info.n_layers)) * info.n_neurons
        if self._is_top_k and self.options.top_k > in_all:
            raise ConfigurationError(
                setting="measure.top_k",
                value=self.options.top_k,
                allowed=f"at most {in_all}, the neurons of the chosen layers",
            )

    def fingerprint_inputs(self) -> dict[str, Any]:
        """`top_k` decides nothing where values are kept."""
        given = self.configuration()
        if not self._is_top_k:
            del given["top_k"]
        return given

    def tables(self, sizes: Sizes) -> dict[str, Table]:
        """`prompts`, then values: `activations` and `neurgrad`, or `top_neurons`."""
        title, unit = schema.ESTIMATES["neurgrad"]
        if self._is_top_k:
            return {"prompts": Table(schema.PROMPTS), "top_neurons": Table(schema.TOP_NEURONS, title, unit, "neurgrad")}
        note = "A neuron that fires by one unit stronger changes the probability by about so much."
        activations = schema.activations(sizes.neurons_by_layer)
        return {
            "prompts": Table(schema.PROMPTS),
            "activations": Table(activations, *schema.ESTIMATES["activation"], "activation"),
            "neurgrad": Table(schema.neurgrad(sizes.neurons_by_layer), title, unit, "neurgrad", note),
        }

    def cost(self, info: ModelInfo, neurons: NeuronsConfig, n_targets: float) -> Cost:
        """Four bytes for each value; float32 of trained models hardly compresses. A row for each target."""
        layers = len(checked_layers(neurons, info.n_layers))
        text = 256
        if self._is_top_k:
            # A row is rank, layer, neuron, value, activation and, mostly repeated, the key.
            return Cost({"prompts": text, "top_neurons": int(20 * self.options.top_k * n_targets)}, n_targets)
        kept = kept_targets(self.options.keep, n_targets)
        values = 4 * layers * info.n_neurons
        return Cost({"prompts": text, "activations": values, "neurgrad": int(values * kept)}, kept)

    def rows(self, shard: ShardInput) -> Iterator[tuple[int, dict[str, pa.Table]]]:
        """Reduced at once, so that `top_k` never holds a shard's full gradients."""
        from neg_service.measures.gradients import gradients

        layers, basis = shard.layers, self.options.basis
        wanted = [wanted_targets(prompt.prompt, self.options.keep) for prompt in shard.prompts]
        tables = _strongest if self._is_top_k else _values
        for index, found in gradients(shard.model, shard.prompts, wanted, basis, layers, shard.budget):
            prompt = shard.prompts[index]
            own = tables(prompt, found, layers, self.options)
            yield index, {"prompts": prompt_row(prompt, found.probability_k), **own}

    @property
    def _is_top_k(self) -> bool:
        return self.options.keep == "top_k"


def _values(
    prompt: EncodedPrompt, found: PromptGradients, layers: Sequence[int], options: NeurGradOptions
) -> dict[str, pa.Table]:
    neurgrad_kln = found.neurgrad_kln
    n_neurons = neurgrad_kln.shape[-1]
    activations = table_of(
        schema.activations(n_neurons),
        len(layers),
        prompt_id=prompt.prompt.id,
        layer=list(layers),
        basis=options.basis,
        activation=fixed_size(found.activation_ln),
    )
    neurgrad = target_layer_rows(
        schema.neurgrad(n_neurons), prompt, found.targets, layers, options.basis, found.probability_k, neurgrad_kln
    )
    return {"activations": activations, "neurgrad": neurgrad}


def _strongest(
    prompt: EncodedPrompt, found: PromptGradients, layers: Sequence[int], options: NeurGradOptions
) -> dict[str, pa.Table]:
    neurgrad_kln = found.neurgrad_kln
    k, _, n = neurgrad_kln.shape
    flat_km = neurgrad_kln.reshape(k, -1)
    # A stable sort of the negated magnitude: among equals the lower layer and neuron comes first.
    best_kt = np.argsort(-np.abs(flat_km), axis=1, kind="stable")[:, : options.top_k]
    best = best_kt.ravel()
    table = table_of(
        schema.TOP_NEURONS,
        best.size,
        **key_columns(prompt, np.repeat(found.targets, options.top_k)),
        rank=np.tile(np.arange(options.top_k), k),
        layer=np.asarray(layers)[best // n],
        neuron=best % n,
        basis=options.basis,
        probability=np.repeat(found.probability_k[list(found.targets)], options.top_k),
        neurgrad=np.take_along_axis(flat_km, best_kt, 1).ravel(),
        activation=found.activation_ln.ravel()[best],
    )
    return {"top_neurons": table}
