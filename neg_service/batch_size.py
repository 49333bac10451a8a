"""How much memory a batch may take, as settings say it, by their names of now and of before."""

from __future__ import annotations

from dataclasses import dataclass

from neg_service.config import ScanConfig, is_whole
from neg_service.errors import ConfigurationError


@dataclass(frozen=True)
class BatchSize:
    """What a batch may take: a number of `unit` (bytes or tokens), or auto, and the setting that says so."""

    key: str
    value: int | None
    unit: str

    @property
    def is_by_old_name(self) -> bool:
        """Whether another setting is used by now."""
        return self.key != _BATCH_BYTES


_BATCH_BYTES = "cluster.batch_bytes"


def batch_size(config: ScanConfig) -> BatchSize:
    """`cluster.batch_bytes`, or what an old name of it says; `auto` and null of an old name say nothing.

    Raises:
        ConfigurationError: two of them say something, or `measure.batch_bytes` is no number of bytes.
    """
    given = {_BATCH_BYTES: config.cluster.batch_bytes, "cluster.batch_tokens": config.cluster.batch_tokens}
    if config.measure.get("name") == "sweep":
        given["measure.batch_bytes"] = config.measure.get("batch_bytes")
    said = {key: value for key, value in given.items() if value not in (None, "auto")}
    old = [key for key in said if key != _BATCH_BYTES]
    if len(said) > 1:
        other = next(key for key in said if key != old[0])
        raise ConfigurationError(
            f"is an old name of {_BATCH_BYTES}, and {other}={said[other]} is given, too: leave it out",
            setting=old[0],
            value=said[old[0]],
        )
    key, value = next(iter(said.items()), (_BATCH_BYTES, None))
    if value is not None and (not is_whole(value) or value < 1):
        raise ConfigurationError(setting=key, value=value, allowed="auto or a whole number, at least 1")
    return BatchSize(key, value, "tokens" if key == "cluster.batch_tokens" else "bytes")


def check_batch_bytes(key: str, value: int, least: int) -> None:
    """Refuse a batch that holds no two rows, of which one is not shifted.

    Raises:
        ConfigurationError: with the least that is needed.
    """
    if value < least:
        raise ConfigurationError(
            f"holds {2 * value // least} rows of {least // 2} bytes, at least 2 are needed: one of them is not shifted",
            setting=key,
            value=value,
            allowed=f"at least {least}",
        )
