"""Which neurons are measured, for measures that cost by the neuron.

| `neurons.choose` | the neurons, all of them within `neurons.layers` |
|------------------|---|
| `all`            | every one |
| `sample`         | `count` of each layer, or of the model, drawn with `seed`; the same for every prompt |
| `top`            | the `count` strongest of each prompt, or over the whole data set |
| `list`           | those given as (layer, index) pairs, inline or in a file with the columns `layer` and `neuron` |

A neuron's strength on a prompt is its largest |NeurGrad| over the prompt's targets, because all targets share the same
interventions; over a data set it is the sum of that. Among equals the lower layer and index comes first.

A sample per layer does not depend on which other layers are chosen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neg_service.config import NeuronsConfig, checked_layers
from neg_service.errors import ConfigurationError, shortened

CHOOSE = ("all", "sample", "top", "list")
Neurons = NDArray[np.int64]


def check_choice(config: NeuronsConfig, n_layers: int, n_neurons: int) -> None:
    """Refuse a choice that the model cannot give.

    Raises:
        ConfigurationError: unknown words, an empty choice, more neurons than there are, one that does not exist.
    """
    layers = checked_layers(config, n_layers)
    for key, value, known in (
        ("choose", config.choose, CHOOSE),
        ("per", config.per, ("layer", "model")),
        ("over", config.over, ("prompt", "dataset")),
    ):
        if value not in known:
            raise ConfigurationError(setting=f"neurons.{key}", value=value, allowed=f"one of {', '.join(known)}")
    if config.seed < 0:
        raise ConfigurationError(setting="neurons.seed", value=config.seed, allowed="0 or more")
    if config.choose in ("sample", "top"):
        is_of_layer = config.choose == "sample" and config.per == "layer"
        most, of = (n_neurons, "a layer") if is_of_layer else (n_neurons * len(layers), "the chosen layers")
        if not 1 <= config.count <= most:
            raise ConfigurationError(
                f"the choice must be from 1 to {most}, the neurons of {of}", setting="neurons.count", value=config.count
            )
    if config.choose == "list":
        _listed(config, n_layers, n_neurons)


def check_whole_layers(config: NeuronsConfig, measure: str) -> None:
    """Refuse a choice of single neurons for a measure that has all of a layer's at once."""
    if config.choose != "all":
        raise ConfigurationError(
            f"is for measure=sweep; measure={measure} takes neurons=all", setting="neurons.choose", value=config.choose
        )


def chosen_neurons(config: NeuronsConfig, n_layers: int, n_neurons: int) -> Neurons:
    """The choice as [n, 2], ordered by layer and index; not for `top`, which depends on the prompts."""
    layers = checked_layers(config, n_layers)
    if config.choose == "list":
        return _listed(config, n_layers, n_neurons)
    if config.choose == "sample" and config.per == "model":
        flat = np.random.default_rng(config.seed).choice(len(layers) * n_neurons, config.count, replace=False)
        return _pairs(layers, np.sort(flat), n_neurons)
    own = np.arange(n_neurons)
    rows = []
    for layer in layers:
        if config.choose == "sample":
            own = np.sort(np.random.default_rng([config.seed, layer]).choice(n_neurons, config.count, replace=False))
        rows.append(np.stack([np.full(len(own), layer), own], 1))
    return np.concatenate(rows)


def strongest_neurons(layers: Sequence[int], strength_ln: NDArray[Any], count: int) -> Neurons:
    """The `count` strongest neurons as [n, 2], ordered by layer and index; `strength_ln` is of the layers given."""
    order = np.argsort(-strength_ln.ravel(), kind="stable")[:count]
    return _pairs(layers, np.sort(order), strength_ln.shape[1])


def count_of(config: NeuronsConfig, n_layers: int, n_neurons: int) -> int:
    """How many neurons the choice has, of each prompt."""
    return config.count if config.choose == "top" else len(chosen_neurons(config, n_layers, n_neurons))


def layers_of(config: NeuronsConfig, n_layers: int) -> list[int]:
    """The layers in which chosen neurons can be."""
    if config.choose == "list":
        return sorted({int(layer) for layer, _ in config.list})
    return checked_layers(config, n_layers)


