"""Where the feed-forward neurons of a model live: one table from the names inside an MLP to its neurons.

Four tensors are called "the neuron" in the literature; the *basis* says which:

| basis    | gated MLP, down(act(gate(x)) * up(x)) | plain MLP, down(act(up(x))) |
|----------|---------------------------------------|-----------------------------|
| `paper`  | up(x)                                 | act(up(x))                  |
| `hidden` | act(gate(x)) * up(x)                  | act(up(x))                  |
| `gate`   | act(gate(x))                          | refused                     |

A new architecture is a row of `LAYOUTS`. What is not in the table is refused by the name of its MLP class, never
guessed: a wrong tensor gives plausible numbers. Refused by name as well is what would fit the table and mislead: layers
that share one set of weights; several MLPs in a layer.

A layer has an MLP, or experts, of which each token uses some (`experts.py`), or both: then the MLP is always on. Each
of the two is a *site*, where neurons pass by: the MLP's, or those of a token's chosen experts side by side.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from neg_service.errors import ConfigurationError, ModelError
from neg_service.layer_neurons import LayerNeurons
from neg_service.models.experts import ExpertsPoint, check_experts, is_experts, n_chosen_of, n_neurons_of
from neg_service.models.experts_function import is_gated, n_experts_of
from neg_service.settings import BASES

K = TypeVar("K")


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
    Layout(gate="gate_proj", up="up_proj", act="activation_fn", down="down_proj"),  # Llama 4
    Layout(up="input_linear", act="activation", down="output_linear", fused=True),  # Granite MoE, shared
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

# Modules that hold experts, of whatever kind.
_OTHER_EXPERTS = re.compile("Experts|(MoE|Moe|MoeBlock|MoEBlock|Mixture)$")
# What no name inside an MLP would show.
_REFUSED = {
    "albert": "runs one layer's weights as all of its layers, so that a neuron has several activations",
    "mobilebert": "has several MLPs a layer",
    "longcat_flash": "has several MLPs a layer, and experts that do nothing",
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

    def register(self, visit: Callable[[Tensor], Tensor | None]) -> Callable[[], None]:
        """Let `visit` see the whole tensor, and replace it, whenever it passes by; gives what takes it back."""

        def on_input(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            changed = visit(inputs[0])
            return None if changed is None else (changed, *inputs[1:])

        def on_output(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            return visit(output)

        if self.side == "input":
            return self.module.register_forward_pre_hook(on_input).remove
        return self.module.register_forward_hook(on_output).remove


Point = HookPoint | ExpertsPoint


class Site(NamedTuple):
    """Neurons of a layer that pass by in one tensor: those of its chosen experts, or of its MLP."""

    layer: int
    is_experts: bool = False


@dataclass(frozen=True)
class Mlp:
    """The MLP of a layer, with the names inside it and how many neurons it has."""

    module: nn.Module
    layout: Layout
    n_neurons: int

    def point(self, basis: str) -> HookPoint:
        """Where its neurons of a basis are."""
        if basis == "gate":
            return HookPoint(self.module.get_submodule(self.layout.act), "output", 0, self.n_neurons)
        if basis == "hidden" or not self.layout.is_gated:
            return HookPoint(self.module.get_submodule(self.layout.down), "input", 0, self.n_neurons)
        start = self.n_neurons if self.layout.fused else 0
        return HookPoint(self.module.get_submodule(self.layout.up), "output", start, self.n_neurons)

    @property
    def act(self) -> HookPoint:
        """Where the activated values are, of a gate or of plain neurons."""
        return HookPoint(self.module.get_submodule(self.layout.act), "output", 0, self.n_neurons)


@dataclass(frozen=True)
class Experts:
    """The experts of a layer, of which each token uses `n_chosen`."""

    module: nn.Module
    n_experts: int
    n_chosen: int
    n_neurons: int

    def point(self, basis: str) -> ExpertsPoint:
        """Where the chosen ones' neurons of a basis are."""
        return ExpertsPoint(self.module, basis, self.n_chosen * self.n_neurons)


