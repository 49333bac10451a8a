"""Proof, before anything is measured, that the engine and a model fit each other.

This is why numbers can be trusted on an architecture that nobody here has seen: rows must reproduce the plain forward
pass, the captured neurons must reproduce their MLP, and a small poke must move the output as the gradient says. An
engine that does not is not used; the next slower one is tried, and where none is left the model is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from neg_service.errors import ModelError, one_line
from neg_service.memory import is_out_of_memory
from neg_service.models.backward import target_gradients
from neg_service.models.feed_forward import Site, visiting
from neg_service.models.rows import BranchRows, flat, keeping_inputs, resuming_at

if TYPE_CHECKING:
    from neg_service.models.language_model import LanguageModel

# How far rows' logits may be from plain ones, against the largest plain logit; how far a poke from the gradient.
# Measured deviations: about 1e-6 in float32, in float64 too where norms round to float32 regardless, and 1e-2 in
# bfloat16; an engine that is wrong is off by 0.1 and more.
LOGIT_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
POKE_TOLERANCE = 0.05
# Rounding adds up from layer to layer; another token's neurons would be off by 1.
READOUT_FACTOR = 5
# A prime number: nothing that cuts prompts into blocks comes out even.
_CHECK_TOKENS, _CHECK_WINDOW = 13, 5
# What share of the tolerance leaves no doubt.
_CLEARLY = 0.1
_LOG_P_POKES, _ACTIVATION_POKES = [1e-2, 1e-3, 1e-4], [1e-1, 1e-2]


@dataclass(frozen=True)
class SelfCheck:
    """The largest deviations that the self-check saw, all relative; `poke` is None where precision is too low.

    engine: what fits the model, see `language_model.py`; not_fitting: why each faster one does not.
    at_readout: of the neurons that rows show at the readout position.
    widens_at_neurons: a layer's one row may become many at its neurons; see `_widens_at_neurons`.
    resumes: a pass may begin at any layer; see `_resumes`.
    """

    logits: float
    neurons: float
    at_readout: float
    poke: float | None
    widens_at_neurons: bool
    resumes: bool
    engine: str
    not_fitting: dict[str, str]


def self_check(model: LanguageModel) -> SelfCheck:
    """Compare engines with the plain model on a few tokens, and choose the first that fits; see the module's header.

    Raises:
        ModelError: no engine fits; for each, a deviation beyond its tolerance, or why it does not run.
    """
    not_fitting: dict[str, str] = {}
    try:
        plain = _plain_logits(model, _check_ids(model))
    except (TypeError, AttributeError, LookupError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"self-check of {_name(model)}: the plain model does not run: {one_line(error)}: choose another "
            f"model.source"
        ) from error
    if not plain.isfinite().all():
        raise ModelError(
            f"self-check of {_name(model)}: the plain model's logits on {_CHECK_TOKENS} tokens are not finite: its "
            f"weights are damaged (model.source), or too large for {_dtype(model)} (model.dtype)"
        )
    for engine in model.engines:
        model.use_engine(engine)
        try:
            return _self_check(model, not_fitting)
        except _NotFittingError as error:
            not_fitting[engine] = str(error)
        except (TypeError, AttributeError, LookupError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                model.use_engine(None)
                raise ModelError(
                    f"self-check of {_name(model)}: the graph of {_CHECK_TOKENS} tokens does not fit into the memory "
                    f"of {model.device} beside the weights: use a larger device, or a smaller model.source or "
                    f"model.dtype"
                ) from error
            own = "" if model.model._supports_attention_backend else "its attention is code of its own; "
            not_fitting[engine] = f"{own}does not run: {one_line(error)}"
    model.use_engine(None)
    reasons = "; ".join(f"{engine}: {reason}" for engine, reason in not_fitting.items())
    raise ModelError(f"self-check of {_name(model)}: {reasons}: choose another model.source or model.dtype")


class _NotFittingError(Exception):
    """An engine gives other numbers than the plain model."""


def _self_check(model: LanguageModel, not_fitting: dict[str, str]) -> SelfCheck:
    ids = _check_ids(model)
    tolerance = LOGIT_TOLERANCE[model.dtype]
    logits = _check_logits(model, ids)
    with _short_windows(model) as has_windows:
        # Without windows it would be the very same once more.
        if has_windows:
            logits = max(logits, _check_logits(model, ids))
    neurons = _check_neurons(model, ids)
    at_readout = _check_readout(model, ids)
    for what, deviation, allowed in (
        ("row logits", logits, tolerance),
        ("captured neurons", neurons, tolerance),
        ("neurons at the readout position", at_readout, READOUT_FACTOR * tolerance),
    ):
        # Written so that NaN fails too.
        if not deviation <= allowed:
            raise _NotFittingError(
                f"{what} are {deviation:.1e} off the plain forward pass, at most {allowed:.0e} is allowed in "
                f"{_dtype(model)}"
            )
    poke = _check_poke(model, ids) if model.dtype in (torch.float32, torch.float64) else None
    if poke is not None and not poke <= POKE_TOLERANCE:
        raise _NotFittingError(
            f"a small shift of a neuron moves the output {poke:.1e} (relative) away from what its gradient says, at "
            f"most {POKE_TOLERANCE} is allowed"
        )
    return SelfCheck(
        logits=logits,
        neurons=neurons,
        at_readout=at_readout,
        poke=poke,
        widens_at_neurons=_widens_at_neurons(model, ids),
        resumes=_resumes(model, ids),
        engine=model.engine,
        not_fitting=not_fitting,
    )


def _name(model: LanguageModel) -> str:
    return f"{model.name} ({type(model.model).__name__})"


def _dtype(model: LanguageModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def _check_ids(model: LanguageModel) -> tuple[int, ...]:
    # All different: with equal tokens a prefix in the wrong order would go unseen.
    n_tokens = model.model.get_input_embeddings().weight.shape[0]
    ids = [n_tokens * (2 * i + 1) // (2 * _CHECK_TOKENS) for i in range(_CHECK_TOKENS)]
    if model.mask_token is not None:
        ids = [token if token != model.mask_token else token + 1 for token in ids]
        ids[7] = model.mask_token
    return tuple(ids)


@torch.no_grad()
def _plain_logits(model: LanguageModel, ids: Sequence[int]) -> Tensor:
    # Every position's logits, because not every architecture can be asked for one alone.
    inputs = torch.tensor([list(ids)], device=model.device)
    logits: Tensor = (model.model(inputs) if model.is_masked else model.model(inputs, use_cache=False)).logits
    return logits[0, _readout(model, ids)]


def _readout(model: LanguageModel, ids: Sequence[int]) -> int:
    return list(ids).index(model.mask_token) if model.mask_token is not None else len(ids) - 1


@torch.no_grad()
def _check_logits(model: LanguageModel, ids: tuple[int, ...]) -> float:
    """The prompt, with and without a header, beside one of another length, in several rows."""
    worst = 0.0
    prompts, counts = _check_prompts(model, ids)
    plain = [_plain_logits(model, prompt) for prompt in prompts]
    for header_length in (0,) if model.is_masked else (0, len(ids) // 2):
        rows = model.rows(prompts, ids[:header_length])
        if isinstance(rows, BranchRows) and rows.n_layers != model.feed_forward.n_layers:
            raise _NotFittingError(
                f"{model.feed_forward.n_layers - rows.n_layers} of the {model.feed_forward.n_layers} layers do not go "
                f"through transformers' attention interface"
            )
        for own_rv, plain_v in zip(torch.split(rows.run(counts), counts), plain, strict=True):
            worst = max(worst, _deviation(own_rv, plain_v))
    model.forget_headers()
    return worst


def _check_prompts(model: LanguageModel, ids: tuple[int, ...]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The prompt in two rows, beside a shorter one in one, where the engine runs several prompts together."""
    prompts = [ids] if model.engine == "rows" else [ids, ids[: len(ids) - 2]]
    return prompts, [2, 1][: len(prompts)]


