"""What a page says is not what its pictures look like: most tests of reports do without matplotlib's layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import pytest
from matplotlib.figure import Figure

# The smallest PNG: one transparent pixel.
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360000002000001e221bc33"
    "0000000049454e44ae426082"
)


@contextmanager
def unrendered() -> Iterator[None]:
    """Figures are drawn upon as ever, and one pixel is saved of each: to lay one out takes a second."""

    def save(_figure: Figure, file: BytesIO, **_options: Any) -> None:
        file.write(PIXEL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save)
        yield


@pytest.fixture
def rendered() -> None:
    """For a test whose figures are to be real."""


@pytest.fixture(autouse=True)
def _unrendered(request: pytest.FixtureRequest) -> Iterator[None]:
    """All others."""
    if "rendered" in request.fixturenames:
        yield
        return
    with unrendered():
        yield
