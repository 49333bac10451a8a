"""A shard measured without a cluster, for tests of measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from neg_service.config import NeuronsConfig
from neg_service.measures.base import Measure, ShardInput
from neg_service.models.batches import Budget
from neg_service.models.inspection import ModelInfo
from neg_service.models.language_model import LanguageModel
from neg_service.prompts.prompt import Prompt
from neg_service.prompts.tokens import encode

# What shards are measured of, and the model that they are planned for.
PROMPTS = [
    Prompt("a", "w3 w14 w15 w9 w26 w5", (" w7", " w8", " w11"), 1),
    Prompt("b", "w3 w14 w15 w9 w2", (" w7", " w8"), 0),
    Prompt("c", "w50 w51", (" w1",), 0),
]
INFO = ModelInfo("tiny", "sha256:0", "LlamaForCausalLM", 3, 40, 64, 1, is_gated=True, is_masked=False, row_values=1000)


def measured_shard(
    measure: Measure[Any],
    model: LanguageModel,
    prompts: Sequence[Prompt],
    neurons: NeuronsConfig | None = None,
    calibration: Mapping[str, Any] | None = None,
    budget: Budget | None = None,
    *,
    sequences: bool = False,
) -> dict[str, pa.Table]:
    """The tables of these prompts as one shard, which are those that the measure says."""
    encoded = list(encode(model.tokenizer, prompts, None, model.mask_token, sequences=sequences))
    shard = ShardInput(
        model, encoded, neurons or NeuronsConfig(), budget=budget or Budget(2**28), calibration=calibration or {}
    )
    found = measure.tables_of(shard)
    declared = measure.tables(model.feed_forward)
    assert list(found) == list(declared)
    assert {name: table.schema for name, table in found.items()} == {n: own.schema for n, own in declared.items()}
    return found
