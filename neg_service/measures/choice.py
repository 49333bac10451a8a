"""Which neurons are measured, for measures that cost by the neuron.

| `neurons.choose` | the neurons, all of them within `neurons.layers` |
|------------------|---|
| `all`            | every one |
| `sample`         | `count` of each layer, or of the model, drawn with `seed`; the same for every prompt |
| `top`            | the `count` strongest of each prompt, or over the whole data set |
| `list`           | those given: pairs (layer, neuron), a file with the columns `layer` and `neuron`, a `NeuronSet` |

A neuron's strength on a prompt is its largest |NeurGrad| over the prompt's targets, because all targets share the same
interventions; over a data set it is the sum of that. Among equals the lower layer and index comes first.

A sample per layer does not depend on which other layers are chosen.

What is asked for is resolved once, when a run is planned (`resolved`): from there on `neurons.list` is a `NeuronSet`,
which replicas get as the object that it is. All neurons of layers follow from the layers alone, and the strongest of
each prompt are known when it is measured; of these there is none. Layers may have unequal numbers of neurons:
`neurons_by_layer` has a number for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neg_service.config import NeuronsConfig, checked_layers
from neg_service.errors import ConfigurationError
from neg_service.neurons import Neurons, NeuronSet, require_existing, rows_of
from neg_service.settings import check_fields


def check_choice(config: NeuronsConfig, neurons_by_layer: Sequence[int]) -> None:
    """Refuse a choice that the model cannot give.

    Raises:
        ConfigurationError: unknown words, an empty choice, more neurons than there are, one that does not exist.
    """
    layers = checked_layers(config, len(neurons_by_layer))
    check_fields("neurons", config, ("choose", "per", "over", "seed"))
    if config.choose in ("sample", "top"):
        is_of_layer = config.choose == "sample" and config.per == "layer"
        counts = [neurons_by_layer[layer] for layer in layers]
        most, of = (min(counts), "a layer") if is_of_layer else (sum(counts), "the chosen layers")
        if not 1 <= config.count <= most:
            raise ConfigurationError(
                f"the choice must be from 1 to {most}, the neurons of {of}", setting="neurons.count", value=config.count
            )
    if config.choose == "list":
        _listed(config, neurons_by_layer)


def check_whole_layers(config: NeuronsConfig, measure: str) -> None:
    """Refuse a choice of single neurons for a measure that has all of a layer's at once."""
    if config.choose != "all":
        raise ConfigurationError(
            f"is for measure=sweep; measure={measure} takes neurons=all", setting="neurons.choose", value=config.choose
        )


def resolved(config: NeuronsConfig, neurons_by_layer: Sequence[int]) -> NeuronsConfig:
    """The choice with its neurons as a `NeuronSet` in `list`, where they do not follow from layers or prompts.

    Raises:
        ConfigurationError: see `check_choice`.
    """
    check_choice(config, neurons_by_layer)
    if config.choose not in ("sample", "list"):
        return config
    # What stands there beside a sample is no list of it, until it is drawn.
    asked = replace(config, list=None) if config.choose == "sample" else config
    return replace(config, list=chosen_neurons(asked, neurons_by_layer))


def chosen_neurons(config: NeuronsConfig, neurons_by_layer: Sequence[int]) -> NeuronSet:
    """The neurons of the choice; not for `top`, which depends on the prompts."""
    layers = checked_layers(config, len(neurons_by_layer))
    if config.choose == "list":
        return _listed(config, neurons_by_layer)
    if config.choose == "sample" and isinstance(config.list, NeuronSet):
        return config.list
    if config.choose == "sample" and config.per == "model":
        in_all = sum(neurons_by_layer[layer] for layer in layers)
        flat = np.random.default_rng(config.seed).choice(in_all, config.count, replace=False)
        return _of_flat(layers, flat, neurons_by_layer)
    if config.choose == "sample":
        draws = {layer: np.random.default_rng([config.seed, layer]) for layer in layers}
        return NeuronSet.of_layers(
            {layer: draw.choice(neurons_by_layer[layer], config.count, replace=False) for layer, draw in draws.items()}
        )
    return NeuronSet.all_of(layers, neurons_by_layer)


def strongest_neurons(
    layers: Sequence[int], strength_ln: Sequence[NDArray[Any]] | NDArray[Any], count: int
) -> NeuronSet:
    """The `count` strongest neurons; `strength_ln`: [L, N] or L times [N], their strengths in the layers given."""
    order = np.argsort(-np.concatenate(list(strength_ln)), kind="stable")[:count]
    return _of_flat(layers, order, dict(zip(layers, map(len, strength_ln), strict=True)))