def identity_of_choice(config: NeuronsConfig, n_layers: int) -> dict[str, Any]:
    """What of the choice decides the numbers; part of a run's identity."""
    identity: dict[str, Any] = {"layers": layers_of(config, n_layers)}
    if config.choose == "sample":
        identity |= {"choose": "sample", "count": config.count, "per": config.per, "seed": config.seed}
    elif config.choose == "top":
        identity |= {"choose": "top", "count": config.count, "over": config.over}
    elif config.choose == "list":
        pairs = sorted([int(layer), int(index)] for layer, index in config.list)
        sha = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
        identity |= {"choose": "list", "count": len(pairs), "sha256": sha}
    return identity


def described(config: NeuronsConfig, n_layers: int, n_neurons: int) -> str:
    """For a person: for example `900 in 30 layers: 30 of each layer, seed 0`."""
    how = {
        "all": "",
        "sample": f": {config.count} of {'each layer' if config.per == 'layer' else 'them all'}, seed {config.seed}",
        "top": f": the strongest {'of each prompt' if config.over == 'prompt' else 'over the data set'}",
        "list": ": as listed",
    }
    layers = layers_of(config, n_layers)
    of_layers = f"{len(layers)} layer{'s' * (len(layers) > 1)}"
    return f"{count_of(config, n_layers, n_neurons)} in {of_layers}{how[config.choose]}"


def with_list_read(config: NeuronsConfig) -> NeuronsConfig:
    """The same choice, with the pairs of a list's file in the place of its name.

    Raises:
        ConfigurationError: see `pairs_in`.
    """
    if config.choose != "list" or not isinstance(config.list, str):
        return config
    # What reads any address takes long to import, and most choices read none.
    from neg_service.measures.lists import pairs_in

    return replace(config, list=pairs_in(config.list))


def checked_neurons(neurons: Sequence[Sequence[int]], n_layers: int, n_neurons: int) -> Neurons:
    """(layer, index) pairs as an array [n, 2].

    Raises:
        ConfigurationError: none, or one that does not exist.
    """
    try:
        chosen = np.asarray(neurons)
    except (ValueError, RecursionError):
        chosen = np.empty(1)
    if chosen.size == 0:
        raise ConfigurationError("the choice is empty; at least one neuron is needed", setting="neurons")
    # Beyond 64 bits numbers are objects, of which none exists; true and false would become 1 and 0.
    is_whole = np.issubdtype(chosen.dtype, np.integer) or all(type(value) is int for value in chosen.flat)
    if chosen.ndim != 2 or chosen.shape[1] != 2 or not is_whole or _has_truth_value(neurons):
        raise ConfigurationError(
            setting="neurons", allowed=f"a list of (layer, index) pairs of whole numbers, not {shortened(neurons)}"
        )
    exists = ((chosen >= 0) & (chosen < [n_layers, n_neurons])).all(1)
    if not exists.all():
        layer, index = map(int, chosen[exists.argmin()])
        raise ConfigurationError(
            f"{shortened((layer, index))} does not exist; the model has layers 0 to {n_layers - 1} and neurons 0 "
            f"to {n_neurons - 1}",
            setting="neurons",
        )
    return chosen.astype(np.int64)


def _has_truth_value(neurons: Any) -> bool:
    return not isinstance(neurons, np.ndarray) and any(
        isinstance(value, bool | np.bool_) for pair in neurons if isinstance(pair, list | tuple) for value in pair
    )


def _listed(config: NeuronsConfig, n_layers: int, n_neurons: int) -> Neurons:
    if not isinstance(config.list, list):
        raise ConfigurationError(
            setting="neurons.list", value=config.list, allowed="a list of [layer, index] pairs, or a file"
        )
    chosen = checked_neurons(config.list, n_layers, n_neurons)
    values, counts = np.unique(chosen, axis=0, return_counts=True)
    if counts.max() > 1:
        raise ConfigurationError(f"{tuple(values[counts.argmax()].tolist())} is given twice", setting="neurons.list")
    outside = set(values[:, 0].tolist()) - set(checked_layers(config, n_layers))
    if outside:
        raise ConfigurationError(
            f"has neurons of layer {min(outside)}, which neurons.layers={config.layers} leaves out",
            setting="neurons.list",
        )
    return values


def _pairs(layers: Sequence[int], flat: NDArray[np.int64], n_neurons: int) -> Neurons:
    return np.stack([np.asarray(layers)[flat // n_neurons], flat % n_neurons], 1)
