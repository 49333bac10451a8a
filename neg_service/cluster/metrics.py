"""What an operator watches: numbers of a run that Ray exports to Prometheus from the driver's node.

How long replicas wait for storage comes from their own nodes, since they say nothing to the driver while they wait.

Few labels: `run`, with `state` of shards and replicas, and `action` of failures. Ray puts `ray_` before each name.
Where no agent of Ray's collects them they cost next to nothing and go nowhere. Ray forgets a gauge seconds after nobody
sets it any more, so that the gauges of a run go with its driver, and keeps a counter for as long as the node lives.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ray.util.metrics import Counter, Gauge, Histogram

from neg_service.cluster.failures import Action
from neg_service.cluster.messages import ShardResult
from neg_service.errors import NegServiceError

_REPORT_SECONDS = 5.0
# Well below the twenty seconds for which Ray keeps a gauge.
_REPEAT_SECONDS = 2.0
# When runs have ended in this process, by name.
_ENDED: dict[str, float] = {}
_SECONDS = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0]


@dataclass(frozen=True)
class Counts:
    """Of a run at a moment: shards by state, and replicas."""

    done: int
    running: int
    failed: int
    ready_replicas: int
    starting_replicas: int


class RunMetrics:
    """The metrics of one run."""

    def __init__(self, run: str, n_shards: int, neurons_a_prompt: int, rows_a_prompt: float) -> None:
        """`n_shards` are those still to do; a row is an intervention, or the branch of a target."""
        self._n_shards, self._neurons, self._rows = n_shards, neurons_a_prompt, rows_a_prompt

        def counter(name: str, what: str) -> Counter:
            made = Counter(f"neg_{name}", what, ("run",))
            made.set_default_tags({"run": run})
            return made

        self._prompts = counter("prompts_total", "Prompts measured")
        self._measured = counter("neurons_total", "Neurons measured, of each prompt anew")
        self._run_rows = counter("rows_total", "Rows run through layers: interventions, or targets")
        self._bytes = counter("stored_bytes_total", "Bytes of parts put to storage")
        what = "Shards that came back undone, by what was done about it"
        self._failures = Counter("neg_shard_failures_total", what, ("run", "action"))
        self._failures.set_default_tags({"run": run})
        self._seconds = Histogram("neg_shard_seconds", "Seconds a shard took, storing included", _SECONDS, ("run",))
        self._seconds.set_default_tags({"run": run})
        self._shards = Gauge("neg_shards", "Shards of this start by state", ("run", "state"))
        self._replicas = Gauge("neg_replicas", "Replicas by state", ("run", "state"))
        self._left = Gauge("neg_seconds_left", "At the pace since the first replica was ready", ("run",))
        self._heard = Gauge("neg_heartbeat_timestamp_seconds", "When the driver was last at work", ("run",))
        for gauge in (self._shards, self._replicas, self._left, self._heard):
            gauge.set_default_tags({"run": run})
        # A counter, because a gauge that is set while a process ends is forgotten before everybody has looked.
        self._ended = counter("ended_timestamp_seconds_total", "When the driver ended, with all done or an error")
        self._run = run
        self._shown: tuple[Counts, float | None] | None = None

    def add(self, result: ShardResult) -> None:
        """A shard is done."""
        n = result.n_prompts
        for metric, amount in (
            (self._prompts, n),
            (self._measured, n * self._neurons),
            (self._run_rows, n * self._rows),
            (self._bytes, sum(result.bytes.values())),
        ):
            # Ray refuses to count by nothing.
            if amount > 0:
                metric.inc(amount)
        self._seconds.observe(max(result.seconds, 1e-3))

    def failed(self, action: Action) -> None:
        """A shard came back undone."""
        self._failures.inc(tags={"action": action.value})

    def show(self, counts: Counts, seconds_left: float | None = None) -> None:
        """How things are now; `seconds_left` None where nothing is known yet."""
        self._shown = counts, seconds_left
        self._heard.set(time.time())
        self._left.set(seconds_left)
        waiting = self._n_shards - counts.done - counts.running - counts.failed
        states = {"done": counts.done, "running": counts.running, "failed": counts.failed, "waiting": waiting}
        for state, n in states.items():
            self._shards.set(n, {"state": state})
        for state, n in (("ready", counts.ready_replicas), ("starting", counts.starting_replicas)):
            self._replicas.set(n, {"state": state})

    @contextmanager
    def waits(self) -> Iterator[None]:
        """While the driver waits for storage: it is at work, and things are as they were shown last.

        Only where the wait has an end of its own: of a driver that hangs nothing is to be heard.
        """
        is_over = threading.Event()

        def repeat() -> None:
            while not is_over.wait(_REPEAT_SECONDS):
                if self._shown is not None:
                    self.show(*self._shown)

        thread = threading.Thread(target=repeat, name="report-waits", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    @contextmanager
    def until_end(self) -> Iterator[None]:
        """What the driver does; it says that it ended with all done, with an error that people are told, or by Ctrl-C.

        Not when it is stopped by a signal (SystemExit), as by a node that is taken away, nor by a fault of its own:
        the run is not finished then, and perhaps nobody knows.
        """
        try:
            yield
        except (NegServiceError, KeyboardInterrupt):
            self.end()
            raise
        self.end()

    def end(self) -> None:
        """The driver has ended, and says so: silence from now on is no reason to look for it."""
        now = time.time()
        self._ended.inc(now - _ENDED.get(self._run, 0.0))
        _ENDED[self._run] = now


def report_waiting(run: str, waited_seconds: Callable[[], float]) -> None:
    """Count, in a replica and from now on, the seconds in which it did nothing but wait for storage.

    In a thread of its own: while a store is away, nothing else happens here that could.
    """
    what = "Seconds in which replicas computed nothing but stored"
    waiting = Counter("neg_storage_wait_seconds_total", what, ("run",))
    waiting.set_default_tags({"run": run})

    def report() -> None:
        before = 0.0
        while True:
            time.sleep(_REPORT_SECONDS)
            now = waited_seconds()
            if now > before:
                waiting.inc(now - before)
            before = now

    threading.Thread(target=report, name="report-waiting", daemon=True).start()
