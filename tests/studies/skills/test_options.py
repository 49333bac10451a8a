"""What a study of skill neurons refuses before anything is scanned, and which contexts it compares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from neg_service.errors import ConfigurationError
from neg_service.studies.skills.options import Context, SkillOptions, check_options, contexts_of
from tests.refusals import refused

GOOD = SkillOptions(sizes=[1, 3, 8], shard_size=24, train_sizes=[24], block=3, blocks=2)


def test_good_options_are_taken() -> None:
    check_options(GOOD)
    check_options(SkillOptions())


@pytest.mark.parametrize(
    ("changed", "refusal"),
    [
        ({"sizes": [0]}, ("probe.sizes", "0", "at least 1")),
        ({"probes": ["forests"]}, ("probe.probes", "forests", "did you mean forest")),
        ({"studies": ["all"]}, ("probe.studies", "all")),
        ({"block": 0}, ("probe.block", "0", "at least 1")),
        ({"block": 9}, ("probe.block", "9", r"at most 8, the largest of probe\.sizes")),
        ({"seed": -1}, ("probe.seed", "-1", "0 or more")),
        ({"probes": []}, ("probe.probes", "[]", "give at least one")),
        ({"shard_size": 8}, ("probe.shard_size", "8", "the probe activation")),
        ({"train_sizes": [25]}, ("probe.train_sizes", "[25]", r"multiple of probe\.shard_size=24")),
        ({"sizes": [3, 8], "efficiency_neurons": 2}, ("probe.efficiency_neurons", "2", "at least 3")),
        ({"contexts": [{"shot": 0}]}, ("probe.contexts[0]", "{'shot': 0}", "must have some of template, shots")),
    ],
)
def test_bad_options_are_refused_before_anything_is_scanned(changed: dict[str, Any], refusal: tuple[Any, ...]) -> None:
    with refused(ConfigurationError, *refusal):
        check_options(replace(GOOD, **changed))


def test_contexts_are_those_asked_for_or_every_template_no_shots_and_other_demonstrations() -> None:
    base = Context("default", 1, 4)
    assert contexts_of(SkillOptions(), base, ["default", "brief"]) == [
        base, Context("brief", 1, 4), Context("default", 0, 4), Context("default", 1, 5),
    ]  # fmt: skip
    asked = SkillOptions(contexts=[{"shots": 2}, {"shots": 1}])
    assert contexts_of(asked, base, ["default", "brief"]) == [base, Context("default", 2, 4)]
