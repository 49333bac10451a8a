"""What a study of linearity refuses before anything is scanned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from neg_service.errors import ConfigurationError
from neg_service.studies.linearity.options import LinearityOptions, check_options


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"estimators": []}, r"study.estimators=\[\]: name at least one of"),
        ({"estimators": ["neurgrads"]}, r"neurgrads is unknown; did you mean neurgrad"),
        ({"estimators": ["neurgrad", "neurgrad"]}, "one is named twice"),
        ({"sets": [2, 2]}, r"study.sets=\[2, 2\]: one is named twice"),
        ({"sets": [0]}, "study.sets=0: must be at least 1"),
        ({"answered": "rightly"}, "study.answered=rightly: must be right or all"),
        ({"grid": "fine"}, "study.grid=fine is unknown; known are full, coarse"),
        ({"ranges": [0.0]}, "study.ranges="),
        ({"ranges": [-1]}, r"study.ranges=\[-1\]: must be positive numbers"),
        ({"ranges": []}, r"study.ranges=\[\]: must be positive numbers, at least one"),
        ({"neurons": 0}, "study.neurons=0: must be at least 1"),
        ({"prompts": 0}, "study.prompts=0: must be at least 1"),
        ({"draws": 0}, "study.draws=0: must be at least 1"),
        ({"keep": "top_k"}, "study.keep=top_k is unknown; known are all, answer"),
        ({"seed": -1}, "study.seed=-1: must not be negative"),
        ({"set_shift": float("inf")}, "study.set_shift=inf: must be a finite number"),
    ],
)
def test_bad_options_are_refused_before_anything_is_scanned(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check_options(replace(LinearityOptions(), **changed))
