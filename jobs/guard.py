"""The last guard of every command: what nobody foresaw is one line too, and where it came from goes to a file.

Foreseen errors are the project's own and are told by their message. All others end here: the line says what was being
done, where in this project, and the exception's own words; the traceback goes to a file that the line names, or to
stderr with `job.traceback=true`. Nothing here may fail: it also tells of a disk that is full and a memory that is.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from neg_service.redaction import without_secrets

EXIT_ERROR, EXIT_INTERRUPTED = 1, 130

log = logging.getLogger(__name__)

_PROJECT = Path(__file__).resolve().parent.parent
_MOST_WORDS = 600


@dataclass
class _Speech:
    """How this command tells of an error."""

    is_json: bool = False
    shows_traceback: bool = False


_speech = _Speech()


def speak(is_json: bool, shows_traceback: bool) -> None:
    """From here on errors are told as lines or as JSON objects, with their traceback on stderr or in a file."""
    _speech.is_json, _speech.shows_traceback = is_json, shows_traceback


def tell(message: str) -> None:
    """Say what is wrong in one line on stderr, without secrets."""
    line = without_secrets(" ".join(part.strip() for part in message.splitlines() if part.strip()))
    if _speech.is_json:
        log.error("%s", line)
        return
    # Where nobody listens, the exit code is what is left.
    with suppress(OSError):
        print(f"error: {line}", file=sys.stderr, flush=True)


def tell_unforeseen(error: BaseException, doing: str) -> None:
    """Say in one line what came up while `doing` something, and put its traceback where a person finds it."""
    tell(f"while {doing}{_place(error)}: {words_of(error)}; {_traceback_of(error)}")


def words_of(error: BaseException) -> str:
    """An exception's class and own words in one line of bounded length, also where it cannot say them."""
    kind = type(error)
    name = (
        kind.__qualname__ if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{kind.__qualname__}"
    )
    try:
        words = " ".join(str(error).split())
    except BaseException as second:  # noqa: BLE001 - whatever an exception does when it is asked
        words = f"it cannot be printed ({type(second).__name__})"
    if len(words) > _MOST_WORDS:
        words = f"{words[: _MOST_WORDS - 100]} ... {words[-90:]}"
    return f"{name}: {words}" if words else f"{name}, which says nothing"


def guard_imports(command: str) -> None:
    """Also what comes up before a command has begun, while its libraries are loaded, is told in one line."""
    prepare_streams()

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
        else:
            tell_unforeseen(error, f"starting {command}")

    def thread_hook(found: threading.ExceptHookArgs) -> None:
        if found.exc_value is not None and not isinstance(found.exc_value, SystemExit):
            named = found.thread.name if found.thread else "a thread"
            tell_unforeseen(found.exc_value, f"{command} was at work in {named}")

    sys.excepthook, threading.excepthook = hook, thread_hook
    # Before the configuration is composed, this is all that can be known of it.
    settings = {argument.lstrip("+") for argument in sys.orig_argv}
    _speech.shows_traceback = bool(settings & {"job.traceback=true", "job.traceback=True"})


def prepare_streams() -> None:
    """Letters that a terminal or a file cannot hold are written as \\x.., and a stream that is closed is no error."""
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - for as long as we run
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def flush_or_silence() -> None:
    """What is still to be written may be what failed; Python would try, and complain, once more when it closes it."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _place(error: BaseException) -> str:
    """The innermost function of this project that the exception came through."""
    found = ""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        try:
            file = Path(code.co_filename).relative_to(_PROJECT)
        except ValueError:
            file = None
        if file is not None and file.parts[0] in ("neg_service", "jobs") and file != Path("jobs/entry.py"):
            found = f" ({code.co_name} in {file}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return found


def _traceback_of(error: BaseException) -> str:
    """Where the traceback is, for a person who wants to know more."""
    try:
        text = without_secrets("".join(traceback.format_exception(error)))
    except Exception as second:  # noqa: BLE001 - such as a second lack of memory
        return f"its traceback cannot be made ({type(second).__name__})"
    if _speech.shows_traceback:
        with suppress(OSError):
            print(text, file=sys.stderr, end="", flush=True)
        return "its traceback stands above"
    reason = ""
    for directory in _places():
        try:
            handle, path = tempfile.mkstemp(prefix="neg_service-traceback-", suffix=".txt", dir=directory)
            with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError as problem:
            reason = reason or f"{problem.strerror or problem}"
        else:
            return f"its traceback is in {path}"
    return f"its traceback cannot be kept ({reason}): job.traceback=true prints it"


def _places() -> Iterator[Path | None]:
    """Where a traceback may lie: the place for temporary files, else the cache."""
    yield None
    cache = os.environ.get("NEG_SERVICE_CACHE") or os.environ.get("XDG_CACHE_HOME") or os.environ.get("HOME")
    if cache:
        yield Path(cache)
