"""`neurons.parquet`: beside run.json and before it, told when it is lost or damaged, and put again by who goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import neg_service
from neg_service.errors import DestinationError
from neg_service.neurons import NeuronSet
from neg_service.storage.neurons import NEURONS_FILE
from neg_service.storage.objects import LocalStore
from neg_service.storage.run import RUN_COPY, RUN_FILE, RunDirectory, is_without_neurons, write_or_match
from neg_service.storage.verify import verify
from tests.storage.conftest import N_SHARDS, TABLES, identity, put

MANY = NeuronSet.from_pairs([[layer, n] for layer in range(20) for n in range(1000)], source="mine.csv")
IDENTITY = {**identity(), "neurons": {"layers": MANY.layers, "count": len(MANY), "sha256": MANY.sha256}}


def begin(place: Path, neurons: NeuronSet | None = MANY, **about: Any) -> RunDirectory:
    return write_or_match(LocalStore(place), IDENTITY, TABLES, about, {}, neurons)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A finished run of 20,000 neurons."""
    begun = begin(tmp_path / "run")
    put(begun, *range(N_SHARDS))
    return begun


def test_thousands_of_neurons_are_no_text(run: RunDirectory, tmp_path: Path) -> None:
    assert (tmp_path / "run" / RUN_FILE).stat().st_size < 10_000
    said = json.loads((tmp_path / "run" / RUN_FILE).read_bytes())["neurons"]
    assert said == {"file": NEURONS_FILE, "source": "mine.csv", "count": 20_000, "sha256": MANY.sha256}
    assert neg_service.open_run(str(tmp_path / "run")).listed_neurons() == MANY
    assert verify(run.store).is_clean
    assert not is_without_neurons(run.store)


def test_the_file_is_there_before_run_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_own, order = LocalStore.put, []

    def told(self: LocalStore, key: str, data: bytes) -> None:
        order.append(key)
        put_own(self, key, data)

    monkeypatch.setattr(LocalStore, "put", told)
    begin(tmp_path / "run")
    assert order == [NEURONS_FILE, RUN_COPY, RUN_FILE]


def test_a_start_that_was_killed_between_the_two_goes_on(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    store.put(NEURONS_FILE, MANY.to_parquet())
    begin(tmp_path / "run")
    assert neg_service.open_run(store.uri).listed_neurons() == MANY


@pytest.mark.parametrize("asked", [None, NeuronSet.from_pairs([[0, 1]])])
def test_neurons_of_something_else_are_foreign(tmp_path: Path, asked: NeuronSet | None) -> None:
    LocalStore(tmp_path / "run").put(NEURONS_FILE, MANY.to_parquet())
    with pytest.raises(DestinationError, match=r"holds neurons\.parquet but no run\.json; it is not a run directory"):
        begin(tmp_path / "run", asked)


def test_other_neurons_than_those_of_the_run_are_refused(run: RunDirectory, tmp_path: Path) -> None:
    before = (tmp_path / "run" / NEURONS_FILE).read_bytes()
    with pytest.raises(
        DestinationError, match=r"neurons\.parquet has other neurons: sha256 .* of 20000 there, .* of 1 a"
    ):
        begin(tmp_path / "run", NeuronSet.from_pairs([[0, 1]]))
    assert (tmp_path / "run" / NEURONS_FILE).read_bytes() == before


def _cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _flipped(content: bytes) -> bytes:
    return content[:200] + bytes([content[200] ^ 1]) + content[201:]


def _of_others(content: bytes) -> bytes:
    return NeuronSet.from_pairs([[0, 1]]).to_parquet()


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (None, "missing"),
        (_cut, "damaged: "),
        (_flipped, "damaged: "),
        (_of_others, "damaged: its 1 neurons do not add up to the checksum in run.json"),
    ],
)
def test_a_file_that_is_lost_or_damaged_is_told_and_put_again(
    run: RunDirectory, tmp_path: Path, harm: Any, problem: str
) -> None:
    file = tmp_path / "run" / NEURONS_FILE
    if harm is None:
        file.unlink()
    else:
        file.write_bytes(harm(file.read_bytes()))
    verdict = verify(run.store)
    (finding,) = verdict.findings
    assert str(finding).startswith(f"{NEURONS_FILE}: {problem}")
    assert verdict.is_without_neurons
    assert not verdict.shards_to_repair
    assert is_without_neurons(run.store)
    opened = neg_service.open_run(str(tmp_path / "run"))
    with pytest.raises(DestinationError, match=rf"neurons\.parquet is {problem}") as caught:
        opened.listed_neurons()
    assert "\n" not in str(caught.value)
    # Tables are read without it.
    assert opened.neuron(1, 3).num_rows == 4 * N_SHARDS
    # Who does not know the neurons leaves it.
    begin(tmp_path / "run", None)
    assert not verify(run.store).is_clean
    begin(tmp_path / "run")
    assert verify(run.store).is_clean


def test_run_json_that_is_lost_is_written_with_its_neurons(run: RunDirectory, tmp_path: Path) -> None:
    for name in (RUN_FILE, RUN_COPY):
        (tmp_path / "run" / name).unlink()
    begin(tmp_path / "run")
    assert verify(run.store).is_clean
    assert neg_service.open_run(str(tmp_path / "run")).listed_neurons() == MANY


def test_a_run_that_has_its_neurons_as_text_is_left_as_it_is(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    write_or_match(store, IDENTITY, TABLES, {}, {"neurons": {"choose": "list", "list": MANY.tolist()}})
    before = store.get(RUN_FILE)
    begin(tmp_path / "run")
    assert store.get(RUN_FILE) == before
    assert store.get(NEURONS_FILE) is None
    assert neg_service.open_run(store.uri).listed_neurons() == MANY
