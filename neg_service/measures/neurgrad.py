"""NeurGrad: the estimate of every neuron's empirical gradient from one backward pass.

For target k, layer l and neuron n at the readout position (the prompt's last token):

    NeurGrad[k, l, n] = d p[k] / d a[l, n] * sgn(a[l, n]),   sgn(0) = +1

in probability per unit of |activation|: positive means that a larger magnitude makes the target more probable.
A silent neuron can only grow, hence sgn(0) = +1. How the gradients are had: `gradients.py`.

Source: Zhao, Jiang, Yoshinaga, "Neuron Empirical Gradient", ACL 2025 (arXiv 2412.18053).

Axes: P prompts, K targets of a prompt, L chosen layers, N neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from neg_service import schema
from neg_service.config import NeuronsConfig, checked_layers
from neg_service.errors import ConfigurationError
from neg_service.measures import Cost, nothing_to_calibrate
from neg_service.measures.batching import default_batch_tokens
from neg_service.measures.choice import check_whole_layers
from neg_service.measures.gradients import Floats, PromptGradients, gradients
from neg_service.measures.tables import fixed_size, key_columns, prompt_row, table_of, target_layer_rows
from neg_service.models.batches import Budget
from neg_service.models.feed_forward import check_basis
from neg_service.models.inspection import ModelInfo
from neg_service.models.language_model import LanguageModel
from neg_service.prompts.prompt import EncodedPrompt, Prompt, check_prompts, check_texts, encode

KEEP = ("all", "answer", "top_k")


@dataclass
class Options:
    """`keep`: all values, those of the right answer only, or the `top_k` strongest neurons of each target."""

    name: str = "neurgrad"
    basis: str = "paper"
    keep: str = "all"
    top_k: int = 100


@dataclass(frozen=True)
class NeurGradResult:
    """NeurGrad of a list of prompts; prompts with fewer targets than K are padded with NaN.

    probability: [P, K] float32, 0..1.
    neurgrad: [P, K, L, N] float32, probability per unit of |activation|.
    activation: [P, L, N] float32, at each prompt's last token.
    n_targets: [P], how many of the K are real.
    layers: the layer numbers along L.
    """

    probability: Floats
    neurgrad: Floats
    activation: Floats
    n_targets: NDArray[np.int64]
    layers: tuple[int, ...]


def neurgrad(
    model: LanguageModel,
    prompts: Sequence[str],
    targets: Sequence[Sequence[str]],
    *,
    basis: str = "paper",
    layers: Sequence[int] | None = None,
    batch_tokens: int | None = None,
) -> NeurGradResult:
    """NeurGrad of every feed-forward neuron for every target of every prompt, at the prompt's last token.

    Formula, units and source: this module's header.

    Args:
        model: from `load_model`.
        prompts: P texts.
        targets: for each prompt, texts that follow it verbatim; each must be one token there.
        basis: which tensor is "the neuron": `paper`, `hidden` or `gate`.
        layers: layer numbers from 0; all layers if not given.
        batch_tokens: how much a batch may hold; halved by itself when memory ends. Never changes the results.

    Returns:
        Arrays on the CPU, in the order of `prompts`.

    Raises:
        PromptError: an empty prompt, one beyond the model's context, or a target that is not one token.
        ConfigurationError: an unknown basis or layer.
        ModelError: the model fails its self-check, which runs once, before the first measurement.
        NonFiniteError: NaN or infinity in a prompt's logits.
    """
    encoded = encoded_texts(model, prompts, targets)
    chosen = checked_layers(NeuronsConfig("all" if layers is None else list(layers)), model.feed_forward.n_layers)
    model.ensure_checked()
    budget = Budget(batch_tokens or default_batch_tokens(model))
    wanted = [tuple(range(len(prompt.target_ids))) for prompt in encoded]

    p, k, n = len(encoded), max(map(len, wanted)), model.feed_forward.n_neurons
    result = NeurGradResult(
        probability=np.full((p, k), np.nan, np.float32),
        neurgrad=np.full((p, k, len(chosen), n), np.nan, np.float32),
        activation=np.empty((p, len(chosen), n), np.float32),
        n_targets=np.array([len(own) for own in wanted]),
        layers=tuple(chosen),
    )
    for index, found in gradients(model, encoded, wanted, basis, chosen, budget):
        result.probability[index, : len(found.targets)] = found.probability_k
        result.neurgrad[index, : len(found.targets)] = found.gradient_kln * sign(found.activation_ln)
        result.activation[index] = found.activation_ln
    return result


def encoded_texts(
    model: LanguageModel, prompts: Sequence[str], targets: Sequence[Sequence[str]]
) -> list[EncodedPrompt]:
    """Texts with targets that follow them, as tokens; a prompt's id is its number.

    Raises:
        PromptError: an empty prompt, one beyond the model's context, or a target that is not one token.
        ConfigurationError: not as many lists of targets as prompts.
    """
    check_texts(prompts, targets)
    if len(prompts) != len(targets):
        raise ConfigurationError(f"{len(prompts)} prompts, but targets for {len(targets)}; one list a prompt is needed")
    asked = [Prompt(str(i), text, tuple(own)) for i, (text, own) in enumerate(zip(prompts, targets, strict=True))]
    check_prompts(asked)
    return list(encode(model.tokenizer, asked, model.context_length, model.mask_token, model=model))


def sign(activation: Floats) -> Floats:
    """The sign of an activation, +1 at zero."""
    return np.where(activation < 0, np.float32(-1), np.float32(1))


# --- as a measure of a scan


def read(options: Options) -> Options:
    """No files."""
    return options


def check(options: Options, neurons: NeuronsConfig, info: ModelInfo, prompts: Sequence[Prompt]) -> None:
    """Refuse what cannot be measured before a model is loaded."""
    check_basis(options.basis, info.is_gated, info.architecture)
    check_whole_layers(neurons, options.name)
    check_keep(options.keep, KEEP, prompts)
    in_all = len(checked_layers(neurons, info.n_layers)) * info.n_neurons
    if options.keep == "top_k" and not 1 <= options.top_k <= in_all:
        raise ConfigurationError(
            f"measure.top_k={options.top_k}: must be from 1 to {in_all}, the neurons of the chosen layers"
        )


def check_keep(keep: str, known: Sequence[str], prompts: Sequence[Prompt]) -> None:
    """Refuse an unknown `measure.keep`, and `answer` where a prompt has none.

    Raises:
        ConfigurationError: naming what it may be.
    """
    if keep not in known:
        raise ConfigurationError(f"measure.keep={keep} is unknown; known are {', '.join(known)}")
    if keep == "answer":
        unanswered = next((prompt.id for prompt in prompts if prompt.answer is None), None)
        if unanswered is not None:
            others = " or ".join(other for other in known if other != "answer")
            raise ConfigurationError(
                f"measure.keep=answer: prompt {unanswered!r} has no answer; use measure.keep={others}"
            )


def identity(options: Options) -> dict[str, Any]:
    """The options that decide the numbers."""
    given = asdict(options)
    if options.keep != "top_k":
        del given["top_k"]
    return given


def tables(options: Options, info: ModelInfo) -> dict[str, pa.Schema]:
    """`prompts`, then values: `activations` and `neurgrad`, or `top_neurons`."""
    return tables_of(options, info.n_neurons)


def tables_of(options: Options, n_neurons: int) -> dict[str, pa.Schema]:
    """The same, for a number of neurons a layer."""
    if options.keep == "top_k":
        return {"prompts": schema.PROMPTS, "top_neurons": schema.TOP_NEURONS}
    return {
        "prompts": schema.PROMPTS,
        "activations": schema.activations(n_neurons),
        "neurgrad": schema.neurgrad(n_neurons),
    }


def cost_a_prompt(options: Options, neurons: NeuronsConfig, info: ModelInfo, n_targets: float) -> Cost:
    """Four bytes a value; float32 of trained models hardly compresses, so this is close. A row a target."""
    layers = len(checked_layers(neurons, info.n_layers))
    text = 256
    if options.keep == "top_k":
        # A row is rank, layer, neuron, value, activation and, mostly repeated, the key.
        return Cost({"prompts": text, "top_neurons": int(20 * options.top_k * n_targets)}, n_targets)
    kept = 1.0 if options.keep == "answer" else n_targets
    values = 4 * layers * info.n_neurons
    return Cost({"prompts": text, "activations": values, "neurgrad": int(values * kept)}, kept)


calibrate = nothing_to_calibrate


def measure(
    model: LanguageModel,
    prompts: Sequence[EncodedPrompt],
    options: Options,
    neurons: NeuronsConfig,
    budget: Budget,
    calibration: Mapping[str, Any],
) -> dict[str, pa.Table]:
    """One shard's tables."""
    layers = checked_layers(neurons, model.feed_forward.n_layers)
    wanted = [wanted_targets(prompt.prompt, options.keep) for prompt in prompts]
    rows: list[_Rows] = [{} for _ in prompts]
    for index, found in gradients(model, prompts, wanted, options.basis, layers, budget):
        # Reduced at once, so that `top_k` never holds a shard's full gradients.
        rows[index] = _rows(prompts[index], found, layers, options)
    return {
        name: pa.concat_tables([own[name] for own in rows]) if rows else table_schema.empty_table()
        for name, table_schema in tables_of(options, model.feed_forward.n_neurons).items()
    }


