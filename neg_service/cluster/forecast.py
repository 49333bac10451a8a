"""What a scan will take, found out by measuring a sample of it: nothing is stored.

Replicas are started as the scan starts them: they load the model, check themselves and calibrate the measure, whose
seconds count once. Then pieces of shards (`sampling.py`) are measured one after the other. A warm-up comes before
them, in growing sizes, until a piece takes a second: it says how large pieces may be, and of its first only that
counts which it took too long. All that is not a piece (reading the data, Ray, loading, the end) a scan does once, too.

Where the scan has several replicas on one node without GPUs, so many measure each piece at once: they share caches
and memory, and one alone would be too fast.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from neg_service.cluster.actors import RayActors
from neg_service.cluster.connection import connect, disconnect
from neg_service.cluster.messages import LogStyle, Shard, ShardResult
from neg_service.cluster.prepare import Prepared
from neg_service.cluster.ray_errors import translated
from neg_service.cluster.replica import scan_worker
from neg_service.cluster.resources import ReplicaSize, nodes, replica_count, wait_for_size
from neg_service.cluster.sampling import (
    MOST_PROMPTS,
    MOST_SHARDS,
    Measured,
    Piece,
    Units,
    even_steps,
    extrapolate,
    extrapolate_bytes,
    part_of,
    pieces,
    prices,
    sample_seconds,
    spread,
    units_of,
    whole_prompts,
)
from neg_service.cluster.scan import worker_spec
from neg_service.config import most_replicas
from neg_service.errors import NegServiceError
from neg_service.measures.base import Cost
from neg_service.measures.choice import count_of

log = logging.getLogger(__name__)

_LOG_SECONDS = 30.0
# The warm-up: how many neurons at first, and how long a piece takes when the machine's speed is known.
_FIRST_NEURONS, _KNOWN_SECONDS = 64, 1.0


@dataclass(frozen=True)
class Forecast:
    """What a whole scan takes, from no part of it done.

    seconds, low, high: from the command's start to its end; `low` and `high` where the sample's pieces disagree.
    replica_seconds: of all replicas together, from their launch to the end of the run. bytes_of_table: as stored.
    start_seconds: of `seconds`, what comes before the first shard. sampled_seconds: how long the sample was measured.
    ranking: the scan that comes first, which is no part of the other numbers here, but of `total`.
    """

    uri: str
    n_replicas: int
    n_shards: int
    seconds: float
    low: float
    high: float
    replica_seconds: float
    bytes_of_table: dict[str, int]
    start_seconds: float
    sampled_prompts: int
    sampled_seconds: float
    ranking: Forecast | None = None

    def total(self, name: str) -> float:
        """A number of this scan and of the ranking before it."""
        return float(getattr(self, name)) + (self.ranking.total(name) if self.ranking else 0.0)

    @property
    def n_bytes(self) -> int:
        """Of all tables, of the ranking's too."""
        return sum(self.bytes_of_table.values()) + (self.ranking.n_bytes if self.ranking else 0)


def forecast(prepared: Prepared, began: float | None = None) -> Forecast:
    """Measure a sample, and say what the scan will take; `began`: when its command did, of `time.monotonic()`.

    Raises:
        NegServiceError: what the scan would fail with, too: a model that is not understood, no node with room for it.
    """
    began = time.monotonic() if began is None else began
    ranking = None
    if prepared.ranking is not None:
        log.info("forecast of the scan that ranks neurons first")
        ranking = forecast(prepared.ranking, began)
        began = time.monotonic()
    # As a scan does, which tells of all mistakes in prompts at once.
    prepared.encoding.encode_all()
    connect(prepared.config.cluster, show_replicas=prepared.config.job.log == "text")
    try:
        sample = _take_sample(prepared)
    finally:
        disconnect()
    return _whole(prepared, sample, time.monotonic() - began, ranking)


@dataclass
class _Sample:
    """What was measured: `warm_up` apart, and all seconds that went into either."""

    n_replicas: int
    overlaps: bool
    launched: float
    ready: float = 0.0
    warm_up: list[Measured] = field(default_factory=list)
    pieces: list[Measured] = field(default_factory=list)
    seconds: float = 0.0
    ended: float = 0.0


def _take_sample(prepared: Prepared) -> _Sample:
    config = prepared.config
    size = wait_for_size(config.cluster, config.model.device, prepared.memory)
    n_replicas, n_together = _replicas(prepared, size)
    actors = RayActors(
        partial(scan_worker, worker_spec(prepared, size)), None, size, n_together, LogStyle(config.job.log)
    )
    log.info(
        "forecast for %d replica%s of %g CPUs and %g GPUs: starting %d",
        n_replicas, "s" * (n_replicas > 1), size.cpus, size.gpus, n_together,
    )  # fmt: skip
    sample = _Sample(n_replicas, bool(size.gpus), time.monotonic())
    launched: list[Any] = []
    try:
        launched += [actors.launch() for _ in range(n_together)]
        _Sampling(prepared, launched, sample).run()
    finally:
        for actor in launched:
            actors.end(actor)
        sample.ended = time.monotonic()
    return sample


