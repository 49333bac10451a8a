"""Tables: who names a layer has an expert, and lists follow the numbers of neurons of the layers."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pytest

from neg_service import schema
from neg_service.measures.tables import table_of

BY_LAYER: dict[str, Callable[..., pa.Schema]] = {
    "neurgrad": schema.neurgrad,
    "integrated_gradients": schema.integrated_gradients,
    "activation": schema.activations,
    "aggregate_importance": schema.aggregate_importance,
    "values": schema.skill_scores,
    "gradient": lambda sizes: schema.baseline("gradient", sizes),
}


@pytest.mark.parametrize("column", list(BY_LAYER))
def test_lists_are_of_fixed_size_where_all_layers_are(column: str) -> None:
    of = BY_LAYER[column]
    assert of([4, 4]).field(column).type.list_size == 4
    assert of([4, 4]).equals(of(4))
    unequal = of([4, 2]).field(column).type
    assert pa.types.is_list(unequal)
    assert unequal.value_type == of(4).field(column).type.value_type
    # A reader finds values of neurons in either.
    assert schema.Table(of([4, 2]), values=column).values == column


@pytest.mark.parametrize("table", [schema.TOP_NEURONS, schema.sweep(), *(of(3) for of in BY_LAYER.values())])
def test_a_row_of_a_layer_may_be_of_an_expert(table: pa.Schema) -> None:
    assert table.names[table.names.index("layer") + 1] == "expert"
    assert table.field("expert") == pa.field("expert", pa.int16())


def test_the_expert_is_null_where_nothing_is_said() -> None:
    kept = pa.schema([("layer", pa.int16()), ("expert", pa.int16())])
    assert table_of(kept, 2, layer=[0, 1])["expert"].to_pylist() == [None, None]
    assert table_of(kept, 2, layer=[0, 1], expert=pa.array([None, 3], pa.int16()))["expert"].to_pylist() == [None, 3]
