"""NeurGrad that takes its time: a measure of one's own, for tests in which things happen while a scan runs."""

from __future__ import annotations

import time
from typing import Any

from neg_service.measures.neurgrad import (  # noqa: F401
    Options,
    calibrate,
    check,
    cost_a_prompt,
    identity,
    read,
    tables,
)
from neg_service.measures.neurgrad import measure as at_once

SECONDS_A_SHARD = 0.25


def measure(*arguments: Any) -> Any:
    """As `neurgrad.measure`, later."""
    time.sleep(SECONDS_A_SHARD)
    return at_once(*arguments)
