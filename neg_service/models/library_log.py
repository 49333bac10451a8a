"""What transformers and the hub's client warn of, in our own log: each text once, each as one line.

Left out: progress bars over weights; transformers' table of tensors that are missing or not used, which `weights.py`
refuses or tells in one line; the hub client's announcements of each retry, since we tell what came of it.
"""

from __future__ import annotations

import logging
import re

from transformers.utils import logging as transformers_logging

log = logging.getLogger(__name__)

_LIBRARIES = ("transformers", "huggingface_hub")
_TOLD_OTHERWISE = re.compile(r"LOAD REPORT|Retrying in \d|thrown while requesting")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_MOST_LETTERS = 400


class _Relay(logging.Handler):
    """Passes a library's warnings on to our log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(_COLOUR.sub("", record.getMessage()).split())
        # The same warning of another prompt differs in its numbers alone.
        kind = re.sub(r"\d+", "0", text)
        if kind in self._told or _TOLD_OTHERWISE.search(text):
            return
        self._told.add(kind)
        library = record.name.partition(".")[0]
        log.log(record.levelno, "%s: %s", library, text[:_MOST_LETTERS] + "…" * (len(text) > _MOST_LETTERS))


_RELAY = _Relay()


def hear_libraries() -> None:
    """From here on what the libraries warn of goes to our log; progress bars over weights are off."""
    transformers_logging.disable_progress_bar()
    for name in _LIBRARIES:
        logger = logging.getLogger(name)
        if _RELAY not in logger.handlers:
            # Their own handlers write to stderr beside our log, over several lines, and again each time.
            logger.handlers = [_RELAY]
            logger.propagate = False
            logger.setLevel(logging.WARNING)
