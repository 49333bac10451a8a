"""The Arrow schema of every table, with units. What a table says of itself besides: `table.py`.

All values are float32: NEGs go below 1e-7, where float16 is already zero. Each row names its basis, because two
results of different bases must never be mixed. Axes: P prompts, K targets of a prompt, L layers, N neurons of a
layer.

A neuron is (layer, expert, neuron): rows that name a `layer` have an `expert`, null of a layer's only MLP and -1 of one
that is always on beside experts; tables that were written before it have no such column. Tables with a list for each
MLP and expert are told how many neurons each layer has: the lists are of fixed size where all have the same number.
Tables of models with experts have what others lack: `routing`, and columns that say whether a neuron was used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from neg_service.errors import DestinationError
from neg_service.layer_neurons import LayerSize, layers_of_sizes
from neg_service.table import (
    ESTIMATES,
    NO_UNIT,
    PER_ACTIVATION,
    PER_MAGNITUDE,
    PROBABILITY,
    Table,
    is_list,
    under_present_names,
)

__all__ = [
    "ESTIMATES",
    "NO_UNIT",
    "PER_ACTIVATION",
    "PER_MAGNITUDE",
    "PROBABILITY",
    "Table",
    "is_list",
    "under_present_names",
]

# How many neurons each layer has, or one number for all.
Neurons = int | Sequence[LayerSize]

# 3: what a tokenizer adds stands once; the resolution of one-sided grids has the baseline row's error.
# 4: neurons are (layer, expert, neuron); tables, columns and engines have the field's names (`former_names.py`).
# 5: sweeps say how far NEG may be off, and how many shifts they ran. 6: prompts have the tokens of long targets.
SCHEMA_VERSION = 6


def known_schema_version(uri: str, identity: dict[str, Any]) -> int:
    """By which schema the tables of a run were written.

    Raises:
        DestinationError: by a later one, whose columns may mean something else.
    """
    version = int(identity.get("schema_version", SCHEMA_VERSION))
    if version > SCHEMA_VERSION:
        raise DestinationError(
            f"{uri}: was stored by a later version of neg_service (schema {version}; this one reads up to "
            f"{SCHEMA_VERSION}): read it with that one"
        )
    return version


PROMPTS = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("targets", pa.list_(pa.string()), nullable=False),
        pa.field("target_tokens", pa.list_(pa.int32()), nullable=False),
        # Index into `targets` of the right one; null where the data set gives none.
        pa.field("answer", pa.int16()),
        # Probability of each target at the readout position, 0..1, softmax in float32 or better.
        pa.field("probabilities", pa.list_(pa.float32()), nullable=False),
        # Index into `targets` of the most probable one, the lower index on a tie.
        pa.field("prediction", pa.int16(), nullable=False),
        # Null of rows of one token: targets' tokens, each one's probability, and the target of the largest mean log p.
        pa.field("target_sequences", pa.list_(pa.list_(pa.int32()))),
        pa.field("token_probabilities", pa.list_(pa.list_(pa.float32()))),
        pa.field("prediction_per_token", pa.int16()),
        # The place of the token whose neurons were read and shifted; null of the readout position.
        pa.field("position", pa.int32()),
    ]
)

# What a chat template made a prompt of, in order: the last column of `prompts` of a run whose prompts are of templates;
# `prompt` is then the text that the template made.
_MESSAGES = pa.field(
    "messages",
    pa.list_(
        pa.struct([pa.field("role", pa.string(), nullable=False), pa.field("content", pa.string(), nullable=False)])
    ),
    nullable=False,
)

# Texts that ask the same, of a run that measures what shifts do there: a further column of `prompts`.
WORDINGS = pa.field("wordings", pa.list_(pa.string()), nullable=False)

# One row for each prompt and layer that has experts: those that its readout token used, ascending, and the router's
# weights; of Llama 4, whose router scales what experts read, 1. Identities, which some routers may choose in the place
# of experts, are left out.
ROUTING = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("experts", pa.list_(pa.int16()), nullable=False),
        pa.field("weights", pa.list_(pa.float32()), nullable=False),
    ]
)

# The |r| from which on a curve of Δp over shifts counts as linear.
LINEAR = 0.95

# Rows of right answers, and all of prompts that have none.
RIGHT = pc.field("is_answer").is_null() | pc.field("is_answer")

_KEY = [
    pa.field("prompt_id", pa.string(), nullable=False),
    pa.field("target_index", pa.int16(), nullable=False),
    pa.field("target", pa.string(), nullable=False),
    pa.field("is_answer", pa.bool_()),
]
# What is measured where it is not the probability: `log_odds`, `logit against 1`...
READOUT = pa.field("readout", pa.string(), nullable=False)
_LAYER = [
    pa.field("layer", pa.int16(), nullable=False),
    # Null of a layer's only MLP; -1 of the MLP that is always on beside experts.
    pa.field("expert", pa.int16()),
]


def with_messages(schemas: dict[str, pa.Schema]) -> dict[str, pa.Schema]:
    """The tables of a run whose prompts a chat template wrote: `prompts` says what each was made of."""
    return {name: own.append(_MESSAGES) if name == "prompts" else own for name, own in schemas.items()}


def _of_each_neuron(name: str, kind: pa.DataType, n_neurons: Neurons) -> pa.Field:
    """A column with a number for each neuron of a row's MLP; `n_neurons`: of each layer, or one number for all."""
    layers = layers_of_sizes([n_neurons] if isinstance(n_neurons, int) else n_neurons)
    sizes = {size for own in layers for size in (own.n_mlp, own.n_of_expert) if size}
    lists = pa.list_(kind, sizes.pop()) if len(sizes) == 1 else pa.list_(kind)
    return pa.field(name, lists, nullable=False)


