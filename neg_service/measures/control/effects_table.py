"""The columns of side effects: of each shift, method and kind of other prompts."""

from __future__ import annotations

import pyarrow as pa

_STEERED = ("steered_probability_before", "steered_probability", "size")
_MEANS = (
    "target_probability_before", "target_probability", "answer_probability_before", "answer_probability", "same_top",
    "kl",
)  # fmt: skip


def schema_of_effects() -> pa.Schema:
    """Probabilities and the share `same_top` 0..1, `kl` in nats; `_low` to `_high` hold 95 %; null: has no meaning."""
    key = [pa.field(name, pa.string(), nullable=False) for name in ("prompt_id", "prompt", "target", "method", "kind")]
    numbers = [pa.field(name, pa.float64(), nullable=False) for name in _STEERED]
    means = [pa.field(f"{name}{end}", pa.float64()) for name in _MEANS for end in ("", "_low", "_high")]
    return pa.schema([*key, pa.field("n", pa.int32(), nullable=False), *numbers, *means])
