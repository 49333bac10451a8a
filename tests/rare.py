"""Which of many cases that take the same path are run each time; the others are run with the faults."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def one_of(n: int, cases: Iterable[Any]) -> list[Any]:
    """One of each `n` cases is run each time, beginning with the first."""
    return [own if i % n == 0 else _rare(own) for i, own in enumerate(cases)]


def _rare(case: Any) -> Any:
    values, marks, name = (case.values, case.marks, case.id) if hasattr(case, "marks") else (case, (), None)
    if not isinstance(values, tuple):
        values = (values,)
    return pytest.param(*values, marks=(*marks, pytest.mark.faults), id=name)
