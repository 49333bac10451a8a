"""A sweep whose noise is another on every replica, as on machines that differ: a measure of one's own, for tests."""

from __future__ import annotations

import os
import time
from typing import Any

from neg_service.measures import sweep as steady
from neg_service.measures.sweep import Options, check, cost_a_prompt, identity, read, tables

__all__ = ["Options", "calibrate", "check", "cost_a_prompt", "identity", "measure", "read", "tables"]
SECONDS_A_SHARD = 0.5


def calibrate(*arguments: Any) -> dict[str, Any]:
    """As many times the noise as the number of this process says."""
    found = steady.calibrate(*arguments)
    found["noise"]["sigma"] *= os.getpid()
    return found


def measure(*arguments: Any) -> Any:
    """As the sweep, later: all replicas get to do something."""
    time.sleep(SECONDS_A_SHARD)
    return steady.measure(*arguments)