@contextmanager
def _short_windows(model: LanguageModel) -> Iterator[bool]:
    """Sliding windows shorter than the few tokens of a check, which would never meet them; whether there are any."""
    before = []
    for part in (model.model.config.get_text_config(), *model.feed_forward.layers.modules()):
        for name, value in part.__dict__.items():
            if "window" in name and type(value) is int and value > _CHECK_WINDOW:
                before.append((part, name, value))
    try:
        for part, name, _ in before:
            setattr(part, name, _CHECK_WINDOW)
        yield bool(before)
    finally:
        for part, name, value in before:
            setattr(part, name, value)


@torch.no_grad()
def _check_neurons(model: LanguageModel, ids: tuple[int, ...]) -> float:
    """The input of the down projection against what it should be made of: the activation, times up if gated."""
    found = model.feed_forward
    act = [Site(mlp.get_submodule(found.layout.act), "output", 0, found.n_neurons) for mlp in found.mlps]
    sites = {"act": act, "paper": found.sites("paper"), "hidden": found.sites("hidden")}
    seen: dict[tuple[str, int], Tensor] = {}

    def keep(name: str) -> AbstractContextManager[None]:
        return visiting(
            dict(enumerate(sites[name])),
            lambda layer, x: seen.update({(name, layer): sites[name][layer].neurons(x)}),
        )

    with keep("act"), keep("paper"), keep("hidden"):
        _plain_logits(model, ids)
    worst = 0.0
    for layer in range(found.n_layers):
        rebuilt = seen["act", layer]
        if found.layout.is_gated:
            rebuilt = rebuilt * seen["paper", layer]
        worst = max(worst, _deviation(rebuilt, seen["hidden", layer]))
    return worst


