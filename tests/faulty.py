"""Workers that fail on purpose, and need no torch: their replicas start in a second."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import ray

from neg_service.cluster import metrics
from neg_service.cluster.messages import Shard, WorkerInfo
from neg_service.errors import ModelError, NonFiniteError


class NeedsMore(Exception):
    """Cannot be unpickled."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def _holds_a_lock() -> Exception:
    return ValueError("locked", threading.Lock())


def _local() -> Exception:
    class Local(Exception):
        """Of a class that no other process has, and that breaks when it is read."""

        def __reduce__(self) -> Any:
            return os.listdir, ("/a folder that is nowhere",)

    return Local("from nowhere")


ODD: list[Callable[[], BaseException]] = [
    lambda: NeedsMore(1, 2),
    _holds_a_lock,
    _local,
    lambda: ray.exceptions.TaskCancelledError(),
    lambda: CancelledError("given up"),
    lambda: SystemExit(3),
    lambda: ValueError("x" * 10**8),
    lambda: ray.exceptions.NodeDiedError("somebody else's"),
]


@dataclass
class FaultyWorker:
    """A worker whose shards do as told: `fails`, `kills` and `hangs` name shards; `once` is a folder for marks.

    A fault named in `once` happens the first time only, over all replicas. `odd` shards raise what a driver cannot
    read, one kind a shard. `calibrates` says what happens when it is asked to: it is known by its process, `kill` and
    `fail` happen in the first one that is asked.
    """

    fails: frozenset[int] = frozenset()
    not_finite: frozenset[int] = frozenset()
    kills: frozenset[int] = frozenset()
    hangs: frozenset[int] = frozenset()
    start_error: str = ""
    odd: bool = False
    calibrates: str = ""
    once: str = ""
    seconds: float = 0.0
    made_by: int = field(default_factory=os.getpid)

    def __call__(self) -> FaultyWorker:
        """As a factory, it makes itself."""
        return self

    def start(self) -> WorkerInfo:
        """Ready at once, or never."""
        if self.start_error == "kill":
            os.kill(os.getpid(), 9)
        if self.start_error:
            raise ModelError(self.start_error)
        return WorkerInfo("nothing")

    def calibrate(self) -> dict[str, Any]:
        """What differs between processes."""
        if self.calibrates in ("kill", "fail") and self._is_due(-1):
            if self.calibrates == "kill":
                os.kill(os.getpid(), 9)
            raise NeedsMore(1, 2)
        return {"by": os.getpid()}

    def compute(
        self, shard: Shard, batch_scale: float, calibration: Mapping[str, Any] = MappingProxyType({})
    ) -> dict[str, pa.Table]:
        """Do what the shard's number asks for."""
        time.sleep(self.seconds)
        if self.odd and shard.index < len(ODD) and self._is_due(shard.index):
            raise ODD[shard.index]()
        if shard.index in self.not_finite:
            raise NonFiniteError(f"prompt of shard {shard.index}: NaN")
        if shard.index in self.fails and self._is_due(shard.index):
            raise OSError(f"shard {shard.index} fails")
        if shard.index in self.hangs and self._is_due(shard.index):
            time.sleep(600)
        if shard.index in self.kills and self._is_due(shard.index):
            os.kill(os.getpid(), 9)
        row = {"shard": shard.index, "batch_scale": batch_scale, "by": os.getpid(), "made_by": self.made_by}
        return {"rows": pa.Table.from_pylist([row | {"calibrated": calibration.get("by")}])}

    def _is_due(self, shard: int) -> bool:
        if not self.once:
            return True
        mark = Path(self.once) / f"shard-{shard}"
        if mark.exists():
            return False
        mark.touch()
        return True


class OftenHeardOf(FaultyWorker):
    """A worker whose replica tells twice a second how long it has waited for storage."""

    def start(self) -> WorkerInfo:
        """Ready at once."""
        metrics._REPEAT_SECONDS = 0.5
        return super().start()
