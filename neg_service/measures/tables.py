"""Arrow tables of results: what the measures' tables have in common."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from neg_service import schema
from neg_service.layer_neurons import NO_EXPERT
from neg_service.prompts.prompt import EncodedPrompt
from neg_service.slots import Slots

if TYPE_CHECKING:
    from neg_service.measures.routing import PromptRouting


log = logging.getLogger(__name__)

# Of the smallest number that float32 holds with all digits.
_LEAST_LOG_P = -87.0


def prompt_tables(
    prompt: EncodedPrompt,
    probability_k: NDArray[np.float32],
    routing: PromptRouting,
    has_experts: bool,
    token_log_p: Sequence[NDArray[Any]] | None = None,
    readout: str = "probability",
) -> dict[str, pa.Table]:
    """The tables that `schema.prompt_tables` says: the same for every measure.

    token_log_p: of each target its tokens' log p, where any is several tokens. readout: what is measured of a target.
    """
    tell_of_underflow(prompt.prompt.id, token_log_p, readout)
    found = {"prompts": prompt_row(prompt, probability_k, token_log_p)}
    return {**found, "routing": routing.table(prompt.prompt.id)} if has_experts else found


def tell_of_underflow(
    prompt_id: str, token_log_p: Sequence[NDArray[Any]] | None, readout: str = "probability", setting: str = "measure."
) -> None:
    """Say once of a prompt that the numbers of a target are lost with its probability, in one of several tokens.

    token_log_p: of each target its tokens' log p, where any is several tokens. setting: what the readout is called.
    """
    log_p = [float(own.sum(dtype=np.float64)) for own in token_log_p or ()]
    if readout == "probability" and min(log_p, default=0.0) < _LEAST_LOG_P:
        _tell_once(prompt_id, setting)


@cache
def _tell_once(prompt_id: str, setting: str) -> None:
    log.warning(
        "prompt %r has a target whose probability is below what float32 holds, so that its NEG and NeurGrad are lost: "
        "%sreadout=log_probability keeps them",
        prompt_id, setting,
    )  # fmt: skip


def prompt_row(
    prompt: EncodedPrompt, probability_k: NDArray[np.float32], token_log_p: Sequence[NDArray[Any]] | None = None
) -> pa.Table:
    """The row of table `prompts`: the same for every measure."""
    prediction = int(probability_k.argmax())
    of_sequences: dict[str, Any] = {}
    if token_log_p is not None:
        # By the logarithms: the products may be below what float32 holds.
        prediction = int(np.argmax([own.sum(dtype=np.float64) for own in token_log_p]))
    if token_log_p is not None and prompt.has_sequences:
        of_sequences = {
            "target_sequences": prompt.target_tokens,
            "token_probabilities": [np.exp(own) for own in token_log_p],
            "prediction_per_token": int(np.argmax([own.mean() for own in token_log_p])),
        }
    return pa.Table.from_pylist(
        [
            {
                "prompt_id": prompt.prompt.id,
                "prompt": prompt.prompt.text,
                "targets": list(prompt.prompt.targets),
                "target_tokens": list(prompt.target_ids),
                "answer": prompt.prompt.answer,
                "probabilities": probability_k,
                "prediction": prediction,
                # The same where each target is one token.
                "prediction_per_token": prediction,
                "position": prompt.at,
                **of_sequences,
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
    slots: Slots,
    basis: str,
    probability_k: NDArray[np.float32],
    values_km: NDArray[np.float32],
    **columns: Any,
) -> pa.Table:
    """Rows by target, then layer and expert, with a value of each neuron in the schema's last column.

    `targets` are indices into the prompt's, along the first axis of the values; `probability_k` is of all its targets;
    `columns`: what the schema has besides, the same in all rows.
    """
    k, repeats = len(targets), len(slots.size)
    name = table_schema.names[-1]
    return table_of(
        table_schema,
        k * repeats,
        **key_columns(prompt, np.repeat(targets, repeats)),
        **mlp_columns(np.tile(slots.layer, k), np.tile(slots.expert, k)),
        basis=basis,
        probability=np.repeat(probability_k[list(targets)], repeats),
        **columns,
        **{name: lists(values_km, np.tile(slots.size, k), table_schema.field(name).type)},
    )


def mlp_columns(layer_r: NDArray[Any], expert_r: NDArray[Any]) -> dict[str, Any]:
    """The columns `layer` and `expert`, null of layers' only MLPs."""
    return {"layer": layer_r, "expert": pa.array(expert_r, pa.int16(), mask=expert_r == NO_EXPERT)}


def lists(values: NDArray[Any], size_r: NDArray[Any], kind: pa.DataType) -> pa.Array:
    """Values one behind the other as lists, of `size_r[r]` each; of fixed size where the column is."""
    flat = pa.array(values.ravel(), kind.value_type)
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(flat, kind.list_size)
    return pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(size_r)]).astype(np.int32), flat)


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
