"""Where the feed-forward neurons of a model live: one table from the names inside an MLP to its neurons.

Four tensors are called "the neuron" in the literature; the *basis* says which:

| basis    | gated MLP, down(act(gate(x)) * up(x)) | plain MLP, down(act(up(x))) |
|----------|---------------------------------------|-----------------------------|
| `paper`  | up(x)                                 | act(up(x))                  |
| `hidden` | act(gate(x)) * up(x)                  | act(up(x))                  |
| `gate`   | act(gate(x))                          | refused                     |

A new architecture is a row of `LAYOUTS`. What is not in the table is refused by the name of its MLP class, never
guessed: a wrong tensor gives plausible numbers. Refused by name as well is what would fit the table and mislead:
experts, of which each token uses some; layers that share one set of weights; several MLPs a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from neg_service.errors import ConfigurationError, ModelError
from neg_service.settings import BASES


@dataclass(frozen=True)
class Layout:
    """Names of the modules inside an MLP, or inside the layer where that has no module `mlp`.

    fused: one projection gives gate and up, in this order.
    """

    up: str
    act: str
    down: str
    gate: str | None = None
    fused: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.gate, self.up, self.act, self.down) if name)

    @property
    def is_gated(self) -> bool:
        return self.gate is not None or self.fused


LAYOUTS = (
    Layout(gate="gate_proj", up="up_proj", act="act_fn", down="down_proj"),  # Llama, Qwen, Mistral, Gemma, OLMo, ...
    Layout(up="gate_up_proj", act="activation_fn", down="down_proj", fused=True),  # Phi-3 and 4, GLM-4
    Layout(up="Wi", act="act", down="Wo", fused=True),  # ModernBERT
    Layout(up="up_proj", act="act_fn", down="down_proj"),  # Nemotron, Arcee, Apertus
    Layout(up="c_fc", act="act", down="c_proj"),  # GPT-2, GPT-Neo, StarCoder
    Layout(up="fc_in", act="act", down="fc_out"),  # GPT-J, CodeGen
    Layout(up="dense_h_to_4h", act="act", down="dense_4h_to_h"),  # GPT-NeoX (Pythia), Falcon
    Layout(up="dense_h_to_4h", act="gelu_impl", down="dense_4h_to_h"),  # BLOOM
    Layout(up="fc1", act="activation_fn", down="fc2"),  # Phi; in the layer itself: OPT
    Layout(up="ffn.up_proj", act="ffn.act", down="ffn.down_proj"),  # MPT
    # BERT, RoBERTa, XLM-R, ELECTRA, DeBERTa.
    Layout(up="intermediate.dense", act="intermediate.intermediate_act_fn", down="output.dense"),
    Layout(up="ffn.lin1", act="ffn.activation", down="ffn.lin2"),  # DistilBERT
)

# What no name inside an MLP would show.
_REFUSED = {
    "albert": "runs one layer's weights as all of its layers, so that a neuron has several activations",
    "mobilebert": "has several MLPs a layer",
}


@dataclass(frozen=True)
class HookPoint:
    """Where a layer's neurons pass by: a slice of the last axis of a module's input or output."""

    module: nn.Module
    side: Literal["input", "output"]
    start: int
    size: int

    def neurons(self, x: Tensor) -> Tensor:
        """The neurons [..., N] within the tensor that passes by."""
        return x[..., self.start : self.start + self.size]


@dataclass(frozen=True)
class FeedForward:
    """The layers of a model, their MLPs, and the layout that these share."""

    layers: nn.ModuleList
    mlps: tuple[nn.Module, ...]
    layout: Layout
    n_neurons: int

    @property
    def n_layers(self) -> int:
        return len(self.mlps)

    @property
    def neurons_by_layer(self) -> tuple[int, ...]:
        """How many neurons each layer has; all have the same number, or the model is refused."""
        return (self.n_neurons,) * self.n_layers

    def hook_points(self, basis: str) -> list[HookPoint]:
        """Where each layer's neurons of a basis are.

        Raises:
            ConfigurationError: an unknown basis, or `gate` for an MLP that has none.
        """
        check_basis(basis, self.layout.is_gated, type(self.mlps[0]).__name__)
        return [self._hook_point(mlp, basis) for mlp in self.mlps]

    def _hook_point(self, mlp: nn.Module, basis: str) -> HookPoint:
        if basis == "gate":
            return HookPoint(mlp.get_submodule(self.layout.act), "output", 0, self.n_neurons)
        if basis == "hidden" or not self.layout.is_gated:
            return HookPoint(mlp.get_submodule(self.layout.down), "input", 0, self.n_neurons)
        start = self.n_neurons if self.layout.fused else 0
        return HookPoint(mlp.get_submodule(self.layout.up), "output", start, self.n_neurons)


def check_basis(basis: str, is_gated: bool, whose: str) -> None:
    """Refuse a basis that is unknown, or that the MLPs of `whose` do not have.

    Raises:
        ConfigurationError: naming the key and what it may be.
    """
    if basis not in BASES:
        raise ConfigurationError(setting="measure.basis", value=basis, allowed=f"one of {', '.join(BASES)}")
    if basis == "gate" and not is_gated:
        raise ConfigurationError(f"{whose} has no gate; use paper or hidden", setting="measure.basis", value="gate")


def find_feed_forward(model: PreTrainedModel) -> FeedForward:
    """Find the MLP of every layer, on a loaded model or on one without weights (meta device).

    Raises:
        ModelError: layers not found, an MLP that is not in the table (naming its class), unequal layers.
    """
    name = type(model).__name__
    if reason := _REFUSED.get(model.config.model_type):
        raise ModelError(f"{name} {reason}: choose another model.source", change="model.source")
    layers = _layers(model)
    experts = next((type(part).__name__ for part in layers.modules() if "Experts" in type(part).__name__), None)
    if experts is not None:
        raise ModelError(
            f"{name} has experts ({experts}), of which each token uses some, so that not every neuron acts on "
            "every prompt: choose a dense model as model.source",
            change="model.source",
        )
    mlps = tuple(_mlp(layer) for layer in layers)
    found = [next((row for row in LAYOUTS if _has(mlp, row)), None) for mlp in mlps]
    for index, (mlp, layout) in enumerate(zip(mlps, found, strict=True)):
        if layout is None:
            known = "; ".join("/".join(row.names) for row in LAYOUTS)
            raise ModelError(
                f"the neurons of {type(mlp).__name__} (layer {index} of {name}) are not known; known are MLPs "
                f"made of {known}: choose another model.source",
                change="model.source",
            )
        if layout != found[0]:
            raise ModelError(
                f"layers 0 and {index} of {name} have different MLPs: {type(mlps[0]).__name__} and {type(mlp).__name__}"
            )
    layout = found[0]
    assert layout is not None
    if len({id(mlp.get_submodule(layout.act)) for mlp in mlps}) < len(mlps):
        raise ModelError(
            f"the layers of {name} share one activation module, so their neurons cannot be told apart; choose "
            "another model.source",
            change="model.source",
        )
    sizes = {_input_size(mlp.get_submodule(layout.down)) for mlp in mlps}
    if len(sizes) > 1:
        raise ModelError(f"the layers of {name} have unequal numbers of neurons: {sorted(sizes)}")
    return FeedForward(layers, mlps, layout, sizes.pop())


@contextmanager
def hooks(points: Mapping[int, HookPoint], visit: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """Call `visit(layer, tensor)` whenever a point's whole tensor passes by; what it returns, if anything, goes on.

    The hooks are gone on leaving, also after an error.
    """
    with ExitStack() as stack:
        for layer, point in points.items():
            stack.callback(_hook(point, layer, visit).remove)
        yield


def _hook(point: HookPoint, layer: int, visit: Callable[[int, Tensor], Tensor | None]) -> Any:
    def on_input(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        changed = visit(layer, inputs[0])
        return None if changed is None else (changed, *inputs[1:])

    def on_output(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return visit(layer, output)

    if point.side == "input":
        return point.module.register_forward_pre_hook(on_input)
    return point.module.register_forward_hook(on_output)


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    n_layers = model.config.get_text_config().num_hidden_layers
    # Of a model of images and text, the part that reads text.
    for module in model.base_model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return module
    raise ModelError(f"{type(model).__name__} has no list of {n_layers} layers; its neurons are not known")


def _mlp(layer: nn.Module) -> nn.Module:
    """The layer's MLP; some architectures (OPT) have its parts in the layer itself."""
    mlp = getattr(layer, "mlp", layer)
    assert isinstance(mlp, nn.Module)
    return mlp


def _has(mlp: nn.Module, layout: Layout) -> bool:
    modules = dict(mlp.named_modules())
    return all(name in modules for name in layout.names)


def _input_size(down: nn.Module) -> int:
    if isinstance(down, nn.Linear):
        return down.in_features
    # GPT-2's Conv1D keeps its weight transposed and names only its output size.
    weight = down.get_parameter("weight")
    return weight.shape[0]
