"""What else might stand for NEG: baselines that NeurGrad is compared with, each a measure of its own name.

For target k, layer l and neuron n at the readout position:

    gradient               d p[k] / d a[l, n]              probability per activation unit
    gradient_x_activation  a[l, n] · d p[k] / d a[l, n]    probability
    activation             a[l, n], the same for all k     no unit
    random                 a draw from N(0, 1)             no unit

The table has the measure's name and a value of each neuron for every (prompt, target, layer), as that of NeurGrad. A
random draw follows from the seed, the prompt's id, the target and the layer alone, not from batches or shards.

Axes: K targets of a prompt, L chosen layers, N neurons of a layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from neg_service import schema
from neg_service.config import NeuronsConfig, checked_layers
from neg_service.measures import Cost, nothing_to_calibrate
from neg_service.measures.choice import check_whole_layers
from neg_service.measures.gradients import Floats, PromptGradients, gradients
from neg_service.measures.neurgrad import check_keep, wanted_targets
from neg_service.measures.tables import prompt_row, target_layer_rows
from neg_service.models.batches import Budget
from neg_service.models.feed_forward import check_basis
from neg_service.models.inspection import ModelInfo
from neg_service.models.language_model import LanguageModel
from neg_service.prompts.prompt import EncodedPrompt, Prompt

NAMES = ("gradient", "gradient_x_activation", "activation", "random")
KEEP = ("all", "answer")


@dataclass
class Options:
    """`keep`: the values of all targets, or those of the right answer only. `seed`: of `random` alone."""

    name: str = "gradient"
    basis: str = "paper"
    keep: str = "all"
    seed: int = 0


def random_draw(seed: int, prompt_id: str, target: str, layer: int, n_neurons: int) -> Floats:
    """The `random` baseline of a layer's neurons [N], for a prompt and a target."""
    key = "\0".join((str(seed), prompt_id, target, str(layer)))
    digest = hashlib.sha256(key.encode()).digest()
    draw = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    return draw.standard_normal(n_neurons, dtype=np.float32)


# --- as measures of a scan


def read(options: Options) -> Options:
    """No files."""
    return options


def check(options: Options, neurons: NeuronsConfig, info: ModelInfo, prompts: Sequence[Prompt]) -> None:
    """Refuse bad options.

    Raises:
        ConfigurationError: naming the key, its value, and what it may be.
    """
    check_basis(options.basis, info.is_gated, info.architecture)
    check_whole_layers(neurons, options.name)
    checked_layers(neurons, info.n_layers)
    check_keep(options.keep, KEEP, prompts)


def identity(options: Options) -> dict[str, Any]:
    """The options that decide the numbers."""
    given = asdict(options)
    if options.name != "random":
        del given["seed"]
    return given


def tables(options: Options, info: ModelInfo) -> dict[str, pa.Schema]:
    """`prompts`, and the values under the measure's name."""
    return {"prompts": schema.PROMPTS, options.name: schema.baseline(options.name, info.n_neurons)}


def cost_a_prompt(options: Options, neurons: NeuronsConfig, info: ModelInfo, n_targets: float) -> Cost:
    """Four bytes a value; a row a target, whose pass back is run even where the activation alone is kept."""
    kept = 1.0 if options.keep == "answer" else n_targets
    values = int(4 * len(checked_layers(neurons, info.n_layers)) * info.n_neurons * kept)
    return Cost({"prompts": 256, options.name: values}, kept)


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
    table_schema = schema.baseline(options.name, model.feed_forward.n_neurons)
    wanted = [wanted_targets(prompt.prompt, options.keep) for prompt in prompts]
    rows: dict[int, tuple[pa.Table, pa.Table]] = {}
    for index, found in gradients(model, prompts, wanted, options.basis, layers, budget):
        prompt, p_k = prompts[index], found.probability_k
        values_kln = _values(options, prompt.prompt, found, layers)
        rows[index] = (
            prompt_row(prompt, p_k),
            target_layer_rows(table_schema, prompt, found.targets, layers, options.basis, p_k, values_kln),
        )
    ordered = [rows[index] for index in range(len(prompts))]
    return {
        "prompts": pa.concat_tables([prompt for prompt, _ in ordered]),
        options.name: pa.concat_tables([values for _, values in ordered]),
    }


def _values(options: Options, prompt: Prompt, found: PromptGradients, layers: Sequence[int]) -> Floats:
    if options.name == "gradient":
        return found.gradient_kln
    if options.name == "gradient_x_activation":
        return found.gradient_kln * found.activation_ln
    if options.name == "activation":
        return np.ascontiguousarray(np.broadcast_to(found.activation_ln, found.gradient_kln.shape))
    n_neurons = found.gradient_kln.shape[-1]
    texts = [prompt.targets[target] for target in found.targets]
    return np.stack(
        [[random_draw(options.seed, prompt.id, text, layer, n_neurons) for layer in layers] for text in texts]
    )