@torch.no_grad()
def _check_readout(model: LanguageModel, ids: tuple[int, ...]) -> float:
    """The neurons that rows show at their readout position against those of the plain pass."""
    sites = dict(enumerate(model.feed_forward.sites("hidden")))
    seen: dict[int, Tensor] = {}

    def keep(layer: int, x: Tensor) -> None:
        seen[layer] = flat(x.contiguous())

    with visiting(sites, keep):
        _plain_logits(model, ids)
        plain = [seen[layer][_readout(model, ids)] for layer in sites]
        prompts, counts = _check_prompts(model, ids)
        rows = model.rows(prompts)
        rows.run(counts)
    place = int(rows.positions(counts)[1])
    return max(_deviation(seen[layer][place], own) for layer, own in enumerate(plain))


def _check_poke(model: LanguageModel, ids: tuple[int, ...]) -> float:
    """In three layers, move the neuron that the engine calls steepest by a little, both ways.

    The step that agrees best counts: with small weights a large one leaves the straight part of the curve, and a small
    one drowns in rounding, but an engine that is wrong agrees at none. So the first that agrees clearly is enough: each
    step is two passes of the whole model.
    """
    found = model.feed_forward
    sites = dict(enumerate(found.sites("paper")))
    # Not the most probable token: where that is certain, nothing moves its log p.
    target = int(_plain_logits(model, ids).topk(2).indices[1])
    layers = sorted({0, found.n_layers // 2, found.n_layers - 1})
    gradients = target_gradients(model.rows([ids]), [[target, 0]], {layer: sites[layer] for layer in layers})
    worst = 0.0
    for layer, gradient_rn in zip(layers, gradients.gradient_lrn, strict=True):
        slopes = gradient_rn[0]
        neuron = int(slopes.abs().argmax())
        slope, best = float(slopes[neuron]), float("inf")
        for step in [change / slope for change in _LOG_P_POKES] + _ACTIVATION_POKES:
            up, down = (_log_p_with(model, sites[layer], neuron, shift, ids, target) for shift in (step, -step))
            best = min(best, abs((up - down) / (2 * slope * step) - 1))
            if best <= _CLEARLY * POKE_TOLERANCE:
                break
        worst = max(worst, best)
    return worst


@torch.no_grad()
def _log_p_with(model: LanguageModel, site: Site, neuron: int, shift: float, ids: Sequence[int], target: int) -> float:
    def poke(_layer: int, x: Tensor) -> Tensor:
        poked = x.clone()
        site.neurons(flat(poked))[_readout(model, ids), neuron] += shift
        return poked

    with visiting({0: site}, poke):
        return float(_plain_logits(model, ids).double().log_softmax(-1)[target])


@torch.no_grad()
def _widens_at_neurons(model: LanguageModel, ids: Sequence[int]) -> bool:
    """Whether a layer may run as one row up to its neurons and as several from there, the rest by broadcasting.

    Most do. One that reshapes its output as its input was (OPT) does not; there every row runs the whole layer.
    """
    layers, sites = model.feed_forward.layers, model.feed_forward.sites("paper")
    rows = model.rows([ids])
    head, middle = model.model.get_output_embeddings(), len(layers) // 2
    seen: list[Tensor] = []

    def widen(_layer: int, x: Tensor) -> Tensor:
        return rows.widened(x, 2).clone()

    handle = head.register_forward_hook(lambda _m, _i, out: seen.append(out.reshape(-1, out.shape[-1])))
    try:
        rows.run([2])
        with visiting({middle: sites[middle]}, widen):
            rows.run([1])
    except (RuntimeError, ValueError, IndexError):
        return False
    finally:
        handle.remove()
    plain, widened = seen
    return widened.shape == plain.shape and _deviation(widened, plain) <= LOGIT_TOLERANCE[model.dtype]


@torch.no_grad()
def _resumes(model: LanguageModel, ids: Sequence[int]) -> bool:
    """Whether a pass may begin at any layer with that layer's stored input, and end as a whole one does.

    Not where something else happens between two layers (a convolution in DeBERTa 2), or where layers use keys and
    values of others (Gemma 3n); there every intervention runs all layers.
    """
    layers, rows = model.feed_forward.layers, model.rows([ids])
    with keeping_inputs(layers) as (inputs, forms):
        plain = rows.run([1])
    for first in range(1, len(layers)):
        try:
            with resuming_at(layers, first, inputs[first], forms):
                resumed = rows.run([1])
        except (TypeError, AttributeError, LookupError, ValueError, RuntimeError):
            return False
        if not _deviation(resumed, plain) <= LOGIT_TOLERANCE[model.dtype]:
            return False
    return True


def _deviation(found: Tensor, expected: Tensor) -> float:
    """The largest difference, against the largest expected value."""
    scale = expected.double().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((found.double() - expected.double()).abs().max() / scale)
