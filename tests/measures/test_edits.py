"""What is refused of edits, and what they are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from neg_service.errors import ConfigurationError
from neg_service.measures.edits import checked_edits, edit_name, read_edits
from tests.refusals import refused


@pytest.mark.parametrize("neuron", [[0, 10**400 - 1], [-(10**400), 0]])
def test_a_neuron_of_any_number_is_refused_in_a_short_line(neuron: list[int]) -> None:
    with refused(
        ConfigurationError, "measure.edits[0].neurons", says="does not exist; the model has layers 0 to 1"
    ) as caught:
        checked_edits([{"neurons": [neuron], "shift": 1.0}], [8, 8])
    assert len(str(caught.value)) < 200


def test_values_and_polarity_stay_with_their_neurons_whatever_the_order() -> None:
    given = {"neurons": [[1, 2], [0, 5], [1, 0]], "enhance": [1.0, 2.0, 3.0], "polarity": [1, -1, -1]}
    (edit,) = checked_edits([given], [8, 8])
    assert edit.neurons.tolist() == [[0, 5], [1, 0], [1, 2]]
    assert edit.values.tolist() == [2.0, 3.0, 1.0]
    assert edit.polarity is not None
    assert edit.polarity.tolist() == [-1.0, -1.0, 1.0]


def test_an_edit_takes_neurons_of_no_expert_and_refuses_those_of_one() -> None:
    # The expert once stood in the middle.
    for neuron in ([1, 2, None], [1, None, 2]):
        (edit,) = checked_edits([{"neurons": [neuron], "scale": 0}], [8, 8])
        assert edit.neurons.tolist() == [[1, 2]]
    with refused(ConfigurationError, "measure.edits[0].neurons", says=r"\(1, 3, 2\) .* layer 1 has no experts"):
        checked_edits([{"neurons": [[1, 3, 2]], "scale": 0}], [8, 8])
    # Layers differ in size.
    with pytest.raises(ConfigurationError, match=r"\(1, 4\) does not exist; .* layer 1 neurons 0 to 3"):
        checked_edits([{"neurons": [[0, 4], [1, 4]], "scale": 0}], [8, 4])


@pytest.mark.parametrize(("name", "called"), [(0, "0"), (0.0, "0.0"), ("x", "x"), ("", "edit-3"), (None, "edit-3")])
def test_an_edit_is_called_by_its_name(name: object, called: str) -> None:
    assert edit_name({"name": name}, 3) == called


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_names_in_a_file_are_as_they_are_written(ending: str, tmp_path: Path) -> None:
    rows = ['{"name": 1.10, "neurons": [[0, 1]], "shift": 0.50}', '{"name": 1.1, "neurons": [[0, 2]], "shift": 1e5}']
    (tmp_path / f"edits.{ending}").write_text("\n".join(rows) if ending == "jsonl" else f"[{','.join(rows)}]")
    edits = read_edits(str(tmp_path / f"edits.{ending}"))
    assert [(own["name"], type(own["shift"])) for own in edits] == [("1.10", float), ("1.1", float)]
    assert [edit.name for edit in checked_edits(edits, [8])] == ["1.10", "1.1"]