def neurgrad(n_neurons: Neurons, is_of_probability: bool = True) -> pa.Schema:
    """One row for each prompt, target and layer. `neurgrad` [N]: probability per unit of |activation|.

    Of another readout rows name it, and are in its unit.
    """
    return pa.schema(
        [
            *_KEY,
            *_LAYER,
            pa.field("basis", pa.string(), nullable=False),
            *([] if is_of_probability else [READOUT]),
            pa.field("probability", pa.float32(), nullable=False),
            _of_each_neuron("neurgrad", pa.float32(), n_neurons),
        ]
    )


def integrated_gradients(n_neurons: Neurons) -> pa.Schema:
    """One row for each prompt, target and layer. `integrated_gradients` [N]: what a neuron brings of the probability.

    Over a layer's neurons it adds up, but for the steps of its sum, to the target's probability less that with the
    layer's neurons at zero at the readout position.
    """
    return pa.schema(
        [
            *_KEY,
            *_LAYER,
            pa.field("basis", pa.string(), nullable=False),
            pa.field("probability", pa.float32(), nullable=False),
            _of_each_neuron("integrated_gradients", pa.float32(), n_neurons),
        ]
    )


def baseline(name: str, n_neurons: Neurons) -> pa.Schema:
    """One row for each prompt, target and layer. `<name>` [N]: a baseline's value of each neuron.

    In probability per activation unit (`gradient`), probability (`gradient_x_activation`), or without a unit
    (`activation`, `random`).
    """
    return pa.schema(
        [
            *_KEY,
            *_LAYER,
            pa.field("basis", pa.string(), nullable=False),
            pa.field("probability", pa.float32(), nullable=False),
            _of_each_neuron(name, pa.float32(), n_neurons),
        ]
    )


def activations(n_neurons: Neurons) -> pa.Schema:
    """One row for each prompt and layer. `activation` [N]: dimensionless, at the readout position."""
    return pa.schema(
        [
            pa.field("prompt_id", pa.string(), nullable=False),
            *_LAYER,
            pa.field("basis", pa.string(), nullable=False),
            _of_each_neuron("activation", pa.float32(), n_neurons),
        ]
    )


# One row for each prompt, target and rank: the neurons of largest |NeurGrad|, strongest first, rank from 0.
TOP_NEURONS = pa.schema(
    [
        *_KEY,
        pa.field("rank", pa.int32(), nullable=False),
        *_LAYER,
        pa.field("neuron", pa.int32(), nullable=False),
        pa.field("basis", pa.string(), nullable=False),
        pa.field("probability", pa.float32(), nullable=False),
        pa.field("neurgrad", pa.float32(), nullable=False),
        pa.field("activation", pa.float32(), nullable=False),
    ]
)


