"""What a whole scan takes, from a sample of it: pure functions on plain data, without Ray.

A *piece* is a few neighbouring prompts of one shard, measured as a shard is, on all of the run's neurons or on a part
of them. What it took is explained by *units*: prompts, tokens, and rows (`Cost.rows`), each with a price that is not
negative. With these prices every shard of the plan is priced, and shards are dealt out to replicas as the driver does.

Prompts are drawn at even steps over their sorted lengths, and with their neighbours, because neighbours share
beginnings and batches; neurons at even steps over those that were chosen, because an intervention costs what the layers
above it cost, and because some neurons take more shifts than others.

Axes: i pieces, s shards, f units.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from neg_service.config import NeuronsConfig
from neg_service.layer_neurons import LayerNeurons
from neg_service.measures.base import Cost
from neg_service.measures.choice import chosen_neurons
from neg_service.prompts.prompt import EncodedPrompt

Floats = NDArray[np.float64]
# What a prompt costs, by the number of its targets, of a share of the neurons.
CostOf = Callable[[int, float], Cost]
# What is measured before anything else says how fast the machine is.
_LEAST_SECONDS, _MOST_SECONDS, _SHARE = 8.0, 60.0, 0.05
_PIECES, _MOST_PIECES, _FACTORS = 6, 24, (0.5, 1.5)
# A run of millions of shards is known well enough from so many of them.
MOST_SHARDS = 1000
# Their prompts are all encoded.
MOST_PROMPTS = 64 * MOST_SHARDS


@dataclass(frozen=True)
class Piece:
    """Prompts `start` to `start + n_prompts` among all, measured on a share of the run's neurons."""

    start: int
    n_prompts: int
    share: float = 1.0


@dataclass(frozen=True)
class Measured:
    """What a piece took: seconds of computing and of encoding its parts, and the bytes of each table's part."""

    piece: Piece
    seconds: float
    encoding_seconds: float = 0.0
    bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Units:
    """What time is spent on; raw_bytes: of each table, before compression, as the measure expects them."""

    prompts: float
    tokens: float
    rows: float
    raw_bytes: Mapping[str, float] = field(default_factory=dict)

    @property
    def of_time(self) -> list[float]:
        """Along f: what is in a shard or piece, then itself.

        Of units that say the same the first gets the price: where each piece has one prompt, what is there once is a
        prompt's and no shard's, which may have many.
        """
        return [self.prompts, self.tokens, self.rows, 1.0]


def units_of(prompts: Sequence[EncodedPrompt], cost_of: CostOf, share: float, rows_are_prompts: bool) -> Units:
    """The units of a shard or a piece; `rows_are_prompts`: a row runs all tokens of its prompt, not one."""
    costs = [cost_of(len(prompt.target_ids), share) for prompt in prompts]
    rows = sum(
        cost.rows * (len(prompt.ids) if rows_are_prompts else 1) for cost, prompt in zip(costs, prompts, strict=True)
    )
    raw: dict[str, float] = {}
    for cost in costs:
        for table, size in cost.bytes.items():
            raw[table] = raw.get(table, 0) + size
    return Units(len(prompts), distinct_tokens([prompt.ids for prompt in prompts]), rows, raw)


def distinct_tokens(prompts: Iterable[Sequence[int]]) -> int:
    """How many tokens run where each beginning that prompts have in common runs once."""
    count = 0
    before: tuple[int, ...] = ()
    for ids in sorted(map(tuple, prompts)):
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, before, strict=False)))
        # The last token is each prompt's own, also where prompts are equal.
        count += len(ids) - min(same, len(ids) - 1)
        before = ids
    return count


def part_of(config: NeuronsConfig, layers: Sequence[LayerNeurons], share: float) -> NeuronsConfig | None:
    """A share of the chosen neurons, at even steps; None where they follow from each prompt, or are all measured."""
    if share >= 1 or config.choose == "top":
        return None
    chosen = chosen_neurons(config, layers)
    found = chosen.take(even_steps(len(chosen), max(1, round(share * len(chosen)))))
    # Of a sample those are left out whose experts a prompt does not use, as `all` does.
    return replace(config, choose="list" if config.choose == "list" else "sample", list=found)


def even_steps(n: int, count: int) -> NDArray[np.int64]:
    """`count` of the places 0 to n - 1, at even steps, each in the middle of its step."""
    return ((np.arange(count) + 0.5) * n / count).astype(np.int64)


def spread(lengths: Sequence[int], count: int) -> list[int]:
    """The places of `count` prompts at even steps over the sorted lengths, the middle ones first."""
    order = np.argsort(np.asarray(lengths), kind="stable")
    steps = even_steps(len(order), min(count, len(order)))
    # Not in the order of their lengths, so that neither a trend of the machine's speed nor taking turns looks like it.
    turns = sorted(range(len(steps)), key=lambda i: (i % 3, i))
    return [int(order[steps[i]]) for i in turns]


def sample_seconds(whole: float) -> float:
    """How long to measure a sample of a scan that takes one replica so many seconds: 5 % of them, 8 to 60 seconds."""
    return min(whole, max(_LEAST_SECONDS, min(_MOST_SECONDS, _SHARE * whole)))


