"""Sums over prompts of values of the neurons that act on each, by layer and expert.

Axes: N neurons of an MLP or expert, M neurons of all of these.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from neg_service.slots import Slots


class Sums:
    """Sums by (layer, expert); what a prompt has no neurons of stays as it is."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, int], NDArray[np.float64]] = {}

    def add(self, slots: Slots, values_m: NDArray[Any]) -> None:
        """Add a prompt's values."""
        bounds = slots.start.tolist()
        for place, key in enumerate(zip(slots.layer.tolist(), slots.expert.tolist(), strict=True)):
            own = values_m[bounds[place] : bounds[place + 1]]
            if key in self._sums:
                self._sums[key] += own
            else:
                self._sums[key] = own.astype(np.float64)

    def slots(self) -> Slots:
        """The MLPs and experts of which there are sums, by layer and expert."""
        keys = np.array(sorted(self._sums), np.int64).reshape(-1, 2)
        sizes = np.array([len(self._sums[key]) for key in sorted(self._sums)], np.int64)
        return Slots(keys[:, 0], keys[:, 1], sizes)

    def values(self) -> NDArray[np.float64]:
        """The sums [M], in that order."""
        return np.concatenate([self._sums[key] for key in sorted(self._sums)])
