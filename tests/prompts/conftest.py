"""What is told once a process is told in each test that asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from neg_service.prompts import added


@pytest.fixture
def nothing_told() -> Iterator[None]:
    """As if nothing had been told of a tokenizer yet."""
    before = set(added._told)
    added._told.clear()
    yield
    added._told.clear()
    added._told.update(before)
