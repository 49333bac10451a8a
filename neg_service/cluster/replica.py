"""A replica: an actor that owns one model, computes shards, puts their parts itself, and says so in a few words.

Tables never pass through the driver or Ray's object store. The actor runs two shards at once, so that while one's
parts are put the next is computed. All computing happens in one thread of its own: OpenMP keeps a pool of
threads for each thread that computes, and when the pools together have more threads than there are processors it puts
them to sleep at every barrier, which made a scan a third slower. What is computed is a `Worker`'s business, which is
made in that thread, too.

A call whose answer was lost on the way is made again by the driver, and gets the same answer: nothing is computed twice
for that. A replica that the cluster counts as dead, because its driver is gone or gave it up, ends itself.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import pyarrow as pa
import ray

from neg_service.cluster.gcs import end_with_the_driver
from neg_service.cluster.logs import log_to_stderr, logging_shard
from neg_service.cluster.messages import Destination, LogStyle, ReplicaInfo, Shard, ShardResult, WorkerInfo, WorkerSpec
from neg_service.cluster.metrics import report_waiting
from neg_service.cluster.ray_errors import in_portable_errors
from neg_service.errors import ConfigurationError, ReplicaLost
from neg_service.storage.parts import encode_part, part_key
from neg_service.storage.stores import open_store

log = logging.getLogger(__name__)

# Of the actor: the driver alone restarts and repeats. Two shards at once, for each a call that waits for what was asked
# before already, of which there is one at most (see `_Answers`), and the questions where it is and what it is doing.
ACTOR_OPTIONS = {"max_restarts": 0, "max_task_retries": 0, "max_concurrency": 8}
_ANSWERS_KEPT = 4


class Worker(Protocol):
    """What a replica runs."""

    def start(self) -> WorkerInfo:
        """Get ready, once."""
        ...

    def calibrate(self) -> dict[str, Any]:
        """What the run has to find out before its first shard; one worker of a run is asked, if there is anything."""
        ...

    def compute(
        self, shard: Shard, batch_scale: float, calibration: Mapping[str, Any] = MappingProxyType({})
    ) -> dict[str, pa.Table]:
        """A shard's tables, in the order in which they are put; `batch_scale` shrinks batches after failures.

        `calibration` is the run's; where there is nothing to calibrate it is not given.
        """
        ...


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """For the first imports, none of which are garbage: looking for it takes a second, and once more later."""
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def scan_worker(spec: WorkerSpec) -> Worker:
    """The worker of a scan, with all that it imports: here, and not where the actor's class is imported; see there."""
    with _without_garbage_collection():
        from neg_service.cluster.worker import ScanWorker
    return ScanWorker(spec)


