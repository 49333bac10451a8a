"""What can be said of a model from its configuration alone, and whether it can be measured: no weights are read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from neg_service.errors import ModelError
from neg_service.layer_neurons import LayerNeurons, described_layers
from neg_service.models.configuration import auto_class_of, is_masked_architecture, read_config, without_weights
from neg_service.models.dimensions import (
    context_length,
    kept_values,
    row_values,
    slope_values,
    token_weights,
    vocabulary,
)
from neg_service.models.engines.base import LAST_TOKEN, MASK_TOKEN
from neg_service.models.engines.select import candidates
from neg_service.models.feed_forward import find_feed_forward
from neg_service.models.folder import LocalModel
from neg_service.models.library_log import hear_libraries
from neg_service.models.quantized import Dequantised, take_quantization
from neg_service.models.repeated_layers import weights_run_again
from neg_service.models.weights import rehearse


@dataclass(frozen=True)
class ModelInfo:
    """What can be said of a model without loading its weights."""

    name: str
    identity: str
    architecture: str
    n_layers: int
    # How many neurons act on a token in a layer, the most of all layers.
    n_neurons: int
    context_length: int | None
    n_parameters: int
    is_gated: bool
    is_masked: bool
    # Whether the activations of all gates can be seen, so that there is the basis `gate`.
    offers_gate: bool = field(default=True, kw_only=True)
    # Values that a row of interventions carries: for its one token, or its first of several.
    row_values: int
    # Rows of the embedding and of the vocabulary head, which may be more than the tokenizer has tokens.
    n_input_ids: int | None = None
    n_output_ids: int | None = None
    # Values that a row of one token with a graph takes, with the slopes of one target.
    gradient_row_values: int = 0
    # The fastest engine that its configuration admits, and what a row of it is; the self-check may choose another.
    engine: str = ""
    row_is: str = ""
    rows_are_prompts: bool = False
    # Weights that a token is multiplied with: in all layers, of experts those that it uses, and in the vocabulary head.
    token_weights: int = 0
    head_weights: int = 0
    # What neurons each layer has; left out, as many in each, without experts.
    layer_neurons: tuple[LayerNeurons, ...] = ()
    # What its weights are made from, where its checkpoint is a quantised one.
    dequantised: Dequantised | None = None

    def __post_init__(self) -> None:
        """Where nothing else is said, all layers are equal, and a token meets all weights."""
        if not self.token_weights:
            object.__setattr__(self, "token_weights", self.n_parameters)
        if not self.layer_neurons:
            object.__setattr__(self, "layer_neurons", (LayerNeurons(self.n_neurons),) * self.n_layers)

    @property
    def neurons_by_layer(self) -> tuple[int, ...]:
        """How many neurons each layer has, of all its experts."""
        return tuple(own.total for own in self.layer_neurons)

    @property
    def has_experts(self) -> bool:
        """Whether any layer has experts."""
        return any(own.n_experts for own in self.layer_neurons)

    @property
    def described_neurons(self) -> str:
        """For a person: for example `30 layers of 1536 neurons`."""
        return described_layers(self.layer_neurons)


def inspect_model(local: LocalModel, trust_remote_code: bool = False, *, check_files: bool = False) -> ModelInfo:
    """Describe a model from its configuration alone: built without memory for weights.

    check_files: also see whether the model would take what lies in its files, as far as they are here.

    Raises:
        ModelError: an architecture whose neurons are not known, or neither a causal nor a masked language model; files
            that the model would not take as they are.
    """
    hear_libraries()
    config = read_config(local, trust_remote_code)
    quantization = take_quantization(config, local.name)
    auto_class = auto_class_of(config, local.name)
    model = without_weights(auto_class, config, local, trust_remote_code)
    require_measurable(model)
    found = find_feed_forward(model)
    tensors = None
    if check_files and local.has_weights:
        tensors = rehearse(local, auto_class, model, trust_remote_code, quantization=quantization)
    n_input_ids, n_output_ids = vocabulary(model)
    of_token, of_head = token_weights(model, found.layer_neurons, found.is_gated)
    of_token += weights_run_again(model)
    sizes = (model.config, found.n_layers, found.n_neurons)
    is_masked = is_masked_architecture(type(model).__name__)
    fitting = candidates(model, MASK_TOKEN if is_masked else LAST_TOKEN)
    engine = next(kind for kind, refusal in fitting.items() if refusal is None)
    return ModelInfo(
        name=local.name,
        identity=local.identity,
        architecture=type(model).__name__,
        n_layers=found.n_layers,
        n_neurons=found.n_neurons,
        context_length=context_length(model),
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
        is_gated=found.is_gated,
        offers_gate=found.offers_gate,
        is_masked=is_masked,
        row_values=row_values(model.config, found.n_neurons),
        gradient_row_values=sum(kept_values(*sizes, found.is_gated)) + slope_values(*sizes),
        n_input_ids=n_input_ids,
        n_output_ids=n_output_ids,
        engine=engine.name,
        row_is=engine.row_is,
        rows_are_prompts=engine.rows_are_prompts,
        token_weights=of_token,
        head_weights=of_head,
        layer_neurons=found.layer_neurons,
        dequantised=quantization.dequantised(tensors) if quantization else None,
    )


def require_measurable(model: PreTrainedModel) -> None:
    """Refuse what is no language model that is read at a token.

    Raises:
        ModelError: an encoder-decoder.
    """
    if model.config.is_encoder_decoder:
        raise ModelError(
            f"{type(model).__name__} is an encoder-decoder; a causal or masked model is needed", change="model.source"
        )


def mask_token_of(tokenizer: Any, name: str, n_input_ids: int | None = None) -> int:
    """The id of a masked model's mask token.

    Raises:
        ModelError: the tokenizer has none, or one that the embedding of `n_input_ids` rows does not have.
    """
    token: int | None = getattr(tokenizer, "mask_token_id", None)
    if token is None:
        raise ModelError(
            f"{name} is a masked model, but its tokenizer has no mask token: choose another model.source",
            change="model.source",
        )
    if n_input_ids is not None and token >= n_input_ids:
        raise ModelError(
            f"{name}: the mask token {tokenizer.mask_token!r} has the id {token}, but it embeds only the ids "
            f"below {n_input_ids}: the tokenizer beside the weights is another model's",
            change="model.source",
        )
    return token