def _replicas(prepared: Prepared, size: ReplicaSize) -> tuple[int, int]:
    """How many replicas the scan will have, and how many measure the sample at once."""
    there, n_shards = nodes(), prepared.plan.n_shards
    asked = min(n_shards, replica_count(most_replicas(prepared.config.cluster), size, there))
    room = min(n_shards, replica_count("auto", size, there))
    if room < asked:
        address = prepared.config.cluster.address or os.environ.get("RAY_ADDRESS") or "local"
        # To Ray on this machine no node is added, and who has no room there waits for ever.
        n_replicas = room if address == "local" else asked
        log.warning("there is room for %d of %d replicas now: a forecast for %d", room, asked, n_replicas)
        asked = n_replicas
    together = 1 if size.gpus else min(asked, max(replica_count("auto", size, [node]) for node in there))
    return asked, max(1, together)


class _Sampling:
    """Measures pieces on replicas that were launched."""

    def __init__(self, prepared: Prepared, actors: Sequence[Any], sample: _Sample) -> None:
        self._prepared, self._actors, self._sample = prepared, actors, sample
        self._calibration: dict[str, Any] = {}
        self._n_asked = 0

    def run(self) -> None:
        """Start the replicas, calibrate, warm up, and measure the pieces."""
        self._start()
        shards = _shards_looked_at(self._prepared)
        encoding = self._prepared.encoding
        lengths = [len(prompt.ids) for own in shards for prompt in encoding[own.start : own.stop]]
        middle = [(place, own) for own in shards for place in own][spread(lengths, 1)[0]]
        can_share = _can_share(self._prepared)
        prompt_seconds = self._warm_up(*middle, can_share)
        whole = prompt_seconds * self._prepared.plan.n_prompts
        found = pieces(shards, lengths, prompt_seconds, sample_seconds(whole), can_share)
        done = self._sample.pieces
        while len(done) < len(found):
            piece = found[len(done)]
            done.append(self._measure(piece))
            what = "forecast: sample %d of %d, %s: %.1f s"
            log.info(what, len(done), len(found), _described(piece), done[-1].seconds)
            if len(done) == 2:
                found[2:] = whole_prompts(found[2:], *done)

    def _start(self) -> None:
        limit = self._prepared.config.cluster.start_seconds
        _answers([actor.where.remote() for actor in self._actors], "room for a replica")
        _answers([actor.start.remote() for actor in self._actors], "a replica to load its model", limit)
        known = self._prepared.about.get("calibration")
        if known is not None:
            self._calibration = dict(known)
        elif self._prepared.measure.has_to_calibrate:
            # Of the run, so one of them does it.
            (self._calibration,) = _answers([self._actors[0].calibrate.remote()], "the measure to be calibrated", limit)
        self._sample.ready = time.monotonic()
        log.info("forecast: ready after %.1f s", self._sample.ready - self._sample.launched)

    def _warm_up(self, place: int, shard: range, can_share: bool) -> float:
        """Measure growing pieces until one takes long enough; gives the seconds of one prompt on all neurons."""
        n_neurons = count_of(self._prepared.config.neurons, self._prepared.info.layer_neurons)
        share, n_prompts = min(1.0, _FIRST_NEURONS / n_neurons) if can_share else 1.0, 1
        while True:
            piece = Piece(max(shard.start, min(place, shard.stop - n_prompts)), n_prompts, share)
            one = self._measure(piece)
            self._sample.warm_up.append(one)
            is_whole = share == 1 and n_prompts == len(shard)
            # The first one is never what a piece takes.
            if len(self._sample.warm_up) > 1 and (one.seconds >= _KNOWN_SECONDS or is_whole):
                return max(1e-6, one.seconds + one.encoding_seconds) / (n_prompts * share)
            if share < 1:
                share = min(1.0, 4 * share)
            else:
                n_prompts = min(2 * n_prompts, len(shard))

    def _measure(self, piece: Piece) -> Measured:
        config, info = self._prepared.config, self._prepared.info
        prompts = tuple(self._prepared.encoding[piece.start : piece.start + piece.n_prompts])
        # Replicas know by its number whether they are asked for the same again.
        shard = Shard(self._n_asked, prompts, part_of(config.neurons, info.layer_neurons, piece.share))
        self._n_asked += 1
        more = [1.0, self._calibration] if self._calibration else []
        began = time.monotonic()
        results: list[ShardResult] = _answers([actor.run.remote(shard, *more) for actor in self._actors], "a sample")
        self._sample.seconds += time.monotonic() - began
        seconds, computed = (
            sum(getattr(own, name) for own in results) / len(results) for name in ("seconds", "computed_seconds")
        )
        return Measured(piece, computed, max(0.0, seconds - computed), results[0].bytes)


