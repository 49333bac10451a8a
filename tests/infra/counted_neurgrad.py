"""NeurGrad of which each shard takes `$NEG_TEST_SECONDS` and leaves a line in the file `$NEG_TEST_COUNTED` at its end.

A measure of one's own, for scans that something happens to: how often was a shard computed?
"""

from __future__ import annotations

import os
import socket
import time
from typing import Any

from neg_service.measures.base import ShardInput
from neg_service.measures.builtin.neurgrad import NeurGrad


class CountedNeurGrad(NeurGrad):
    """As NeurGrad, later, and counted."""

    def measure(self, shard: ShardInput) -> Any:
        """The shard's tables; the line says its first prompt and the host."""
        time.sleep(float(os.environ["NEG_TEST_SECONDS"]))
        found = super().measure(shard)
        # One write of a few bytes to the end of a file: lines of several processes do not mix.
        with open(os.environ["NEG_TEST_COUNTED"], "a", buffering=1) as file:  # noqa: PTH123
            file.write(f"{shard.prompts[0].prompt.id} {socket.gethostname()}\n")
        return found
