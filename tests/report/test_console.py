"""Text for a terminal."""

from __future__ import annotations

import numpy as np
import pytest

from neg_service.report.console import Correlation, aligned, columns


def test_rows_stand_in_two_columns_of_which_the_second_may_have_several_lines() -> None:
    shown = aligned([("model", "x (y)"), ("basis", "a: b\nc: d"), ("of digits", "0012"), ("empty", "")])
    assert shown.splitlines() == [
        "  model      x (y)",
        "  basis      a: b",
        "             c: d",
        "  of digits  0012",
        "  empty",
    ]


def test_numbers_of_a_table_stand_to_the_right_as_they_are_written() -> None:
    shown = columns(("task", "n", "%"), [("ner", "7", "1.50"), ("agnews", "1200", "")])
    assert shown.splitlines() == ["  task       n     %", "  ner        7  1.50", "  agnews  1200"]


def test_a_correlation_of_parts_is_that_of_the_whole() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=1000) + 1e6
    y = x + draw.normal(size=1000)
    found = Correlation()
    assert np.isnan(found.value)
    for part in np.split(np.arange(1000), [0, 1, 300, 301, 999]):
        found.add(x[part], y[part])
    assert found.value == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-9)
    constant = Correlation()
    constant.add(np.ones(3), np.arange(3.0))
    assert np.isnan(constant.value)
