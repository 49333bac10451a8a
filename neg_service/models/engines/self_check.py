"""Proof, before anything is measured, that an engine and a model fit each other.

This is why numbers can be trusted on an architecture that nobody here has seen: rows must reproduce the plain forward
pass, the captured neurons must reproduce their MLP, each layer's experts what the modeling code's own loop makes of
them, and a small finite difference must move the output as the gradient says. An engine that does not is not used
(`engines/select.py`).

Models with experts are checked in float32, whatever their precision: in bfloat16 rounding alone has other experts
chosen in two passes of the same prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neg_service.errors import ModelError, one_line
from neg_service.models.dimensions import context_length
from neg_service.models.engines.backward import target_gradients
from neg_service.models.engines.base import Engine, LoadedModel, MismatchError
from neg_service.models.engines.needs import has_states
from neg_service.models.experts import ExpertsPoint
from neg_service.models.experts_function import summed, watching_routing
from neg_service.models.feed_forward import Point, Site, hooks
from neg_service.models.precision import in_precision
from neg_service.models.start_at_layer import flat, keep_inputs, start_at_layer

# How far rows' logits may be from plain ones, against the largest plain logit; how far a finite difference from the
# gradient. Measured deviations: about 1e-6 in float32, in float64 too where norms round to float32 regardless, and 1e-2
# in bfloat16; an engine that is wrong is off by 0.1 and more.
LOGIT_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
FINITE_DIFFERENCE_TOLERANCE = 0.05
# Rounding adds up from layer to layer; another token's neurons would be off by 1.
READOUT_FACTOR = 5
# A prime number: nothing that cuts prompts into blocks comes out even.
CHECK_TOKENS, _CHECK_WINDOW = 13, 5
# What share of the tolerance leaves no doubt.
_CLEARLY = 0.1
# What a configuration or a layer calls the number of tokens that are seen at most.
_LIMIT = re.compile("window|attention_chunk|index_topk|topk_tokens")
# What recurrent layers call the blocks in which they go through a prompt. Some cut it so without a name for it.
_BLOCK, _UNNAMED_BLOCK, _LONGEST_BLOCK = re.compile("(chunk|block)_size$"), 64, 512
_LOG_P_STEPS, _ACTIVATION_STEPS = [1e-2, 1e-3, 1e-4], [1e-1, 1e-2]


@dataclass(frozen=True)
class SelfCheck:
    """The largest deviations that the self-check saw, all relative.

    at_readout: of the neurons that rows show at the readout position.
    finite_difference: of a finite difference from what the gradient says; None where precision is too low for one.
    experts: of what own code makes of each layer's experts; None of a model without.
    late_expansion: the sites at whose neurons a layer's one row may become many; see `_late_expansion`.
    starts_at_layers: a pass may begin at any layer; see `_starts_at_layers`.
    """

    logits: float
    neurons: float
    at_readout: float
    finite_difference: float | None
    experts: float | None
    late_expansion: frozenset[Site]
    starts_at_layers: bool


def check_plain(model: LoadedModel) -> None:
    """See whether the plain model runs at all, on a few tokens.

    Raises:
        ModelError: it does not, or its logits are not finite.
    """
    try:
        plain = _plain_logits(model, _check_ids(model))
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
    engine.prefixes.forget()
    return found


def _check_engine(engine: Engine, *, has_gradients: bool) -> SelfCheck:
    model = engine.model
    ids = _check_ids(model)
    tolerance = LOGIT_TOLERANCE[model.dtype]
    experts = _check_experts(engine, ids) if model.feed_forward.has_experts else None
    # Written so that NaN fails too.
    if experts is not None and not experts <= tolerance:
        raise MismatchError(
            f"experts are {experts:.1e} off the modeling code's own loop, at most {tolerance:.0e} is allowed"
        )
    logits = _check_logits(engine, ids)
    with _short_windows(model) as has_windows:
        # Without windows it would be the very same once more.
        if has_windows:
            logits = max(logits, _check_logits(engine, ids))
    if has_states(model.module):
        logits = max(logits, _check_logits(engine, _ids(model, _longer_than_a_block(model))))
    neurons = _check_neurons(model, ids)
    at_readout = _check_readout(engine, ids)
    for what, deviation, allowed in (
        ("row logits", logits, tolerance),
        ("captured neurons", neurons, tolerance),
        ("neurons at the readout position", at_readout, READOUT_FACTOR * tolerance),
    ):
        if not deviation <= allowed:
            raise MismatchError(
                f"{what} are {deviation:.1e} off the plain forward pass, at most {allowed:.0e} is allowed in "
                f"{_dtype(model)}"
            )
    finite_difference = _check_finite_difference(engine, ids) if has_gradients else None
    if finite_difference is not None and not finite_difference <= FINITE_DIFFERENCE_TOLERANCE:
        raise MismatchError(
            f"a small shift of a neuron moves the output {finite_difference:.1e} (relative) away from what its "
            f"gradient says, at most {FINITE_DIFFERENCE_TOLERANCE} is allowed"
        )
    return SelfCheck(
        logits=logits,
        neurons=neurons,
        at_readout=at_readout,
        finite_difference=finite_difference,
        experts=experts,
        late_expansion=frozenset(_late_expansion(engine, ids)),
        starts_at_layers=_starts_at_layers(engine, ids),
    )


def name_of(model: LoadedModel) -> str:
    """A model as messages name it."""
    return f"{model.name} ({type(model.module).__name__})"


def _dtype(model: LoadedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def _check_ids(model: LoadedModel) -> tuple[int, ...]:
    return _ids(model, CHECK_TOKENS)


def _ids(model: LoadedModel, count: int) -> tuple[int, ...]:
    # All different, if there are so many: with equal tokens a prefix in the wrong order would go unseen.
    n_tokens = model.module.get_input_embeddings().weight.shape[0]
    ids = [n_tokens * (2 * i + 1) // (2 * count) for i in range(count)]
    if model.mask_token is not None:
        ids = [token if token != model.mask_token else token + 1 for token in ids]
        ids[7] = model.mask_token
    return tuple(ids)


@torch.no_grad()
def _plain_logits(model: LoadedModel, ids: Sequence[int], *, shows_experts: bool = False) -> Tensor:
    """Logits of the model's own pass; `shows_experts`: with own code for its experts, whose neurons then pass by."""
    # Every position's logits, because not every architecture can be asked for one alone.
    inputs = torch.tensor([list(ids)], device=model.device)
    with model.own_experts() if shows_experts else model.plain_experts():
        logits: Tensor = model.module(inputs, **({} if model.mask_token is not None else {"use_cache": False})).logits
    return logits[0, _readout(model, ids)]


