"""The textbook way for mixtures: experts run token by token and expert by expert, on the whole sequence.

Nothing of the package is used. What the experts of a family compute is written out by hand.

Axes: K targets, N neurons of an expert or MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tests import oracle
from tests.mixtures import Mixture

ALWAYS_ON, ATTENTION = -1, -1
Key = tuple[int, int]
# Given (layer, expert) and the neurons [N] of an expert or MLP at the position, it gives those that go on; of several
# positions, (layer, expert, position).
Touch = Callable[[Any, Tensor], Tensor]


class _State:
    """What the pass that runs is to do: one at a time."""

    basis: ClassVar[str] = ""
    position: ClassVar[int | Sequence[int]] = -1
    touch: ClassVar[Touch] = staticmethod(lambda key, x: x)
    layer_of: ClassVar[dict[int, int]] = {}
    # Under `ATTENTION` less its layer what attention chose, where it has experts, too.
    routing: ClassVar[dict[int, tuple[list[int], list[float]]]] = {}

    @classmethod
    def is_read(cls, t: int) -> bool:
        return t == cls.position if isinstance(cls.position, int) else t in cls.position

    @classmethod
    def key(cls, layer: int, expert: int, t: int) -> Any:
        return (layer, expert) if isinstance(cls.position, int) else (layer, expert, t)


def _gated(module: Any, gate: Tensor, up: Tensor, key: Any, is_read: bool) -> Tensor:
    if is_read and _State.basis == "paper":
        up = _State.touch(key, up)
    if type(module).__name__ == "GptOssExperts":
        limited = torch.clamp(gate, max=module.limit)
        act = limited * torch.sigmoid(limited * module.alpha)
        up = torch.clamp(up, min=-module.limit, max=module.limit) + 1
    else:
        act = _act(module)(gate)
    if is_read and _State.basis == "gate":
        act = _State.touch(key, act)
    hidden = act * up
    return _State.touch(key, hidden) if is_read and _State.basis == "hidden" else hidden


def _act(module: Any) -> Any:
    if type(module).__name__ == "JetMoeMoE":
        return module.activation
    return module.mlp.activation_fn if type(module).__name__ == "DbrxExperts" else module.act_fn


def _one(module: Any, x: Tensor, expert: int, t: int, is_read: bool) -> Tensor:
    """What one expert makes of one token."""
    key = _State.key(_State.layer_of[id(module)], expert, t)
    if type(module).__name__ == "DbrxExperts":
        # All experts' rows in one matrix.
        rows = slice(expert * module.ffn_hidden_size, (expert + 1) * module.ffn_hidden_size)
        return _gated(module, module.mlp.w1[rows] @ x, module.mlp.v1[rows] @ x, key, is_read) @ module.mlp.w2[rows]
    if type(module).__name__ == "JetMoeMoE":
        gate, up = (module.input_linear.weight[expert] @ x).chunk(2)
        return module.output_linear.weight[expert] @ _gated(module, gate, up, key, is_read)
    is_columns = type(module).__name__ == "Llama4TextExperts" or getattr(module, "is_transposed", False)
    up_and_gate, down = module.gate_up_proj[expert], module.down_proj[expert]
    both = x @ up_and_gate if is_columns else up_and_gate @ x
    if getattr(module, "has_bias", False):
        both = both + module.gate_up_proj_bias[expert]
    half = len(both) // 2
    gate, up = (both[:half], both[half:]) if getattr(module, "is_concatenated", True) else (both[::2], both[1::2])
    hidden = _gated(module, gate, up, key, is_read)
    out = hidden @ down if is_columns else down @ hidden
    return out + module.down_proj_bias[expert] if getattr(module, "has_bias", False) else out


def _token_by_token(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    rows = []
    for t, x in enumerate(hidden_states):
        is_read = _State.is_read(t)
        chosen = top_k_index[t].tolist()
        if is_read:
            _State.routing[_State.layer_of[id(self)]] = (chosen, top_k_weights[t].tolist())
        # What an identity gives is what it reads.
        given = [x if _is_identity(self, expert) else _one(self, x, expert, t, is_read) for expert in chosen]
        terms = [own * top_k_weights[t, slot] for slot, own in enumerate(given)]
        rows.append(torch.stack(terms).sum(0))
    return torch.stack(rows).to(hidden_states.dtype)


def _is_identity(module: Any, expert: int) -> bool:
    return type(module).__name__ == "LongcatFlashExperts" and expert >= module.num_routed_experts


ALL_EXPERTS_FUNCTIONS.register("token_by_token", _token_by_token)


def _llama_4(self: Any, hidden_states: Tensor) -> Tensor:
    """All experts run for all tokens; those that a token did not choose read zeros, and are not its neurons."""
    out = []
    for expert, tokens in enumerate(hidden_states.view(self.num_experts, -1, self.hidden_size)):
        for t, x in enumerate(tokens):
            is_chosen = bool((x != 0).any())
            if is_chosen and _State.is_read(t):
                _State.routing[_State.layer_of[id(self)]] = ([expert], [1.0])
            out.append(_one(self, x, expert, t, is_chosen and _State.is_read(t)))
    return torch.stack(out)


def _dbrx(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    return _token_by_token(self, hidden_states[0], top_k_index, top_k_weights)[None]


def _inkling_shared(self: Any, hidden_states: Tensor, gammas: Tensor) -> Tensor:
    """All of these experts run for each token; their neurons are those of one after those of the other."""
    rows, layer = [], _State.layer_of[id(self)]
    weights = gammas.reshape(-1, len(self.down_proj))
    for t, x in enumerate(hidden_states.reshape(-1, hidden_states.shape[-1])):
        gate, up = (torch.cat([own @ x for own in every]) for every in (self.gate_proj, self.up_proj))
        hidden = _gated(self, gate, up, _State.key(layer, ALWAYS_ON, t), _State.is_read(t))
        parts = hidden.view(len(self.down_proj), -1)
        rows.append(sum(weights[t, s] * (down @ parts[s]) for s, down in enumerate(self.down_proj)))
    return torch.stack(rows).view_as(hidden_states)


def _chosen_by_jetmoe(router: Any, x_th: Tensor) -> tuple[Tensor, Tensor]:
    largest, chosen = router.layer(x_th).float().topk(router.top_k, -1)
    return chosen, largest.softmax(-1).to(x_th.dtype)


def _jetmoe(self: Any, layer_input: Tensor) -> Tensor:
    """Router and experts in one."""
    (x_th,) = layer_input
    return _token_by_token(self, x_th, *_chosen_by_jetmoe(self.router, x_th))[None] + self.bias


def _noted(index: int) -> Any:
    """A hook on what chooses the experts of a layer's attention."""

    def note(router: Any, inputs: tuple[Tensor], _output: Any) -> None:
        chosen, weights = _chosen_by_jetmoe(router, inputs[0])
        for t in filter(_State.is_read, range(len(chosen))):
            _State.routing[ATTENTION - index] = (chosen[t].tolist(), weights[t].tolist())

    return note


