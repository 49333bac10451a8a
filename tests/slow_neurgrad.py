"""NeurGrad that takes its time: a measure of one's own, for tests in which things happen while a scan runs.

While there is a file at `$NEG_TEST_GATE`, shards from the one that begins with prompt `FREE` on wait for it to go: so a
test has a scan in its middle for as long as it needs, on a machine of any speed.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from neg_service.measures.base import ShardInput
from neg_service.measures.builtin.neurgrad import NeurGrad

SECONDS_A_SHARD = 0.25
FREE = 20


class SlowNeurGrad(NeurGrad):
    """As NeurGrad, later."""

    def measure(self, shard: ShardInput) -> Any:
        """After some time, and not while the gate is shut."""
        time.sleep(SECONDS_A_SHARD)
        gate = Path(os.environ.get("NEG_TEST_GATE", ""))
        if int(shard.prompts[0].prompt.id) >= FREE:
            while gate.is_file():
                time.sleep(0.05)
            if Path(f"{gate}.fail").is_file():
                raise ArithmeticError("told to fail")
        return super().measure(shard)
