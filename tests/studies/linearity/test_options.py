"""What a study of linearity refuses before anything is scanned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from neg_service.errors import ConfigurationError
from neg_service.studies.linearity.options import LinearityOptions, check_options
from tests.refusals import refused


@pytest.mark.parametrize(
    ("changed", "refusal"),
    [
        ({"estimators": []}, ("study.estimators", "[]", "at least one of")),
        ({"estimators": ["neurgrads"]}, ("study.estimators", "neurgrads", "did you mean neurgrad")),
        (
            {"estimators": ["neurgrad", "neurgrad"]},
            ("study.estimators", "['neurgrad', 'neurgrad']", "one is named twice"),
        ),
        ({"sets": [2, 2]}, ("study.sets", "[2, 2]", "one is named twice")),
        ({"sets": [0]}, ("study.sets", "0", "at least 1")),
        ({"answered": "rightly"}, ("study.answered", "rightly", "right or all")),
        ({"grid": "fine"}, ("study.grid", "fine", "adaptive, full, coarse")),
        ({"ranges": [0.0]}, ("study.ranges", "[0.0]")),
        ({"ranges": [-1]}, ("study.ranges", "[-1]", "positive numbers")),
        ({"ranges": []}, ("study.ranges", "[]", "positive numbers, at least one")),
        ({"neurons": 0}, ("study.neurons", "0", "at least 1")),
        ({"prompts": 0}, ("study.prompts", "0", "at least 1")),
        ({"draws": 0}, ("study.draws", "0", "at least 1")),
        ({"keep": "top_k"}, ("study.keep", "top_k", "all or answer")),
        ({"seed": -1}, ("study.seed", "-1", "0 or more")),
        ({"set_shift": float("inf")}, ("study.set_shift", "inf", "a finite number")),
    ],
)
def test_bad_options_are_refused_before_anything_is_scanned(changed: dict[str, Any], refusal: tuple[Any, ...]) -> None:
    with refused(ConfigurationError, *refusal):
        check_options(replace(LinearityOptions(), **changed))
