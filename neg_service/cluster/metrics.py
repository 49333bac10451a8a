"""What an operator watches: numbers of a run that Ray exports to Prometheus from the driver's node.

How long replicas wait for storage comes from their own nodes, since they say nothing to the driver while they wait.

Few labels: `run`, with `state` of shards and replicas, `action` of failures, and the versions of what works. Ray puts
`ray_` before each name. Where no agent of Ray's collects them they cost next to nothing and go nowhere.

**Nearly all are gauges to Ray, totals included.** Ray keeps a counter, and its histogram, for as long as the node
lives, and offers nothing to remove one; on a cluster that stays, each scan of the past would be scraped for ever. A
gauge it forgets when nobody has set it for twenty seconds. So what a counter would count is added up here and set every
second or so, from 0 on: to Prometheus, whose `rate` and `increase` do not ask for a type, that is the same, and an
ended scan leaves by itself. What stays is one number a run: when it ended.
"""

from __future__ import annotations

import platform
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version

from ray.util.metrics import Counter, Gauge

from neg_service.cluster.failures import Action
from neg_service.cluster.messages import ShardResult
from neg_service.errors import NegServiceError

# Ray forgets a gauge after twice its own interval of ten seconds.
_REPEAT_SECONDS = 1.0
# When runs have ended in this process, by name.
_ENDED: dict[str, float] = {}
_SECONDS = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0]
_VERSIONS_OF = ("ray", "torch", "transformers")

_TOTALS = {
    "neg_prompts_total": "Prompts measured",
    "neg_neurons_total": "Neurons measured, of each prompt anew",
    "neg_rows_total": "Rows run through layers: interventions, or targets",
    "neg_stored_bytes_total": "Bytes of parts put to storage",
    "neg_cpu_seconds_total": "CPUs of replicas times the seconds for which they held them, loading included",
    "neg_gpu_seconds_total": "GPUs of replicas times the seconds for which they held them, loading included",
    "neg_computed_cpu_seconds_total": "Of the CPU-seconds, those in which shards that are stored were computed",
    "neg_shard_seconds_sum": "Seconds that shards took, storing included",
    "neg_shard_seconds_count": "Shards done",
}


@dataclass(frozen=True)
class Counts:
    """Of a run at a moment: shards by state, and replicas; placed ones hold what they asked for, whatever they do."""

    done: int
    running: int
    failed: int
    ready_replicas: int
    starting_replicas: int
    placed_replicas: int


class RunMetrics:
    """The metrics of one run."""

    def __init__(
        self,
        run: str,
        n_shards: int,
        neurons_a_prompt: int,
        rows_a_prompt: float,
        *,
        cpus_a_replica: float = 1.0,
        gpus_a_replica: float = 0.0,
    ) -> None:
        """`n_shards` are those still to do; a row is an intervention, or the branch of a target."""
        self._run, self._n_shards = run, n_shards
        self._neurons, self._rows = neurons_a_prompt, rows_a_prompt
        self._cpus, self._gpus = cpus_a_replica, gpus_a_replica

        def gauge(name: str, what: str, *labels: str) -> Gauge:
            made = Gauge(name, what, ("run", *labels))
            made.set_default_tags({"run": run})
            return made

        self._totals = dict.fromkeys(_TOTALS, 0.0)
        self._total_gauges = {name: gauge(name, what) for name, what in _TOTALS.items()}
        self._failures = gauge("neg_shard_failures_total", "Shards that came back undone, by what was done", "action")
        self._n_failures = dict.fromkeys(Action, 0)
        self._seconds = gauge("neg_shard_seconds_bucket", "Shards that took at most `le` seconds", "le")
        self._n_within = [0] * (len(_SECONDS) + 1)
        self._shards = gauge("neg_shards", "Shards of this start by state", "state")
        self._replicas = gauge("neg_replicas", "Replicas by state", "state")
        self._left = gauge("neg_seconds_left", "At the pace since the first replica was ready")
        self._heard = gauge("neg_heartbeat_timestamp_seconds", "When the driver was last at work")
        self._last_shard = gauge("neg_last_shard_timestamp_seconds", "When a shard was last stored, in this start")
        self._last_shard_at: float | None = None
        self._versions = {name: version(name) for name in _VERSIONS_OF}
        self._versions |= {"version": version("neg-service"), "python": platform.python_version()}
        self._build = gauge("neg_build_info", "Versions of what the driver runs with; always 1", *self._versions)
        # A counter, because a gauge that is set while a process ends may be forgotten before everybody has looked.
        self._ended = Counter(
            "neg_ended_timestamp_seconds_total", "When the driver ended, with all done or an error", ("run",)
        )
        self._ended.set_default_tags({"run": run})
        self._shown: tuple[Counts, float | None] | None = None
        self._shown_at = time.monotonic()

    def add(self, result: ShardResult) -> None:
        """A shard is done."""
        n, seconds = result.n_prompts, result.seconds
        for name, amount in (
            ("neg_prompts_total", n),
            ("neg_neurons_total", n * self._neurons),
            ("neg_rows_total", n * self._rows),
            ("neg_stored_bytes_total", sum(result.bytes.values())),
            ("neg_computed_cpu_seconds_total", result.computed_seconds * self._cpus),
            ("neg_shard_seconds_sum", seconds),
            ("neg_shard_seconds_count", 1),
        ):
            self._totals[name] += amount
        self._n_within[bisect_left(_SECONDS, seconds)] += 1
        self._last_shard_at = time.time()

    def failed(self, action: Action) -> None:
        """A shard came back undone."""
        self._n_failures[action] += 1

    def show(self, counts: Counts, seconds_left: float | None = None) -> None:
        """How things are now; `seconds_left` None where nothing is known yet."""
        self._spend()
        self._shown = counts, seconds_left
        self._heard.set(time.time())
        self._build.set(1, self._versions)
        self._left.set(seconds_left)
        self._last_shard.set(self._last_shard_at)
        waiting = self._n_shards - counts.done - counts.running - counts.failed
        states = {"done": counts.done, "running": counts.running, "failed": counts.failed, "waiting": waiting}
        for state, n in states.items():
            self._shards.set(n, {"state": state})
        for state, n in (("ready", counts.ready_replicas), ("starting", counts.starting_replicas)):
            self._replicas.set(n, {"state": state})
        for name, total in self._totals.items():
            self._total_gauges[name].set(total)
        for action, n in self._n_failures.items():
            self._failures.set(n, {"action": action.value})
        n_within = 0
        for bound, n in zip([*map("{:g}".format, _SECONDS), "+Inf"], self._n_within, strict=True):
            n_within += n
            self._seconds.set(n_within, {"le": bound})

    def _spend(self) -> None:
        """Count what replicas held since things were last shown."""
        before, self._shown_at = self._shown_at, time.monotonic()
        if self._shown is not None:
            replica_seconds = (self._shown_at - before) * self._shown[0].placed_replicas
            self._totals["neg_cpu_seconds_total"] += replica_seconds * self._cpus
            self._totals["neg_gpu_seconds_total"] += replica_seconds * self._gpus

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
    """Show, in a replica and from now on, the seconds in which it did nothing but wait for storage.

    In a thread of its own: while a store is away, nothing else happens here that could.
    """
    what = "Seconds in which replicas computed nothing but stored"
    waiting = Gauge("neg_storage_wait_seconds_total", what, ("run",))
    waiting.set_default_tags({"run": run})

    def report() -> None:
        while True:
            waiting.set(waited_seconds())
            time.sleep(_REPEAT_SECONDS)

    threading.Thread(target=report, name="report-waiting", daemon=True).start()