@dataclass(frozen=True)
class FeedForward:
    """The layers of a model, and in each its MLP, its experts, or both."""

    layers: nn.ModuleList
    mlps: tuple[Mlp | None, ...]
    experts: tuple[Experts | None, ...]

    @property
    def n_layers(self) -> int:
        """How many layers there are."""
        return len(self.layers)

    @cached_property
    def layer_neurons(self) -> tuple[LayerNeurons, ...]:
        """What neurons each layer has."""
        found = []
        for mlp, experts in zip(self.mlps, self.experts, strict=True):
            n_mlp = mlp.n_neurons if mlp else 0
            if experts is None:
                found.append(LayerNeurons(n_mlp))
            else:
                found.append(LayerNeurons(n_mlp, experts.n_experts, experts.n_neurons, experts.n_chosen))
        return tuple(found)

    @property
    def neurons_by_layer(self) -> tuple[int, ...]:
        """How many neurons each layer has, of all its experts."""
        return tuple(own.total for own in self.layer_neurons)

    @property
    def n_neurons(self) -> int:
        """How many neurons act on a token in a layer, the most of all layers."""
        return max(own.n_slots for own in self.layer_neurons)

    @property
    def has_experts(self) -> bool:
        """Whether any layer has experts."""
        return any(self.experts)

    @cached_property
    def experts_modules(self) -> tuple[nn.Module, ...]:
        """The experts of all layers that have some."""
        return tuple(own.module for own in self.experts if own)

    @property
    def is_gated(self) -> bool:
        """Whether all MLPs and experts have a gate."""
        return all(mlp.layout.is_gated for mlp in self.mlps if mlp) and all(map(is_gated, self.experts_modules))

    def sites(self, basis: str, layers: Iterable[int] | None = None) -> dict[Site, Point]:
        """Where the neurons of a basis pass by: by layer, its experts before its MLP.

        Raises:
            ConfigurationError: an unknown basis, or `gate` where an MLP has none.
        """
        check_basis(basis, self.is_gated, self._class_name)
        found: dict[Site, Point] = {}
        for layer in range(self.n_layers) if layers is None else layers:
            if (experts := self.experts[layer]) is not None:
                found[Site(layer, True)] = experts.point(basis)
            if (mlp := self.mlps[layer]) is not None:
                found[Site(layer)] = mlp.point(basis)
        return found

    def check_basis(self, basis: str) -> None:
        """Refuse a basis that these do not have.

        Raises:
            ConfigurationError: see `check_basis`.
        """
        check_basis(basis, self.is_gated, self._class_name)

    @property
    def _class_name(self) -> str:
        plain = next((mlp for mlp in self.mlps if mlp and not mlp.layout.is_gated), None)
        some = plain or next(own for own in (*self.mlps, *self.experts) if own)
        return type(some.module).__name__


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
    """Find the MLP and the experts of every layer, on a loaded model or on one without weights (meta device).

    Raises:
        ModelError: layers not found, or an MLP or experts whose neurons are not known, naming their class.
    """
    name = type(model).__name__
    if reason := _REFUSED.get(model.config.model_type):
        raise ModelError(f"{name} {reason}: choose another model.source", change="model.source")
    layers, config = _layers(model), model.config.get_text_config()
    mlps, experts = [], []
    for index, layer in enumerate(layers):
        whose = f"layer {index} of {name}"
        own = _experts(layer, whose, config)
        experts.append(own)
        mlps.append(_mlp(layer, whose, None if own is None else own.module))
    acts = [id(mlp.module.get_submodule(mlp.layout.act)) for mlp in mlps if mlp]
    if len(set(acts)) < len(acts):
        raise ModelError(
            f"the layers of {name} share one activation module, so their neurons cannot be told apart; choose "
            "another model.source",
            change="model.source",
        )
    return FeedForward(layers, tuple(mlps), tuple(experts))


