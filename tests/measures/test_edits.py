"""What is refused of edits, and what they are called."""

from __future__ import annotations

import pytest

from neg_service.errors import ConfigurationError
from neg_service.measures.edits import checked_edits, edit_name


@pytest.mark.parametrize("neuron", [[0, 10**400 - 1], [-(10**400), 0]])
def test_a_neuron_of_any_number_is_refused_in_a_short_line(neuron: list[int]) -> None:
    with pytest.raises(ConfigurationError, match="does not exist; the model has layers 0 to 1") as caught:
        checked_edits([{"neurons": [neuron], "shift": 1.0}], [8, 8])
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(("name", "called"), [(0, "0"), (0.0, "0.0"), ("x", "x"), ("", "edit-3"), (None, "edit-3")])
def test_an_edit_is_called_by_its_name(name: object, called: str) -> None:
    assert edit_name({"name": name}, 3) == called
