"""Where the feed-forward neurons of a model live: one table from the names inside an MLP to its neurons.

Four tensors are called "the neuron" in the literature; the *basis* says which:

| basis    | gated MLP, down(act(gate(x)) * up(x)) | plain MLP, down(act(up(x))) |
|----------|---------------------------------------|-----------------------------|
| `paper`  | up(x)                                 | act(up(x))                  |
| `hidden` | act(gate(x)) * up(x)                  | act(up(x))                  |
| `gate`   | act(gate(x))                          | refused                     |

Where an MLP has a norm before its down projection (BitNet), `hidden` is what the norm reads. `gate` is refused as well
where the activation is no module (LFM2), so that nothing could be put in its place.

A new architecture is a row of `LAYOUTS` (`layouts.py`). What is not in the table is refused by the name of its MLP
class, never guessed: a wrong tensor gives plausible numbers. Refused by name as well is what would fit the table and
mislead (`_REFUSED`).

A layer has an MLP, or experts, of which each token uses some (`experts.py`), or both: then the MLP is always on. Each
of the two is a *site*, where neurons pass by: the MLP's, or those of a token's chosen experts side by side. A layer of
a hybrid may have neither. Where layers share an MLP's modules, a hook knows which layer runs; where one layer's weights
run as several layers, each run has modules of its own (`repeated_layers.py`).

A layer may have several MLPs that run one after another (`_SEVERAL`): each is a site, and their neurons are numbered
through, those of the first one first, so that outside of a pass they are one MLP's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from neg_service.errors import ConfigurationError, ModelError
from neg_service.layer_neurons import LayerNeurons
from neg_service.models.attention_experts import attention_routers
from neg_service.models.experts import ExpertsPoint, SharedExperts, check_experts, is_experts, n_chosen_of
from neg_service.models.experts_classes import is_gated, n_choices_of, n_experts_of, n_neurons_of
from neg_service.models.hook_points import HookPoint
from neg_service.models.layers import find_layers
from neg_service.models.layouts import LAYOUTS, layout_of
from neg_service.models.mlp import Mlp, mlp_of
from neg_service.models.repeated_layers import layers_as_run
from neg_service.models.shared_experts import is_shared
from neg_service.models.text_config import text_config
from neg_service.neurons import Ints
from neg_service.settings import BASES

K = TypeVar("K")

# Modules that hold experts, of whatever kind.
_OTHER_EXPERTS = re.compile("Experts|(MoE|Moe|MoeBlock|MoEBlock|Mixture)$")
# Parts of a layer that are no MLP, whatever modules they have inside.
_NO_MLP = re.compile("Attention|Mixer|Norm|Dropout")
_AROUND_MLP = re.compile("(Norm|Router)$")
_ONE_FOR_ALL = "runs one layer's weights as several layers, so that a neuron has several activations"
# What no name inside an MLP would show.
_REFUSED = {
    "cpmant": "puts tokens of its own before a prompt",
    "flaubert": "keeps its MLPs apart from its layers, and is masked or causal by its configuration alone",
    "funnel": "pools tokens on the way up, so that a neuron acts on several at once",
    "longformer": "pads prompts to whole windows, so that its layers see other tokens",
    "mobilebert": "multiplies by the weight of its vocabulary head without running it, so that no difference is seen",
    "perceiver": "has no layers on tokens: its layers run on latents",
    "prophetnet": "runs several streams of tokens through its MLPs, one for each token that it predicts",
    "reformer": "has reversible layers, which run once more on the way back",
    "rwkv": "has no feed-forward layers: its channel mixing also reads the token before",
    "squeezebert": "has convolutions in the place of its MLPs' projections",
    "xlm": "keeps its MLPs apart from its layers, and is masked or causal by its configuration alone",
    "xlnet": "looks at later tokens too, so that its last token predicts none",
    "yoso": "chooses by random hashes what its attention looks at, so that no two passes are equal",
}
# Of families with several MLPs a layer these, in the order in which they run.
_SEVERAL: dict[str, Callable[[Any], Iterable[nn.Module]]] = {"longcat_flash": lambda layer: layer.mlps}
# Of models of images and text: what names the layers that do not run on text alone. They have no neurons then.
_OF_IMAGES_ALONE = {"mllama_text_model": "cross_attention_layers"}


Point = HookPoint | ExpertsPoint


class Site(NamedTuple):
    """Neurons of a layer that pass by in one tensor: those of its chosen experts, or of an MLP.

    part: which one of the layer's MLPs.
    """

    layer: int
    is_experts: bool = False
    part: int = 0


@dataclass(frozen=True)
class Experts:
    """The experts of a layer, of which each token uses `n_chosen`.

    attention_routers: what chooses those of the layer's attention, where it has some, too.
    """

    module: nn.Module
    n_experts: int
    n_chosen: int
    n_neurons: int
    attention_routers: tuple[nn.Module, ...] = ()

    def point(self, basis: str) -> ExpertsPoint:
        """Where the chosen ones' neurons of a basis are."""
        return ExpertsPoint(self.module, basis, self.n_chosen * self.n_neurons)