@contextmanager
def hooks(points: Mapping[K, Point], visit: Callable[[K, Tensor], Tensor | None]) -> Iterator[None]:
    """Call `visit(key, tensor)` whenever a point's whole tensor passes by; what it returns, if anything, goes on.

    The hooks are gone on leaving, also after an error.
    """
    with ExitStack() as stack:
        for key, point in points.items():
            stack.callback(point.register(partial(visit, key)))
        yield


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    n_layers = model.config.get_text_config().num_hidden_layers
    # Of a model of images and text, the part that reads text.
    for module in model.base_model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return module
    raise ModelError(f"{type(model).__name__} has no list of {n_layers} layers; its neurons are not known")


def _experts(layer: nn.Module, whose: str, config: Any) -> Experts | None:
    """The experts of a layer, if it has some."""
    found = [part for part in layer.modules() if is_experts(part)]
    if not found:
        others = [part for part in layer.modules() if _OTHER_EXPERTS.search(type(part).__name__)]
        # What holds the weights, if its name says so, before what holds that.
        other = min(others, key=lambda part: "Experts" not in type(part).__name__, default=None)
        if other is not None:
            raise ModelError(
                f"the experts of {whose} ({type(other).__name__}) are not known: choose another model.source",
                change="model.source",
            )
        return None
    if len(found) > 1:
        raise ModelError(f"{whose} has several sets of experts: choose another model.source", change="model.source")
    (module,) = found
    check_experts(module, whose)
    n_chosen = n_chosen_of(module, layer, config)
    if n_chosen is None:
        raise ModelError(
            f"{whose}: nothing tells how many of its experts ({type(module).__name__}) a token uses: choose another "
            "model.source",
            change="model.source",
        )
    return Experts(module, n_experts_of(module), n_chosen, n_neurons_of(module))


def _mlp(layer: nn.Module, whose: str, experts: nn.Module | None) -> Mlp | None:
    """The layer's MLP, or None of a layer that has experts alone; some (OPT) have its parts in the layer itself."""
    usual = getattr(layer, "mlp", layer)
    assert isinstance(usual, nn.Module)
    if (layout := next((row for row in LAYOUTS if _has(usual, row)), None)) is not None:
        return _mlp_of(usual, layout)
    found: list[Mlp] = []
    # Beside experts it has a name of its own in each architecture; and so where layers have no module `mlp`.
    if experts is not None or usual is layer:
        inside = set() if experts is None else set(experts.modules())
        plain = [row for row in LAYOUTS if not any("." in name for name in row.names)]
        for part in layer.modules():
            layout = next((row for row in plain if part not in inside and _has(part, row)), None)
            if layout is not None:
                found.append(_mlp_of(part, layout))
    if len(found) > 1:
        names = ", ".join(type(own.module).__name__ for own in found)
        raise ModelError(f"{whose} has several MLPs ({names}): choose another model.source", change="model.source")
    if found or experts is not None:
        return found[0] if found else None
    known = "; ".join("/".join(row.names) for row in LAYOUTS)
    raise ModelError(
        f"the neurons of {type(usual).__name__} ({whose}) are not known; known are MLPs made of {known}: choose "
        "another model.source",
        change="model.source",
    )


def _mlp_of(module: nn.Module, layout: Layout) -> Mlp:
    return Mlp(module, layout, _input_size(module.get_submodule(layout.down)))


def _has(mlp: nn.Module, layout: Layout) -> bool:
    modules = dict(mlp.named_modules())
    return all(name in modules for name in layout.names)


def _input_size(down: nn.Module) -> int:
    if isinstance(down, nn.Linear):
        return down.in_features
    # GPT-2's Conv1D keeps its weight transposed and names only its output size.
    weight = down.get_parameter("weight")
    return weight.shape[0]
