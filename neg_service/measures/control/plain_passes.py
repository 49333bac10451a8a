"""Shifts in plain passes: constants added to what passes by inside a model that runs by its own class.

Nothing of the engines runs here, so that what is exported and what is generated hold outside of this package, too. The
one exception are experts: their neurons pass by nowhere in the library's code, so they run by the function of
`experts_function.py`.

Where a constant acts:

| at        | in a pass over                 | the constant is added                                       |
|-----------|--------------------------------|-------------------------------------------------------------|
| `readout` | a prompt, without a cache yet  | at the pass's last position                                 |
| `readout` | tokens behind a filled cache   | nowhere: what the prompt's readout position left is in the cache |
| `all`     | anything                       | at all positions                                            |

The last position is that of a prompt alone in its pass, or of prompts that are padded on the left.

Axes: B prompts, T positions of a pass, N neurons or features, X experts of a layer, n neurons of each, k chosen ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neg_service.errors import ConfigurationError
from neg_service.measures.batching import encoded_prompts
from neg_service.measures.control.control import ControlResult
from neg_service.models.experts import ExpertsPoint, own_experts, plain_experts
from neg_service.models.experts_classes import n_choices_of
from neg_service.models.experts_function import Routing, watching_routing
from neg_service.models.feed_forward import Point, Site
from neg_service.models.language_model import LanguageModel
from neg_service.models.start_at_layer import flat
from neg_service.models.transfer import sent
from neg_service.prompts.chat import prompts_of
from neg_service.prompts.prompt import Asked, EncodedPrompt, is_conversation

READOUT, ALL = "readout", "all"
PLACES = (READOUT, ALL)


@dataclass(frozen=True, eq=False)
class Addition:
    """A constant that is added where something passes by: [N] at a module, [X, n] at what a layer's router chooses."""

    point: Point
    constant: Tensor


def check_place(at: str) -> None:
    """Refuse what says no positions.

    Raises:
        ConfigurationError: naming what there is.
    """
    if at not in PLACES:
        raise ConfigurationError(setting="at", value=at, allowed=f"one of {', '.join(PLACES)}")


def moved_by(model: LanguageModel, result: ControlResult, index: int) -> dict[Site, Addition]:
    """What a result's shift of one prompt adds, at the neurons themselves; nothing where the shift is zero.

    Raises:
        ConfigurationError: the result has no such prompt, or is of a model with other layers.
    """
    check_index(index, len(result.shift))
    rows_n, added_n = result.neurons(index)
    layer_n, neuron_n = rows_n[:, 0], rows_n[:, 1]
    # Below zero: the MLP, only or always on.
    expert_n = rows_n[:, 2] if rows_n.shape[1] > 2 else np.full(len(rows_n), -1)
    feed_forward, sizes = model.feed_forward, model.feed_forward.layer_neurons
    for layer, neuron, expert in zip(layer_n.tolist(), neuron_n.tolist(), expert_n.tolist(), strict=True):
        size = 0 if layer >= len(sizes) else sizes[layer].n_of_expert if expert >= 0 else sizes[layer].n_mlp
        if neuron >= size or (expert >= 0 and expert >= sizes[layer].n_experts):
            raise ConfigurationError(
                f"it moves neuron {neuron} of layer {layer}, which {model.name} does not have: give the model that it "
                "was made with",
                change="result",
            )
    found = {}
    for site, point in feed_forward.sites(result.basis, sorted(set(layer_n.tolist()))).items():
        own_n, numbers = feed_forward.are_at(site, layer_n, expert_n, neuron_n), feed_forward.numbers(site)
        if not own_n.any():
            continue
        where: tuple[Any, ...] = (neuron_n[own_n] - numbers.start,)
        constant = torch.zeros(len(numbers), dtype=torch.float64)
        if (experts := feed_forward.experts[site.layer]) is not None and site.is_experts:
            # Of identities, which a token may choose, too, nothing is moved.
            constant, where = constant.repeat(n_choices_of(experts.module), 1), (expert_n[own_n], *where)
        constant[where] = torch.from_numpy(added_n[own_n]).double()
        found[site] = Addition(point, constant)
    return found


