"""The tables of the measure `control`: what was wanted and achieved of each target, and the shifts.

Axes: M neurons that act on a prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from neg_service.measures.control.effects_table import schema_of_effects
from neg_service.measures.tables import key_columns, mlp_columns, table_of
from neg_service.prompts.prompt import EncodedPrompt

if TYPE_CHECKING:
    from neg_service.measures.control.steering import Steered

_KEY = [
    pa.field("prompt_id", pa.string(), nullable=False),
    pa.field("target_index", pa.int16(), nullable=False),
    pa.field("target", pa.string(), nullable=False),
    pa.field("is_answer", pa.bool_()),
    # Which of the wishes for this target, from 0.
    pa.field("wish", pa.int16(), nullable=False),
]

# One row for each prompt, steered target and wish.
CONTROL = pa.schema(
    [
        *_KEY,
        # probability, top or margin; and how much: a probability 0..1, or nats above `against`, null of all others.
        pa.field("kind", pa.string(), nullable=False),
        pa.field("wanted", pa.float64(), nullable=False),
        pa.field("against", pa.string()),
        pa.field("basis", pa.string(), nullable=False),
        # The precision in which the model computed.
        pa.field("dtype", pa.string(), nullable=False),
        # What was least: l2 or scaled.
        pa.field("norm_is", pa.string(), nullable=False),
        # Of the target without and with the shift, 0..1, read from passes of the model.
        pa.field("probability_before", pa.float64(), nullable=False),
        pa.field("probability", pa.float64(), nullable=False),
        # In the unit of `wanted`: without a shift, with the first that was tried, and with the one that is given.
        pa.field("value_before", pa.float64(), nullable=False),
        pa.field("first_shot", pa.float64(), nullable=False),
        pa.field("achieved", pa.float64(), nullable=False),
        # Whether `achieved` is within the tolerance; why not, or `already there`.
        pa.field("reached", pa.bool_(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        # The probability with the shift as NEG, and as the gradient of log-odds, predict it. No results.
        pa.field("predicted_by_neg", pa.float64(), nullable=False),
        pa.field("predicted_by_log_odds", pa.float64(), nullable=False),
        # Interventions, and gradients beside the first.
        pa.field("passes", pa.int32(), nullable=False),
        # Of the shift: how many neurons it moves, √Σδ², the same over that of all activations, and the largest |δ|.
        pa.field("n_moved", pa.int32(), nullable=False),
        pa.field("norm", pa.float64(), nullable=False),
        pa.field("relative_norm", pa.float64(), nullable=False),
        pa.field("largest", pa.float64(), nullable=False),
        # Where it was asked for: what the model writes behind the prompt without the shift, with it at the readout
        # position alone, and with it at all positions.
        pa.field("text_before", pa.string()),
        pa.field("text", pa.string()),
        pa.field("text_everywhere", pa.string()),
    ]
)

# One row for each prompt, steered target, wish and neuron that is moved, the largest shifts first, rank from 0.
CONTROL_SHIFT = pa.schema(
    [
        *_KEY,
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("expert", pa.int16()),
        pa.field("neuron", pa.int32(), nullable=False),
        pa.field("basis", pa.string(), nullable=False),
        # What is added to the neuron's activation, signed, in its unit; and its activation without that.
        pa.field("shift", pa.float64(), nullable=False),
        pa.field("activation", pa.float32(), nullable=False),
    ]
)

# One row for each prompt, steered target, wish, method and kind of other prompts: what the shift does to references,
# beside a constant on the target's logit and random neurons. Means over `n` references, `_low` to `_high` hold 95 %.
CONTROL_SIDE_EFFECTS = pa.schema(
    [*_KEY, *[own for own in schema_of_effects() if own.name not in ("prompt_id", "prompt", "target")]]
)


def side_effect_rows(prompt: EncodedPrompt, target: int, wish: int, effects: pa.Table) -> pa.Table:
    """Rows of table `control_side_effects`, of what was measured of one shift."""
    n = effects.num_rows
    own = {name: effects[name].combine_chunks() for name in effects.column_names}
    return table_of(CONTROL_SIDE_EFFECTS, n, **(own | key_columns(prompt, np.full(n, target))), wish=np.full(n, wish))


def control_row(
    prompt: EncodedPrompt, target: int, wish: int, against: str | None, found: Steered, basis: str, dtype: str,
    norm_is: str, texts: tuple[str, str, str] | None = None,
) -> pa.Table:  # fmt: skip
    """The row of table `control`."""
    return table_of(
        CONTROL,
        1,
        **key_columns(prompt, np.array([target])),
        wish=[wish],
        kind=found.aim.kind,
        wanted=[found.aim.wanted],
        against=against,
        basis=basis,
        dtype=dtype,
        norm_is=norm_is,
        **{
            name: [getattr(found, name)]
            for name in (
                "probability_before", "probability", "value_before", "first_shot", "achieved", "reached",
                "predicted_by_neg", "predicted_by_log_odds", "passes", "norm", "relative_norm", "largest",
            )
        },
        reason=found.reason,
        **dict(zip(("text_before", "text", "text_everywhere"), texts or (None, None, None), strict=True)),
        n_moved=[int(np.count_nonzero(found.shift.shift_m))],
    )  # fmt: skip


def shift_rows(prompt: EncodedPrompt, target: int, wish: int, found: Steered, basis: str, most: int | None) -> pa.Table:
    """Rows of table `control_shift`, of the `most` largest shifts, or of all."""
    shift_m, slots = found.shift.shift_m, found.shift.slots
    order = np.argsort(-np.abs(shift_m), kind="stable")[: np.count_nonzero(shift_m)][:most]
    layer, expert, neuron = slots.rows_at(order).T
    return table_of(
        CONTROL_SHIFT,
        len(order),
        **key_columns(prompt, np.full(len(order), target)),
        wish=np.full(len(order), wish),
        rank=np.arange(len(order)),
        **mlp_columns(layer, expert),
        neuron=neuron,
        basis=basis,
        shift=shift_m[order],
        activation=found.activation_m[order].astype(np.float32),
    )
