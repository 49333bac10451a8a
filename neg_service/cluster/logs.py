"""What the program says of itself, on stderr: lines for a person, or JSON objects that a log store can search.

Each JSON object has `time`, `level`, `logger` and `message`, and `run`, `replica` and `shard` where they are known.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from pythonjsonlogger.json import JsonFormatter

log = logging.getLogger(__name__)

_ABOUT: dict[str, Any] = {}
_SHARD: ContextVar[int | None] = ContextVar("shard", default=None)


def log_to_stderr(style: str, **about: Any) -> None:
    """Send what is logged from here on to stderr as `text` or `json`; the latter with what is known `about` it all."""
    handler = logging.StreamHandler(sys.stderr)
    if style == "json":
        handler.setFormatter(
            JsonFormatter(
                ["levelname", "name", "message"],
                rename_fields={"levelname": "level", "name": "logger", "timestamp": "time"},
                timestamp=True,
            )
        )
        handler.addFilter(_with_what_is_known)
        add_to_logs(**about)
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=style == "json")


def add_to_logs(**about: Any) -> None:
    """What every JSON object says from here on."""
    _ABOUT.update(about)


def tell_interrupted(stopped: BaseException) -> None:
    """Tell, once, a person who stops a command how it goes on; a note of the exception says that it was told."""
    text = "interrupted; the same command continues from here"
    if text not in getattr(stopped, "__notes__", ()):
        log.warning(text)
        stopped.add_note(text)


@contextmanager
def logging_shard(index: int) -> Iterator[None]:
    """What is logged inside, in this thread, is about that shard."""
    token = _SHARD.set(index)
    try:
        yield
    finally:
        _SHARD.reset(token)


def _with_what_is_known(record: logging.LogRecord) -> bool:
    for name, value in (*_ABOUT.items(), ("shard", _SHARD.get())):
        if value is not None and not hasattr(record, name):
            setattr(record, name, value)
    return True