@dataclass(frozen=True)
class FeedForward:
    """The layers of a model, and in each its MLP, its experts, or both.

    mlps: of each layer, in the order in which they run; most have one.
    """

    layers: nn.ModuleList
    mlps: tuple[tuple[Mlp | SharedExperts, ...], ...]
    experts: tuple[Experts | None, ...]

    @property
    def n_layers(self) -> int:
        """How many layers there are."""
        return len(self.layers)

    @property
    def n_blocks(self) -> int:
        """How many times an attention and an MLP run: as often as there are layers, where these have one MLP each."""
        return sum(max(1, len(own)) for own in self.mlps)

    @cached_property
    def layer_neurons(self) -> tuple[LayerNeurons, ...]:
        """What neurons each layer has."""
        found = []
        for mlps, experts in zip(self.mlps, self.experts, strict=True):
            n_mlp = sum(mlp.n_neurons for mlp in mlps)
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
        """The experts of all layers that have some, and those that are always on."""
        shared = [mlp.module for mlp in self.mlp_at.values() if isinstance(mlp, SharedExperts)]
        return (*(own.module for own in self.experts if own), *shared)

    @cached_property
    def attention_routers(self) -> tuple[nn.Module, ...]:
        """What chooses experts of attention, in all layers."""
        return tuple(router for own in self.experts if own for router in own.attention_routers)

    @property
    def is_gated(self) -> bool:
        """Whether all MLPs and experts have a gate."""
        experts = [is_gated(own.module) for own in self.experts if own]
        return all(experts) and all(mlp.is_gated for mlp in self.mlp_at.values())

    @property
    def offers_gate(self) -> bool:
        """Whether all of these gates' activations can be seen and replaced."""
        return self.is_gated and all(mlp.offers_gate for mlp in self.mlp_at.values())

    @cached_property
    def mlp_at(self) -> dict[Site, Mlp | SharedExperts]:
        """The MLPs by their sites."""
        return {Site(layer, part=part): mlp for layer, own in enumerate(self.mlps) for part, mlp in enumerate(own)}

    def numbers(self, site: Site) -> range:
        """The numbers of the neurons at a site: in each expert, or among those of all MLPs of the layer."""
        if site.is_experts:
            return range(self.layer_neurons[site.layer].n_of_expert)
        start = sum(mlp.n_neurons for mlp in self.mlps[site.layer][: site.part])
        return range(start, start + self.mlp_at[site].n_neurons)

    def are_at(self, site: Site, layer: Ints, expert: Ints, neuron: Ints) -> NDArray[np.bool_]:
        """Which of some neurons pass by at a site."""
        numbers = self.numbers(site)
        is_own = (layer == site.layer) & ((expert >= 0) == site.is_experts)
        found: NDArray[np.bool_] = is_own & (neuron >= numbers.start) & (neuron < numbers.stop)
        return found

    def sites(self, basis: str, layers: Iterable[int] | None = None) -> dict[Site, Point]:
        """Where the neurons of a basis pass by: by layer, its experts before its MLPs.

        Raises:
            ConfigurationError: an unknown basis, or `gate` where an MLP has none.
        """
        self.check_basis(basis)
        found: dict[Site, Point] = {}
        for layer in range(self.n_layers) if layers is None else layers:
            if (experts := self.experts[layer]) is not None:
                found[Site(layer, True)] = experts.point(basis)
            for part, mlp in enumerate(self.mlps[layer]):
                found[Site(layer, part=part)] = mlp.point(basis)
        return found

    def check_basis(self, basis: str) -> None:
        """Refuse a basis that these do not have.

        Raises:
            ConfigurationError: see `check_basis`.
        """
        check_basis(basis, self.is_gated, self._class_name, self.offers_gate)

    @property
    def _class_name(self) -> str:
        plain = next((mlp for mlp in self.mlp_at.values() if not mlp.offers_gate), None)
        some = plain or next(own for own in (*self.mlp_at.values(), *self.experts) if own)
        return type(some.module).__name__