_Rows = dict[str, pa.Table]


def wanted_targets(prompt: Prompt, keep: str) -> tuple[int, ...]:
    """The indices of the targets whose values `measure.keep` asks for."""
    if keep == "answer":
        assert prompt.answer is not None
        return (prompt.answer,)
    return tuple(range(len(prompt.targets)))


def _rows(prompt: EncodedPrompt, found: PromptGradients, layers: Sequence[int], options: Options) -> _Rows:
    neurgrad_kln = found.gradient_kln * sign(found.activation_ln)
    n_neurons = neurgrad_kln.shape[-1]
    rows = {"prompts": prompt_row(prompt, found.probability_k)}
    if options.keep == "top_k":
        rows["top_neurons"] = _strongest(prompt, found, neurgrad_kln, layers, options)
        return rows
    rows["activations"] = table_of(
        schema.activations(n_neurons),
        len(layers),
        prompt_id=prompt.prompt.id,
        layer=list(layers),
        basis=options.basis,
        activation=fixed_size(found.activation_ln),
    )
    rows["neurgrad"] = target_layer_rows(
        schema.neurgrad(n_neurons), prompt, found.targets, layers, options.basis, found.probability_k, neurgrad_kln
    )
    return rows


def _strongest(
    prompt: EncodedPrompt,
    found: PromptGradients,
    neurgrad_kln: Floats,
    layers: Sequence[int],
    options: Options,
) -> pa.Table:
    k, _, n = neurgrad_kln.shape
    flat_km = neurgrad_kln.reshape(k, -1)
    # A stable sort of the negated magnitude: among equals the lower layer and neuron comes first.
    best_kt = np.argsort(-np.abs(flat_km), axis=1, kind="stable")[:, : options.top_k]
    best = best_kt.ravel()
    return table_of(
        schema.TOP_NEURONS,
        best.size,
        **key_columns(prompt, np.repeat(found.targets, options.top_k)),
        rank=np.tile(np.arange(options.top_k), k),
        layer=np.asarray(layers)[best // n],
        neuron=best % n,
        basis=options.basis,
        probability=np.repeat(found.probability_k[list(found.targets)], options.top_k),
        neurgrad=np.take_along_axis(flat_km, best_kt, 1).ravel(),
        activation=found.activation_ln.ravel()[best],
    )