class Replica:
    """Runs as a Ray actor; a plain class, so that tests need no cluster."""

    def __init__(
        self, make_worker: Callable[[], Worker], destination: Destination | None, logs: LogStyle | None = None
    ) -> None:
        """Cheap: the model is loaded in `start`, where an error reaches the driver as itself.

        Without a destination parts are encoded, and their sizes told, but nothing is stored.
        """
        self._make_worker = make_worker
        self._destination = destination
        self._logs = logs or LogStyle()
        self._computing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")
        self._doing = _Doing()
        self._answers = _Answers()

    @in_portable_errors
    def where(self) -> str:
        """The id of its node, which it knows as soon as its process is up; asked again of one that was out of reach."""
        self._answers.once("watch", end_with_the_driver)
        node_id: str = ray.get_runtime_context().get_node_id()
        return node_id

    @in_portable_errors
    def start(self) -> ReplicaInfo:
        """Load and check the model; from here on, what this process logs reaches the driver's stderr by Ray."""
        info: ReplicaInfo = self._answers.once("start", self._start)
        return info

    @in_portable_errors
    def calibrate(self) -> dict[str, Any]:
        """What the run has to find out before its first shard, as run.json will keep it."""
        found: dict[str, Any] = self._answers.once("calibrate", self._calibrate)
        return found

    @in_portable_errors
    def run(
        self, shard: Shard, batch_scale: float = 1.0, calibration: Mapping[str, Any] = MappingProxyType({})
    ) -> ShardResult:
        """Compute a shard and put its parts, the last table's last: that one is the commit."""
        result: ShardResult = self._answers.once(
            (shard.index, batch_scale), lambda: self._run(shard, batch_scale, calibration)
        )
        return result

    @in_portable_errors
    def is_only_storing(self) -> bool:
        """Asked by the driver when nothing was heard for long: whether this replica waits for storage alone."""
        return self._doing.is_only_storing

    def _start(self) -> ReplicaInfo:
        log_to_stderr(self._logs.style, run=self._logs.run, replica=self._logs.replica)
        logging.getLogger().setLevel(logging.WARNING)
        logging.getLogger("neg_service").setLevel(logging.INFO)
        # Arrow's own allocator keeps tens of megabytes of what encoding a part took; the system's gives them back, and
        # encoding is as fast.
        pa.set_memory_pool(pa.system_memory_pool())
        if self._destination is not None:
            to = self._destination
            self._store = open_store(to.uri, to.endpoint_url, to.retry_timeout)
        if ray.is_initialized():
            report_waiting(self._logs.run, self._doing.waited_seconds)
        self._worker = self._computing.submit(self._make_worker).result()
        worker = self._computing.submit(self._worker.start).result()
        return ReplicaInfo(os.getpid(), socket.gethostname(), worker)

    def _calibrate(self) -> dict[str, Any]:
        found: object = self._computing.submit(self._worker.calibrate).result()
        # Of nothing the driver would think that it was not calibrated yet, and would ask for ever.
        if not isinstance(found, dict):
            raise ConfigurationError(
                f"the measure's calibrate gave {found!r:.100} in the place of a dictionary; {{}} where there is nothing"
            )
        try:
            # All replicas get what run.json gives back, also the one that found it out; NaN is no JSON.
            kept: dict[str, Any] = json.loads(json.dumps(found, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"the measure's calibrate gave what run.json cannot keep: {error}") from error
        return kept

    def _run(self, shard: Shard, batch_scale: float, calibration: Mapping[str, Any]) -> ShardResult:
        began = time.monotonic()
        tables, computed = self._computing.submit(self._compute, shard, batch_scale, calibration).result()
        sizes = {}
        with self._doing.one_more(storing=1), logging_shard(shard.index):
            for name in list(tables):
                # Taken out, so that a table that is stored takes no memory any more.
                table, to = tables.pop(name), self._destination
                data = encode_part(name, table, to.fingerprint if to else "", shard.index)
                del table
                if to is not None:
                    self._store.put(part_key(name, shard.index), data)
                sizes[name] = len(data)
                del data
        waited = self._doing.waited_since_last_asked()
        return ShardResult(shard.index, len(shard.prompts), sizes, waited, time.monotonic() - began, computed)

    def _compute(
        self, shard: Shard, batch_scale: float, calibration: Mapping[str, Any]
    ) -> tuple[dict[str, pa.Table], float]:
        began = time.monotonic()
        with self._doing.one_more(computing=1), logging_shard(shard.index):
            # A measure with nothing to calibrate is told nothing.
            tables = self._worker.compute(shard, batch_scale, *[calibration] * bool(calibration))
        return tables, time.monotonic() - began


@dataclass
class _Answer:
    """What was asked for, given or to come, and how often it was asked for again."""

    given: Future[Any] = field(default_factory=Future)
    asked_again: int = 0


class _Answers:
    """A call that is made again, since its answer was lost, waits for it or gets it, and nothing is done twice.

    It shows that the answers to those before are lost: they wait no longer, since each takes a thread of
    the actor, which must be able to say where it is however often a connection breaks within one long shard.

    Answers of the last few shards are kept, and no errors: what failed may be tried again.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._answers: dict[Hashable, _Answer] = {}

    def once(self, what: Hashable, work: Callable[[], Any]) -> Any:
        with self._changed:
            answer = self._answers.get(what)
            if answer is not None:
                return self._wait_for(answer)
            answer = self._answers[what] = _Answer()
        try:
            answer.given.set_result(work())
        except BaseException as error:
            answer.given.set_exception(error)
            with self._changed:
                del self._answers[what]
                self._changed.notify_all()
            raise
        self._forget_old()
        return answer.given.result()

    def _wait_for(self, answer: _Answer) -> Any:
        answer.asked_again += 1
        mine = answer.asked_again
        self._changed.notify_all()
        self._changed.wait_for(lambda: answer.given.done() or answer.asked_again > mine)
        if answer.given.done():
            return answer.given.result()
        raise ReplicaLost("the same was asked again meanwhile: this answer is lost")

    def _forget_old(self) -> None:
        with self._changed:
            self._changed.notify_all()
            # In the order in which they were asked for.
            shards = [what for what, one in self._answers.items() if isinstance(what, tuple) and one.given.done()]
            for what in shards[:-_ANSWERS_KEPT]:
                del self._answers[what]


class _Doing:
    """What the threads of a replica are doing, and for how long storage alone kept it busy."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._computing = self._storing = 0
        self._since = time.monotonic()
        self._waited = self._told = 0.0

    @property
    def is_only_storing(self) -> bool:
        return bool(self._storing and not self._computing)

    @contextmanager
    def one_more(self, *, computing: int = 0, storing: int = 0) -> Iterator[None]:
        self._change(computing, storing)
        try:
            yield
        finally:
            self._change(-computing, -storing)

    def waited_seconds(self) -> float:
        """Until now, also while it waits."""
        self._change(0, 0)
        return self._waited

    def waited_since_last_asked(self) -> float:
        now = self.waited_seconds()
        with self._lock:
            waited, self._told = now - self._told, now
        return waited

    def _change(self, computing: int, storing: int) -> None:
        with self._lock:
            now = time.monotonic()
            if self.is_only_storing:
                self._waited += now - self._since
            self._since = now
            self._computing += computing
            self._storing += storing
