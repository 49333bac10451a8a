"""Workers that fail on purpose, and need no torch: their replicas start in a second."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from neg_service.cluster.plan import Shard
from neg_service.cluster.replica import Ready
from neg_service.errors import ModelError, NonFiniteError


@dataclass
class FaultyWorker:
    """A worker whose shards do as told: `fails`, `kills` and `hangs` name shards; `once` is a folder for marks.

    A fault named in `once` happens the first time only, over all replicas.
    """

    fails: frozenset[int] = frozenset()
    not_finite: frozenset[int] = frozenset()
    kills: frozenset[int] = frozenset()
    hangs: frozenset[int] = frozenset()
    start_error: str = ""
    once: str = ""
    seconds: float = 0.0

    def __call__(self) -> FaultyWorker:
        """As a factory, it makes itself."""
        return self

    def start(self) -> Ready:
        """Ready at once, or never."""
        if self.start_error == "kill":
            os.kill(os.getpid(), 9)
        if self.start_error:
            raise ModelError(self.start_error)
        return Ready("nothing")

    def compute(self, shard: Shard, batch_scale: float) -> dict[str, pa.Table]:
        """Do what the shard's number asks for."""
        time.sleep(self.seconds)
        if shard.index in self.not_finite:
            raise NonFiniteError(f"prompt of shard {shard.index}: NaN")
        if shard.index in self.fails and self._is_due(shard.index):
            raise OSError(f"shard {shard.index} fails")
        if shard.index in self.hangs and self._is_due(shard.index):
            time.sleep(600)
        if shard.index in self.kills and self._is_due(shard.index):
            os.kill(os.getpid(), 9)
        return {"rows": pa.table({"shard": [shard.index], "batch_scale": [batch_scale]})}

    def _is_due(self, shard: int) -> bool:
        if not self.once:
            return True
        mark = Path(self.once) / f"shard-{shard}"
        if mark.exists():
            return False
        mark.touch()
        return True
