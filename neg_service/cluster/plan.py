"""What will be done, before anything is: shards, bytes, memory, and the identity of the run.

Pure functions on plain data. The plan depends on the prompts, the measure, the model, and on whether replicas have an
accelerator, never on how many replicas there are, because the shard plan is part of the run's identity.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neg_service.batch_size import BatchSize
from neg_service.cluster.messages import Shard
from neg_service.config import ModelConfig, ScanConfig
from neg_service.memory import OLD_TOKENS, busy_bytes
from neg_service.prompts.prompt import EncodedPrompt, Prompt, digest
from neg_service.prompts.sources import dataset_name
from neg_service.schema import SCHEMA_VERSION

# The module of the actor knows shards, and must not import torch; see `worker.py`.
if TYPE_CHECKING:
    from neg_service.measures.base import Cost
    from neg_service.models.inspection import ModelInfo

_DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# Python, torch and Ray before any model is loaded; measured on Linux, in bytes.
_RUNTIME_BYTES = 600 * 2**20


@dataclass(frozen=True)
class Plan:
    """How the prompts are cut, and what comes out of them; bytes are before compression.

    n_rows: how many rows run through layers in all: a branch a target, or an intervention each. rows_are: what a person
    calls them. first_shard: the number of the first shard, behind those of the run that is extended.
    """

    n_prompts: int
    n_targets: int
    shard_size: int
    n_shards: int
    bytes_of_table: dict[str, int]
    n_rows: int
    rows_are: str = "gradients"
    first_shard: int = 0

    @property
    def shards(self) -> range:
        """The numbers of the shards."""
        return range(self.first_shard, self.first_shard + self.n_shards)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tables."""
        return sum(self.bytes_of_table.values())

    def places_of(self, shard: int) -> range:
        """The places of a shard's prompts among all."""
        start = (shard - self.first_shard) * self.shard_size
        return range(start, min(start + self.shard_size, self.n_prompts))


def make_plan(prompts: Sequence[Prompt], cost_a_prompt: Cost, shard_size: int, first_shard: int = 0) -> Plan:
    """Cut the prompts into shards; how large `auto` is, says `shard_size.py`."""
    n_prompts = len(prompts)
    return Plan(
        n_prompts=n_prompts,
        n_targets=sum(len(prompt.targets) for prompt in prompts),
        shard_size=shard_size,
        n_shards=-(-n_prompts // shard_size),
        bytes_of_table={table: size * n_prompts for table, size in cost_a_prompt.bytes.items()},
        n_rows=round(cost_a_prompt.rows * n_prompts),
        rows_are=cost_a_prompt.rows_are,
        first_shard=first_shard,
    )


def shards_of(prompts: Sequence[EncodedPrompt], plan: Plan, done: Iterable[int] = ()) -> Iterator[Shard]:
    """The shards that are not done, in order, made one at a time."""
    skip = frozenset(done)
    for index in plan.shards:
        if index not in skip:
            places = plan.places_of(index)
            yield Shard(index, tuple(prompts[places.start : places.stop]))


def identity_of(
    config: ScanConfig,
    info: ModelInfo,
    measure: dict[str, Any],
    prompts: Sequence[Prompt],
    plan: Plan,
    source: dict[str, Any] | None = None,
    extends: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that decides the numbers, and nothing else; what a run's fingerprint is made of.

    source: of prompts, what more is to be known of where they come from. `prompts` are all; where a run is extended,
    `extends` says which, and the plan is of the others.
    """
    from neg_service.measures.choice import identity_of_choice

    return {
        "schema_version": SCHEMA_VERSION,
        "model": {"identity": info.identity, "dtype": config.model.dtype, **_engine_settings(config.model)},
        "prompts": {"sha256": digest(prompts), "count": len(prompts), **(source or {})},
        "measure": measure,
        "neurons": identity_of_choice(config.neurons, info.n_layers),
        "plan": {"shard_size": plan.shard_size, "shards": plan.shards.stop},
        **({} if extends is None else {"extends": extends}),
    }


def _engine_settings(model: ModelConfig) -> dict[str, str]:
    """What was asked for beside the usual: other engines, and other products, give other digits."""
    usual, names = ModelConfig(), ("engine", "products")
    return {name: getattr(model, name) for name in names if getattr(model, name) != getattr(usual, name)}


def run_name(config: ScanConfig, info: ModelInfo, measure: str) -> str:
    """What people see in front of the fingerprint."""
    return fit_for_a_name(config.job.name or f"{info.name}-{dataset_name(config.dataset)}-{measure.rsplit('.', 1)[-1]}")


def fit_for_a_name(text: str) -> str:
    """A text as a part of a path or key that every file system, server and label takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)


def replica_bytes(info: ModelInfo, dtype: str, plan: Plan, batch: BatchSize) -> int:
    """About what a replica on CPUs needs: weights, the runtime, a batch, and two shards' results.

    Beside the weights a fifth of them for loading, or what measuring noise holds in float64, whichever is larger: a
    layer, and pieces of the embeddings and the head (`models/precision.py`).
    """
    weights = info.n_parameters * _DTYPE_BYTES[dtype]
    # Where layers share weights, a token meets more of them than there are.
    of_layer = max(info.n_parameters, info.token_weights) // info.n_layers
    in_float64 = of_layer * _DTYPE_BYTES["float64"] + 2 * 2**28
    shard = plan.total_bytes // max(1, plan.n_shards)
    return weights + max(weights // 5, in_float64) + _RUNTIME_BYTES + batch_bytes(info, dtype, batch) + 4 * shard


def batch_bytes(info: ModelInfo, dtype: str, batch: BatchSize) -> int:
    """What the replica's budget will be, unless it finds less free (`models/room.py`)."""
    row = info.gradient_row_values * max(4, _DTYPE_BYTES[dtype])
    if batch.value is None:
        return busy_bytes(row)
    return batch.value * row // OLD_TOKENS if batch.unit == "tokens" else batch.value