def count_of(config: NeuronsConfig, neurons_by_layer: Sequence[int]) -> int:
    """How many neurons the choice has, of each prompt."""
    if config.choose == "all":
        return sum(neurons_by_layer[layer] for layer in checked_layers(config, len(neurons_by_layer)))
    return config.count if config.choose == "top" else len(chosen_neurons(config, neurons_by_layer))


def layers_of(config: NeuronsConfig, n_layers: int) -> list[int]:
    """The layers in which chosen neurons can be."""
    return set_of(config).layers if config.choose == "list" else checked_layers(config, n_layers)


def identity_of_choice(config: NeuronsConfig, n_layers: int) -> dict[str, Any]:
    """What of the choice decides the numbers; part of a run's identity."""
    identity: dict[str, Any] = {"layers": layers_of(config, n_layers)}
    if config.choose == "sample":
        identity |= {"choose": "sample", "count": config.count, "per": config.per, "seed": config.seed}
    elif config.choose == "top":
        identity |= {"choose": "top", "count": config.count, "over": config.over}
    elif config.choose == "list":
        listed = set_of(config)
        identity |= {"choose": "list", "count": len(listed), "sha256": listed.sha256}
    return identity


def described(config: NeuronsConfig, neurons_by_layer: Sequence[int]) -> str:
    """For a person: for example `900 in 30 layers: 30 of each layer, seed 0`."""
    how = {
        "all": "",
        "sample": f": {config.count} of {'each layer' if config.per == 'layer' else 'them all'}, seed {config.seed}",
        "top": f": the strongest {'of each prompt' if config.over == 'prompt' else 'over the data set'}",
        "list": ": as listed",
    }
    layers = layers_of(config, len(neurons_by_layer))
    of_layers = f"{len(layers)} layer{'s' * (len(layers) > 1)}"
    return f"{count_of(config, neurons_by_layer)} in {of_layers}{how[config.choose]}"


def with_list_read(config: NeuronsConfig) -> NeuronsConfig:
    """The same choice, with the neurons of a list's file in the place of its name.

    Raises:
        ConfigurationError: see `neurons_in`.
    """
    if config.choose != "list" or not isinstance(config.list, str):
        return config
    # What reads any address takes long to import, and most choices read none.
    from neg_service.measures.lists import neurons_in

    return replace(config, list=neurons_in(config.list))


def set_of(config: NeuronsConfig) -> NeuronSet:
    """The neurons of a list, whatever model they are of.

    Raises:
        ConfigurationError: there is no list, or a neuron is in it twice.
    """
    if isinstance(config.list, NeuronSet):
        return config.list
    if not isinstance(config.list, list):
        raise ConfigurationError(
            setting="neurons.list", value=config.list, allowed="a list of [layer, index] pairs, or a file"
        )
    return NeuronSet.from_pairs(config.list)


def checked_neurons(neurons: Any, neurons_by_layer: Sequence[int], setting: str = "neurons") -> Neurons:
    """Pairs or triples as rows (layer, expert, neuron) [n, 3], in their order.

    Raises:
        ConfigurationError: none, or one that does not exist.
    """
    rows_n3 = neurons.rows if isinstance(neurons, NeuronSet) else rows_of(neurons, setting)
    require_existing(rows_n3, neurons_by_layer, setting)
    return rows_n3


def _listed(config: NeuronsConfig, neurons_by_layer: Sequence[int]) -> NeuronSet:
    if isinstance(config.list, list):
        # Before they are a set: what exists nowhere is told first.
        checked_neurons(config.list, neurons_by_layer, "neurons.list")
    listed = set_of(config)
    if not len(listed):
        raise ConfigurationError("the choice is empty; at least one neuron is needed", setting="neurons.list")
    listed.require_existing(neurons_by_layer, "neurons.list")
    outside = set(listed.layers) - set(checked_layers(config, len(neurons_by_layer)))
    if outside:
        raise ConfigurationError(
            f"has neurons of layer {min(outside)}, which neurons.layers={config.layers} leaves out",
            setting="neurons.list",
        )
    return listed


def _of_flat(layers: Sequence[int], flat: NDArray[np.int64], neurons_by_layer: Any) -> NeuronSet:
    """Neurons by their numbers through all the layers given; `neurons_by_layer` is asked for these alone."""
    starts = np.cumsum([0, *(neurons_by_layer[layer] for layer in layers)])
    numbers = np.sort(flat)
    cuts = np.searchsorted(numbers, starts)
    return NeuronSet.of_layers({layer: numbers[cuts[i] : cuts[i + 1]] - starts[i] for i, layer in enumerate(layers)})
