"""Short forms on the command line say the same as what they are short for."""

from __future__ import annotations

import pytest

from jobs.entry import composed
from jobs.shorthand import written_out
from neg_service.config import ScanConfig
from neg_service.errors import ConfigurationError
from neg_service.prompts.tasks import TASKS
from tests.refusals import refused


@pytest.mark.parametrize("task", ["ner", "amazon-review-multi", "all"])
def test_a_task_is_a_data_set_by_its_short_name(task: str) -> None:
    short = composed("scan", [f"dataset=mceval8k/{task}", "dataset.limit=3"], ScanConfig)
    assert short == composed("scan", ["dataset=mceval8k", f"dataset.task={task}", "dataset.limit=3"], ScanConfig)
    assert (short.dataset.task, short.dataset.limit) == (task, 3)


def test_every_task_can_be_named() -> None:
    for task in TASKS:
        assert written_out([f"dataset=mceval8k/{task}"]) == [f"dataset.task={task}", "dataset=mceval8k"]


def test_a_task_that_was_typed_counts_wherever_it_stands() -> None:
    for given in (["dataset=mceval8k/ner", "dataset.task=paws"], ["dataset.task=paws", "dataset=mceval8k/ner"]):
        assert composed("scan", given, ScanConfig).dataset.task == "paws"


def test_what_is_not_short_stays() -> None:
    given = ["dataset=facts", "dataset=mceval8k", "job.name=dataset=mceval8k/ner", "dataset.source=mceval8k/ner"]
    assert written_out(given) == given


def test_several_tasks_are_several_values_of_one_setting() -> None:
    assert written_out(["dataset=mceval8k/ner,mceval8k/paws"]) == ["dataset.task=ner,paws", "dataset=mceval8k"]
    with refused(ConfigurationError, "dataset.task", "facts,ner"):
        composed("scan", ["dataset=mceval8k/facts,mceval8k/ner"], ScanConfig)
    with refused(ConfigurationError, "dataset", "facts,mceval8k/ner", says="mceval8k/ner is short for dataset=mce"):
        written_out(["dataset=facts,mceval8k/ner"])
