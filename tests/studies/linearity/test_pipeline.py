"""A study of a tiny model in this process: which prompts and neurons it is of, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neg_service.cluster.prepare import prepare
from neg_service.config import NeuronsConfig, ScanConfig
from neg_service.errors import ConfigurationError
from neg_service.storage.reader import Run, open_run
from neg_service.studies.linearity.options import LinearityOptions
from neg_service.studies.linearity.pipeline import run_linearity
from neg_service.studies.linearity.triples import triples_of
from neg_service.studies.scans import StudyScans
from neg_service.studies.tables import StudyTables
from tests.here import scan_here
from tests.refusals import refused
from tests.studies.linearity.scans import configured, rows
from tests.tiny_models import tiny_model, tiny_tokenizer

N_LAYERS, N_NEURONS = 3, 40
SMALL = LinearityOptions(
    neurons=4, ranges=[1.0], range_prompts=1, sets=[2], draws=10, steps=2, grid="coarse", estimators=["neurgrad"]
)


@pytest.fixture(scope="module")
def predictions(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Of each prompt, which of its three targets the tiny model takes."""
    folder = tmp_path_factory.mktemp("predictions")
    run = scan_here(configured(tiny_directory, folder, rows()))
    table = run.table("prompts").to_table()
    return dict(zip(table["prompt_id"].to_pylist(), table["prediction"].to_pylist(), strict=True))


def study(config: ScanConfig, options: LinearityOptions, neurons: NeuronsConfig | None = None) -> Study:
    scans = StudyScans(replace(config, neurons=neurons or NeuronsConfig()), scan_here)
    tables = run_linearity(options, scans)
    return Study(tables, dict(scans.runs))


@dataclass
class Study:
    """What was found, and the URIs of the runs by what they were for."""

    tables: StudyTables
    runs: dict[str, str]

    def rows(self, table: str) -> list[dict[str, Any]]:
        return self.tables.rows[table]

    def prompts(self, purpose: str = "sweep") -> list[str]:
        table = open_run(self.runs[purpose]).table("sweep").to_table()
        return list(dict.fromkeys(table["prompt_id"].to_pylist()))


def with_answers(predictions: Mapping[str, int]) -> list[dict[str, Any]]:
    """The first four are answered rightly, the fifth is not, the last has no answer."""
    made = rows()
    for number, row in enumerate(made[:5]):
        place = predictions[row["id"]] if number < 4 else (predictions[row["id"]] + 1) % 3
        row["answer"] = row["targets"][place]
    return made


def test_what_is_answered_rightly_is_studied(tmp_path: Path, tiny_directory: Path, predictions: dict[str, int]) -> None:
    config = configured(tiny_directory, tmp_path, with_answers(predictions))
    found = study(config, replace(SMALL, keep="all"))
    (accuracy,) = found.rows("accuracy")
    median = accuracy.pop("median_probability")
    assert accuracy == {"prompts": 6, "with_answer": 5, "right": 4, "studied": 4}
    prompts = open_run(found.runs["sweep"]).table("prompts").to_table().to_pylist()
    assert median == pytest.approx(np.median([row["probabilities"][row["answer"]] for row in prompts]), rel=1e-5)
    assert found.prompts() == ["p20", "p21", "p22", "p23"]
    # Of right answers alone: a NEG for each prompt, layer and neuron, whatever the number of targets.
    assert found.rows("estimators")[0]["n"] == 4 * N_LAYERS * 4
    everything = study(config, replace(SMALL, keep="all", answered="all"))
    assert everything.prompts() == [f"p{i}" for i in range(20, 26)]


def test_some_of_them_are_drawn_and_ranges_are_spread_over_them(
    tmp_path: Path, tiny_directory: Path, predictions: dict[str, int]
) -> None:
    config = configured(tiny_directory, tmp_path, with_answers(predictions)[:5])
    drawn = {tuple(study(config, replace(SMALL, prompts=2, seed=s)).prompts()) for s in range(2)}
    assert len(drawn) > 1
    for ids in drawn:
        assert len(ids) == 2
        assert list(ids) == sorted(ids)
        assert set(ids) <= {"p20", "p21", "p22", "p23"}
    found = study(config, replace(SMALL, range_prompts=2))
    assert found.prompts("range-1") == ["p20", "p22"]


def test_all_neurons_and_prompts_without_answers(tmp_path: Path, tiny_directory: Path) -> None:
    config = configured(tiny_directory, tmp_path, rows()[:2])
    options = replace(SMALL, neurons=None, keep="all", estimators=["neurgrad", "random", "activation"])
    found = study(config, options, NeuronsConfig([0, 2]))
    assert found.rows("accuracy") == [
        {"prompts": 2, "with_answer": 0, "right": 0, "studied": 2, "median_probability": None}
    ]
    by_name = {row["estimator"]: row for row in found.rows("estimators") if row["layer"] is None}
    assert by_name["neurgrad"]["n"] == 2 * 3 * 2 * N_NEURONS
    assert by_name["neurgrad"]["pearson"] > 0.9
    assert abs(by_name["random"]["pearson"]) < 0.2
    # What has not the unit of NEG has no relative error.
    assert by_name["neurgrad"]["median_relative_error"] < 0.1
    assert np.isnan(by_name["activation"]["median_relative_error"])
    assert {row["layer"] for row in found.rows("layers")} == {None, 0, 2}


