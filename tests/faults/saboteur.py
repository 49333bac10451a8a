"""A measure that is `neurgrad`, in a replica to which things happen.

What happens, and when, stands in a JSON file that $NEG_FAULTS names, as a list of orders:

    {"when": "compute", "shard": 3, "do": "exit"}           before shard 3 is computed
    {"when": "before put", "shard": 3, "table": "neurgrad", "do": "exit"}
    {"when": "after put", "shard": 3, "table": "prompts", "do": "hold"}

`exit` ends the process at once, `exhaust` asks for more memory than there is. `hold` tells the process's id and then
sleeps, so that somebody can do something to it; `sleep` sleeps for `seconds`. An order without a shard holds for all of
them, and every time; one with a shard is carried out once. The driver loads this module too, and nothing happens to it,
because it computes and puts no parts. In replicas storage is asked again five times as soon as otherwise: the pauses
after dozens of requests that fail would be most of a test.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
from tenacity import wait_random_exponential

from neg_service.measures.base import ShardInput
from neg_service.measures.builtin.neurgrad import NeurGrad
from neg_service.storage import retries
from neg_service.storage.objects import LocalStore
from neg_service.storage.parts import shard_of
from neg_service.storage.s3 import S3Store

VARIABLE = "NEG_FAULTS"
PROMPTS_A_SHARD = 2
SHORT_PAUSE = wait_random_exponential(multiplier=0.2, min=0.1, max=6)


class SabotagedNeurGrad(NeurGrad):
    """As NeurGrad, after what is ordered for the shard."""

    def measure(self, shard: ShardInput) -> dict[str, pa.Table]:
        """The shard's tables, if nothing happens."""
        happen("compute", int(shard.prompts[0].prompt.id) // PROMPTS_A_SHARD, "")
        return super().measure(shard)


def happen(when: str, shard: int, table: str) -> None:
    """Carry out the orders for this moment."""
    plan = Path(os.environ.get(VARIABLE, ""))
    if not plan.is_file():
        return
    for number, order in enumerate(json.loads(plan.read_text())):
        if order["when"] != when or order.get("shard", shard) != shard or order.get("table", table) != table:
            continue
        if "shard" in order:
            try:
                (plan.parent / f"{plan.name}.{number}.done").touch(exist_ok=False)
            except FileExistsError:
                continue
        if order["do"] == "exit":
            os._exit(1)
        if order["do"] == "exhaust":
            _exhaust()
        if order["do"] == "hold":
            told = plan.parent / f"{plan.name}.{number}.pid"
            told.with_suffix(".part").write_text(str(os.getpid()))
            told.with_suffix(".part").rename(told)
        time.sleep(float(order.get("seconds", 60)))


def _exhaust() -> None:
    """Ask for more memory than this process may have."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**20, before[1]))
    try:
        bytearray(2**28)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _sabotaged(put: Callable[[Any, str, bytes], None]) -> Callable[[Any, str, bytes], None]:
    def sabotaged(self: Any, key: str, data: bytes) -> None:
        shard = shard_of(key)
        if shard is None:
            put(self, key, data)
            return
        table = key.partition("/")[0]
        happen("before put", shard, table)
        put(self, key, data)
        happen("after put", shard, table)

    return sabotaged


S3Store.put = _sabotaged(S3Store.put)  # type: ignore[method-assign]
LocalStore.put = _sabotaged(LocalStore.put)  # type: ignore[method-assign]
if "pytest" not in sys.modules:
    retries._PAUSE = SHORT_PAUSE
