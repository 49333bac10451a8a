"""Tasks for processes of their own: one that hangs, one that dies, one that ends."""

from __future__ import annotations

import os
import time

from jobs.benchmarks.isolated import Tell


def hangs(tell: Tell) -> None:
    tell("first", None)
    tell("first", 1)
    tell("second", None)
    time.sleep(600)


def dies(tell: Tell) -> None:
    tell("alone", None)
    os._exit(3)


def ends(tell: Tell, value: int) -> None:
    tell("whole", value)
