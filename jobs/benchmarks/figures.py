"""Figures over repeats, bars, and processes that take turns.

A ratio is taken within each repeat and then summarised, so that a slow moment of a shared machine hits both sides.
"""

from __future__ import annotations

import multiprocessing
import operator
import sys
from collections.abc import Callable, Collection, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

# What the names of ways end with that multiply otherwise than those without: where it is chosen, the engine has oneDNN
# and the ways beside it have not.
FAST, OFF = ", with oneDNN", ", with PyTorch's own product"


def figure(values: Sequence[float], unit: str) -> dict[str, Any]:
    """Median, minimum and maximum of the repeats."""
    return {"median": _short(median(values)), "min": _short(min(values)), "max": _short(max(values)), "unit": unit}


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, Any]:
    """Of two ways that took turns, repeat by repeat."""
    return figure([a / b for a, b in zip(over, under, strict=True)], "ratio")


def bar(name: str, value: float, limit: float, *, at_most: bool) -> dict[str, Any]:
    """A figure against what it has to reach."""
    reached = operator.le(value, limit) if at_most else operator.ge(value, limit)
    return {"name": name, "value": value, "bar": f"{'<=' if at_most else '>='} {limit:g}", "reached": reached}


def all_reached(bars: Sequence[dict[str, Any]]) -> bool:
    """Whether every bar is."""
    return all(one["reached"] for one in bars)


def taking_turns(
    ways: dict[str, Callable[[], Callable[[], float]]], repeats: int, seldom: Collection[str] = ()
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Run each way in a process of its own, one after the other, `repeats` rounds after one that is not counted.

    `ways[name]()` gets a way ready in its process; what it gives runs once and returns its figure. What takes long is
    `seldom` run, in every other repeat from the first on, and gets warm on its own.

    Returns:
        The figures of each way, and the peak memory of its process in MiB, of each repeat.
    """
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name, prepare in ways.items():
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_serve, args=(theirs, prepare), daemon=True)
        process.start()
        theirs.close()
        pipes[name] = ours
        processes.append(process)
    found: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, pipe in pipes.items():
            if name in seldom and turn % 2 == 0:
                continue
            pipe.send("run")
            value, peak = pipe.recv()
            sys.stderr.write(f"{'warm-up' if turn == 0 else f'repeat {turn} of {repeats}'}: {name} {value:.4g}\n")
            if turn:
                found[name].append(value)
                peaks[name].append(peak)
    for pipe in pipes.values():
        pipe.send("end")
    for process in processes:
        process.join()
    return found, peaks


def _serve(pipe: Connection, prepare: Callable[[], Callable[[], float]]) -> None:
    run = prepare()
    while pipe.recv() == "run":
        # Linux forgets the highest resident size so far when a 5 is written here.
        Path("/proc/self/clear_refs").write_text("5")
        value = run()
        status = Path("/proc/self/status").read_text()
        pipe.send((value, int(status.split("VmHWM:")[1].split()[0]) / 1024))


def _short(value: float) -> float:
    return float(f"{value:.4g}")
