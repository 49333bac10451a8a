"""Neurons that are the strongest over the data set: a scan of its own finds them before the scan that measures them."""

from __future__ import annotations

from dataclasses import replace

from neg_service.config import NeuronsConfig, ScanConfig
from neg_service.measures.builtin.aggregate_importance import total
from neg_service.measures.choice import strongest_neurons
from neg_service.storage.reader import open_run


def needs_ranking(neurons: NeuronsConfig) -> bool:
    """Whether which neurons are measured follows from all prompts together."""
    return neurons.choose == "top" and neurons.over == "dataset"


def ranking_of(config: ScanConfig) -> ScanConfig:
    """The scan that finds the strongest neurons over the data set for another one, in its basis if it has one."""
    name = None if config.job.name is None else f"{config.job.name}-aggregate_importance"
    basis = {key: value for key, value in config.measure.items() if key == "basis"}
    return replace(
        config,
        measure={"name": "aggregate_importance", **basis},
        neurons=NeuronsConfig(config.neurons.layers),
        job=replace(config.job, name=name, shard_size="auto", resume=None),
    )


def strongest(ranking_uri: str, config: ScanConfig) -> NeuronsConfig:
    """The neurons that a finished ranking finds for a scan, as a list."""
    strength = open_run(ranking_uri, config.storage.endpoint_url).table("aggregate_importance").to_table()
    found = strongest_neurons(*total(strength), config.neurons.count)
    return NeuronsConfig(config.neurons.layers, choose="list", list=replace(found, source=ranking_uri))