# Families whose experts do not ask transformers' interface.
_FORWARDS = {
    "Llama4TextExperts": _llama_4,
    "DbrxExperts": _dbrx,
    "JetMoeMoE": _jetmoe,
    "LongcatFlashExperts": _token_by_token,
    "InklingSharedExperts": _inkling_shared,
}


def _is_experts(part: nn.Module) -> bool:
    name = type(part).__name__
    return name in _FORWARDS or (name.endswith("Experts") and name != "JetMoeParallelExperts")


def layers_of(model: Any) -> Any:
    """The layers of a family's model."""
    return model.transformer.blocks if hasattr(model, "transformer") else model.model.layers


@contextmanager
def token_by_token(
    model: Any, family: Mixture, basis: str, position: int | Sequence[int], touch: Touch
) -> Iterator[None]:
    """Let a model run its experts one by one, and `touch` see and change the neurons of a basis at a position, or at
    several."""
    with ExitStack() as stack:
        _State.basis, _State.position, _State.touch = basis, position, staticmethod(touch)
        _State.layer_of, _State.routing = {}, {}
        for index, layer in enumerate(layers_of(model)):
            experts = [part for part in layer.modules() if _is_experts(part)]
            for part in experts:
                _State.layer_of[id(part)] = index
                if (forward := _FORWARDS.get(type(part).__name__)) is not None:
                    part.forward = forward.__get__(part)
                    stack.callback(part.__dict__.pop, "forward")
            for part in layer.modules():
                if type(part).__name__ == "JetMoeMoA":
                    stack.callback(part.router.register_forward_hook(_noted(index)).remove)
            paths = (family.always_on if experts else family.dense).split()
            for part, path in enumerate(paths):
                of_parts = (part, len(paths))
                own = _touched(layer.get_submodule(path), (index, ALWAYS_ON), basis, position, of_parts)
                stack.callback(own.remove)
        before = model.config._experts_implementation_internal
        model.config._experts_implementation_internal = "token_by_token"
        stack.callback(setattr, model.config, "_experts_implementation_internal", before)
        yield


