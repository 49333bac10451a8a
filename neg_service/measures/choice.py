"""Which neurons are measured, for measures that cost by the neuron.

| `neurons.choose` | the neurons, all of them within `neurons.layers` |
|------------------|---|
| `all`            | every one |
| `sample`         | `count` of each layer, or of the model, drawn with `seed`; the same for every prompt. Of layers
                     with experts `count` of each expert, and of the MLP that is always on: of these only those of
                     experts that a prompt uses are measured |
| `top`            | the `count` strongest of each prompt, or over the whole data set |
| `list`           | those given: pairs (layer, neuron) or triples (layer, neuron, expert), a file with the columns
                     `layer`, `neuron` and `expert`, a `NeuronSet` |

A neuron's strength on a prompt is its largest |NeurGrad| over the prompt's targets, because all targets share the same
interventions; over a data set it is the sum of that. Among equals the lower layer and index comes first.

A sample per layer does not depend on which other layers are chosen.

What is asked for is resolved once, when a run is planned (`resolved`): from there on `neurons.list` is a `NeuronSet`,
which replicas get as the object that it is. All neurons of layers follow from the layers alone, and the strongest of
each prompt are known when it is measured; of these there is none. Layers may have unequal numbers of neurons:
`neurons_by_layer` has a number for each, or a `LayerNeurons` for one with experts. All neurons are those that act on a
prompt: of experts that its readout token uses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neg_service.config import NeuronsConfig, checked_layers
from neg_service.errors import ConfigurationError
from neg_service.layer_neurons import ALWAYS_ON, NO_EXPERT, LayerNeurons, LayerSize, layers_of_sizes
from neg_service.neurons import Neurons, NeuronSet, require_existing, rows_of
from neg_service.settings import check_fields
from neg_service.slots import Slots


def layers_with_neurons(config: NeuronsConfig, neurons_by_layer: Sequence[LayerSize]) -> list[int]:
    """The chosen layers, some of which may have no neurons: layers of a hybrid may be attention or a recurrence alone.

    Raises:
        ConfigurationError: see `checked_layers`; none of them has any.
    """
    layers, sizes = checked_layers(config, len(neurons_by_layer)), layers_of_sizes(neurons_by_layer)
    if config.choose != "list" and not any(sizes[layer].total for layer in layers):
        some = [layer for layer, own in enumerate(sizes) if own.total]
        raise ConfigurationError(
            f"has no layer with feed-forward neurons; there are some in {', '.join(map(str, some[:8]))}"
            + (" and others" if len(some) > 8 else ""),
            setting="neurons.layers",
            value=config.layers,
        )
    return layers


def check_choice(config: NeuronsConfig, neurons_by_layer: Sequence[LayerSize]) -> None:
    """Refuse a choice that the model cannot give.

    Raises:
        ConfigurationError: unknown words, an empty choice, more neurons than there are, one that does not exist.
    """
    layers = layers_with_neurons(config, neurons_by_layer)
    check_fields("neurons", config, ("choose", "per", "over", "seed"))
    if config.choose in ("sample", "top"):
        sizes = layers_of_sizes(neurons_by_layer)
        of_mlps = [size for layer in layers for _, size in sizes[layer].mlps]
        has_experts = any(sizes[layer].n_experts for layer in layers)
        if config.choose == "sample" and config.per == "layer":
            most, of = min(of_mlps), "an expert or an MLP" if has_experts else "a layer"
        elif config.choose == "top" and has_experts:
            most, of = sum(sizes[layer].n_slots for layer in layers), "the chosen layers that act on a prompt"
        else:
            most, of = sum(of_mlps), "the chosen layers"
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


def resolved(config: NeuronsConfig, neurons_by_layer: Sequence[LayerSize]) -> NeuronsConfig:
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


def chosen_neurons(config: NeuronsConfig, neurons_by_layer: Sequence[LayerSize]) -> NeuronSet:
    """The neurons of the choice; not for `top`, which depends on the prompts."""
    layers = checked_layers(config, len(neurons_by_layer))
    if config.choose == "list":
        return _listed(config, neurons_by_layer)
    if config.choose == "sample" and isinstance(config.list, NeuronSet):
        return config.list
    sizes = layers_of_sizes(neurons_by_layer)
    mlps = {(layer, expert): size for layer in layers for expert, size in sizes[layer].mlps}
    if config.choose == "sample" and config.per == "model":
        draw = np.random.default_rng(config.seed)
        numbers = np.sort(draw.choice(sum(mlps.values()), config.count, replace=False))
        return NeuronSet(*np.ascontiguousarray(_slots_of(mlps).rows_at(numbers).T))
    if config.choose == "sample":
        return NeuronSet.of_mlps(
            {
                key: np.random.default_rng(_seeds(config.seed, *key)).choice(size, config.count, replace=False)
                for key, size in mlps.items()
            }
        )
    return NeuronSet.all_of(layers, neurons_by_layer)


def _seeds(seed: int, layer: int, expert: int) -> list[int]:
    """Of the draw of an MLP or expert: a neuron is in or out whatever else is drawn from."""
    return [seed, layer] if expert == NO_EXPERT else [seed, layer, expert - ALWAYS_ON]


def _slots_of(mlps: Mapping[tuple[int, int], int]) -> Slots:
    layer, expert = np.array(list(mlps), np.int64).reshape(-1, 2).T
    return Slots(layer, expert, np.array(list(mlps.values()), np.int64))


def strongest_neurons(slots: Slots, strength_m: NDArray[Any], count: int) -> NeuronSet:
    """The `count` strongest neurons, of those that stand along M and their strengths there."""
    order = np.argsort(-strength_m, kind="stable")[:count]
    return NeuronSet.distinct(slots.rows_at(order))[0]


def count_of(config: NeuronsConfig, neurons_by_layer: Sequence[LayerSize]) -> int:
    """How many neurons of each prompt are measured; of a sample of experts' neurons about so many."""
    sizes = layers_of_sizes(neurons_by_layer)
    layers = checked_layers(config, len(sizes))
    if config.choose == "all":
        return sum(sizes[layer].n_slots for layer in layers)
    if config.choose == "top":
        return config.count
    chosen = chosen_neurons(config, neurons_by_layer)
    return len(chosen) if config.choose == "list" else _used_of(chosen, sizes)


