"""What a scan will take, as text for a person and as JSON: hours, replica-hours, bytes and money."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from neg_service.report.console import aligned, bytes_text

if TYPE_CHECKING:
    from neg_service.cluster.forecast import Forecast


def as_json(found: Forecast, price_per_hour: float | None, raw_bytes: int) -> dict[str, Any]:
    """One object: hours, bytes as stored, and money, which is null without a price; `ranking` is part of all totals."""
    hours = found.total("seconds") / 3600
    replica_hours = found.total("replica_seconds") / 3600
    return {
        "results": found.uri,
        "replicas": found.n_replicas,
        "shards": found.n_shards,
        "hours": hours,
        "hours_low": found.total("low") / 3600,
        "hours_high": found.total("high") / 3600,
        "hours_before_the_first_shard": found.total("start_seconds") / 3600,
        "replica_hours": replica_hours,
        "bytes": found.n_bytes,
        "bytes_of_table": found.bytes_of_table,
        "bytes_before_compression": raw_bytes,
        "price_per_hour": price_per_hour,
        "money": None if price_per_hour is None else replica_hours * price_per_hour,
        "sampled_prompts": found.sampled_prompts,
        "sampled_seconds": found.total("sampled_seconds"),
        "ranking": found.ranking and as_json(found.ranking, price_per_hour, 0) | {"bytes_before_compression": None},
    }


def describe(found: dict[str, Any]) -> str:
    """The same for a person."""
    replicas, n = found["replicas"], found["sampled_prompts"]
    tables = [f"{bytes_text(size):>10}  {table}" for table, size in found["bytes_of_table"].items()]
    beside = bytes_text(found["bytes_before_compression"])
    rows = [
        ("time", f"{_clock(found['hours'])} ({_clock(found['hours_low'])} to {_clock(found['hours_high'])})"),
        ("of that", f"{_clock(found['hours_before_the_first_shard'])} to start, check the model, and end"),
        ("replicas", f"{replicas}: {_clock(found['replica_hours'])} of replicas, {found['replica_hours']:.3g} hours"),
        (
            "bytes",
            "\n".join([f"{bytes_text(found['bytes']):>10}  in all, stored; {beside} before compression", *tables]),
        ),
    ]
    if found["money"] is not None:
        price = f"{found['price_per_hour']:g} for a replica and hour"
        rows.append(("money", f"{found['money']:.2f}, at {price}"))
    if found["ranking"]:
        ranking = found["ranking"]
        rows.append(
            (
                "ranking",
                f"{_clock(ranking['hours'])} of the time, {bytes_text(ranking['bytes'])}: the scan that comes first",
            )
        )
    rows.append(
        ("sample", f"{n} prompt{'s' * (n > 1)} of {found['shards']} shards in {found['sampled_seconds']:.1f} s")
    )
    rows.append(("results", f"{found['results']} (nothing was stored)"))
    return f"forecast of the whole scan\n{aligned(rows)}"


def _clock(hours: float) -> str:
    """For example `42 s`, `3.4 min` or `12.5 h`."""
    seconds = 3600 * hours
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{hours:.3g} h"