def _readout(model: LoadedModel, ids: Sequence[int]) -> int:
    return list(ids).index(model.mask_token) if model.mask_token is not None else len(ids) - 1


@torch.no_grad()
def _check_logits(engine: Engine, ids: tuple[int, ...]) -> float:
    """The prompt, with and without a shared prefix, beside one of another length, in several rows."""
    worst = 0.0
    prompts, counts = _check_prompts(engine, ids)
    plain = [_plain_logits(engine.model, prompt) for prompt in prompts]
    for n_shared in (0, len(ids) // 2) if engine.shares_prefixes else (0,):
        rows = engine.rows(prompts, ids[:n_shared])
        for own_rv, plain_v in zip(torch.split(rows.run(counts), counts), plain, strict=True):
            worst = max(worst, _deviation(own_rv, plain_v))
    engine.prefixes.forget()
    return worst


def _check_prompts(engine: Engine, ids: tuple[int, ...]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The prompt in two rows, beside a shorter one in one, where the engine runs several prompts together."""
    return ([ids, ids[: len(ids) - 2]], [2, 1]) if engine.runs_prompts_together else ([ids], [2])


@contextmanager
def _short_windows(model: LoadedModel) -> Iterator[bool]:
    """Windows and chunks shorter than the few tokens of a check, which would never meet them; whether there are any."""
    before = []
    for part in (model.module.config.get_text_config(), *model.feed_forward.layers.modules()):
        for name, value in part.__dict__.items():
            if _LIMIT.search(name) and type(value) is int and value > _CHECK_WINDOW:
                before.append((part, name, value))
    try:
        for part, name, _ in before:
            setattr(part, name, _CHECK_WINDOW)
        yield bool(before)
    finally:
        for part, name, value in before:
            setattr(part, name, value)


def _longer_than_a_block(model: LoadedModel) -> int:
    """How many tokens are two and a bit of the blocks in which recurrent layers go through a prompt, or one, if long."""
    own = (model.module.config.get_text_config(), *model.feed_forward.layers.modules())
    blocks = [size for part in own for name, size in part.__dict__.items() if _BLOCK.search(name) and type(size) is int]
    longest = max([_UNNAMED_BLOCK, *(size for size in blocks if size <= _LONGEST_BLOCK)])
    wanted = (2 * longest if longest <= _UNNAMED_BLOCK else longest) + _CHECK_WINDOW
    return min(wanted, context_length(model.module) or wanted)


@torch.no_grad()
def _check_neurons(model: LoadedModel, ids: tuple[int, ...]) -> float:
    """The input of MLPs' down projections against what it should be made of: the activation, times up if gated."""
    mlps = {Site(layer): mlp for layer, mlp in enumerate(model.feed_forward.mlps) if mlp}
    points: dict[str, dict[Site, Point]] = {
        "act": {site: mlp.activated()[0] for site, mlp in mlps.items()},
        "paper": {site: mlp.point("paper") for site, mlp in mlps.items()},
        "hidden": {site: mlp.point("hidden") for site, mlp in mlps.items()},
    }
    seen: dict[tuple[str, Site], Tensor] = {}

    def keep(name: str) -> AbstractContextManager[None]:
        return hooks(points[name], lambda site, x: seen.update({(name, site): points[name][site].neurons(x)}))

    with keep("act"), keep("paper"), keep("hidden"):
        _plain_logits(model, ids)
    worst = 0.0
    for site, mlp in mlps.items():
        rebuilt = mlp.activated()[1](seen["act", site])
        if mlp.layout.is_gated:
            rebuilt = rebuilt * seen["paper", site]
        worst = max(worst, _deviation(rebuilt, seen["hidden", site]))
    return worst


@torch.no_grad()
def _check_experts(engine: Engine, ids: tuple[int, ...]) -> float:
    """What own code makes of each layer's experts against the modeling code's loop, on what a plain pass gives them.

    Raises:
        MismatchError: experts that do not run by own code, or another number of them than is known.
    """
    model = engine.model
    found = {own.module: own for own in model.feed_forward.experts if own}
    deviations: dict[Any, float] = {}
    reasons: list[str] = []

    def compare(module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        # Here, where a layer's weights are in the precision of the pass.
        handles.pop(module).remove()
        with model.own_experts(), watching_routing() as routing:
            deviations[module] = _deviation(summed(module, module(*args, **kwargs)), summed(module, output))
        if module not in routing:
            reasons.append(f"{type(module).__name__} does not go through transformers' experts interface")
        elif (n_chosen := routing[module].expert_tk.shape[1]) != found[module].n_chosen:
            reasons.append(f"a token uses {n_chosen} experts, its configuration says {found[module].n_chosen}")

    handles = {module: module.register_forward_hook(compare, with_kwargs=True) for module in found}
    try:
        _plain_logits(model, ids)
    finally:
        reasons += [f"{type(module).__name__} does not run in a plain pass" for module in handles]
        for handle in handles.values():
            handle.remove()
    if reasons:
        raise MismatchError(reasons[0])
    return max(deviations.values())


@torch.no_grad()
def _check_readout(engine: Engine, ids: tuple[int, ...]) -> float:
    """The neurons that rows show at their readout position against those of the plain pass."""
    model = engine.model
    points = model.feed_forward.sites("hidden")
    seen: dict[Site, Tensor] = {}

    def keep(site: Site, x: Tensor) -> None:
        seen[site] = flat(x.contiguous())

    with hooks(points, keep):
        _plain_logits(model, ids, shows_experts=True)
        plain = {site: seen[site][_readout(model, ids)] for site in points}
        prompts, counts = _check_prompts(engine, ids)
        rows = engine.rows(prompts)
        rows.run(counts)
    place = int(rows.positions(counts)[1])
    return max(_deviation(seen[site][place], own) for site, own in plain.items())


def _check_finite_difference(engine: Engine, ids: tuple[int, ...]) -> float:
    """In three layers, move the neuron that the engine calls steepest by a little, both ways.

    The step that agrees best counts: with small weights a large one leaves the straight part of the curve, and a small
    one drowns in rounding, but an engine that is wrong agrees at none. So the first that agrees clearly is enough: each
    step is two passes of the whole model.
    """
    model = engine.model
    # Not the most probable token: where that is certain, nothing moves its log p.
    target = int(_plain_logits(model, ids).topk(2).indices[1])
    points = model.feed_forward.sites("paper", _some_layers(model))
    gradients = target_gradients(engine.rows([ids]), [[target, 0]], points)
    worst = 0.0
    for point, gradient_rn in zip(points.values(), gradients.gradient_srn, strict=True):
        slopes = gradient_rn[0]
        neuron = int(slopes.abs().argmax())
        slope, best = float(slopes[neuron]), float("inf")
        for step in [change / slope for change in _LOG_P_STEPS] + _ACTIVATION_STEPS:
            up, down = (_log_p_with(model, point, neuron, shift, ids, target) for shift in (step, -step))
            best = min(best, abs((up - down) / (2 * slope * step) - 1))
            if best <= _CLEARLY * FINITE_DIFFERENCE_TOLERANCE:
                break
        worst = max(worst, best)
    return worst


def _some_layers(model: LoadedModel) -> list[int]:
    """The first, the middle and the last layer, and the first and the last that have experts."""
    n_layers, experts = model.feed_forward.n_layers, model.feed_forward.experts
    with_experts = [layer for layer, own in enumerate(experts) if own]
    return sorted({0, n_layers // 2, n_layers - 1, *with_experts[:1], *with_experts[-1:]})


@torch.no_grad()
def _log_p_with(model: LoadedModel, point: Point, neuron: int, shift: float, ids: Sequence[int], target: int) -> float:
    def move(_layer: int, x: Tensor) -> Tensor:
        moved = x.clone()
        point.neurons(flat(moved))[_readout(model, ids), neuron] += shift
        return moved

    with hooks({0: point}, move):
        logits = _plain_logits(model, ids, shows_experts=isinstance(point, ExpertsPoint))
        return float(logits.double().log_softmax(-1)[target])


@torch.no_grad()
def _late_expansion(engine: Engine, ids: Sequence[int]) -> Iterator[Site]:
    """The sites at which a layer may run as one row up to its neurons and as several from there, by broadcasting.

    Most MLPs can. A layer that reshapes its output as its input was (OPT, most blocks of experts) cannot; there every
    row runs the whole layer.
    """
    model = engine.model
    rows = engine.rows([ids])
    head = model.module.get_output_embeddings()
    seen: list[Tensor] = []

    def expand(_site: Site, x: Tensor) -> Tensor:
        return rows.expand_rows(x, 2).clone()

    handle = head.register_forward_hook(lambda _m, _i, out: seen.append(out.reshape(-1, out.shape[-1])))
    try:
        rows.run([2])
        plain = seen.pop()
        for site, point in model.feed_forward.sites("paper").items():
            try:
                with hooks({site: point}, expand):
                    rows.run([1])
            except (RuntimeError, ValueError, IndexError):
                continue
            expanded = seen.pop()
            if expanded.shape == plain.shape and _deviation(expanded, plain) <= LOGIT_TOLERANCE[model.dtype]:
                yield site
    finally:
        handle.remove()


@torch.no_grad()
def _starts_at_layers(engine: Engine, ids: Sequence[int]) -> bool:
    """Whether a pass of several rows may begin at any layer with that layer's stored input, and end as a whole one.

    Not where something else happens between two layers (a convolution in DeBERTa 2), where layers use keys and values
    of others (Gemma 3n), or hand on what one row chose (DeepSeek 3.2); there every intervention runs all layers.
    """
    layers, rows = engine.model.feed_forward.layers, engine.rows([ids])
    with keep_inputs(layers) as (inputs, output_structures):
        rows.run([1])
    plain = rows.run([2])
    if len(inputs) != len(layers):
        return False
    for first in range(1, len(layers)):
        try:
            with start_at_layer(layers, first, rows.expand_rows(inputs[first], 2), output_structures):
                found = rows.run([2])
        except (TypeError, AttributeError, LookupError, ValueError, RuntimeError):
            return False
        if not _deviation(found, plain) <= LOGIT_TOLERANCE[engine.model.dtype]:
            return False
    return True


def _deviation(found: Tensor, expected: Tensor) -> float:
    """The largest difference, against the largest expected value."""
    scale = expected.double().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((found.double() - expected.double()).abs().max() / scale)
