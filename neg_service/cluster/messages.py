"""What the driver and its replicas send each other, and what a replica is told when it is launched.

Plain data, small, pickled by Ray: prompts go out, what became of them comes back, tables travel in neither direction.
This module imports nothing else of the cluster, and neither Ray nor torch, so that every other one may import it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from neg_service.config import NeuronsConfig, ScanConfig
from neg_service.prompts.prompt import EncodedPrompt


@dataclass(frozen=True)
class Shard:
    """A fixed, ordered slice of the prompts with their tokens: the unit of work, of retries and of storage.

    neurons: in the place of those of the run, where only a sample of them is to be measured.
    """

    index: int
    prompts: tuple[EncodedPrompt, ...]
    neurons: NeuronsConfig | None = None


@dataclass(frozen=True)
class ShardResult:
    """A shard that is done: all its parts are stored.

    bytes: of each table's part. waited_seconds: how long, since the last result, this replica computed nothing because
    parts were being put. seconds: from when the shard was asked for to when it was stored, the wait for the shard
    before it included. computed_seconds: of these, how long it was computed.
    """

    shard: int
    n_prompts: int
    bytes: dict[str, int] = field(default_factory=dict)
    waited_seconds: float = 0.0
    seconds: float = 0.0
    computed_seconds: float = 0.0


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker is made from, see `worker.py`.

    identity: of the model that the run was planned for; another one is refused. samples: on which the measure is
    calibrated, by whichever replica is asked to.
    """

    config: ScanConfig
    identity: str
    threads: int
    samples: Sequence[EncodedPrompt] = ()


@dataclass(frozen=True)
class WorkerInfo:
    """What a worker says when it is ready: what it runs on, and what it found out about its model.

    engine: how the model's rows are run, see `models/engines/`. cpu_product: what multiplies its matrices and what that
    gains, see `models/cpu_product.py`; None where there is no choice. dequantised: what its weights were made from, if
    quantised, see `models/quantized.py`.
    """

    runs_on: str
    engine: str = ""
    cpu_product: Mapping[str, Any] | None = None
    dequantised: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class ReplicaInfo:
    """A replica that is ready: its process, its host, and what its worker says."""

    pid: int
    node: str
    worker: WorkerInfo


@dataclass(frozen=True)
class Destination:
    """Where parts go, and for how many seconds an operation of a store that does not answer is repeated."""

    uri: str
    endpoint_url: str | None
    fingerprint: str
    retry_timeout: float = 0


@dataclass(frozen=True)
class LogStyle:
    """How a replica logs (see `logs.py`), and what it is called there."""

    style: str = "text"
    run: str = ""
    replica: int | None = None
