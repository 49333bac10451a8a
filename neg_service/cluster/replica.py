"""A replica: an actor that owns one model, computes shards, puts their parts itself, and returns small receipts.

Results never pass through the driver or Ray's object store. The actor runs two calls at once, so that while one
shard's parts are put the next is computed. All computing happens in one thread of its own: OpenMP keeps a pool of
threads for each thread that computes, and when the pools together have more threads than there are processors it puts
them to sleep at every barrier, which made a scan a third slower. What is computed is a `Worker`'s business.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

from neg_service.cluster.plan import Shard
from neg_service.config import ScanConfig, typed
from neg_service.errors import ModelError
from neg_service.measures import find_measure
from neg_service.measures.batching import default_batch_tokens
from neg_service.models.batches import Budget
from neg_service.models.language_model import LanguageModel, load_model, set_threads
from neg_service.prompts.prompt import EncodedPrompt, Prompt, encode
from neg_service.storage.objects import open_store
from neg_service.storage.parts import encode_part, part_key

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ready:
    """What a worker says when it is ready: what it runs on, and what it found out about its own precision."""

    runs_on: str
    calibration: dict[str, Any] = field(default_factory=dict)


class Worker(Protocol):
    """What a replica runs."""

    def start(self) -> Ready:
        """Get ready, once."""
        ...

    def compute(self, shard: Shard, batch_scale: float) -> dict[str, pa.Table]:
        """A shard's tables, in the order in which they are put; `batch_scale` shrinks batches after failures."""
        ...


@dataclass(frozen=True)
class Destination:
    """Where parts go."""

    uri: str
    endpoint_url: str | None
    fingerprint: str


@dataclass(frozen=True)
class Hello:
    """A replica that is ready."""

    pid: int
    node: str
    ready: Ready


@dataclass(frozen=True)
class Receipt:
    """A shard that is done: all its parts are stored."""

    shard: int
    n_prompts: int
    bytes: dict[str, int] = field(default_factory=dict)


class Replica:
    """Runs as a Ray actor; a plain class, so that tests need no cluster."""

    def __init__(self, make_worker: Callable[[], Worker], destination: Destination | None) -> None:
        """Cheap: the model is loaded in `start`, where an error reaches the driver as itself."""
        self._make_worker = make_worker
        self._destination = destination
        self._computing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")

    def start(self) -> Hello:
        """Load and check the model; from here on, what this process logs reaches the driver's stderr by Ray."""
        logging.basicConfig(format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S")
        logging.getLogger("neg_service").setLevel(logging.INFO)
        self._store = open_store(self._destination.uri, self._destination.endpoint_url) if self._destination else None
        self._worker = self._make_worker()
        return Hello(os.getpid(), socket.gethostname(), self._computing.submit(self._worker.start).result())

    def run(self, shard: Shard, batch_scale: float = 1.0) -> Receipt:
        """Compute a shard and put its parts, the last table's last: that one is the commit."""
        tables = self._computing.submit(self._worker.compute, shard, batch_scale).result()
        sizes = {}
        for name, table in tables.items():
            assert self._store is not None
            assert self._destination is not None
            data = encode_part(table, self._destination.fingerprint, shard.index)
            self._store.put(part_key(name, shard.index), data)
            sizes[name] = len(data)
        return Receipt(shard.index, len(shard.prompts), sizes)


class ScanWorker:
    """Runs a measure on a language model."""

    def __init__(
        self,
        config: ScanConfig,
        identity: str,
        threads: int,
        samples: Sequence[Prompt] = (),
        calibration: dict[str, Any] | None = None,
    ) -> None:
        """`identity` is the model that the run was planned for; another one is refused.

        The measure is calibrated on `samples`, unless the run was before: then with that `calibration`.
        """
        self._config = config
        self._identity = identity
        self._threads = threads
        self._samples = samples
        self._calibration = calibration
        self._measure = find_measure(config.measure["name"])
        self._options = typed(self._measure.Options, config.measure, "measure")

    def start(self) -> Ready:
        """Load the model, check that it is the planned one, let it check itself, and calibrate the measure."""
        set_threads(self._threads)
        asked = self._config.model
        self._model: LanguageModel = load_model(
            asked.source,
            revision=asked.revision,
            dtype=asked.dtype,
            device=asked.device,
            trust_remote_code=asked.trust_remote_code,
        )
        if self._model.identity != self._identity:
            raise ModelError(
                f"model.source={asked.source} is {self._model.identity} on {socket.gethostname()}, but the run was "
                f"planned for {self._identity}: put the same files on every node"
            )
        checked = self._model.ensure_checked()
        log.debug("self-check passed: %s", checked)
        batch_tokens = self._config.cluster.batch_tokens
        self._budget = Budget(default_batch_tokens(self._model) if batch_tokens == "auto" else int(batch_tokens))
        if self._calibration is None:
            samples, neurons = self._encoded(self._samples), self._config.neurons
            self._calibration = self._measure.calibrate(self._model, samples, self._options, neurons)
        return Ready(f"{self._model.device}, {self._threads} threads", self._calibration)

    def compute(self, shard: Shard, batch_scale: float) -> dict[str, pa.Table]:
        """Encode and measure a shard."""
        prompts = self._encoded(shard.prompts)
        # A shard that failed for memory runs in small batches without making all later ones small.
        budget = self._budget
        if batch_scale != 1:
            budget = Budget(max(1, int(budget.tokens * batch_scale)), budget.scale * batch_scale)
        neurons, calibration = self._config.neurons, self._calibration or {}
        return self._measure.measure(self._model, prompts, self._options, neurons, budget, calibration)

    def _encoded(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        model = self._model
        return list(encode(model.tokenizer, prompts, model.context_length, model.mask_token))
