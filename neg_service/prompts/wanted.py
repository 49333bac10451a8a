"""What a row of a data set wants of its targets, for the measure `control`: the column `wanted`.

| written                                   | means                                                             |
|-------------------------------------------|-------------------------------------------------------------------|
| `0.8`, or `{"probability": 0.8}`          | this probability                                                  |
| `"top"`, or `{"top": true}`               | just above all other tokens                                       |
| `{"margin": 2.0, "against": " London"}`   | so many nats above another token, or above all without `against`  |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from neg_service.errors import PromptError, shortened

# Which kind, the number, and what a margin is measured against.
WantedOfRow = tuple[str, float, str | None]


def wanted_of(who: str, given: Any) -> WantedOfRow | None:
    """What the column says of the prompt `who`; None where it says nothing.

    Raises:
        PromptError: it is none of the above.
    """
    if given is None:
        return None
    if given == "top":
        return ("top", 0.0, None)
    if isinstance(given, str):
        # A cell of CSV.
        try:
            given = float(given)
        except ValueError:
            raise _refused(who, given) from None
    if _is_number(given):
        given = {"probability": given}
    # Columns of Parquet have all keys in every row.
    said = {key: value for key, value in given.items() if value is not None} if isinstance(given, Mapping) else {}
    if said == {"top": True}:
        return ("top", 0.0, None)
    against = said.get("against")
    if set(said) == {"probability"} and _is_number(said["probability"]) and 0 < said["probability"] < 1:
        return ("probability", float(said["probability"]), None)
    if set(said) <= {"margin", "against"} and _is_number(said.get("margin")) and isinstance(against, str | None):
        return ("margin", float(said["margin"]), against)
    raise _refused(who, given)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _refused(who: str, given: Any) -> PromptError:
    return PromptError(
        f"prompt {who!r}: wanted must be a probability above 0 and below 1, top, or "
        f'{{"margin": NATS, "against": TEXT}}, not {shortened(given)}',
        change="dataset.source",
    )