def check_index(index: int, n: int) -> None:
    """Refuse what is no prompt of a result with `n`.

    Raises:
        ConfigurationError: saying which there are.
    """
    is_number = isinstance(index, int | np.integer) and not isinstance(index, bool)
    if not is_number or not 0 <= index < n:
        raise ConfigurationError(setting="index", value=index, allowed=f"from 0 to {n - 1}, a prompt of the result")


@contextmanager
def adding(model: nn.Module, additions: Sequence[Addition], at: str) -> Iterator[None]:
    """Let constants be added in the passes of a model; the hooks are gone on leaving, also after an error.

    Raises:
        ConfigurationError: an unknown `at`.
    """
    check_place(at)
    running = _Pass(is_everywhere=at == ALL)
    with ExitStack() as stack, watching_routing() as routing:
        if at == READOUT:
            stack.callback(model.register_forward_pre_hook(running.begin, with_kwargs=True).remove)
        for addition in additions:
            stack.callback(addition.point.register(partial(_add, addition, running, routing)))
        yield


@contextmanager
def experts_for(model: LanguageModel, additions: Sequence[Addition]) -> Iterator[None]:
    """Let a mixture's experts run by the library's plain loop, or by our function where their neurons are shifted."""
    modules = model.feed_forward.experts_modules
    is_own = any(isinstance(addition.point, ExpertsPoint) for addition in additions)
    with own_experts(modules) if is_own else plain_experts(modules):
        yield


class _Pass:
    """The pass that runs: how many positions it has, and whether constants are added in it."""

    def __init__(self, is_everywhere: bool) -> None:
        self.is_everywhere = self.acts = is_everywhere
        self.n_positions = 0

    def begin(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """Look at what a pass is given."""
        given = signature(model.forward).bind_partial(*args, **kwargs).arguments
        # What a signature does not name stands below the name of what takes it.
        given = {**given, **kwargs}
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if tokens is None:
            raise ConfigurationError("a pass with a shift at its readout position needs input_ids or inputs_embeds")
        self.n_positions = tokens.shape[1]
        # The second one is xLSTM's.
        self.acts = not any(_is_filled(given.get(name)) for name in ("past_key_values", "cache_params"))


def _is_filled(cache: Any) -> bool:
    if cache is None:
        return False
    if not hasattr(cache, "get_seq_length"):
        return int(getattr(cache, "seqlen_offset", 0)) > 0
    # The whole cache says the length of a first layer, which may be one that keeps its state elsewhere (MiniMax).
    layers = [own for own in getattr(cache, "layers", ()) if hasattr(own, "get_seq_length")]
    return any(own.get_seq_length() > 0 for own in layers or [cache])


def _add(addition: Addition, running: _Pass, routing: dict[nn.Module, Routing], x: Tensor) -> Tensor | None:
    if not running.acts:
        return None
    changed = x.clone(memory_format=torch.contiguous_format)
    # Some layers flatten prompts and positions.
    neurons_fn, constant = addition.point.neurons(flat(changed)), sent(addition.constant, x.device).double()
    places = slice(None) if running.is_everywhere else slice(running.n_positions - 1, None, running.n_positions)
    if constant.ndim > 1:
        # Of each token what its experts have: a token that does not use an expert has nothing of it.
        constant = constant[routing[addition.point.module].expert_tk[places]].flatten(1)
    neurons_fn[places] = (neurons_fn[places].double() + constant).to(x.dtype)
    return changed


def encoded(model: LanguageModel, prompt: Asked, target: str | None = None) -> EncodedPrompt:
    """One prompt of a call, text or messages, as tokens, with the token of its target if one is given.

    Raises:
        PromptError: no text and no messages, or an unusable one; a target that is not one token.
    """
    if not (isinstance(prompt, str) or is_conversation(prompt)) or not prompt:
        raise ConfigurationError(setting="prompt", value=repr(prompt), allowed="a text, or a list of messages")
    if target is not None and (not isinstance(target, str) or not target):
        raise ConfigurationError(setting="target", value=repr(target), allowed="a text that follows the prompt")
    (own,) = encoded_prompts(model, prompts_of(model, [prompt], [[] if target is None else [target]]), "error")
    return own