def n_used(config: NeuronsConfig, neurons_by_layer: Sequence[LayerSize]) -> int:
    """How many of these a prompt uses, about: of a list each neuron is told, also where its expert was not chosen."""
    if config.choose != "list":
        return count_of(config, neurons_by_layer)
    return _used_of(chosen_neurons(config, neurons_by_layer), layers_of_sizes(neurons_by_layer))


def _used_of(chosen: NeuronSet, sizes: Sequence[LayerNeurons]) -> int:
    """Of an expert's neurons the share of its layer's experts that a token uses."""
    # A token may choose more than there are experts with neurons.
    share = np.array([min(own.n_chosen / max(1, own.n_experts), 1.0) for own in sizes])
    return math.ceil(float(np.where(chosen.expert >= 0, share[chosen.layer], 1.0).sum()))


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


def described(config: NeuronsConfig, neurons_by_layer: Sequence[LayerSize]) -> str:
    """For a person: for example `900 in 30 layers: 30 of each layer, seed 0`."""
    sizes = layers_of_sizes(neurons_by_layer)
    has_experts = any(sizes[layer].n_experts for layer in layers_of(config, len(sizes)))
    each = "each expert and MLP" if has_experts else "each layer"
    how = {
        "all": " (those of experts that a prompt uses)" if has_experts else "",
        "sample": f": {config.count} of {each if config.per == 'layer' else 'them all'}, seed {config.seed}",
        "top": f": the strongest {'of each prompt' if config.over == 'prompt' else 'over the data set'}",
        "list": ": as listed",
    }
    layers = layers_of(config, len(neurons_by_layer))
    of_layers = f"{len(layers)} layer{'s' * (len(layers) > 1)}"
    about = "about " if has_experts and config.choose == "sample" else ""
    return f"{about}{count_of(config, neurons_by_layer)} in {of_layers}{how[config.choose]}"


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


def checked_neurons(neurons: Any, neurons_by_layer: Sequence[LayerSize], setting: str = "neurons") -> Neurons:
    """Pairs or triples as rows (layer, expert, neuron) [n, 3], in their order.

    Raises:
        ConfigurationError: none, or one that does not exist.
    """
    rows_n3 = neurons.rows if isinstance(neurons, NeuronSet) else rows_of(neurons, setting)
    return require_existing(rows_n3, neurons_by_layer, setting)


def _listed(config: NeuronsConfig, neurons_by_layer: Sequence[LayerSize]) -> NeuronSet:
    if isinstance(config.list, list):
        # Before they are a set: what exists nowhere is told first.
        checked_neurons(config.list, neurons_by_layer, "neurons.list")
    listed = set_of(config)
    if not len(listed):
        raise ConfigurationError("the choice is empty; at least one neuron is needed", setting="neurons.list")
    listed = listed.in_model(neurons_by_layer, "neurons.list")
    outside = set(listed.layers) - set(checked_layers(config, len(neurons_by_layer)))
    if outside:
        raise ConfigurationError(
            f"has neurons of layer {min(outside)}, which neurons.layers={config.layers} leaves out",
            setting="neurons.list",
        )
    return listed