def pieces(
    shards: Sequence[range], lengths: Sequence[int], prompt_seconds: float, seconds: float, can_share: bool
) -> list[Piece]:
    """Pieces that together take about so many seconds, where one prompt takes `prompt_seconds` on all neurons.

    Half of them are small, and half three times as large. lengths: of the prompts of these shards, one after the other.
    can_share: a part of the neurons may be measured; so it is where a prompt takes too long, of each prompt two parts.
    """
    places = [(place, own) for own in shards for place in own]
    each = seconds / _PIECES
    if can_share and prompt_seconds > 2 * each:
        anchors = [places[i][0] for i in spread(lengths, _PIECES // 2)]
        return [Piece(place, 1, factor * each / prompt_seconds) for place in anchors for factor in _FACTORS]
    largest = max(map(len, shards))
    sizes = [min(largest, max(1, round(factor * each / prompt_seconds))) for factor in _FACTORS]
    count = min(_MOST_PIECES, max(_PIECES, round(2 * seconds / (sum(sizes) * prompt_seconds))))
    found = []
    for turn, i in enumerate(spread(lengths, count)):
        (place, own), size = places[i], sizes[turn % 2]
        start = max(own.start, min(place - size // 2, own.stop - size))
        found.append(Piece(start, min(size, own.stop - start)))
    return list(dict.fromkeys(found))


def whole_prompts(rest: Sequence[Piece], small: Measured, large: Measured) -> list[Piece]:
    """The pieces that are left, on all neurons where a part of them, three times as large, took hardly longer.

    So it is where few neurons of many layers are measured: each layer's pass costs what its weights cost.
    """
    if large.piece.share >= 1 or large.seconds > 1.5 * small.seconds:
        return list(rest)
    return list(dict.fromkeys(replace(piece, share=1.0) for piece in rest))


def prices(units_if: Floats, seconds_i: Floats) -> Floats:
    """Prices [f], none negative, whose sums over units come nearest to the seconds, relative to these sums.

    Relative to the seconds themselves, pieces that were slow by chance would count for less than those that were fast.
    Units that say the same about all pieces share one price: more prices are taken only where they explain more.
    """
    relative_to_i = seconds_i
    for _ in range(3):
        price_f = _nearest(units_if / relative_to_i[:, None], seconds_i / relative_to_i)
        relative_to_i = np.maximum(units_if @ price_f, 1e-3 * seconds_i)
    return price_f


def _nearest(units_if: Floats, target_i: Floats) -> Floats:
    n_units = units_if.shape[1]
    scale_f, found, best = np.maximum(units_if.max(0), 1e-300), np.zeros(n_units), math.inf
    for size in range(1, min(n_units, len(target_i)) + 1):
        for own in map(list, itertools.combinations(range(n_units), size)):
            price_f, *_ = np.linalg.lstsq(units_if[:, own] / scale_f[own], target_i, rcond=1e-6)
            if (price_f < 0).any():
                continue
            off = float(np.square(units_if[:, own] @ (price_f / scale_f[own]) - target_i).sum())
            if off < 0.9 * best - 1e-12:
                best, found = off, np.zeros(n_units)
                found[own] = price_f / scale_f[own]
    return found


def makespan(seconds_s: Iterable[float], n_replicas: int) -> float:
    """How long replicas work that take the shards in order, each the next one as it is free."""
    busy = [0.0] * max(1, n_replicas)
    for seconds in seconds_s:
        heapq.heapreplace(busy, busy[0] + seconds)
    return max(busy)


@dataclass(frozen=True)
class Extrapolated:
    """Of a whole scan: seconds from the first shard's beginning to the last one's end.

    low, high: two standard errors below and above, from what leaving out one piece or the other makes of it.
    """

    seconds: float
    low: float
    high: float


def extrapolate(
    measured: Sequence[Measured],
    units_i: Sequence[Units],
    shards: Sequence[Units],
    n_shards: int,
    n_replicas: int,
    *,
    overlaps: bool = False,
) -> Extrapolated:
    """What all shards take on so many replicas; `shards` are units of some, at even steps, or of all.

    overlaps: parts are encoded while the next shard is computed, on processors that have nothing else to do.
    """
    units_if = np.array([own.of_time for own in units_i])
    computing_i = np.array([one.seconds for one in measured])
    encoding_i = np.array([one.encoding_seconds for one in measured])
    seconds_i = np.maximum(1e-9, np.maximum(computing_i, encoding_i) if overlaps else computing_i + encoding_i)
    shard_sf = np.array([own.of_time for own in shards])

    def total(kept: list[int]) -> float:
        price_f = prices(units_if[kept], seconds_i[kept])
        seconds_s = np.maximum(0.0, shard_sf @ price_f)
        every = seconds_s if len(shards) == n_shards else seconds_s[np.arange(n_shards) * len(shards) // n_shards]
        return makespan(every.tolist(), n_replicas)

    everything = list(range(len(measured)))
    seconds = total(everything)
    if len(measured) < 3:
        return Extrapolated(seconds, seconds, seconds)
    without = np.array([total([i for i in everything if i != left]) for left in everything])
    n = len(without)
    # The jackknife's standard error.
    error = 2 * math.sqrt((n - 1) / n * float(np.square(without - without.mean()).sum()))
    return Extrapolated(seconds, max(0.0, seconds - error), seconds + error)


def extrapolate_bytes(
    measured: Sequence[Measured], units_i: Sequence[Units], shards: Sequence[Units], n_shards: int
) -> dict[str, int]:
    """Bytes of each table as stored: what a part has anyhow, and what it has for each byte before compression.

    Unlike of seconds, large pieces count for more: small parts, whose pages hold few rows, compress worse than shards.
    """
    found = {}
    for table in measured[0].bytes:
        raw_i = np.array([own.raw_bytes.get(table, own.rows) for own in units_i], np.float64)
        bytes_i = np.array([max(1, one.bytes[table]) for one in measured], np.float64)
        largest = bytes_i.max()
        of_byte, of_part = largest * _nearest(np.stack([raw_i, np.ones(len(raw_i))], 1), bytes_i / largest)
        raw = sum(own.raw_bytes.get(table, own.rows) for own in shards) * n_shards / len(shards)
        found[table] = round(of_part * n_shards + of_byte * raw)
    return found
