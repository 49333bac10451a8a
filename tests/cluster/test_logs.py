"""Logs as JSON objects, in a process of their own; a replica's are in `test_driver.py`, which has a cluster."""

from __future__ import annotations

import json
import subprocess
import sys

CODE = """
import logging
from neg_service.cluster.logs import add_to_logs, log_to_stderr, logging_shard
log_to_stderr("json", replica=3)
log = logging.getLogger("neg_service.test")
log.info("before")
add_to_logs(run="a-run")
with logging_shard(7):
    log.warning("with %s", "two\\nlines")
log.info("driver", extra={"replica": 5})
"""


def test_each_line_is_an_object_that_says_what_it_is_about() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    before, during, after = map(json.loads, done.stderr.splitlines())
    assert (before["message"], before["level"], before["logger"]) == ("before", "INFO", "neg_service.test")
    assert before["replica"] == 3
    assert "run" not in before
    assert "shard" not in before
    assert (during["run"], during["shard"], during["message"]) == ("a-run", 7, "with two\nlines")
    assert (after["run"], after["replica"]) == ("a-run", 5)
    assert "shard" not in after
    assert before["time"].startswith("20")
