"""Experts of mixtures, neuron by neuron: one function of our own in transformers' experts interface.

At each token a router chooses some experts of a layer and weighs them. What passes by here is what the chosen experts
of a token compute, laid side by side in the order of their numbers:

| basis    | of each chosen expert, before the router's weight                                             |
|----------|-----------------------------------------------------------------------------------------------|
| `paper`  | the up projection's output as it comes, before clamps; of plain experts the activated one     |
| `gate`   | the activated gate                                                                            |
| `hidden` | the input of the down projection                                                              |

Modeling code calls its experts through the interface, so nothing of it is copied. Four families have none: DBRX;
JetMoE; Llama 4, which runs all experts for all tokens on inputs that it scaled; and LongCat, some of whose experts are
identities and have no neurons. Of these the `forward` of the experts is replaced while a pass of ours runs, and so is
that of experts that are always on (`shared_experts.py`). What is computed: `experts_function.py`. The self-check
compares each layer with the modeling code's own loop.

Axes: T tokens, k chosen experts of a token, X experts of a layer, N neurons of an expert, H hidden size, S = T·k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import __version__ as transformers_version

from neg_service.errors import ModelError
from neg_service.models.attention_experts import noting_attention
from neg_service.models.experts_classes import LLAMA_4, gate_of, lacks_of_interface
from neg_service.models.experts_function import (
    EXPERTS,
    FORWARDS,
    LLAMA_4_CHOSEN,
    VISITS,
    Visit,
)
from neg_service.models.shared_experts import SHARED_FORWARDS, is_shared, n_shared_neurons_of

_FORWARDS = FORWARDS | SHARED_FORWARDS


@dataclass(frozen=True)
class ExpertsPoint:
    """Where the neurons of a layer's experts pass by, in their order: those of the chosen ones [T, k·N], or of all that
    are always on.
    """

    module: nn.Module
    basis: str
    size: int

    def neurons(self, x: Tensor) -> Tensor:
        """All of them."""
        return x

    def register(self, visit: Visit) -> Callable[[], None]:
        """Let `visit` see the tensor, and replace it, in every pass of an engine; gives what takes it back."""
        own = VISITS.setdefault(self.module, {}).setdefault(self.basis, [])
        own.append(visit)
        return lambda: own.remove(visit)


@dataclass(frozen=True)
class SharedExperts:
    """The experts of a layer that are always on, which are its MLP."""

    module: nn.Module

    is_gated: ClassVar[bool] = True
    offers_gate: ClassVar[bool] = True

    @property
    def n_neurons(self) -> int:
        """How many neurons they have, all together."""
        return n_shared_neurons_of(self.module)

    def point(self, basis: str) -> ExpertsPoint:
        """Where their neurons of a basis are."""
        return ExpertsPoint(self.module, basis, self.n_neurons)


@contextmanager
def own_experts(modules: Sequence[nn.Module], attention_routers: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Let these experts modules run by the function here, and put them back as they were, also after an error.

    attention_routers: what these choose is seen as routing (`attention_experts.py`).
    """
    with ExitStack() as stack:
        stack.enter_context(noting_attention(attention_routers))
        for config in {id(own.config): own.config for own in modules if type(own).__name__ not in _FORWARDS}.values():
            stack.enter_context(_implementation(config, EXPERTS))
        for module in modules:
            if (forward := _FORWARDS.get(type(module).__name__)) is not None:
                had = module.__dict__.get("forward")
                module.forward = forward.__get__(module)
                stack.callback(_put_forward_back, module, had)
        yield


@contextmanager
def plain_experts(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let them run by the modeling code's own loop, which every precision and size can, as fast kernels cannot."""
    with ExitStack() as stack:
        for config in {id(own.config): own.config for own in modules if hasattr(own, "config")}.values():
            stack.enter_context(_implementation(config, "eager"))
        yield


@contextmanager
def _implementation(config: Any, name: str) -> Iterator[None]:
    # The setter of `_experts_implementation` would set those of all sub-configurations too.
    before = config._experts_implementation_internal
    config._experts_implementation_internal = name
    try:
        yield
    finally:
        config._experts_implementation_internal = before


def _put_forward_back(module: nn.Module, had: Any) -> None:
    if had is None:
        del module.__dict__["forward"]
    else:
        module.forward = had


def is_experts(module: nn.Module) -> bool:
    """Whether a module is a layer's experts that are chosen, by its name; of which kind says `check_experts`."""
    if type(module).__name__ in _FORWARDS:
        # Of LongCat all may be identities.
        return not is_shared(module) and bool(getattr(module, "num_routed_experts", True))
    return "Experts" in type(module).__name__ and any(
        isinstance(getattr(module, name, None), nn.Parameter) and getattr(module, name).ndim == 3
        for name in ("down_proj", "gate_up_proj", "up_proj")
    )


def check_experts(module: nn.Module, whose: str) -> None:
    """Refuse experts whose neurons are not known.

    Raises:
        ModelError: naming the class.
    """
    name = type(module).__name__
    if lacking := lacks_of_interface():
        raise ModelError(
            f"{whose} has experts ({name}), and transformers {transformers_version} has another interface for them "
            f"({lacking} is missing): install the version that pyproject.toml allows, or choose a dense model as "
            "model.source",
            change="model.source",
        )
    if name in FORWARDS:
        return
    missing = [
        attribute
        for attribute in ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated", "config")
        if not hasattr(module, attribute)
    ]
    if missing:
        raise ModelError(
            f"the experts of {whose} ({name}) do not go through transformers' experts interface (no {missing[0]}): "
            "choose another model.source",
            change="model.source",
        )
    if getattr(module, "_is_expert_parallel", False):
        raise ModelError(f"the experts of {whose} ({name}) are spread over processes; load the model whole")
    if module.has_gate and gate_of(module) is None:
        raise ModelError(
            f"the experts of {whose} ({name}) have a gate of their own, which is not known; choose another "
            "model.source",
            change="model.source",
        )


def n_chosen_of(module: nn.Module, layer: nn.Module, config: Any) -> int | None:
    """How many experts a token uses; None where neither the router nor the configuration tells."""
    found = None
    for part in layer.modules():
        own = part is not module and next(
            (part.__dict__[name] for name in ("top_k", "topk", "k") if type(part.__dict__.get(name)) is int), None
        )
        # True is an int, too.
        if type(own) is int and any(word in type(part).__name__.lower() for word in ("rout", "gate", "moe", "ffn")):
            found = int(own)
            break
    for name in ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k"):
        value = getattr(config, name, None)
        if found is None and type(value) is int:
            found = value
    if found is not None and type(module).__name__ == LLAMA_4:
        LLAMA_4_CHOSEN[module] = found
    return found