def test_of_prompts_with_answers_the_right_ones_are_compared_though_others_have_none(
    tmp_path: Path, tiny_directory: Path, predictions: dict[str, int]
) -> None:
    config = configured(tiny_directory, tmp_path, with_answers(predictions))
    found = study(config, replace(SMALL, keep="all", answered="all"))
    # Five right answers and three targets of the prompt without one, four neurons of three layers.
    assert found.rows("estimators")[0]["n"] == (5 + 3) * 4 * N_LAYERS


@pytest.mark.parametrize(
    ("engine", "at"), [("shared_prefix", None), ("differences", None), ("shared_prefix", 0), ("differences", 0)]
)
def test_the_noise_of_a_change_does_not_depend_on_the_grid_that_it_is_told_from(
    tmp_path: Path, tiny_directory: Path, engine: str, at: int | None
) -> None:
    config = configured(tiny_directory, tmp_path, [{**rows()[0], "at": at}])
    config = replace(config, model=replace(config.model, engine=engine))
    noise = {}
    for grid in ("full", "coarse"):
        measure = {"name": "sweep", "grid": grid}
        run = scan_here(replace(config, measure=measure, neurons=NeuronsConfig(choose="sample", count=3)))
        first = run.table("sweep").head(1).to_pylist()[0]
        assert first["target_index"] == 0
        two_deviations = 2 * first["probability"] * run.about["calibration"]["noise"]["sigma"]
        # Of rows of several tokens the noise is measured on the self-check's tokens, and is the same in each run.
        two_deviations = 1 if at is not None else two_deviations
        noise[grid] = triples_of(run, [], 0).noise[0] / two_deviations
    if at is not None:
        assert noise["coarse"] == pytest.approx(noise["full"], rel=1e-5)
    elif engine == "shared_prefix":
        assert noise == pytest.approx({"full": 1, "coarse": 1}, rel=1e-5)
    else:
        # A share of how far logits spread at the largest shift, which both tell from other shifts.
        assert noise["coarse"] == pytest.approx(noise["full"], rel=0.1)


def test_a_single_prompt_has_no_intervals(tmp_path: Path, tiny_directory: Path) -> None:
    config = configured(tiny_directory, tmp_path, rows()[:1])
    found = study(config, replace(SMALL, keep="all"))
    row = found.rows("estimators")[0]
    assert row["pearson"] > 0.5
    assert np.isnan([row["pearson_low"], row["pearson_high"], row["signs_low"]]).all()


def test_every_scan_is_checked_before_the_first(tmp_path: Path, tiny_directory: Path) -> None:
    config = configured(tiny_directory, tmp_path, rows())

    def scan(_: ScanConfig) -> Run:
        raise AssertionError("scanned")

    options = replace(SMALL, keep="all", neurons=N_NEURONS + 1)
    with refused(ConfigurationError, "study.neurons", N_NEURONS + 1):
        run_linearity(options, StudyScans(config, scan, prepare))


def test_a_masked_model_is_studied_as_any_other(tmp_path: Path) -> None:
    tiny_model("BERT").model.save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    prompts = [{"prompt": f"w{i} [MASK] w{i + 1}", "targets": ["w7", "w8"], "answer": "w7"} for i in (20, 21)]
    config = configured(tmp_path / "bert", tmp_path, prompts)
    options = replace(SMALL, answered="all", estimators=["neurgrad", "integrated_gradients"])
    found = study(config, options)
    by_name = {row["estimator"]: row for row in found.rows("estimators") if row["layer"] is None}
    assert by_name["neurgrad"]["pearson"] > 0.9
    assert np.isfinite(by_name["integrated_gradients"]["pearson"])
    assert found.rows("additivity")[0]["pearson"] > 0.9


def test_what_cannot_be_studied_is_refused_by_the_key_to_change(
    tmp_path: Path, tiny_directory: Path, predictions: dict[str, int]
) -> None:
    wrong = with_answers(predictions)[4:5]
    one_target = [{"prompt": "w1 w2", "targets": [" w7"], "answer": " w7"}]
    sample, every = NeuronsConfig(choose="sample", count=3), NeuronsConfig()
    for prompts, options, neurons, refusal in (
        (wrong, SMALL, every, ("study.answered", "right", "the model answers none of 1 prompts rightly")),
        (one_target, SMALL, every, ("study.answered", "right", "prompts have one target each")),
        # What it hands on to scans is told by its own settings.
        (rows(), SMALL, every, ("study.keep", "answer", "prompt 'p20' has no answer; use study.keep=all")),
        (rows(), replace(SMALL, keep="all", basis="x"), every, ("study.basis", "x")),
        (wrong, SMALL, sample, ("neurons.choose", "sample", "a study draws its neurons")),
    ):
        with refused(ConfigurationError, *refusal):
            study(configured(tiny_directory, tmp_path, prompts), options, neurons)
