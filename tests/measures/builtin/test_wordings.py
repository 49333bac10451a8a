"""Side effects of `control` at other wordings of its prompts: scans against the library, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import neg_service
from neg_service.cluster.prepare import prepare
from neg_service.config import DatasetConfig, JobConfig, ModelConfig, NeuronsConfig, ScanConfig, StorageConfig
from neg_service.errors import ConfigurationError, PromptError
from neg_service.measures import measure_of
from neg_service.prompts.prompt import Prompt
from neg_service.report.sections import sections_of
from neg_service.report.sections.loading import Loaded
from neg_service.storage.reader import Run
from tests.here import scan_here
from tests.refusals import ANY, refused
from tests.report.conftest import unrendered
from tests.shards import INFO, PROMPTS, measured_shard
from tests.tiny_models import tiny_model

REFERENCES = [["w50 w51 w52", " w1"], ["w53 w54 w55", " w2"]]
METHODS = ["shift", "logit constant", "random neurons"]
# The first has two wordings, the second one, the third none.
WORDED = [
    replace(PROMPTS[0], wordings=(("w3 w9 w26", None), ("w15 w5", None))),
    replace(PROMPTS[1], wordings=(("w30 w31", None),)),
    PROMPTS[2],
]


def measured(prompts: list[Prompt] = WORDED, **options: Any) -> Any:
    measure = measure_of({"name": "control", "probability": 0.02, "tolerance": 1e-4, **options}).of_prompts(prompts)
    measure.validate(INFO, NeuronsConfig(), prompts)
    return measured_shard(measure, tiny_model("Llama 2", torch.float64), prompts)


@pytest.mark.parametrize("references", [None, REFERENCES])
def test_rows_of_wordings_are_those_of_the_library(references: list[list[str]] | None) -> None:
    rows = measured(references=references)["control_side_effects"].to_pylist()
    kinds = {"a": ["wordings"], "b": ["wordings"], "c": []}
    assert [(row["prompt_id"], row["kind"], row["method"]) for row in rows] == [
        (who, kind, method)
        for who, own in kinds.items()
        for kind in [*["references"] * bool(references), *own]
        for method in METHODS
    ]
    model = tiny_model("Llama 2", torch.float64)
    texts = [prompt.text for prompt in WORDED]
    targets = [prompt.targets[prompt.answer or 0] for prompt in WORDED]
    result = neg_service.control(model, texts, targets, probability=0.02, tolerance=1e-4)
    wordings = [[text for text, _ in prompt.wordings or ()] for prompt in WORDED]
    pairs = [(prompt, answer) for prompt, answer in REFERENCES]
    own_effects = neg_service.side_effects(model, result, texts, targets, pairs, wordings=wordings).table().to_pylist()
    expected = [row for row in own_effects if references or row["kind"] == "wordings"]
    for name in ("n", "target_probability_before", "target_probability", "target_probability_high", "kl", "size"):
        found = [np.array([row[name] for row in own], np.float64) for own in (rows, expected)]
        np.testing.assert_allclose(*found, rtol=1e-6, err_msg=name)


def test_each_target_is_read_behind_its_wordings() -> None:
    rows = measured(WORDED[:1], keep="all")["control_side_effects"].to_pylist()
    shifts = [row for row in rows if row["method"] == "shift"]
    assert [row["target"] for row in shifts] == list(PROMPTS[0].targets)
    model = tiny_model("Llama 2", torch.float64)
    for row in shifts:
        worded = [neg_service.neurgrad(model, [text], [[row["target"]]]) for text, _ in WORDED[0].wordings or ()]
        mean = np.mean([float(found.probability[0, 0]) for found in worded])
        assert row["target_probability_before"] == pytest.approx(mean, rel=1e-5)


def test_prompts_say_their_wordings_and_runs_without_are_as_before() -> None:
    found = measured()
    assert found["prompts"]["wordings"].to_pylist() == [["w3 w9 w26", "w15 w5"], ["w30 w31"], []]
    for prompts, options in ((PROMPTS, {}), (WORDED, {"wordings": False})):
        plain = measured(prompts, **options)
        assert "control_side_effects" not in plain
        assert "wordings" not in plain["prompts"].column_names
    measure = measure_of({"name": "control"})
    assert "wordings" not in measure.of_prompts(PROMPTS).fingerprint_inputs()
    assert measure.of_prompts(WORDED).fingerprint_inputs()["wordings"] is True


def test_wordings_that_cannot_be() -> None:
    with refused(ConfigurationError, setting="measure.wordings"):
        measured(PROMPTS, wordings=True)
    with pytest.raises(PromptError, match=r"prompt 'b': its wording 0 is in measure\.references, too"):
        measured(references=[["w30 w31", " w1"], *REFERENCES])
    with pytest.raises(PromptError, match=r"prompt 'a': its wording 1 is in measure\.holding, too"):
        measured(holding=[["w15 w5", " w1"]])
    with pytest.raises(PromptError, match=r"'a' has wordings, and measure=sweep has no use for them: .*wordings: ''"):
        measure_of({"name": "sweep"}).of_prompts(WORDED)


def rows_of(*wordings: Any) -> str:
    rows = [
        {"prompt": f"w{i} w{i + 9}", "targets": [" w7", " w8"], "answer": " w8", "id": f"p{i}", "wordings": own}
        for i, own in enumerate(wordings, 20)
    ]
    return "\n".join(map(json.dumps, rows))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_directory: Path) -> ScanConfig:
    place = tmp_path_factory.mktemp("worded")
    (place / "rows.jsonl").write_text(rows_of(["w2 w3", "w4"], None, ["w5"]))
    return ScanConfig(
        model=ModelConfig(source=str(tiny_directory)),
        dataset=DatasetConfig(source=str(place / "rows.jsonl")),
        measure={"name": "control", "probability": [0.02, 0.1], "max_passes": 3},
        storage=StorageConfig(uri=str(place / "runs")),
        job=JobConfig(shard_size=1),
    )


@pytest.fixture(scope="module")
def run(config: ScanConfig) -> Run:
    return scan_here(config)


def test_a_scan_measures_at_the_wordings_of_its_rows(config: ScanConfig, run: Run) -> None:
    rows = run.table("control_side_effects").to_table().to_pylist()
    assert [(row["prompt_id"], row["n"]) for row in rows if row["method"] == "shift"] == [("p20", 2)] * 2 + [
        ("p22", 1)
    ] * 2
    # What was found out is not asked for again where the run goes on.
    assert prepare(config).uri == run.uri
    other = replace(config, measure={**config.measure, "wordings": False})
    assert prepare(other).uri != run.uri


def test_the_report_says_what_becomes_of_other_wordings(run: Run) -> None:
    with unrendered():
        _, section = sections_of(Loaded([run]))
    (grid,) = [grid for grid in section.grids if grid.title == "Side effects, by method"]
    shown = [dict(zip(grid.head, row, strict=True)) for row in grid.rows]
    assert [(row["other prompts"], row["method"], row["KL, nats"]) for row in shown] == [
        ("wordings", method, "-") for method in METHODS
    ]
    rows = run.table("control_side_effects").to_table().to_pylist()
    change = [row["target_probability"] - row["target_probability_before"] for row in rows if row["method"] == "shift"]
    assert shown[0]["p of the target there, change"].startswith(f"{np.median(change):+.4f} (")
    assert "carried-0" in [picture.name for picture in section.pictures]


def test_an_extended_run_names_rows_of_which_wordings_alone_differ(
    config: ScanConfig, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "more.jsonl").write_text(rows_of(["w2 w3", "w4"], None, ["w6"], None))
    asked = replace(
        config,
        dataset=replace(config.dataset, source=str(tmp_path / "more.jsonl")),
        job=replace(config.job, extend=run.uri),
    )
    says = "1 has another at, other messages or other wordings ('p22')"
    with refused(PromptError, "dataset.source", ANY, says=re.escape(says)):
        prepare(asked)
    (tmp_path / "more.jsonl").write_text(rows_of(["w2 w3", "w4"], None, ["w5"], None))
    extended = scan_here(asked)
    assert extended.table("control_side_effects").count_rows() == 3 * 4
