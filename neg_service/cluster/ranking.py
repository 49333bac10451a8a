"""Neurons that are the strongest over the data set: a scan of its own finds them before the scan that measures them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from neg_service.config import NeuronsConfig, ScanConfig
from neg_service.errors import ConfigurationError
from neg_service.measures.builtin.aggregate_importance import total
from neg_service.measures.choice import strongest_neurons
from neg_service.slots import Slots
from neg_service.storage.reader import open_run, reading


def needs_ranking(neurons: NeuronsConfig) -> bool:
    """Whether which neurons are measured follows from all prompts together."""
    return neurons.choose == "top" and neurons.over == "dataset"


def ranking_of(config: ScanConfig) -> ScanConfig:
    """The scan that finds the strongest neurons over the data set for another one: of what that one measures.

    Its basis, where neurons move, and what of a target is read, as far as its measure knows them.
    """
    name = None if config.job.name is None else f"{config.job.name}-aggregate_importance"
    shared = ("basis", "at", "readout", "against") if "readout" in config.measure else ("basis", "at")
    same = {key: config.measure[key] for key in shared if key in config.measure}
    return replace(
        config,
        measure={"name": "aggregate_importance", **same},
        neurons=NeuronsConfig(config.neurons.layers),
        job=replace(config.job, name=name, shard_size="auto", resume=None),
    )


def strongest(ranking_uri: str, config: ScanConfig) -> NeuronsConfig:
    """The neurons that a finished ranking finds for a scan, as a list; its parts are read one after the other.

    Raises:
        StorageError: a part cannot be read.
        ConfigurationError: no neuron has any importance, so that none is the strongest.
    """
    run = open_run(ranking_uri, config.storage.endpoint_url)
    with reading(run):
        importance = total(part.to_table() for _, part in run.parts("aggregate_importance"))
    keys = np.array(list(importance), np.int64)
    slots = Slots(keys[:, 0], keys[:, 1], np.array(list(map(len, importance.values()))))
    importance_m = np.concatenate(list(importance.values()))
    if not importance_m.any():
        raise ConfigurationError(
            f"in the ranking {ranking_uri} no neuron has any influence that float32 holds: choose neurons otherwise, "
            "or use measure.readout=log_probability, which keeps what improbable targets lose",
            setting="neurons.over",
            value="dataset",
        )
    found = strongest_neurons(slots, importance_m, config.neurons.count)
    return NeuronsConfig(config.neurons.layers, choose="list", list=replace(found, source=ranking_uri))
