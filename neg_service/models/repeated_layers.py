"""Models that run one layer's weights as several layers (ALBERT, HRM): each run of a pass becomes a layer of its own.

Layer i is then the i-th run of a pass, and its neurons are what activations are in that run: shifts and gradients are
of activations, and no weight is changed.

A loaded model is *unrolled* (`unroll`): each run gets modules of its own, with hooks of their own, over the very same
tensors, and the modeling code goes through these instead. So all else may go by modules, as of any model. Nothing is
counted, so that there is nothing to be reset behind an error or a pass that begins in the middle. The self-check
compares it with the model as it was loaded (`as_loaded`, `engines/unrolled_check.py`).

HRM drops the gradients of its early runs (`L_bp_cycles`), which spared memory when it was trained. Unrolled it keeps
them all: NeurGrad is the slope of what a pass computes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from neg_service.errors import ModelError, one_line


@dataclass(frozen=True)
class Unrolled:
    """The layers of an unrolled model, in the order in which they run, and what of the model leads to them.

    changes: of each attribute that is another one its owner, its name, and what it was and is.
    """

    layers: nn.ModuleList
    changes: tuple[tuple[Any, str, Any, Any], ...]


# Where the layers are as they are stored, below the model's body: fewer than run.
_STORED = {"albert": "encoder.albert_layer_groups", "hrm_text": "L_module.layers"}


def stored_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList] | None:
    """Where a model that runs layers again has them, and the list of them; None of any other model."""
    own: str | None = _STORED.get(model.config.model_type)
    if own is None:
        return None
    path = next(name for name, part in model.named_modules() if part is model.base_model)
    return f"{path}.{own}".lstrip("."), model.base_model.get_submodule(own)


def unroll(model: PreTrainedModel) -> None:
    """Give each run of a layer modules of its own, where a model runs layers again; any other is left alone.

    Raises:
        ModelError: see `layers_as_run`.
    """
    if _known(model) is not None or (made := _made(model)) is None:
        return
    model._unrolled_layers = made
    for owner, name, _, own in made.changes:
        setattr(owner, name, own)


def layers_as_run(model: PreTrainedModel) -> nn.ModuleList | None:
    """A layer for each run, of a model that runs layers again, unrolled or not; None of any other.

    Raises:
        ModelError: it is made otherwise than is known here.
    """
    found = _known(model) or _made(model)
    return None if found is None else found.layers


@contextmanager
def as_loaded(model: PreTrainedModel) -> Iterator[bool]:
    """Let an unrolled model run, and be saved, as it was loaded, for as long as this lasts; gives whether it is one."""
    found = _known(model)
    changes = () if found is None else found.changes
    for owner, name, was, _ in changes:
        setattr(owner, name, was)
    try:
        yield found is not None
    finally:
        for owner, name, _, own in changes:
            setattr(owner, name, own)


def weights_run_again(model: PreTrainedModel) -> int:
    """How many weights a token meets once more, in all further runs of layers."""
    layers = layers_as_run(model)
    if layers is None:
        return 0
    return sum(own.numel() for layer in layers for own in layer.parameters()) - sum(
        own.numel() for own in layers.parameters()
    )


def _known(model: PreTrainedModel) -> Unrolled | None:
    found: Unrolled | None = getattr(model, "_unrolled_layers", None)
    return found


def _made(model: PreTrainedModel) -> Unrolled | None:
    make = _UNROLLED.get(model.config.model_type)
    try:
        return None if make is None else make(model.base_model)
    except (AttributeError, LookupError) as error:
        raise ModelError(
            f"{type(model).__name__} runs one layer's weights as several layers, and not as transformers 5 does: "
            f"{one_line(error)}: choose another model.source",
            change="model.source",
        ) from error


def _albert(body: Any) -> Unrolled:
    """Groups of layers, each of which runs several times in a row; by number each run is a group of one layer then."""
    encoder = body.encoder
    config, groups = encoder.config, encoder.albert_layer_groups
    runs_of_group = config.num_hidden_layers / config.num_hidden_groups
    of_runs = [groups[int(run / runs_of_group)] for run in range(config.num_hidden_layers)]
    layers = nn.ModuleList(_twin(layer) for group in of_runs for layer in group.albert_layers)
    own = copy.copy(config)
    own.num_hidden_layers = own.num_hidden_groups = len(layers)
    return Unrolled(layers, ((encoder, "albert_layer_groups", groups, layers), (encoder, "config", config, own)))


def _hrm(body: Any) -> Unrolled:
    """Two stacks in turns: the low one `L_cycles` times, then the high one, and that `H_cycles` times."""
    config, layers, stacks = body.config, nn.ModuleList(), nn.ModuleDict()
    for _ in range(config.H_cycles):
        for stack in (*[body.L_module] * config.L_cycles, body.H_module):
            start, own = len(layers), _twin(stack)
            layers.extend(own._modules.pop("layers"))
            # What is in the list counts, also where somebody puts another layer there.
            own.__dict__["layers"] = _Part(layers, start, len(layers))
            stacks[str(start)] = own
    for number, attention in enumerate(layer.get_submodule("self_attn") for layer in layers):
        # So far a layer's number in its stack, to which code adds `cycle_offset`.
        attention.__dict__["layer_idx"] = number
    by_turn = _Stacks(layers, stacks)
    all_slopes = [config.L_cycles] * config.H_cycles
    return Unrolled(
        layers,
        (
            (body, "L_module", body.L_module, by_turn),
            (body, "H_module", body.H_module, by_turn),
            (body, "L_bp_cycles_padded", body.L_bp_cycles_padded, all_slopes),
        ),
    )


_UNROLLED: dict[str, Callable[[Any], Unrolled]] = {"albert": _albert, "hrm_text": _hrm}


class _Part:
    """Some layers of a list, one behind the other."""

    def __init__(self, layers: nn.ModuleList, start: int, stop: int) -> None:
        self._layers, self._start, self._stop = layers, start, stop

    def __iter__(self) -> Iterator[nn.Module]:
        return islice(self._layers, self._start, self._stop)


class _Stacks(nn.Module):
    """In the place of both stacks of HRM: the run that begins with layer `cycle_offset`."""

    def __init__(self, layers: nn.ModuleList, stacks: nn.ModuleDict) -> None:
        super().__init__()
        self.layers, self.stacks = layers, stacks

    def forward(self, *args: Any, cycle_offset: int, **kwargs: Any) -> Any:
        # Its layers have numbers of their own.
        return self.stacks[str(cycle_offset)](*args, cycle_offset=0, **kwargs)


def _twin(module: nn.Module, known: dict[int, nn.Module] | None = None) -> Any:
    """A module once more, and all within: with hooks of their own, over the same tensors, also when these change."""
    known = {} if known is None else known
    if id(module) not in known:
        # Weights and buffers stay in the very dictionaries that they are in.
        own = known[id(module)] = copy.copy(module)
        for name, value in module.__dict__.items():
            if "_hooks" in name:
                own.__dict__[name] = copy.copy(value)
        own.__dict__["_modules"] = {
            name: None if part is None else _twin(part, known) for name, part in module._modules.items()
        }
    return known[id(module)]
