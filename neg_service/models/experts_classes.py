"""What is known of classes of experts: where their weights are, and what they compute between their projections.

Most go through transformers' experts interface, and say by attributes how their weights lie; those that do not are
known by name (`experts_function.py` has the `forward` of each).

Axes: X experts of a layer, O outputs and I inputs of a projection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

try:
    from transformers.integrations import moe
except ImportError:
    moe = None

# Transformers' experts interface; None of a version without.
INTERFACE: Any = moe
LLAMA_4, DBRX = "Llama4TextExperts", "DbrxExperts"
JETMOE, LONGCAT = "JetMoeMoE", "LongcatFlashExperts"
# What has no interface; all of these have gates.
_KNOWN_BY_NAME = (LLAMA_4, DBRX, JETMOE, LONGCAT)


@dataclass(frozen=True)
class Projections:
    """The weights of a layer's experts [X, O, I], or transposed.

    into: of the gate and the up projection in one tensor or in one each, or of the up projection alone.
    """

    into: tuple[Tensor, ...]
    down: Tensor
    is_into_transposed: bool
    is_down_transposed: bool


def projections_of(module: Any) -> Projections:
    """Where a class keeps its weights."""
    kind = type(module).__name__
    if kind == LLAMA_4:
        return Projections((module.gate_up_proj,), module.down_proj, True, True)
    if kind == DBRX:
        gate, up, down = (
            own.view(module.num_experts, module.ffn_hidden_size, module.hidden_size)
            for own in (module.mlp.w1, module.mlp.v1, module.mlp.w2)
        )
        return Projections((gate, up), down, False, True)
    if kind == LONGCAT:
        # The first tensor has places for the identities, too.
        return Projections((module.gate_up_proj[: module.num_routed_experts],), module.down_proj, False, False)
    if kind == JETMOE:
        return Projections((module.input_linear.weight,), module.output_linear.weight, False, False)
    into = module.gate_up_proj if module.has_gate else module.up_proj
    return Projections((into,), module.down_proj, module.is_transposed, module.is_transposed)


def n_experts_of(module: nn.Module) -> int:
    """How many experts it has."""
    return int(projections_of(module).down.shape[0])


def n_choices_of(module: Any) -> int:
    """Among how many its router chooses: experts, and identities behind them."""
    return int(module.total_experts) if type(module).__name__ == LONGCAT else n_experts_of(module)


def n_neurons_of(module: nn.Module) -> int:
    """How many neurons each of its experts has."""
    own = projections_of(module)
    return int(own.down.shape[1 if own.is_down_transposed else 2])


def is_gated(module: nn.Module) -> bool:
    """Whether its experts have a gate beside their up projection."""
    return type(module).__name__ in _KNOWN_BY_NAME or bool(module.has_gate)


# --- what an experts class computes between its projections: (activated gate, the factor that the up projection gives)

Gate = Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]


def _plain_gate(module: Any, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return module.act_fn(gate), up


def _clamped(limit: str) -> Gate:
    def apply(module: Any, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        most = getattr(module, limit)
        act = getattr(module, "act_fn", nn.functional.silu)
        return act(gate.clamp(max=most)), up.clamp(-most, most)

    return apply


def _swish_plus_one(limit: str, alpha: str) -> Gate:
    def apply(module: Any, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        most = getattr(module, limit)
        gate = gate.clamp(max=most)
        return gate * torch.sigmoid(gate * getattr(module, alpha)), up.clamp(-most, most) + 1

    return apply


def _in_float32(module: Any, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return module.act_fn(gate.float()), up.float()


def _soft_capped(module: Any, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    own, gate, up = module.act_fn, gate.float(), up.float()
    return own.gate_softcap(gate) * torch.sigmoid(gate), own.up_softcap(up)


_GATES: dict[str, Gate] = {
    LLAMA_4: _plain_gate,
    LONGCAT: _plain_gate,
    DBRX: lambda module, gate, up: (module.mlp.activation_fn(gate), up),
    JETMOE: lambda module, gate, up: (module.activation(gate), up),
    "BeamExperts": _in_float32,
    "Inkling2Experts": _soft_capped,
    "GptOssExperts": _swish_plus_one("limit", "alpha"),
    "OpenAIPrivacyFilterExperts": _swish_plus_one("limit", "alpha"),
    "MiniMaxM3VLExperts": _swish_plus_one("swiglu_limit", "swiglu_alpha"),
    "DeepseekV4Experts": _clamped("limit"),
    "Glm5NextTextExperts": _clamped("swiglu_limit"),
    "HYV4Experts": _clamped("swiglu_limit"),
}


def gate_of(module: nn.Module) -> Gate | None:
    """What a class computes between its projections; None of one that is not known."""
    if (own := _GATES.get(type(module).__name__)) is not None:
        return own
    # The interface gives classes without a gate of their own this one.
    return _plain_gate if getattr(type(module), "_apply_gate", None) is INTERFACE._default_apply_gate else None


def lacks_of_interface() -> str | None:
    """What transformers' experts interface lacks of that for which all this was written, if anything."""
    if INTERFACE is None:
        return "transformers.integrations.moe"
    for name in ("ALL_EXPERTS_FUNCTIONS", "_default_apply_gate"):
        if not hasattr(INTERFACE, name):
            return name
    return None if hasattr(INTERFACE.ALL_EXPERTS_FUNCTIONS, "register") else "ALL_EXPERTS_FUNCTIONS.register"
