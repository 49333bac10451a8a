"""What the driver tells of a run while it goes, in one place: progress for a person, metrics, and the run's own notes.

`Observer` hears and does nothing; a benchmark or a test takes what it wants to hear. `RunObserver` is that of a scan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from neg_service.cluster.failures import Action
from neg_service.cluster.messages import ReplicaInfo, Shard, ShardResult
from neg_service.cluster.metrics import Counts, RunMetrics
from neg_service.cluster.progress import Progress
from neg_service.storage.run import RunDirectory, calibration_of, note


class Observer:
    """Hears what becomes of a run."""

    def replica_ready(self, info: ReplicaInfo) -> None:
        """A replica has started."""

    def calibrated(self, found: dict[str, Any]) -> dict[str, Any]:
        """What the first replica has found out for all shards; gives what they are to be told, by default just that."""
        return found

    def shard_done(self, result: ShardResult) -> None:
        """All parts of a shard are stored."""

    def shard_undone(self, action: Action) -> None:
        """A shard came back undone, and this is done about it."""

    def shard_quarantined(self, shard: Shard, error: str, failures: int) -> None:
        """A shard is given up."""

    def counted(self, counts: Counts) -> None:
        """How things are, about once a second."""


class RunNotes:
    """What replicas find out about a run, kept in its run.json beside its identity."""

    def __init__(self, directory: RunDirectory, begin: Callable[[], object]) -> None:
        """`begin` writes run.json where there is none, or sees that it is that of this very run."""
        self.found: dict[str, Any] = {}
        self._store = directory.store
        self._begin = begin

    def add(self, **found: Any) -> None:
        """To be kept."""
        self.found.update(found)

    def keep(self) -> None:
        """Write them; what is there already stays."""
        note(self._store, self.found)

    def agree_on_calibration(self, calibration: dict[str, Any]) -> dict[str, Any]:
        """Keep a calibration, or give the one that another driver of the same run has kept before."""
        # Another driver, which was refused, may have taken run.json with it; no shard is put before it says this.
        self._begin()
        note(self._store, {**self.found, "calibration": calibration})
        kept = calibration_of(self._store)
        agreed = calibration if kept is None else kept
        self.add(calibration=agreed)
        return agreed


class RunObserver(Observer):
    """Tells a person, an operator, and the run itself."""

    def __init__(
        self,
        directory: RunDirectory,
        notes: RunNotes,
        progress: Progress,
        metrics: RunMetrics,
        calibration: dict[str, Any] | None,
    ) -> None:
        """`calibration` is the run's, where it is known already."""
        self.progress = progress
        self._directory, self._notes, self._metrics = directory, notes, metrics
        self._calibration = calibration
        self._is_first = True

    @contextmanager
    def until_end(self) -> Iterator[None]:
        """While the driver runs; see `RunMetrics.until_end`."""
        try:
            with self._metrics.until_end():
                yield
        finally:
            self.progress.close()

    def replica_ready(self, info: ReplicaInfo) -> None:
        """The first one says what the run runs on; where nothing is to be calibrated, work begins now."""
        if not self._is_first:
            return
        self._is_first = False
        self._notes.add(engine=info.worker.engine, runs_on=info.worker.runs_on)
        if info.worker.cpu_product is not None:
            self._notes.add(cpu_product=dict(info.worker.cpu_product))
        if info.worker.dequantised is not None:
            # The plan of a checkpoint whose files are not on the driver's machine does not know how many tensors.
            self._notes.add(dequantised=dict(info.worker.dequantised))
        if self._calibration is not None:
            self._notes.add(calibration=self._calibration)
            with self._metrics.waits():
                self._notes.keep()
            self.progress.start()

    def calibrated(self, found: dict[str, Any]) -> dict[str, Any]:
        """Keep it with the run before any shard is; another driver of the run may have been first."""
        with self._metrics.waits():
            agreed = self._notes.agree_on_calibration(found)
        self.progress.start()
        return agreed

    def shard_done(self, result: ShardResult) -> None:
        """Count it."""
        self.progress.add(result)
        self._metrics.add(result)

    def shard_undone(self, action: Action) -> None:
        """Count it."""
        self._metrics.failed(action)

    def shard_quarantined(self, shard: Shard, error: str, failures: int) -> None:
        """Keep why."""
        with self._metrics.waits():
            self._directory.record_failure(shard.index, error, failures)

    def counted(self, counts: Counts) -> None:
        """Show them."""
        self._metrics.show(counts, self.progress.seconds_left)