def top_neurons(is_of_probability: bool = True) -> pa.Schema:
    """One row for each prompt, target and rank; see above, and `neurgrad`."""
    if is_of_probability:
        return TOP_NEURONS
    return TOP_NEURONS.insert(TOP_NEURONS.get_field_index("probability"), READOUT)


# One row for each prompt, target, layer and token of the prompt: NeurGrad there of the layer's strongest neuron, and
# all of them summed up.
POSITIONS = pa.schema(
    [
        *_KEY,
        *_LAYER,
        pa.field("neuron", pa.int32(), nullable=False),
        pa.field("basis", pa.string(), nullable=False),
        pa.field("probability", pa.float32(), nullable=False),
        # Which token from 0, and what it says by itself.
        pa.field("position", pa.int32(), nullable=False),
        pa.field("token", pa.string(), nullable=False),
        pa.field("neurgrad", pa.float32(), nullable=False),
        # Σ |NeurGrad| over the layer's neurons that act on the token, in the same unit.
        pa.field("total", pa.float32(), nullable=False),
    ]
)


def prompt_tables(has_experts: bool, has_wordings: bool = False) -> dict[str, Table]:
    """The tables of a prompt itself: `prompts`, and `routing` of models with experts."""
    prompts = PROMPTS.append(WORDINGS) if has_wordings else PROMPTS
    return {"prompts": Table(prompts), **({"routing": Table(ROUTING)} if has_experts else {})}


def sweep(n_shifts: int | None = None, has_experts: bool = False, is_of_probability: bool = True) -> pa.Schema:
    """One row for each prompt, target, layer and neuron: NEG by intervention, and what it is to be compared with.

    With `n_shifts`, the whole curve too: `delta_p` [S], at the shifts that run.json names; of the adaptive grid as
    measured at those that were run, and as fitted between them. Of another readout than the probability rows name it,
    all is in its unit in the place of probability, and changes are called `delta`.
    """
    fields = [
        *_KEY,
        *_LAYER,
        pa.field("neuron", pa.int32(), nullable=False),
        pa.field("basis", pa.string(), nullable=False),
        # Whether the magnitude or the neuron itself was shifted.
        pa.field("shift", pa.string(), nullable=False),
        # The precision in which the model computed. Anything below float32 loses small NEGs, and rounds the shifts of
        # large activations themselves.
        pa.field("dtype", pa.string(), nullable=False),
        # Of the target without a shift, 0..1.
        pa.field("probability", pa.float32(), nullable=False),
        pa.field("activation", pa.float32(), nullable=False),
        # Probability per unit of |activation|, or of the activation where `shift` is signed.
        pa.field("neg", pa.float32(), nullable=False),
        # How far `neg` may be off that of the whole grid without rounding, an estimate in its unit: of the shifts that
        # were left out, or three standard deviations of the noise, whichever is larger. And how many shifts were run.
        pa.field("neg_error", pa.float32(), nullable=False),
        pa.field("n_shifts", pa.int32(), nullable=False),
        # Pearson correlation of (shift, change of probability); R² of the fit through the origin.
        pa.field("r", pa.float32(), nullable=False),
        pa.field("r2", pa.float32(), nullable=False),
        # The largest |Δp| over the shifts; where some were left out, over the curve that is fitted between them.
        pa.field("max_abs_delta_p" if is_of_probability else "max_abs_delta", pa.float32(), nullable=False),
        # The estimates: NeurGrad, in probability per unit of |activation|, which predicts `neg` of magnitudes; and the
        # plain gradient, per unit of the activation, which predicts it where `shift` is signed.
        pa.field("neurgrad", pa.float32(), nullable=False),
        pa.field("gradient", pa.float32(), nullable=False),
        # The smallest |neg| whose sign is known, from the measured noise of this sweep; and whether `neg` is above it.
        pa.field("resolution", pa.float32(), nullable=False),
        pa.field("is_resolved", pa.bool_(), nullable=False),
        # Whether `neg` and its estimate have the same sign: NeurGrad, or the plain gradient where `shift` is signed;
        # null where `neg` has no known sign.
        pa.field("signs_agree", pa.bool_()),
    ]
    if has_experts:
        fields += [
            # Whether the readout token used the neuron's expert, or, with measure.at=each, any token that predicts one
            # of the target's; otherwise all of its values are 0.
            pa.field("is_routed", pa.bool_(), nullable=False),
            # The share of its shifts for which a layer above chose other experts, 0..1.
            pa.field("routing_changed", pa.float32(), nullable=False),
        ]
    if n_shifts is not None:
        name = "delta_p" if is_of_probability else "delta"
        fields.append(pa.field(name, pa.list_(pa.float32(), n_shifts), nullable=False))
    if not is_of_probability:
        fields.insert([own.name for own in fields].index("probability"), READOUT)
    return pa.schema(fields)


