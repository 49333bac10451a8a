"""The report and the console on runs of a tiny mixture: which expert a neuron is of, and what experts carry."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from neg_service.config import NeuronsConfig
from neg_service.neurons import NeuronSet
from neg_service.report.console import agreement, describe_tables, strongest
from neg_service.report.page import Section
from neg_service.report.sections import sections_of
from neg_service.report.sections.loading import Loaded
from neg_service.schema import LINEAR
from neg_service.storage.reader import Run
from tests.mixtures import tiny_mixture
from tests.report.runs import grid_of, only_section, run_of

# Layer and expert; None of the dense layer.
Mlp = tuple[int, int | None]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture: a dense layer, and two with an MLP that is always on and three of eight experts."""
    place = tmp_path_factory.mktemp("mixture")
    model = tiny_mixture("DeepSeek 3")
    model.model.save_pretrained(place / "model")
    model.tokenizer.save_pretrained(place / "model")
    return place


@pytest.fixture(scope="module")
def neurgrad(place: Path) -> Run:
    return run_of(place, place / "model", {"name": "neurgrad"}, answered=False)


@pytest.fixture(scope="module")
def page(neurgrad: Run) -> list[Section]:
    """The overview, and the section of that run."""
    return sections_of(Loaded([neurgrad]))


