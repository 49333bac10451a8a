"""NeurGrad of which each shard takes `$NEG_TEST_SECONDS` and leaves a line in the file `$NEG_TEST_COUNTED` at its end.

A measure of one's own, for scans that something happens to: how often was a shard computed? No shard begins before
replicas on `$NEG_TEST_HOSTS` hosts have one, so that what happens to one of them happens to a replica at work.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from neg_service.measures.base import ShardInput
from neg_service.measures.builtin.neurgrad import NeurGrad


class CountedNeurGrad(NeurGrad):
    """As NeurGrad, later, and counted."""

    def measure(self, shard: ShardInput) -> Any:
        """The shard's tables; the line says its first prompt and the host."""
        self._await_others()
        time.sleep(float(os.environ["NEG_TEST_SECONDS"]))
        found = super().measure(shard)
        # One write of a few bytes to the end of a file: lines of several processes do not mix.
        with open(os.environ["NEG_TEST_COUNTED"], "a", buffering=1) as file:  # noqa: PTH123
            file.write(f"{shard.prompts[0].prompt.id} {socket.gethostname()}\n")
        return found

    @staticmethod
    def _await_others() -> None:
        counted = Path(os.environ["NEG_TEST_COUNTED"])
        counted.with_suffix(f".{socket.gethostname()}").touch()
        until = time.monotonic() + 100
        while len(list(counted.parent.glob(f"{counted.name}.*"))) < int(os.environ["NEG_TEST_HOSTS"]):
            assert time.monotonic() < until, "the other replica does not come"
            time.sleep(0.1)
