"""How values stand in cells of tables, and the units that they have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from neg_service.schema import ESTIMATES, PER_MAGNITUDE

UNIT = PER_MAGNITUDE
# Beside tables of neurons of models with experts.
EXPERTS_NOTE = "Expert -1 is the MLP that is always on beside experts, and - a layer's only MLP."
# Of estimators: what people call them, and their unit.
VALUES = ESTIMATES


def estimator_name(name: str) -> str:
    """What people call an estimator."""
    return VALUES.get(name, (name, ""))[0]


def interval(row: Mapping[str, Any], name: str, digits: int, factor: float = 1.0) -> str:
    """A statistic with its bootstrap interval, or a dash where it has no meaning."""
    value, low, high = (row[key] for key in (name, f"{name}_low", f"{name}_high"))
    if value is None or value != value:
        return "-"
    shown = f"{factor * value:.{digits}f}"
    # Of a single prompt there is no interval.
    return f"{shown} ({factor * low:.{digits}f} to {factor * high:.{digits}f})" if low == low else shown


def percent(share: float | None) -> str:
    """A share of one in percent, without the sign."""
    return "-" if share is None or share != share else f"{100 * share:.1f}"


def short(value: Any) -> str:
    """A number in four digits, anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def expert_cell(expert: int | None) -> str:
    """An expert as people name it: -1 of the MLP that is always on, a dash of a layer's only one."""
    return "-" if expert is None else str(expert)


def lists_in(column: pa.Array) -> list[NDArray[Any]]:
    """The rows of a column of lists, which may differ in size."""
    flat = column.flatten().to_numpy(zero_copy_only=False)
    ends = np.cumsum(pc.list_value_length(column).to_numpy(zero_copy_only=False))
    return np.split(flat, ends[:-1]) if len(column) else []
