"""Tasks in processes of their own, one at a time, each with a limit on its time: one that fails costs no other.

All processes start at once, so that what they import takes its time beside the first task, and each waits for its
turn. What a task tells on its way is kept, also of one that fails or is ended. Nothing here imports torch: a process
that is to use a GPU has to be the first to ask for it.
"""

from __future__ import annotations

import importlib
import multiprocessing
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

# A step that begins has no value yet.
Tell = Callable[[str, Any], None]
STARTING_SECONDS = 300.0


@dataclass(frozen=True)
class Task:
    """`module.function(tell, *arguments)`, imported where it runs; it calls `tell(step, value)`, None when one begins.

    What is told and the arguments must be such as can be sent to another process.
    """

    module: str
    function: str
    arguments: tuple[Any, ...] = ()


@dataclass
class Outcome:
    """What a task told, by step, its seconds, and why it did not come to its end, with the step that it was at."""

    told: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    failed: str | None = None


def one_after_the_other(tasks: Mapping[str, Task], seconds: float) -> dict[str, Outcome]:
    """Run tasks, each for at most so many seconds; a process that takes longer is killed."""
    spawn = multiprocessing.get_context("spawn")
    waiting = {}
    for name, task in tasks.items():
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_serve, args=(theirs, task), daemon=True)
        process.start()
        theirs.close()
        waiting[name] = process, ours
    try:
        return {name: _followed(process, pipe, seconds) for name, (process, pipe) in waiting.items()}
    finally:
        for process, _ in waiting.values():
            process.kill()
            process.join()


def _followed(process: Any, pipe: Connection, seconds: float) -> Outcome:
    found, step = Outcome(), ""
    try:
        if not pipe.poll(STARTING_SECONDS):
            return Outcome(failed=f"its process did not start within {STARTING_SECONDS:g} s")
        pipe.recv()
        began = time.monotonic()
        pipe.send("run")
        while pipe.poll(max(0.0, began + seconds - time.monotonic())):
            told = pipe.recv()
            if told is None:
                break
            step, value = told
            if value is not None:
                found.told[step] = value
        else:
            found.failed = f"{_at(step)}was not ready within {seconds:g} s, and was ended"
        found.seconds = time.monotonic() - began
    except (EOFError, ConnectionError):
        process.join()
        found.failed = f"{_at(step)}its process ended with {process.exitcode}; stderr says why"
    process.kill()
    process.join()
    return found


def _at(step: str) -> str:
    return f"{step}: " if step else ""


def _serve(pipe: Connection, task: Task) -> None:
    function = getattr(importlib.import_module(task.module), task.function)
    pipe.send("ready")
    pipe.recv()
    function(lambda step, value: pipe.send((step, value)), *task.arguments)
    pipe.send(None)
