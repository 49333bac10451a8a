"""Proof, before anything is measured, that an engine and a model fit each other.

This is why numbers can be trusted on an architecture that nobody here has seen (`comparisons.py` says how):

- rows give the plain model's logits: behind no shared prefix and behind one, in several rows, beside another prompt,
  with every limit of attention made shorter than the prompt, and behind more tokens than recurrent layers take at once;
- the neurons that are captured make up what their MLPs hand on, and rows show those of their own token;
- each layer's experts give what the modeling code's own loop makes of them;
- gradients at every layer are those of the plain model's own pass;
- small shifts of every layer's neurons move the plain model's output as the gradients say.

An engine that does not pass is not used (`select.py`). Models with experts are checked in float32, whatever their
precision: in bfloat16 rounding alone has other experts chosen in two passes of the same prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from neg_service.errors import ModelError, one_line
from neg_service.models.engines.base import Engine, LoadedModel, MismatchError
from neg_service.models.engines.comparisons import (
    CHECK_TOKENS,
    SHORT_LIMIT,
    check_ids,
    check_prompts,
    experts_deviation,
    finite_difference_deviation,
    gradient_deviation,
    logits_deviation,
    longer_than_a_block,
    neurons_deviation,
    plain_logits,
    readout_deviation,
    short_limits,
    spread_ids,
)
from neg_service.models.engines.needs import has_states
from neg_service.models.engines.partial_passes import starts_and_expansion
from neg_service.models.engines.unrolled_check import runs_otherwise
from neg_service.models.feed_forward import Site
from neg_service.models.mlp import Mlp
from neg_service.models.precision import in_precision
from neg_service.models.repeated_layers import layers_as_run

# How far rows' logits may be from plain ones, against the largest plain logit; gradients from plain ones, against the
# layer's largest; and how far a finite difference from the gradient. Measured deviations: about 1e-6 in float32, in
# float64 too where norms round to float32 regardless, and 1e-2 in bfloat16; an engine that is wrong is off by 0.1 and
# more.
LOGIT_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
GRADIENT_TOLERANCE = 1e-2
FINITE_DIFFERENCE_TOLERANCE = 0.05
# Rounding adds up from layer to layer; another token's neurons would be off by 1.
READOUT_FACTOR = 5


@dataclass(frozen=True)
class SelfCheck:
    """The largest deviations that the self-check saw, all relative.

    at_readout: of the neurons that rows show at the readout position.
    gradients: of gradients at layers' inputs from the plain model's; None where precision is too low for one.
    finite_difference: of a finite difference from what the gradients say; None likewise.
    experts: of what own code makes of each layer's experts; None of a model without.
    differences: of differences of logits by difference arithmetic from those of rows, in float64; None without it.
    together: whether differences of several prompts run together.
    tried: what was compared with what, for a person. late_expansion: the sites at whose neurons a layer's one row may
    become many. starts_at_layers: a pass may begin at any layer.
    """

    logits: float
    neurons: float
    at_readout: float
    gradients: float | None
    finite_difference: float | None
    experts: float | None
    late_expansion: frozenset[Site]
    starts_at_layers: bool
    tried: tuple[str, ...] = ()
    differences: float | None = None
    together: bool = False


def check_plain(model: LoadedModel) -> None:
    """See whether the plain model runs at all, on a few tokens.

    Raises:
        ModelError: it does not, its logits are not finite, or it is not what it was loaded as.
    """
    try:
        plain = plain_logits(model, check_ids(model))
        otherwise = runs_otherwise(model, LOGIT_TOLERANCE[model.dtype])
    except (TypeError, AttributeError, LookupError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"self-check of {name_of(model)}: the plain model does not run: {one_line(error)}: choose another "
            "model.source",
            change="model.source",
        ) from error
    if not plain.isfinite().all():
        raise ModelError(
            f"self-check of {name_of(model)}: the plain model's logits on {CHECK_TOKENS} tokens are not finite: "
            f"its weights are damaged (model.source), or too large for {_dtype(model)}",
            change="model.dtype",
        )
    if otherwise is not None:
        raise ModelError(
            f"self-check of {name_of(model)}: {otherwise}: choose another model.source", change="model.source"
        )


def check_engine(engine: Engine) -> SelfCheck:
    """Compare an engine with the plain model on a few tokens; see the module's header.

    Raises:
        MismatchError: a deviation beyond its tolerance; what else its passes raise.
    """
    module, layers = engine.model.module, engine.model.feed_forward.layers
    is_low = engine.model.dtype not in (torch.float32, torch.float64)
    is_other = engine.model.feed_forward.has_experts and is_low
    with in_precision(module, layers, torch.float32) if is_other else nullcontext():
        found = _check_engine(engine, has_gradients=not is_low)
    # What runs on has to be of the model's own precision.
    engine.forget()
    return found


def _check_engine(engine: Engine, *, has_gradients: bool) -> SelfCheck:
    model = engine.model
    ids = check_ids(model)
    tolerance = LOGIT_TOLERANCE[model.dtype]
    experts = experts_deviation(engine, ids) if model.feed_forward.has_experts else None
    if experts is not None:
        require_within(experts, tolerance, "experts are {} off the modeling code's own loop")
    logits, tried = _check_logits(engine, ids)
    neurons, at_readout = neurons_deviation(model, ids), readout_deviation(engine, ids)
    where = f"off the plain forward pass, in {_dtype(model)}"
    require_within(logits, tolerance, "row logits are {} " + where)
    require_within(neurons, tolerance, "captured neurons are {} " + where)
    require_within(at_readout, READOUT_FACTOR * tolerance, "neurons at the readout position are {} " + where)
    gradients = finite_difference = None
    if has_gradients:
        gradients = gradient_deviation(engine, ids)
        require_within(gradients, GRADIENT_TOLERANCE, "gradients are {} off those of the plain model's own pass")
        finite_difference = finite_difference_deviation(engine, ids, FINITE_DIFFERENCE_TOLERANCE)
        what = "small shifts of neurons move the output {} (relative) away from what gradients say"
        require_within(finite_difference, FINITE_DIFFERENCE_TOLERANCE, what)
    starts_at_layers, late_expansion = starts_and_expansion(engine, ids, tolerance)
    return SelfCheck(
        logits=logits,
        neurons=neurons,
        at_readout=at_readout,
        gradients=gradients,
        finite_difference=finite_difference,
        experts=experts,
        late_expansion=late_expansion,
        starts_at_layers=starts_at_layers,
        tried=(*tried, *_tried_of_neurons(model, has_gradients)),
    )


def require_within(deviation: float, allowed: float, what: str) -> None:
    """Refuse a deviation that is too large; written so that NaN is.

    Raises:
        MismatchError: naming it and the limit.
    """
    if not deviation <= allowed:
        raise MismatchError(f"{what.format(f'{deviation:.1e}')}, at most {allowed:g} is allowed")


def _check_logits(engine: Engine, ids: tuple[int, ...]) -> tuple[float, list[str]]:
    """How far rows' logits are from the plain model's, and which prompts said so."""
    model = engine.model
    tried = [f"rows of prompts of {_lengths(engine, ids)} tokens against the plain model, one by one"]
    logits = logits_deviation(engine, ids)
    with short_limits(model) as shortened:
        # Without limits it would be the very same once more.
        if shortened:
            logits = max(logits, logits_deviation(engine, ids))
            tried.append(f"the same with {', '.join(shortened)} = {SHORT_LIMIT}, which the prompts are longer than")
    if has_states(model.module):
        longer = spread_ids(model, longer_than_a_block(model))
        logits = max(logits, logits_deviation(engine, longer))
        tried.append(f"the same with {_lengths(engine, longer)} tokens, for layers that go through a prompt in blocks")
    return logits, tried


def _tried_of_neurons(model: LoadedModel, has_gradients: bool) -> Iterator[str]:
    """What is compared of neurons, for a person."""
    mlps = sum(isinstance(own, Mlp) for own in model.feed_forward.mlp_at.values())
    experts = sum(map(bool, model.feed_forward.experts))
    if mlps:
        yield f"what the down projections of {mlps} MLPs read against their activation, times up where there is a gate"
    if experts:
        yield f"the experts of {experts} layers against the modeling code's own loop, in float32 or better"
    if layers_as_run(model.module) is not None:
        yield f"logits with {model.feed_forward.n_layers} layers of their own against the model as it was loaded"
    yield "the neurons that rows show at the readout position against those of the plain model, in every layer"
    if has_gradients:
        yield "gradients at the input of every layer against those of the plain model's own pass"
        yield "small shifts of all neurons of each layer, in the plain model, against what gradients say"
    else:
        yield "no gradients: in low precision their differences drown in rounding"


def _lengths(engine: Engine, ids: tuple[int, ...]) -> str:
    return " and ".join(str(len(prompt)) for prompt in check_prompts(engine, ids)[0])


def name_of(model: LoadedModel) -> str:
    """A model as messages name it."""
    return f"{model.name} ({type(model.module).__name__})"


def _dtype(model: LoadedModel) -> str:
    return str(model.dtype).removeprefix("torch.")