def change_columns(own: pa.Schema) -> tuple[str, str]:
    """What a sweep calls the largest change, and the curve: of probabilities, or of another readout."""
    return ("max_abs_delta", "delta") if "max_abs_delta" in own.names else ("max_abs_delta_p", "delta_p")


def aggregate_importance(n_neurons: Neurons, is_of_probability: bool = True) -> pa.Schema:
    """One row for each layer and shard. `aggregate_importance` [N]: sums over the shard's prompts.

    What is added up is a neuron's largest |NeurGrad| over the prompt's targets, in probability per unit of
    |activation|. Of another readout rows name it, and are in its unit.
    """
    return pa.schema(
        [
            *_LAYER,
            pa.field("basis", pa.string(), nullable=False),
            *([] if is_of_probability else [READOUT]),
            pa.field("n_prompts", pa.int32(), nullable=False),
            _of_each_neuron("aggregate_importance", pa.float64(), n_neurons),
        ]
    )


# One row for each prompt, edit and target: the target's probability, 0..1, without and with a joint intervention.
_INTERVENE = pa.schema(
    [
        *_KEY,
        pa.field("edit", pa.string(), nullable=False),
        pa.field("basis", pa.string(), nullable=False),
        # The precision in which the model computed.
        pa.field("dtype", pa.string(), nullable=False),
        pa.field("probability_before", pa.float32(), nullable=False),
        pa.field("probability", pa.float32(), nullable=False),
        # Their difference, far more exact than subtracting them.
        pa.field("delta_p", pa.float32(), nullable=False),
        # Index into the prompt's targets of the most probable one, the lower index on a tie.
        pa.field("prediction_before", pa.int16(), nullable=False),
        pa.field("prediction", pa.int16(), nullable=False),
    ]
)


def intervene(has_experts: bool = False) -> pa.Schema:
    """One row for each prompt, edit and target."""
    # How many of an edit's neurons the edited row's token, or any of its tokens, used, and were changed.
    n_routed = pa.field("n_routed", pa.int32(), nullable=False)
    return _INTERVENE.append(n_routed) if has_experts else _INTERVENE


def skill_scores(n_neurons: Neurons) -> pa.Schema:
    """One row for each task, score, layer and shard. `values` [N]: the score's sum over the task's prompts.

    score: `polarity`, `magnitude`, `fires/0`… (whole numbers) or `activation`; see `measures/builtin/skill_scores.py`.
    """
    return pa.schema(
        [
            pa.field("task", pa.string(), nullable=False),
            pa.field("n_prompts", pa.int32(), nullable=False),
            *_LAYER,
            pa.field("basis", pa.string(), nullable=False),
            pa.field("score", pa.string(), nullable=False),
            # Whole numbers are exact up to 2²⁴.
            _of_each_neuron("values", pa.float32(), n_neurons),
        ]
    )


# One row for each prompt: what the neurons chosen for its task say about its K labels. The neurons are in
# neurons.parquet of the run, by task; lists are in their order.
NEURON_PREDICTIONS = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        # [K·S], label by label: the sign of NeurGrad, -1, 0 or 1.
        pa.field("sign", pa.list_(pa.int8()), nullable=False),
        # [S]: the label of the largest and of the smallest NeurGrad, the lower one of equals; -1 where the readout
        # token does not use the neuron's expert.
        pa.field("largest", pa.list_(pa.int8()), nullable=False),
        pa.field("smallest", pa.list_(pa.int8()), nullable=False),
        # [S], dimensionless, at the readout position.
        pa.field("activation", pa.list_(pa.float32()), nullable=False),
    ]
)
