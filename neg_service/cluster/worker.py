"""What runs inside a replica: a measure on a language model.

Apart from `replica.py`, so that the module of the actor does not import torch: Ray imports the actor's class and what
it is made with in two threads at once, and two threads that import torch at once find it half initialised.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from neg_service.batch_size import batch_size
from neg_service.cluster.messages import Shard, WorkerInfo, WorkerSpec
from neg_service.errors import ModelError
from neg_service.measures import measure_of
from neg_service.measures.base import ShardInput
from neg_service.measures.batching import bytes_of_tokens
from neg_service.models.batches import Budget
from neg_service.models.language_model import LanguageModel
from neg_service.models.loading import loaded, set_threads
from neg_service.models.placement import processor_name
from neg_service.models.room import auto_batch_bytes

log = logging.getLogger(__name__)

_PRODUCT = "cpu_product"


class ScanWorker:
    """Runs a measure on a language model."""

    def __init__(self, spec: WorkerSpec) -> None:
        """Cheap."""
        self._config = spec.config
        self._identity = spec.identity
        self._threads = spec.threads
        self._samples = spec.samples
        self._measure = measure_of(spec.config.measure)

    def start(self) -> WorkerInfo:
        """Load the model, check that it is the planned one, and let it check itself."""
        set_threads(self._threads)
        began = time.monotonic()
        self._model: LanguageModel = loaded(self._config.model)
        log.info("loaded %s in %.1f s; checking that the engine fits it", self._model.name, time.monotonic() - began)
        if self._model.identity != self._identity:
            raise ModelError(
                f"is {self._model.identity} on {socket.gethostname()}, but the run was planned for {self._identity}: "
                "put the same files on every node",
                setting="model.source",
                value=self._config.model.source,
            )
        # Code of somebody's own may have changed what no file of ours shows.
        is_own = type(self._measure).__module__.startswith("neg_service.")
        if self._config.model.self_check == "remembered" and is_own:
            self._model.remember_checks()
        chosen = self._model.ensure_checked()
        log.info(
            "self-check passed, engine %s, row logits %.0e off the plain pass", chosen.engine.name, chosen.check.logits
        )
        self._measure.budget = self._budget = Budget(self._batch_bytes())
        log.info("a batch takes up to %.0f MiB of memory", self._budget.bytes / 2**20)
        devices = ", ".join(f"{device} ({processor_name(device)})" for device in self._model.devices)
        product = self._model.cpu_product
        made = self._model.dequantised
        return WorkerInfo(
            f"{devices}, {self._threads} threads",
            chosen.engine.name,
            None if product is None else product.as_dict(),
            None if made is None else asdict(made),
        )

    def _batch_bytes(self) -> int:
        asked, gpus = batch_size(self._config), self._config.cluster.gpus_per_replica
        if asked.value is None:
            return auto_batch_bytes(self._model, 1 if gpus == "auto" else gpus or 1)
        return bytes_of_tokens(self._model, asked.value) if asked.unit == "tokens" else asked.value

    def calibrate(self) -> dict[str, Any]:
        """Calibrate the measure on the samples, and say with which product, where it is not PyTorch's own."""
        found = self._measure.calibrate(self._model, self._samples, self._config.neurons)
        product = self._model.cpu_product
        return {**found, _PRODUCT: product.name} if found and product and product.name != "torch" else found

    def compute(
        self, shard: Shard, batch_scale: float, calibration: Mapping[str, Any] = MappingProxyType({})
    ) -> dict[str, pa.Table]:
        """Measure a shard."""
        # A shard that failed for memory runs in small batches without making all later ones small.
        if calibration:
            # Products differ in their rounding: what was found of one's noise holds for that one.
            self._model.use_product(calibration.get(_PRODUCT, "torch"))
        budget = self._budget if batch_scale == 1 else self._budget.scaled(batch_scale)
        neurons = shard.neurons or self._config.neurons
        shard_input = ShardInput(self._model, shard.prompts, neurons=neurons, budget=budget, calibration=calibration)
        return self._measure.tables_of(shard_input)