def _touched(mlp: nn.Module, key: Key, basis: str, position: int | Sequence[int], of_parts: tuple[int, int]) -> Any:
    module, side = oracle.neuron_module(mlp, basis)

    def change(x: Tensor) -> Tensor:
        rows = list(x.reshape(-1, x.shape[-1]))
        start = x.shape[-1] // 2 if side.startswith("second") else 0
        for t in [position] if isinstance(position, int) else position:
            rows[t] = torch.cat([rows[t][:start], _of_part(_State.key(*key, t), rows[t][start:], *of_parts)])
        return torch.stack(rows).view_as(x)

    if side == "input":
        return module.register_forward_pre_hook(lambda _m, inputs: (change(inputs[0]), *inputs[1:]))
    return module.register_forward_hook(lambda _m, _i, output: change(output))


def _of_part(key: Any, x: Tensor, part: int, n_parts: int) -> Tensor:
    """What `touch` makes of the neurons of one of a layer's MLPs; it sees them in their places among those of all."""
    n = len(x)
    among_all = torch.cat([x.new_zeros(part * n), x, x.new_zeros((n_parts - part - 1) * n)])
    return _State.touch(key, among_all)[part * n : (part + 1) * n]


def probabilities(
    model: Any, family: Mixture, ids: Sequence[int], basis: str, touch: Touch = lambda key, x: x
) -> Tensor:
    """Of the vocabulary [V] behind the last token."""
    with token_by_token(model, family, basis, len(ids) - 1, touch):
        logits: Tensor = model(torch.tensor([list(ids)]), use_cache=False).logits[0, -1]
    return logits.softmax(-1)


def routing() -> dict[int, tuple[list[int], list[float]]]:
    """By layer what the last token of the last pass chose, in the router's order, and the weights of that.

    Those of a layer's attention, where it has some, are under `ATTENTION` less its number.
    """
    return dict(_State.routing)


def gradients(
    model: Any, family: Mixture, ids: Sequence[int], target_ids: Sequence[int], basis: str
) -> tuple[np.ndarray, dict[Key, np.ndarray], dict[Key, np.ndarray]]:
    """Probabilities [K]; by (layer, expert) gradients d p / d a [K, N] and activations [N] at the last token."""
    leaves: dict[Key, Tensor] = {}
    activations: dict[Key, np.ndarray] = {}

    def touch(key: Key, x: Tensor) -> Tensor:
        # Of several MLPs of a layer each in turn, among zeros.
        activations[key] = activations.get(key, 0) + x.detach().double().numpy()
        leaf = leaves.setdefault(key, torch.zeros_like(x, requires_grad=True))
        return x + leaf

    with torch.enable_grad():
        p = probabilities(model, family, ids, basis, touch)
        slopes = [torch.autograd.grad(p[k], list(leaves.values()), retain_graph=True) for k in target_ids]
    by_key = {key: np.stack([own[i].numpy() for own in slopes]) for i, key in enumerate(leaves)}
    return p.detach()[list(target_ids)].numpy(), by_key, activations


def shifted(
    model: Any, family: Mixture, ids: Sequence[int], basis: str, key: Key, neuron: int, shift: float
) -> tuple[Tensor, dict[int, list[int]]]:
    """Probabilities [V] with one neuron moved, and the experts that each layer chose then."""

    def touch(own: Key, x: Tensor) -> Tensor:
        if own != key:
            return x
        moved = x.clone()
        moved[neuron] += shift
        return moved

    with torch.no_grad():
        p = probabilities(model, family, ids, basis, touch)
    return p, {layer: sorted(chosen) for layer, (chosen, _) in _State.routing.items()}
