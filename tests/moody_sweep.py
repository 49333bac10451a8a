"""A sweep whose noise is another on every replica, as on machines that differ: a measure of one's own, for tests."""

from __future__ import annotations

import os
import time
from typing import Any

from neg_service.measures.base import ShardInput
from neg_service.measures.builtin.sweep import NeuronSweep

SECONDS_A_SHARD = 0.5


class MoodySweep(NeuronSweep):
    """As the sweep, but for its noise and its haste."""

    def calibrate(self, *given: Any) -> dict[str, Any]:
        """As many times the noise as the number of this process says."""
        found = super().calibrate(*given)
        found["noise"]["sigma"] *= os.getpid()
        return found

    def measure(self, shard: ShardInput) -> Any:
        """As the sweep, later: all replicas get to do something."""
        time.sleep(SECONDS_A_SHARD)
        return super().measure(shard)
