"""The measure `strength`: how strong each neuron is over a data set, as sums that need no stored gradients.

A neuron's strength on a prompt is its largest |NeurGrad| over the prompt's targets. A shard adds that up over its
prompts, so a data set of any size leaves a few numbers a neuron and shard; `total` adds up the shards. This is what
`neurons.choose=top neurons.over=dataset` ranks by.

Axes: K targets, L layers, N neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from neg_service import schema
from neg_service.config import NeuronsConfig, checked_layers
from neg_service.measures import Cost, nothing_to_calibrate
from neg_service.measures.choice import check_whole_layers
from neg_service.measures.gradients import gradients
from neg_service.measures.tables import fixed_size, table_of
from neg_service.models.batches import Budget
from neg_service.models.feed_forward import check_basis
from neg_service.models.inspection import ModelInfo
from neg_service.models.language_model import LanguageModel
from neg_service.prompts.prompt import EncodedPrompt, Prompt


@dataclass
class Options:
    """See `conf/measure/strength.yaml`."""

    name: str = "strength"
    basis: str = "paper"


def read(options: Options) -> Options:
    """No files."""
    return options


def check(options: Options, neurons: NeuronsConfig, info: ModelInfo, prompts: Sequence[Prompt]) -> None:
    """Refuse bad options.

    Raises:
        ConfigurationError: naming the key, its value, and what it may be.
    """
    check_basis(options.basis, info.is_gated, info.architecture)
    check_whole_layers(neurons, options.name)
    checked_layers(neurons, info.n_layers)


def identity(options: Options) -> dict[str, Any]:
    """All of them."""
    return asdict(options)


def tables(options: Options, info: ModelInfo) -> dict[str, pa.Schema]:
    """`strength`."""
    return {"strength": schema.strength(info.n_neurons)}


def cost_a_prompt(options: Options, neurons: NeuronsConfig, info: ModelInfo, n_targets: float) -> Cost:
    """A shard's sums are spread over its prompts, of which there are mostly many."""
    layers = len(checked_layers(neurons, info.n_layers))
    return Cost({"strength": layers * info.n_neurons // 8}, n_targets)


calibrate = nothing_to_calibrate


def measure(
    model: LanguageModel,
    prompts: Sequence[EncodedPrompt],
    options: Options,
    neurons: NeuronsConfig,
    budget: Budget,
    calibration: Mapping[str, Any],
) -> dict[str, pa.Table]:
    """One shard's sums, in float64, where the order of the prompts hardly changes them."""
    layers = checked_layers(neurons, model.feed_forward.n_layers)
    wanted = [range(len(prompt.target_ids)) for prompt in prompts]
    strength_ln = np.zeros((len(layers), model.feed_forward.n_neurons))
    for _, found in gradients(model, prompts, wanted, options.basis, layers, budget):
        # The sign that makes a gradient a NeurGrad does not change its magnitude.
        strength_ln += np.abs(found.gradient_kln).max(0)
    table = table_of(
        schema.strength(model.feed_forward.n_neurons),
        len(layers),
        layer=np.array(layers),
        basis=options.basis,
        n_prompts=np.full(len(layers), len(prompts)),
        strength=fixed_size(strength_ln),
    )
    return {"strength": table}


def total(table: pa.Table) -> tuple[list[int], NDArray[np.float64]]:
    """Layers and strength [L, N] from the rows of all shards."""
    layer_r = table["layer"].to_numpy()
    strength_rn = table["strength"].combine_chunks().flatten().to_numpy().reshape(len(layer_r), -1)
    layers = np.unique(layer_r)
    strength_ln = np.zeros((len(layers), strength_rn.shape[1]))
    np.add.at(strength_ln, np.searchsorted(layers, layer_r), strength_rn)
    return layers.tolist(), strength_ln
