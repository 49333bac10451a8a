"""Runs with the measure `control` that differ in which neurons may move alone: what the same wishes took in each.

Runs are of one group where model, precision, prompts and all settings but the neurons, what is wanted and what is kept
are the same; what is compared are the wishes that all runs of a group have. Of very many, those are kept whose hash is
among the smallest, which are the same ones in every run.

Axes: R runs, W wishes that all of them have.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from neg_service.report.wishes import SIZES, Doubles, Quartiles, is_of_wishes, to_go, within
from neg_service.storage.reader import Run, reading

# Wishes of a run that are kept.
MOST = 20_000
# Settings that runs of a group need not share: what is wanted and stored says each row, and what is measured beside the
# shifts leaves them as they are.
_MAY_DIFFER = {
    "name", "probability", "top", "margin", "against", "keep", "keep_shift", "top_k", "write", "references", "wordings",
}  # fmt: skip
_SAME_WISH = ("prompt_id", "target", "kind", "wanted", "against")
_NUMBERS = (
    "wish", "value_before", "probability_before", "probability", "first_shot", "achieved", "reached", "passes",
    "n_moved", "norm", "relative_norm",
)  # fmt: skip


@dataclass(frozen=True)
class Moving:
    """What a run did about the wishes that are compared.

    neurons: which ones might move, in words. n_moved: how many were, the median over wishes that needed a shift.
    table: rows of table `control` [W], in the same order in all runs. kl_w: of each wish the mean KL on references with
    its shift, nats. worded_w: by how much its target's probability changed at other wordings; NaN without such.
    """

    neurons: str
    n_moved: float
    table: pa.Table
    kl_w: Doubles
    worded_w: Doubles

    def column(self, name: str) -> NDArray[Any]:
        """Of the wishes [W]."""
        found: NDArray[Any] = self.table[name].to_numpy()
        return found

    def medians(self, is_own_w: NDArray[np.bool_]) -> dict[str, float]:
        """Of some of the wishes: the share `reached`, and medians; `off` and `first_off`: from what was wanted."""
        of = {name: self.column(name)[is_own_w] for name in ("wanted", *_NUMBERS)}
        found = {name: float(np.median(of[name])) for name in ("passes", "norm", "relative_norm", "probability")}
        return found | {
            "reached": float(of["reached"].mean()),
            "first_off": float(np.median(np.abs(of["first_shot"] - of["wanted"]))),
            "off": float(np.median(np.abs(of["achieved"] - of["wanted"]))),
            "before": float(np.median(of["probability_before"])),
        }

    def quartiles(self, name: str) -> Quartiles:
        """Of a column over all wishes."""
        return Quartiles.of(self.column(name).astype(np.float64))


def compared(runs: Sequence[Run]) -> list[list[Moving]]:
    """Groups of at least two runs with wishes in common, each with the most neurons first."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if (name := _table_of_wishes(run)) is not None:
            groups.setdefault(_shared(run, name), []).append(run)
    found = [_moving(own) for own in groups.values() if len({json.dumps(run.config.get("neurons")) for run in own}) > 1]
    return [own for own in found if own]


def of_sizes(movings: Sequence[Moving]) -> Iterator[tuple[float, float, NDArray[np.bool_]]]:
    """By how far wishes were, in nats, as the first run has it: the bins, and which wishes are in them."""
    return within(to_go(movings[0].table), SIZES)


def of_wanted(movings: Sequence[Moving]) -> list[tuple[float, NDArray[np.bool_]]]:
    """By the probabilities that were wanted: each, and which wishes are for it."""
    wanted_w, is_own_w = movings[0].column("wanted"), pc.equal(movings[0].table["kind"], "probability").to_numpy()
    return [(float(one), is_own_w & (wanted_w == one)) for one in np.unique(wanted_w[is_own_w])]


def _table_of_wishes(run: Run) -> str | None:
    if not run.done():
        return None
    return next((name for name in run.tables if is_of_wishes(run.schemas[name].names)), None)


