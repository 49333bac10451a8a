"""The fast engine for models with recurrent layers: the last token in rows, each a single step from one frozen state.

Linear attention, state-space layers and convolutions leave a state in the place of keys and values: the tokens before
the last run once, and each row steps from that state with its last token and stores nothing (`frozen_cache.py`).
Attention beside them works as in `kv_cache.py`. Single steps are other code than the pass over a whole prompt, so:

- where the pass over a prompt limits the size of a time step and the single step does not, it is limited in both
  (`_limited_time_steps`): numbers would be off by 1e-4, close enough to pass a check by luck;
- fused kernels of a single step, where such are installed, have no way back; the code that they stand in for runs
  instead (`_plain_steps`).

Axes: R rows, H heads of a state-space layer.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from neg_service.models.engines.base import (
    LAST_TOKEN,
    Engine,
    Ids,
    LoadedModel,
    MismatchError,
    RowSizes,
    SplitPrompt,
    last_token_behind_the_rest,
    require_single_tokens,
)
from neg_service.models.engines.frozen_cache import FrozenCache, filled, positions, state_values
from neg_service.models.engines.needs import has_states, kinds_of_layers
from neg_service.models.head import exact_head_gradient
from neg_service.models.text_config import text_config

# Packages whose kernels transformers takes in the place of its own code when it finds them.
_FUSED = ("mamba_ssm", "causal_conv1d", "fla")
# What a step makes of a state on the way, and what of that a graph keeps.
_STATES_OF_A_STEP = 4


class RecurrentStateEngine(Engine):
    """Rows of one prompt's last token, each a step from the state that the tokens before left."""

    name = "recurrent_state"
    row_is = "the last token, a step from the state that the tokens before left"
    reads_at = (LAST_TOKEN,)
    shares_prefixes = False
    runs_prompts_together = False
    targets_share_rows = False

    @classmethod
    def refusal(cls, model: PreTrainedModel) -> str | None:
        """See `Engine`."""
        return None if has_states(model) else f"{type(model).__name__} has no recurrent layers"

    def split(self, prompt: Ids) -> SplitPrompt:
        """See `Engine`."""
        return last_token_behind_the_rest(prompt)

    def prepare(self, prompts: Sequence[SplitPrompt], shared: Ids = ()) -> RecurrentStateRows:
        """See `Engine`; of one prompt.

        Raises:
            MismatchError: states that are not in the cache.
        """
        require_single_tokens(self, prompts)
        (prompt,) = prompts
        return RecurrentStateRows(self.model, prompt, self.row_sizes(len(prompt.ids)))

    def row_sizes(self, n_tokens: int) -> RowSizes:
        """See `Engine`: a row copies keys and values, or a state, or in some layers both."""
        config = text_config(self.model.module.config)
        keys, states = 4 * n_tokens * int(config.hidden_size), _STATES_OF_A_STEP * self._state_values
        has_both = any(kind.startswith("hybrid") for kind in kinds_of_layers(self.model.module))
        return self.model.row_sizes(1, n_tokens, keys + states if has_both else max(keys, states))

    @cached_property
    def _state_values(self) -> int:
        # One token leaves as large a state as any number.
        with running(self.model):
            cache = filled(self.model, (0,))
        return 0 if cache is None else state_values(cache)


class RecurrentStateRows:
    """Rows of one prompt's last token; see `Rows`."""

    tokens = 1
    targets_share_rows = False

    def __init__(self, model: LoadedModel, prompt: SplitPrompt, sizes: RowSizes) -> None:
        self._model, self._last, self._past, self.sizes = model, prompt.row.ids[0], len(prompt.prefix), sizes
        with running(model):
            cache = filled(model, prompt.prefix)
        if cache is not None and not state_values(cache):
            raise MismatchError("its layers keep their states elsewhere than in a cache")
        self._frozen = None if cache is None else FrozenCache(cache)

    def run(self, counts: Sequence[int]) -> Tensor:
        """See `Rows`."""
        module = self._model.module
        last_r1 = torch.tensor([[self._last]] * sum(counts), device=module.device)
        with ExitStack() as stack:
            stack.enter_context(running(self._model))
            stack.enter_context(self._model.own_experts())
            stack.enter_context(exact_head_gradient(module))
            options: dict[str, Any] = {"use_cache": False}
            if self._frozen is not None:
                stack.enter_context(self._frozen.telling_rows(module))
                options = {"use_cache": True, "past_key_values": self._frozen, **positions(module, self._past, 1)}
            logits: Tensor = module(last_r1, **options).logits
        return logits[:, -1]

    def positions(self, counts: Sequence[int]) -> Tensor:
        """See `Rows`; a row is one token."""
        return torch.arange(sum(counts))

    def expand_rows(self, x: Tensor, n_rows: int) -> Tensor:
        """See `Rows`."""
        return x.expand(n_rows, *x.shape[1:])


@contextmanager
def running(model: LoadedModel) -> Iterator[None]:
    """Let single steps be what the pass over a whole prompt is; see the module's header."""
    with _limited_time_steps(model.module), _plain_steps(model.module):
        yield


@contextmanager
def _limited_time_steps(module: PreTrainedModel) -> Iterator[None]:
    """Keep each time step within its layer's limits: softplus is monotone, so what goes into it can be kept instead.

    Where the layer's own code does so too, nothing changes.
    """
    with ExitStack() as stack:
        for part in module.modules():
            low, high = getattr(part, "time_step_limit", None) or (0.0, math.inf)
            if (low > 0 or high < math.inf) and hasattr(part, "dt_bias") and hasattr(part, "in_proj"):
                bounds = tuple(_inverse_softplus(limit) for limit in (low, high))
                stack.callback(part.in_proj.register_forward_hook(_limiting(part.dt_bias, *bounds)).remove)
        yield


def _limiting(bias_h: Tensor, low: float, high: float) -> Any:
    """A hook for a projection whose last H outputs become time steps, once `bias_h` is added to them."""

    def limit(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        n = len(bias_h)
        steps = torch.clamp(output[..., -n:], low - bias_h, high - bias_h).to(output.dtype)
        return torch.cat([output[..., :-n], steps], -1)

    return limit


def _inverse_softplus(y: float) -> float:
    if y in (0.0, math.inf):
        return -math.inf if y == 0 else y
    return y + math.log(-math.expm1(-y))


@contextmanager
def _plain_steps(module: PreTrainedModel) -> Iterator[None]:
    """Let functions that fused kernels replaced be what transformers has in their place."""
    if not any(importlib.util.find_spec(package) for package in _FUSED):
        yield
        return
    replaced: list[tuple[Any, str, Any]] = []
    try:
        for code in {sys.modules[type(part).__module__] for part in module.modules()}:
            for name, function in list(vars(code).items()):
                plain = inspect.unwrap(function) if inspect.isfunction(function) else function
                if plain is not function and plain.__module__ == code.__name__:
                    replaced.append((code, name, function))
                    setattr(code, name, _taking_what_it_knows(plain))
        yield
    finally:
        for code, name, function in replaced:
            setattr(code, name, function)


def _taking_what_it_knows(function: Any) -> Any:
    """A function that leaves out named arguments that it does not have, as its fused stand-in's caller expects."""
    known = inspect.signature(function).parameters
    takes_all = any(own.kind is inspect.Parameter.VAR_KEYWORD for own in known.values())

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **(kwargs if takes_all else {key: kwargs[key] for key in kwargs if key in known}))

    return call
