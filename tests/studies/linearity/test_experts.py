"""Linearity of a tiny mixture: neurons of the same number in several experts are told apart, unused ones left out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neg_service.config import NeuronsConfig
from neg_service.layer_neurons import NO_EXPERT
from neg_service.measures.builtin.baselines import random_draw
from neg_service.neurons import NeuronSet
from neg_service.schema import LINEAR
from neg_service.storage.reader import Run, open_run
from neg_service.studies.linearity.curves import CurveRouting, by_layer
from neg_service.studies.linearity.options import LinearityOptions
from neg_service.studies.linearity.pipeline import run_linearity
from neg_service.studies.linearity.report import layer_cells, routing_cells, routing_text, tables_text
from neg_service.studies.linearity.tables import linearity_tables
from neg_service.studies.linearity.triples import integrals_of, triples_of
from neg_service.studies.scans import StudyScans
from neg_service.studies.tables import StudyTables
from tests.here import scan_here
from tests.mixtures import tiny_mixture
from tests.studies.linearity.scans import configured, rows

ESTIMATORS = ["neurgrad", "integrated_gradients", "random"]
OPTIONS = LinearityOptions(
    neurons=2, ranges=[1.0], range_prompts=1, sets=[6], draws=10, steps=2, grid="coarse", answered="all", keep="all",
    estimators=ESTIMATORS,
)  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyTables, dict[str, Run]]:
    """The tables of a study, and its runs by what they were for."""
    place = tmp_path_factory.mktemp("mixture")
    model = tiny_mixture("DeepSeek 3")
    model.model.save_pretrained(place / "model")
    model.tokenizer.save_pretrained(place / "model")
    prompts = [{**row, "targets": row["targets"][:2]} for row in rows()[:3]]
    scans = StudyScans(configured(place / "model", place, prompts), scan_here)
    return run_linearity(OPTIONS, scans), {purpose: open_run(uri) for purpose, uri in scans.runs}


def swept(runs: dict[str, Run]) -> list[dict[str, Any]]:
    return list(runs["sweep"].table("sweep").to_table().to_pylist())


@pytest.mark.faults
def test_triples_meet_the_estimates_of_their_own_expert(study: tuple[StudyTables, dict[str, Run]]) -> None:
    _, runs = study
    triples = triples_of(runs["sweep"], ESTIMATORS, seed=3)
    integrals = integrals_of(runs["integrated_gradients"], triples)
    stored = {
        (row["prompt_id"], row["target"], row["layer"], row["expert"]): row["integrated_gradients"]
        for row in runs["integrated_gradients"].table("integrated_gradients").to_table().to_pylist()
    }
    neg = {
        (row["prompt_id"], row["target"], row["layer"], row["expert"], row["neuron"]): row["neg"]
        for row in swept(runs)
    }  # fmt: skip
    assert len(triples.neg) == len(neg)
    for i, (layer, expert, neuron) in enumerate(triples.rows.tolist()):
        prompt, target = triples.prompts[triples.prompt[i]], triples.targets[triples.target[i]]
        key = (prompt, target, layer, None if expert == NO_EXPERT else expert)
        assert triples.neg[i] == neg[(*key, neuron)]
        assert integrals[i] == stored[key][neuron]
        assert triples.estimates["random"][i] == random_draw(3, prompt, target, layer, 20, expert)[neuron]
    # Its neurons are of several experts of a layer.
    assert len(np.unique(triples.expert)) > 3


@pytest.mark.faults
def test_neurons_of_experts_that_a_prompt_does_not_use_are_left_out_and_counted(
    study: tuple[StudyTables, dict[str, Run]], tmp_path: Path
) -> None:
    tables, runs = study
    assert tables.rows["estimators"][0]["n"] == len(swept(runs)) > 0
    # 0 is the only layer without experts: the points say whose neuron each is.
    assert {row["layer"] for row in tables.rows["points"] if row["expert"] is None} == {0}
    config = configured(Path(runs["sweep"].about["model"]["source"]), tmp_path, rows()[:1])
    asked = [[0, 3, None], [1, 3, -1], *([1, 3, expert] for expert in range(8))]
    neurons = NeuronsConfig(choose="list", list=NeuronSet.from_pairs(asked))
    run = scan_here(replace(config, measure={"name": "sweep", "shifts": [-1.0, 1.0]}, neurons=neurons))
    triples = triples_of(run, ["neurgrad"], seed=0)
    # A token uses three of eight experts; three targets each.
    assert len(triples.neg) == 3 * (2 + 3)
    assert triples.routing is not None
    assert triples.routing.unused_layer.tolist() == [1] * 3 * 5
    layers = linearity_tables(triples)["layers"]
    assert [(row["layer"], row["n_unused"]) for row in layers] == [(None, 15), (0, 0), (1, 15)]
    assert "15 curves of experts that prompts do not use" in routing_text(layers)


@pytest.mark.faults
def test_linearity_is_told_with_and_without_other_experts_chosen_above(
    study: tuple[StudyTables, dict[str, Run]],
) -> None:
    tables, runs = study
    own = [row for row in swept(runs) if row["is_resolved"]]
    whole = tables.rows["layers"][0]
    changed = [abs(row["r"]) >= LINEAR for row in own if row["routing_changed"] > 0]
    same = [abs(row["r"]) >= LINEAR for row in own if row["routing_changed"] == 0]
    assert whole["n_rerouted"] == len(changed) > 0
    assert whole["share_linear_rerouted"] == pytest.approx(np.mean(changed))
    assert whole["share_linear_same_experts"] == pytest.approx(np.mean(same))
    text = tables_text(tables.arrow())
    assert routing_text(tables.rows["layers"]) in text
    assert all(cell in text for cell in (*layer_cells(whole), *routing_cells(whole)))


@pytest.mark.faults
def test_sets_are_predicted_from_their_neurons_that_a_prompt_uses(
    study: tuple[StudyTables, dict[str, Run]],
) -> None:
    tables, runs = study
    edit = runs["sets"].config["measure"]["edits"][0]
    assert all(len(neuron) == 3 for neuron in edit["neurons"])
    members = {(layer, expert, neuron) for layer, neuron, expert in edit["neurons"]}
    joint = {
        (row["prompt_id"], row["target"]): row for row in runs["sets"].table("intervene").to_table().to_pylist()
        if row["edit"] == edit["name"]
    }  # fmt: skip
    own = [row for row in swept(runs) if (row["layer"], row["expert"], row["neuron"]) in members]
    for (prompt, target), row in joint.items():
        assert row["n_routed"] == sum((one["prompt_id"], one["target"]) == (prompt, target) for one in own)
    (added,) = tables.rows["additivity"]
    assert added["pearson"] > 0.5


def test_a_layer_none_of_whose_curves_changed_the_routing_has_no_share_of_such() -> None:
    ones = np.ones(3)
    routing = CurveRouting(np.array([True, False, False]), np.array([1, 1]))
    r = np.array([0.5, 1.0, 0.2])
    found = {row["layer"]: row for row in by_layer(r, ones, ones, ones > 0, np.array([0, 0, 1]), routing)}
    names = ("n_rerouted", "share_linear_rerouted", "share_linear_same_experts", "n_unused")
    assert [tuple(found[layer][name] for name in names) for layer in (None, 0, 1)] == [
        (1, 0.0, 0.5, 2), (1, 0.0, 1.0, 0), (0, None, 0.0, 2),
    ]  # fmt: skip
    assert "n_rerouted" not in by_layer(r, ones, ones, ones > 0, np.array([0, 0, 1]))[0]