def _shared(run: Run, table: str) -> str:
    """What runs of a group have in common."""
    model = {
        key: run.config["model"][key]
        for key in ("identity", "dtype", "engine", "products")
        if key in run.config["model"]
    }
    measure = {key: value for key, value in run.config["measure"].items() if key not in _MAY_DIFFER}
    return json.dumps([table, model, run.config["prompts"]["sha256"], measure], sort_keys=True)


def _moving(runs: Sequence[Run]) -> list[Moving]:
    kept = [_kept(run) for run in runs]
    keys = [dict(zip(zip(*(own[name].to_pylist() for name in _SAME_WISH), strict=True), range(len(own)), strict=True))
            for own in kept]  # fmt: skip
    common = [key for key in keys[0] if all(key in other for other in keys[1:])]
    if not common:
        return []
    has_same_references = len({json.dumps(run.config["measure"].get("references")) for run in runs}) == 1
    found = []
    for run, table, places in zip(runs, kept, keys, strict=True):
        own = table.take(pa.array([places[key] for key in common]))
        n_moved = own["n_moved"].to_numpy()
        moved = n_moved[n_moved > 0]
        kl_w = _effects(run, own, "references", "kl") if has_same_references else np.full(len(own), np.nan)
        worded_w = _effects(run, own, "wordings", "target_probability")
        found.append(Moving(_neurons(run), float(np.median(moved)) if len(moved) else 0.0, own, kl_w, worded_w))
    return sorted(found, key=lambda own: -own.n_moved)


def _kept(run: Run) -> pa.Table:
    """The wishes of a run, or those with the smallest hashes."""
    name = _table_of_wishes(run)
    assert name is not None
    with reading(run):
        kept, hash_r = None, np.empty(0, np.int64)
        for batch in run.table(name, [*_SAME_WISH, *_NUMBERS]).to_batches(batch_size=8192):
            wishes = zip(*(batch[key].to_pylist() for key in _SAME_WISH), strict=True)
            hash_r = np.r_[hash_r, np.array([crc32(repr(own).encode()) for own in wishes], np.int64)]
            rows = pa.Table.from_batches([batch])
            kept = rows if kept is None else pa.concat_tables([kept, rows])
            if len(kept) > MOST:
                # In their order, as wishes come.
                chosen = np.sort(np.argsort(hash_r, kind="stable")[:MOST])
                kept, hash_r = kept.take(pa.array(chosen)).combine_chunks(), hash_r[chosen]
        return kept


def _effects(run: Run, wishes: pa.Table, kind: str, column: str) -> Doubles:
    """What the shifts of wishes do elsewhere: a column of side effects, less what it was before, if that is known."""
    name = next((own for own in run.tables if {"method", "kind", column} <= set(run.schemas[own].names)), None)
    found_w: Doubles = np.full(len(wishes), np.nan)
    if name is None:
        return found_w
    key = ("prompt_id", "target", "wish")
    place = {own: at for at, own in enumerate(zip(*(wishes[one].to_pylist() for one in key), strict=True))}
    before = f"{column}_before"
    columns = [*key, column, *[before] * (before in run.schemas[name].names)]
    with reading(run):
        only = (pc.field("method") == "shift") & (pc.field("kind") == kind)
        for batch in run.table(name, columns, only).to_batches(batch_size=8192):
            for row in batch.to_pylist():
                at = place.get(tuple(row[one] for one in key))
                if at is not None:
                    found_w[at] = row[column] - row.get(before, 0.0)
    return found_w


def _neurons(run: Run) -> str:
    """Which neurons might move, in a few words."""
    chosen = run.config.get("neurons", {})
    count, layers = chosen.get("count"), chosen.get("layers")
    said = {
        "all": "all",
        "top": f"the {count} strongest",
        "sample": f"{count} of each layer, drawn" if chosen.get("per") == "layer" else f"{count}, drawn",
        "list": f"a list of {count}",
    }[chosen.get("choose", "all")]
    of_model = run.about.get("model", {}).get("layers")
    if isinstance(layers, list) and len(layers) != of_model:
        said += f", layers {', '.join(map(str, layers))}" if len(layers) < 5 else f", {len(layers)} layers"
    return said
