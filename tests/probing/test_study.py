"""A task with planted skill neurons, probed from its rows to the tables: probes find exactly what was planted."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from neg_service.config import DatasetConfig
from neg_service.errors import ConfigurationError
from neg_service.probing.options import Context, Options
from neg_service.probing.study import Findings, run_probe
from tests.skills import PLANTED, PLANTED_WORDINGS, ScansHere, planted_model, planted_rows, write_split

OPTIONS = Options(
    sizes=[1, 3, 8], shard_size=24, train_sizes=[24], studies=["efficiency", "flexibility"], block=3, blocks=2
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted model and its task."""
    place = tmp_path_factory.mktemp("planted")
    planted_model(place / "model")
    (place / "wordings.toml").write_text(PLANTED_WORDINGS)
    for i, (split, count) in enumerate((("train", 50), ("valid", 26), ("test", 26))):
        write_split(place / "data", "imdb", split, planted_rows(count, 100 * i))
    return place


def found_in(place: Path, options: Options = OPTIONS, data: str = "data") -> Findings:
    """What a probe finds; runs are kept between probes, as a user's are."""
    dataset = DatasetConfig(source=str(place / data), wordings=str(place / "wordings.toml"))
    scans = ScansHere(place / "model", dataset, place / "results", options.shard_size)
    return run_probe(["imdb"], Context(), options, scans, dataset.wordings)


@pytest.fixture(scope="module")
def stored(place: Path) -> Findings:
    """From stored gradients."""
    return found_in(place)


def rows_of(found: Findings, table: str, **keys: Any) -> list[dict[str, Any]]:
    return [row for row in found.rows[table] if all(row[key] == value for key, value in keys.items())]


@pytest.mark.parametrize("kind", ["polarity", "magnitude"])
def test_probes_find_exactly_the_planted_neurons(stored: Findings, kind: str) -> None:
    best = rows_of(stored, "neurons", score_name=kind)[: len(PLANTED)]
    assert {(row["layer"], row["neuron"]): row["polarity"] for row in best} == PLANTED
    # 48 train rows without the two demonstrations; each right label is ahead of one other, in every prompt.
    assert {abs(row["score"]) for row in best} == {96 if kind == "polarity" else 48}
    following = rows_of(stored, "neurons", score_name=kind)[len(PLANTED)]
    assert abs(following["score"]) < 0.8 * abs(best[0]["score"])


def test_planted_neurons_do_the_task(stored: Findings) -> None:
    for probe in ("polarity", "magnitude", "forest", "activation"):
        (row,) = rows_of(stored, "accuracy", probe=probe, split="test", n_neurons=3)
        assert row["accuracy"] == 1.0, probe
        (chosen,) = rows_of(stored, "accuracy", probe=probe, split="test", is_chosen=True)
        assert chosen["accuracy"] == 1.0
    for probe in ("majority", "random"):
        assert max(row["accuracy"] for row in rows_of(stored, "accuracy", probe=probe, split="test")) < 0.9
    assert {row["n_prompts"] for row in rows_of(stored, "accuracy", split="test")} == {26}
    first, second = rows_of(stored, "flexibility", probe="polarity")
    assert (first["first_rank"], first["accuracy"], second["first_rank"]) == (0, 1.0, 3)
    assert second["accuracy"] < 1.0
    assert {row["n_train"] for row in stored.rows["efficiency"]} == {24, 48}


def test_both_ways_choose_the_same_neurons_and_answer_alike(stored: Findings, place: Path) -> None:
    summed = found_in(place, replace(OPTIONS, store_gradients=False))
    for table in ("neurons", "accuracy", "efficiency", "flexibility"):
        assert summed.rows[table] == stored.rows[table], table
    assert {Path(uri).name.split("-")[3] for uri in summed.runs} == {"scores", "votes"}
    # Sums and votes, no gradients: a shard has as many numbers as neurons, and a prompt a few bytes of each chosen one.
    assert not any((Path(uri) / "neurgrad").exists() for uri in summed.runs)


def test_the_test_split_is_seen_by_no_choice(stored: Findings, place: Path) -> None:
    for split, rows in (("train", planted_rows(50, 0)), ("valid", planted_rows(26, 100))):
        write_split(place / "other", "imdb", split, rows)
    # Every label the wrong way round.
    write_split(place / "other", "imdb", "test", [{**row, "label": 1 - row["label"]} for row in planted_rows(26, 200)])
    other = found_in(place, data="other")
    assert other.rows["neurons"] == stored.rows["neurons"]
    for found in (other, stored):
        assert [row["n_neurons"] for row in rows_of(found, "accuracy", probe="polarity", is_chosen=True)] == [1, 1]
    assert rows_of(other, "accuracy", split="valid") == rows_of(stored, "accuracy", split="valid")
    (row,) = rows_of(other, "accuracy", probe="polarity", split="test", n_neurons=3)
    assert row["accuracy"] == 0.0


def test_robustness_and_interdependency(place: Path) -> None:
    options = replace(OPTIONS, studies=["robustness", "interdependency"], suppressed=3, suppress_by=200.0)
    found = found_in(place, replace(options, contexts=[{"wording": "other"}, {"shots": 0}]))
    rows = rows_of(found, "robustness", probe="polarity")
    assert Counter(row["found_with"] for row in rows) == Counter({row["used_with"]: 3 for row in rows})
    # Only the last word counts in this model, so that words around it change nothing.
    assert {row["accuracy"] for row in rows} == {1.0}
    assert {row["shared_neurons"] for row in rows} == {3}
    own, drawn = (rows_of(found, "interdependency", suppressed=name)[0] for name in ("imdb", "random"))
    assert own["accuracy_before"] == drawn["accuracy_before"]
    assert own["accuracy"] <= own["accuracy_before"] - 0.4
    assert abs(drawn["accuracy"] - own["accuracy_before"]) <= 0.25


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sizes": [1, 500]}, r"probe\.sizes=\[1, 500\]: the chosen layers have 120 neurons"),
        ({"sizes": [0]}, r"probe\.sizes=\[0\]"),
        ({"probes": ["forests"]}, r"probe\.probes=forests is unknown; known are polarity"),
        ({"studies": ["all"]}, r"probe\.studies=all is unknown"),
        ({"block": 0}, r"probe\.block=0: must be at least 1"),
    ],
)
def test_bad_options_are_refused(place: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        found_in(place, replace(OPTIONS, **changed))
