"""The Arrow schema of every table, with units. What is stored is decided here and nowhere else.

All values are float32: NEGs go below 1e-7, where float16 is already zero. Each row names its basis, because two
results of different bases must never be mixed. Axes: P prompts, K targets of a prompt, L layers, N neurons of a
layer.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

# 3: what a tokenizer adds stands once; the resolution of one-sided grids has the unshifted row's error.
SCHEMA_VERSION = 3

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


def neurgrad(n_neurons: int) -> pa.Schema:
    """One row a (prompt, target, layer). `neurgrad` [N]: probability per unit of |activation|."""
    return pa.schema(
        [
            *_KEY,
            pa.field("layer", pa.int16(), nullable=False),
            pa.field("basis", pa.string(), nullable=False),
            pa.field("probability", pa.float32(), nullable=False),
            pa.field("neurgrad", pa.list_(pa.float32(), n_neurons), nullable=False),
        ]
    )


def integrated_gradients(n_neurons: int) -> pa.Schema:
    """One row a (prompt, target, layer). `integrated_gradients` [N]: probability, of the target's that a neuron brings.

    Over a layer's neurons it adds up, but for the steps of its sum, to the target's probability less that with the
    layer's neurons at zero at the readout position.
    """
    return pa.schema(
        [
            *_KEY,
            pa.field("layer", pa.int16(), nullable=False),
            pa.field("basis", pa.string(), nullable=False),
            pa.field("probability", pa.float32(), nullable=False),
            pa.field("integrated_gradients", pa.list_(pa.float32(), n_neurons), nullable=False),
        ]
    )


def baseline(name: str, n_neurons: int) -> pa.Schema:
    """One row a (prompt, target, layer). `<name>` [N]: a baseline's value of each neuron.

    In probability per activation unit (`gradient`), probability (`gradient_x_activation`), or without a unit
    (`activation`, `random`).
    """
    return pa.schema(
        [
            *_KEY,
            pa.field("layer", pa.int16(), nullable=False),
            pa.field("basis", pa.string(), nullable=False),
            pa.field("probability", pa.float32(), nullable=False),
            pa.field(name, pa.list_(pa.float32(), n_neurons), nullable=False),
        ]
    )


def activations(n_neurons: int) -> pa.Schema:
    """One row a (prompt, layer). `activation` [N]: dimensionless, at the readout position."""
    return pa.schema(
        [
            pa.field("prompt_id", pa.string(), nullable=False),
            pa.field("layer", pa.int16(), nullable=False),
            pa.field("basis", pa.string(), nullable=False),
            pa.field("activation", pa.list_(pa.float32(), n_neurons), nullable=False),
        ]
    )


# One row a (prompt, target, rank): the neurons of largest |NeurGrad|, strongest first, rank from 0.
TOP_NEURONS = pa.schema(
    [
        *_KEY,
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("layer", pa.int16(), nullable=False),
        pa.field("neuron", pa.int32(), nullable=False),
        pa.field("basis", pa.string(), nullable=False),
        pa.field("probability", pa.float32(), nullable=False),
        pa.field("neurgrad", pa.float32(), nullable=False),
        pa.field("activation", pa.float32(), nullable=False),
    ]
)


def sweep(n_shifts: int | None = None) -> pa.Schema:
    """One row a (prompt, target, layer, neuron): NEG by intervention, and what it is to be compared with.

    With `n_shifts`, the whole curve too: `delta_p` [S], at the shifts that run.json names.
    """
    fields = [
        *_KEY,
        pa.field("layer", pa.int16(), nullable=False),
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
        # Pearson correlation of (shift, change of probability); R² of the fit through the origin.
        pa.field("r", pa.float32(), nullable=False),
        pa.field("r2", pa.float32(), nullable=False),
        # The largest |Δp| over the shifts; of the coarse grid, over the curve that it interpolates.
        pa.field("largest_delta_p", pa.float32(), nullable=False),
        # The estimates: NeurGrad, in probability per unit of |activation|, which foretells `neg` of magnitudes; and the
        # plain gradient, per unit of the activation, which foretells it where `shift` is signed.
        pa.field("neurgrad", pa.float32(), nullable=False),
        pa.field("gradient", pa.float32(), nullable=False),
        # The smallest |neg| whose sign is known, from the measured noise of this sweep; and whether `neg` is above it.
        pa.field("resolution", pa.float32(), nullable=False),
        pa.field("is_resolved", pa.bool_(), nullable=False),
        # Whether `neg` and its estimate have the same sign: NeurGrad, or the plain gradient where `shift` is signed;
        # null where `neg` has no known sign.
        pa.field("signs_agree", pa.bool_()),
    ]
    if n_shifts is not None:
        fields.append(pa.field("delta_p", pa.list_(pa.float32(), n_shifts), nullable=False))
    return pa.schema(fields)


def strength(n_neurons: int) -> pa.Schema:
    """One row a layer and shard. `strength` [N]: the sum over the shard's prompts of a neuron's largest |NeurGrad|.

    The largest is over the prompt's targets, in probability per unit of |activation|.
    """
    return pa.schema(
        [
            pa.field("layer", pa.int16(), nullable=False),
            pa.field("basis", pa.string(), nullable=False),
            pa.field("n_prompts", pa.int32(), nullable=False),
            pa.field("strength", pa.list_(pa.float64(), n_neurons), nullable=False),
        ]
    )


# One row a (prompt, edit, target): the target's probability, 0..1, without and with a joint intervention.
INTERVENE = pa.schema(
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


def scores(n_neurons: int) -> pa.Schema:
    """One row a (task, score, layer) and shard. `values` [N]: the score's sum over the shard's prompts of that task.

    score: `polarity`, `magnitude`, `fires/0`… (whole numbers) or `activation`; see `measures/scores.py`.
    """
    return pa.schema(
        [
            pa.field("task", pa.string(), nullable=False),
            pa.field("n_prompts", pa.int32(), nullable=False),
            pa.field("layer", pa.int16(), nullable=False),
            pa.field("basis", pa.string(), nullable=False),
            pa.field("score", pa.string(), nullable=False),
            # Whole numbers are exact up to 2²⁴.
            pa.field("values", pa.list_(pa.float32(), n_neurons), nullable=False),
        ]
    )


# One row a prompt: what the neurons chosen for its task say about its K labels. The neurons are in run.json, under
# config.measure.chosen; lists are in their order.
VOTES = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        # [K·S], label by label: the sign of NeurGrad, -1, 0 or 1.
        pa.field("sign", pa.list_(pa.int8()), nullable=False),
        # [S]: the label of the largest and of the smallest NeurGrad, the lower one of equals.
        pa.field("largest", pa.list_(pa.int8()), nullable=False),
        pa.field("smallest", pa.list_(pa.int8()), nullable=False),
        # [S], dimensionless, at the readout position.
        pa.field("activation", pa.list_(pa.float32()), nullable=False),
    ]
)
