"""What a refusal says, asserted by its type and its fields; sentences are asserted only by tests of sentences.

A refusal names the setting (or, in the library, the parameter) that is to be changed, the value that it has, and what
is allowed. Tests that ask for these go on to hold when a sentence is put better, and fail when the refusal is gone or
is about something else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import ANY

import pytest

from neg_service.errors import NOT_GIVEN, NegServiceError

__all__ = ["ANY", "NOT_GIVEN", "assert_refusal", "refused"]


@contextmanager
def refused(
    kind: type[NegServiceError], setting: Any = ANY, value: Any = ANY, says: str = "", *, allowed: Any = ANY
) -> Iterator[pytest.ExceptionInfo[NegServiceError]]:
    """What is run within is refused, with an error of this kind and with these fields; what is left out is not asked.

    setting: its key or the name of its parameter; None where none can be changed.
    value: compared as it is shown; `NOT_GIVEN` where the error shows none.
    allowed: what it must be, whole.
    says: a regular expression for a fact that no field carries, such as the name of a prompt or the limit.
    """
    with pytest.raises(kind) as caught:
        yield caught
    assert_refusal(caught.value, setting, value, says, allowed=allowed)


def assert_refusal(
    error: NegServiceError, setting: Any = ANY, value: Any = ANY, says: str = "", *, allowed: Any = ANY
) -> None:
    """The error has these fields and is told in one line."""
    assert setting == error.setting, f"{error.setting} is to be changed, not {setting}: {error}"
    if value is not ANY:
        assert _shown(value) == _shown(error.value), str(error)
    assert allowed == error.allowed, str(error)
    assert re.search(says, str(error)), f"{says} is not in: {error}"
    assert "\n" not in str(error)


def _shown(value: Any) -> str:
    return "" if value is NOT_GIVEN else str(value)