@pytest.fixture(autouse=True)
def _without_images(page: list[Section], monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn once, of that page; of others they cost more than all the rest."""
    monkeypatch.setattr(Figure, "savefig", lambda self, image, **_: image.write(b""))


def name_of(row: dict[str, str]) -> tuple[int, int | None, int]:
    """The neuron of a row of a page."""
    return int(row["layer"]), None if row["expert"] == "-" else int(row["expert"]), int(row["neuron"])


def test_strongest_neurons_are_named_with_their_expert(neurgrad: Run, page: list[Section]) -> None:
    stored = [row for row in neurgrad.table("neurgrad").to_table().to_pylist() if row["prompt_id"] == "p22"]
    own = {
        (row["layer"], row["expert"], n): value
        for row in stored if row["target"] == " w8" for n, value in enumerate(row["neurgrad"])
    }  # fmt: skip
    best = sorted(own, key=lambda neuron: -abs(own[neuron]))[:5]
    prompt = neurgrad.table("prompts").to_table().to_pylist()[2]["prompt"]
    shown = [row for row in grid_of(page[1], "strongest") if (row["prompt"], row["target"]) == (prompt, " w8")]
    assert [name_of(row) for row in shown] == best
    assert [row["NeurGrad"] for row in shown] == [f"{own[neuron]:+.3e}" for neuron in best]
    found = strongest(neurgrad, "p22", " w8", 5)
    assert [(neuron.layer, neuron.expert, neuron.index) for neuron in found] == best
    activations = {
        (row["layer"], row["expert"]): row["activation"]
        for row in neurgrad.table("activations").to_table().to_pylist() if row["prompt_id"] == "p22"
    }  # fmt: skip
    assert [neuron.values["activation"] for neuron in found] == [
        activations[layer, expert][n] for layer, expert, n in best
    ]
    n_values = sum(len(row["neurgrad"]) for row in neurgrad.table("neurgrad").to_table().to_pylist())
    assert f"{n_values} of NeurGrad" in dict(describe_tables(neurgrad))["values"]


def test_what_experts_carry_and_how_often_they_are_used(neurgrad: Run, page: list[Section]) -> None:
    carried: dict[Mlp, float] = defaultdict(float)
    used: dict[Mlp, set[str]] = defaultdict(set)
    for row in neurgrad.table("neurgrad").to_table().to_pylist():
        carried[row["layer"], row["expert"]] += float(np.abs(row["neurgrad"]).sum())
        used[row["layer"], row["expert"]].add(row["prompt_id"])
    of_layer = {layer: sum(own for key, own in carried.items() if key[0] == layer) for layer in (1, 2)}
    overview, section = page
    rows = {(int(row["layer"]), int(row["expert"])): row for row in grid_of(section, "experts")}
    assert rows.keys() == {key for key in carried if key[1] is not None}
    assert len({len(own) for own in used.values()}) > 1
    for (layer, expert), row in rows.items():
        share = 100 * carried[layer, expert] / of_layer[layer]
        assert float(row["share of the layer, %"]) == pytest.approx(share, abs=0.06)
        assert row["used by prompts, %"] == f"{100 * len(used[layer, expert]) / 5:.1f}"
    assert [picture.name for picture in section.pictures] == ["strength-0", "experts-0"]
    assert "8 experts of 14 neurons, 3 of them used by a token" in overview.grids[0].rows[0][2]


def test_means_over_the_data_set_are_over_all_prompts_also_of_experts_that_a_shard_does_not_use(
    place: Path, neurgrad: Run
) -> None:
    largest: dict[tuple[str, int, int | None], Any] = {}
    for row in neurgrad.table("neurgrad").to_table().to_pylist():
        key = row["prompt_id"], row["layer"], row["expert"]
        largest[key] = np.maximum(largest.get(key, 0.0), np.abs(np.array(row["neurgrad"], np.float64)))
    mean: dict[tuple[int, int | None, int], float] = defaultdict(float)
    for (_, layer, expert), values in largest.items():
        for n, value in enumerate(values.tolist()):
            mean[layer, expert, n] += value / 5
    run = run_of(place, place / "model", {"name": "aggregate_importance"}, answered=False)
    # Three shards, of which some lack an expert that others have.
    rows = run.table("aggregate_importance").to_table().to_pylist()
    of_mlp = [sum((row["layer"], row["expert"]) == key for row in rows) for key in {name[:2] for name in mean}]
    assert min(of_mlp) < max(of_mlp) == 3
    shown = grid_of(only_section(run), "strongest")
    best = sorted(mean, key=lambda neuron: -mean[neuron])[:50]
    assert [name_of(row) for row in shown] == best
    assert [float(row["aggregate importance"]) for row in shown] == pytest.approx(
        [mean[neuron] for neuron in best], rel=2e-3
    )


def test_sweeps_leave_out_what_prompts_do_not_use_and_edits_say_how_many_they_do(place: Path) -> None:
    asked = [[0, 3, None], [1, 3, -1], *([1, 3, expert] for expert in range(8))]
    neurons = NeuronsConfig(choose="list", list=NeuronSet.from_pairs(asked))
    run = run_of(place, place / "model", {"name": "sweep", "shifts": [-1.0, 1.0]}, neurons)
    rows = run.table("sweep").to_table().to_pylist()
    routed = [row for row in rows if row["is_routed"]]
    lines = dict(agreement(run))
    assert lines["curves"].startswith(f"{len(routed)}: ")
    assert lines["left out"].startswith(f"{len(rows) - len(routed)} curves of experts")
    linear = [abs(row["r"]) >= LINEAR for row in routed]
    assert lines["linear"].startswith(f"{100 * np.mean(linear):.1f} %")
    changed = [is_linear for is_linear, row in zip(linear, routed, strict=True) if row["routing_changed"] > 0]
    assert f"for {100 * len(changed) / len(routed):.1f} % some shift" in lines["experts above"]
    shown = grid_of(only_section(run), "swept")
    used = {row["expert"] for row in routed if row["prompt_id"] == "p20" and row["layer"] == 1}
    assert {name_of(row)[1] for row in shown[:5]} == {None, *used}
    assert {row["neuron"] for row in shown} == {"3"}

    edits = [{"name": "all", "neurons": asked, "shift": 1.0}]
    section: Section = only_section(run_of(place, place / "model", {"name": "intervene", "edits": edits}))
    (edit,) = grid_of(section, "edits")
    assert (edit["neurons"], edit["neurons that prompts use, mean"]) == ("10", "5.00")
    assert edit["what"] == "shift 1 of 0:3, 1:3:-1, 1:3:0, …"