def check_basis(basis: str, is_gated: bool, whose: str, offers_gate: bool = True) -> None:
    """Refuse a basis that is unknown, or that the MLPs of `whose` do not have.

    Raises:
        ConfigurationError: naming the key and what it may be.
    """
    if basis not in BASES:
        raise ConfigurationError(setting="measure.basis", value=basis, allowed=f"one of {', '.join(BASES)}")
    if basis == "gate" and not is_gated:
        raise ConfigurationError(f"{whose} has no gate; use paper or hidden", setting="measure.basis", value="gate")
    if basis == "gate" and not offers_gate:
        raise ConfigurationError(
            f"the activation of a gate of {whose} is no module, so that nothing can be put in its place; use paper or "
            "hidden",
            setting="measure.basis",
            value="gate",
        )


def find_feed_forward(model: PreTrainedModel) -> FeedForward:
    """Find the MLP and the experts of every layer, on a loaded model or on one without weights (meta device).

    Raises:
        ModelError: layers not found, none with an MLP, or an MLP or experts whose neurons are not known, naming their
            class.
    """
    name, config = type(model).__name__, text_config(model.config)
    if reason := _REFUSED.get(model.config.model_type):
        raise _refusal(f"{name} {reason}")
    layers = layers_as_run(model) or find_layers(model)[1]
    if len(set(map(id, layers))) < len(layers):
        raise _refusal(f"{name} {_ONE_FOR_ALL}")
    silent = getattr(config, _OF_IMAGES_ALONE.get(config.model_type, ""), None) or ()
    mlps: list[Sequence[Mlp | SharedExperts]] = []
    experts: list[Experts | None] = []
    several = _SEVERAL.get(config.model_type)
    for index, layer in enumerate(layers):
        whose = f"layer {index} of {name}"
        own = None if index in silent else _experts(layer, whose, config)
        experts.append(own)
        if index in silent:
            mlps.append(())
        elif several is not None:
            modules = list(several(layer))
            if len(set(map(id, modules))) < len(modules):
                raise _refusal(f"{whose} runs one MLP several times")
            mlps.append([_known_mlp(module, index, whose) for module in modules])
        else:
            mlps.append(_mlps(layer, index, whose, None if own is None else own.module))
    if not any(mlps) and not any(experts):
        raise _refusal(f"{name} has no feed-forward layers")
    found = FeedForward(layers, _told_apart(layers, mlps), tuple(experts))
    if len(set(map(id, found.experts_modules))) < len(found.experts_modules):
        raise _refusal(f"layers of {name} share one set of experts")
    return found


def _refusal(reason: str) -> ModelError:
    return ModelError(f"{reason}: choose another model.source", change="model.source")