def _whole(prepared: Prepared, sample: _Sample, elapsed: float, ranking: Forecast | None) -> Forecast:
    """What follows from a sample for the whole scan, whose command has taken `elapsed` seconds here."""
    n_shards = prepared.plan.n_shards
    units = _units_by(prepared)
    shards = [units(Piece(own.start, len(own))) for own in _shards_looked_at(prepared)]
    everything = [*sample.warm_up, *sample.pieces]
    # The very first one is never what a piece takes.
    measured = everything[1:]
    own = [units(one.piece) for one in measured]
    found = extrapolate(measured, own, shards, n_shards, sample.n_replicas, overlaps=sample.overlaps)
    n_bytes = extrapolate_bytes(everything, [units(one.piece) for one in everything], shards, n_shards)
    beside = max(0.0, elapsed - sample.seconds) + _too_long(everything, own, units(everything[0].piece))
    as_replica = max(0.0, sample.ended - sample.launched - sample.seconds)
    places = {place for one in everything for place in range(one.piece.start, one.piece.start + one.piece.n_prompts)}
    return Forecast(
        uri=prepared.uri,
        n_replicas=sample.n_replicas,
        n_shards=n_shards,
        seconds=beside + found.seconds,
        low=beside + found.low,
        high=beside + found.high,
        replica_seconds=sample.n_replicas * (as_replica + found.seconds),
        bytes_of_table=n_bytes,
        start_seconds=beside,
        sampled_prompts=len(places),
        sampled_seconds=sample.seconds,
        ranking=ranking,
    )


def _too_long(measured: Sequence[Measured], units_i: Sequence[Units], units: Units) -> float:
    """What the first piece of all took longer than it would take by now; a scan's first shard does, too."""
    first, *others = measured
    seconds_i = np.array([max(1e-9, one.seconds) for one in others])
    found = prices(np.array([own.of_time for own in units_i]), seconds_i)
    return max(0.0, first.seconds - float(np.array(units.of_time) @ found))


def _units_by(prepared: Prepared) -> Callable[[Piece], Units]:
    info, neurons, measure = prepared.info, prepared.config.neurons, prepared.measure

    @cache
    def cost_of(n_targets: int, share: float) -> Cost:
        return measure.cost(info, part_of(neurons, info.layer_neurons, share) or neurons, n_targets)

    def units(piece: Piece) -> Units:
        prompts = prepared.encoding[piece.start : piece.start + piece.n_prompts]
        return units_of(prompts, cost_of, piece.share, info.rows_are_prompts)

    return units


def _can_share(prepared: Prepared) -> bool:
    """Whether a part of the neurons costs less than all of them."""
    info, neurons, measure = prepared.info, prepared.config.neurons, prepared.measure
    part = part_of(neurons, info.layer_neurons, 0.5) if measure.MEASURES_SINGLE_NEURONS else None
    return part is not None and measure.cost(info, part, 1).rows < measure.cost(info, neurons, 1).rows


def _shards_looked_at(prepared: Prepared) -> list[range]:
    """The places of the prompts of all shards, or of enough of them at even steps."""
    plan = prepared.plan
    most = min(MOST_SHARDS, max(1, MOST_PROMPTS // plan.shard_size))
    looked_at = even_steps(plan.n_shards, min(plan.n_shards, most))
    return [plan.places_of(plan.shards[int(place)]) for place in looked_at]


def _described(piece: Piece) -> str:
    part = f" on {100 * piece.share:.2g} % of the neurons" if piece.share < 1 else ""
    return f"{piece.n_prompts} prompt{'s' * (piece.n_prompts > 1)}{part}"


def _answers(calls: list[Any], what: str, limit: float = float("inf")) -> list[Any]:
    """The answers to calls of replicas; says now and then what is waited for.

    Raises:
        NegServiceError: one of them failed, or does not come within `limit` seconds.
    """
    began = spoke = time.monotonic()
    waiting = calls
    while waiting:
        _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=1.0)
        now = time.monotonic()
        if waiting and now - began > limit:
            raise NegServiceError(f"waited {limit:.0f} s for {what} (cluster.start_seconds)")
        if waiting and now - spoke > _LOG_SECONDS:
            spoke = now
            log.info("forecast: waiting for %s", what)
    try:
        return list(ray.get(calls))
    except RayError as error:
        found = translated(error)
        raise (
            found if isinstance(found, NegServiceError) else NegServiceError(f"a sample cannot be measured: {found}")
        ) from error
