"""A shard swept without a cluster, for tests of what sweeps are made of."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from neg_service.config import NeuronsConfig
from neg_service.measures import measure_of
from neg_service.measures.base import Measure
from neg_service.models.batches import Budget
from neg_service.models.language_model import LanguageModel
from neg_service.prompts.prompt import Prompt
from tests.shards import INFO, measured_shard

PROMPTS = [
    Prompt("a", "w3 w14 w15 w9 w26 w5", (" w7", " w8", " w11"), 1),
    Prompt("b", "w3 w14 w15 w9 w2", (" w7", " w8"), None),
    Prompt("c", "w50 w51", (" w1",), 0),
]
SHIFTS = [-2.0, -0.5, 0.5, 2.0]


def swept(
    model: LanguageModel,
    neurons: NeuronsConfig,
    prompts: list[Prompt] = PROMPTS,
    sigma: float = 0.0,
    budget: Budget | None = None,
    **given: Any,
) -> dict[str, pa.Table]:
    """The tables of these prompts, as if the noise had been found to be `sigma`."""
    measure = sweep_of(**{"shifts": SHIFTS, **given})
    measure.validate(INFO, neurons, prompts)
    return measured_shard(measure, model, prompts, neurons, {"noise": {"sigma": sigma}}, budget)


def sweep_of(**given: Any) -> Measure[Any]:
    """The measure with these options, which is not validated yet."""
    return measure_of({"name": "sweep", **given})