def _told_apart(
    layers: nn.ModuleList, mlps: list[Sequence[Mlp | SharedExperts]]
) -> tuple[tuple[Mlp | SharedExperts, ...], ...]:
    """Where layers share modules of their MLPs, each with its layer."""
    users = Counter(id(part) for own in mlps for mlp in own if isinstance(mlp, Mlp) for part in mlp.parts)

    def told(layer: nn.Module, mlp: Mlp | SharedExperts) -> Mlp | SharedExperts:
        if isinstance(mlp, SharedExperts) or all(users[id(part)] == 1 for part in mlp.parts):
            return mlp
        return replace(mlp, within=layer)

    return tuple(tuple(told(layer, mlp) for mlp in own) for layer, own in zip(layers, mlps, strict=True))


@contextmanager
def hooks(points: Mapping[K, Point], visit: Callable[[K, Tensor], Tensor | None]) -> Iterator[None]:
    """Call `visit(key, tensor)` whenever a point's whole tensor passes by; what it returns, if anything, goes on.

    The hooks are gone on leaving, also after an error.
    """
    with ExitStack() as stack:
        for key, point in points.items():
            stack.callback(point.register(partial(visit, key)))
        yield


def _experts(layer: nn.Module, whose: str, config: Any) -> Experts | None:
    """The experts of a layer, if it has some."""
    found = [part for part in layer.modules() if is_experts(part)]
    if not found:
        others = [part for part in layer.modules() if _OTHER_EXPERTS.search(type(part).__name__)]
        # What holds the weights, if its name says so, before what holds that.
        other = min(others, key=lambda part: "Experts" not in type(part).__name__, default=None)
        if other is not None:
            raise _refusal(f"the experts of {whose} ({type(other).__name__}) are not known")
        return None
    if len(found) > 1:
        names = ", ".join(type(part).__name__ for part in found)
        raise _refusal(f"{whose} has several sets of experts ({names})")
    (module,) = found
    check_experts(module, whose)
    n_chosen = n_chosen_of(module, layer, config)
    if n_chosen is None:
        raise _refusal(
            f"{whose}: nothing tells how many of its experts ({type(module).__name__}) a token uses",
        )
    n_choices = n_choices_of(module)
    if not 1 <= n_chosen <= n_choices:
        raise _refusal(f"{whose}: a token would use {n_chosen} of its {n_choices} experts (num_experts_per_tok)")
    return Experts(module, n_experts_of(module), n_chosen, n_neurons_of(module), attention_routers(layer))


def _known_mlp(module: nn.Module, index: int, whose: str) -> Mlp:
    if (layout := layout_of(module)) is None:
        raise _unknown(module, whose)
    return mlp_of(module, layout, index)


def _mlps(layer: nn.Module, index: int, whose: str, experts: nn.Module | None) -> Sequence[Mlp | SharedExperts]:
    """The layer's MLP; some (OPT) have its parts in the layer itself.

    Nothing of a layer that has experts alone, or attention or a recurrence alone.
    """
    usual = getattr(layer, "mlp", None)
    usual = usual if isinstance(usual, nn.Module) else layer
    if usual is not experts and (layout := layout_of(usual)) is not None:
        return [mlp_of(usual, layout, index)]
    found: list[Mlp | SharedExperts] = [SharedExperts(part) for part in layer.modules() if is_shared(part)]
    # Beside experts it has a name of its own in each architecture; and so where layers have no module `mlp`.
    if experts is not None or usual is layer:
        # Norms and routers may have small MLPs of their own.
        others = [part for part in layer.modules() if part is experts or _AROUND_MLP.search(type(part).__name__)]
        inside = {own for part in others for own in part.modules()}
        for part in layer.modules():
            layout = None if part in inside else layout_of(part, is_whole=False)
            if layout is not None:
                found.append(mlp_of(part, layout, index))
    if len(found) > 1:
        raise _refusal(f"{whose} has several MLPs ({', '.join(type(own.module).__name__ for own in found)})")
    is_without = usual is layer and all(_NO_MLP.search(type(part).__name__) for part in layer.children())
    if found or experts is not None or is_without:
        return found
    raise _unknown(usual, whose)


def _unknown(module: nn.Module, whose: str) -> ModelError:
    known = "; ".join("/".join(row.names) for row in LAYOUTS)
    return _refusal(
        f"the neurons of {type(module).__name__} ({whose}) are not known; known are MLPs made of {known}",
    )
