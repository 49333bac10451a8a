"""Arrow tables of results: what the measures' tables have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from neg_service import schema
from neg_service.prompts.prompt import EncodedPrompt


def prompt_row(prompt: EncodedPrompt, probability_k: NDArray[np.float32]) -> pa.Table:
    """The row of table `prompts`: the same for every measure."""
    return pa.Table.from_pylist(
        [
            {
                "prompt_id": prompt.prompt.id,
                "prompt": prompt.prompt.text,
                "targets": list(prompt.prompt.targets),
                "target_tokens": list(prompt.target_ids),
                "answer": prompt.prompt.answer,
                "probabilities": probability_k,
                "prediction": int(probability_k.argmax()),
            }
        ],
        schema.PROMPTS,
    )


def key_columns(prompt: EncodedPrompt, target_of_row: NDArray[np.int64]) -> dict[str, Any]:
    """The columns that name a prompt and a target, for rows of the targets given by index."""
    answer = prompt.prompt.answer
    return {
        "prompt_id": prompt.prompt.id,
        "target_index": target_of_row,
        "target": np.array(prompt.prompt.targets, dtype=object)[target_of_row],
        "is_answer": None if answer is None else target_of_row == answer,
    }


def target_layer_rows(
    table_schema: pa.Schema,
    prompt: EncodedPrompt,
    targets: Sequence[int],
    layers: Sequence[int],
    basis: str,
    probability_k: NDArray[np.float32],
    values_kln: NDArray[np.float32],
) -> pa.Table:
    """Rows by target, then layer, with a value of each neuron in the schema's last column.

    `targets` are indices into the prompt's, along the first axis of the values; `probability_k` is of all its targets.
    """
    repeats = len(layers)
    return table_of(
        table_schema,
        len(targets) * repeats,
        **key_columns(prompt, np.repeat(targets, repeats)),
        layer=np.tile(layers, len(targets)),
        basis=basis,
        probability=np.repeat(probability_k[list(targets)], repeats),
        **{table_schema.names[-1]: fixed_size(values_kln)},
    )


def table_of(table_schema: pa.Schema, n_rows: int, **columns: Any) -> pa.Table:
    """A table from arrays, or from single values that every row repeats; `expert` is null where it is not given."""
    arrays = []
    for field in table_schema:
        values = columns.get("expert") if field.name == "expert" else columns[field.name]
        if values is None or isinstance(values, str):
            arrays.append(pa.repeat(pa.scalar(values, field.type), n_rows))
        else:
            arrays.append(values if isinstance(values, pa.Array) else pa.array(values, field.type))
    return pa.Table.from_arrays(arrays, schema=table_schema)


def fixed_size(values: NDArray[Any]) -> pa.Array:
    """Rows of vectors: the last axis becomes a list of fixed size, the others become rows."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[-1])
