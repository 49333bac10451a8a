"""What the self-check compares: passes of an engine with those of the plain model, each giving how far they are apart.

Deviations are relative to the largest expected value, unless it says otherwise. `self_check.py` says how large they
may be.

Axes: R rows, N neurons of a site, F features.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from neg_service.models.dimensions import context_length
from neg_service.models.engines.backward import target_gradients
from neg_service.models.engines.base import Engine, LoadedModel, MismatchError, Rows
from neg_service.models.engines.full_sequence import UnpaddedEngine
from neg_service.models.experts_function import summed, watching_routing
from neg_service.models.feed_forward import Point, Site, hooks
from neg_service.models.head import log_softmax
from neg_service.models.mlp import Mlp
from neg_service.models.onednn import plain_products
from neg_service.models.precision import at_least_float32, in_precision
from neg_service.models.start_at_layer import flat
from neg_service.models.text_config import text_config

# A prime number: nothing that cuts prompts into blocks comes out even.
CHECK_TOKENS = 13
# What limits of attention are for a moment, so that the few tokens of a check meet them.
SHORT_LIMIT = 5
# What a configuration or a layer calls the number of tokens that are seen at most.
_LIMIT = re.compile("(window|attention_chunk|index_topk|topk_tokens)(?!.*(_layers|_pattern)$)")
# What recurrent layers call the blocks in which they go through a prompt. Some cut it so without a name for it.
_BLOCK, _UNNAMED_BLOCK, _LONGEST_BLOCK = re.compile("(chunk|block)_size$"), 64, 512
# By how much log p is to change; by how much neurons move at the most for that, and where they are said to change
# nothing; and what rounding alone makes of a difference of two log p in float32, with logits up to `_LOGITS`.
_LOG_P_STEPS, _LARGEST_STEP, _STEP_OF_NOTHING = (1e-2, 1e-3, 1e-4), 1.0, 1e-2
_ROUNDING, _LOGITS = 5e-6, 20
_STEP_IN_FLOAT64 = 1e-5
_DRAWS = 8
# What share of the tolerance leaves no doubt.
_CLEARLY = 0.1


def check_ids(model: LoadedModel) -> tuple[int, ...]:
    return spread_ids(model, CHECK_TOKENS)


def spread_ids(model: LoadedModel, count: int) -> tuple[int, ...]:
    # All different, if there are so many: with equal tokens a prefix in the wrong order would go unseen.
    n_tokens = model.module.get_input_embeddings().weight.shape[0]
    ids = [n_tokens * (2 * i + 1) // (2 * count) for i in range(count)]
    if model.mask_token is not None:
        ids = [token if token != model.mask_token else token + 1 for token in ids]
        ids[7] = model.mask_token
    return tuple(ids)


@torch.no_grad()
def plain_logits(model: LoadedModel, ids: Sequence[int], *, shows_experts: bool = False) -> Tensor:
    """Logits of the model's own pass; `shows_experts`: with own code for its experts, whose neurons then pass by."""
    # Every position's logits, because not every architecture can be asked for one alone.
    return plain_sequence(model, ids, shows_experts=shows_experts)[readout(model, ids)]


def plain_sequence(model: LoadedModel, ids: Sequence[int], *, shows_experts: bool = False) -> Tensor:
    """The same behind every token [T, V], with gradients where they are enabled."""
    inputs = torch.tensor([list(ids)], device=model.device)
    with plain_products(), model.own_experts() if shows_experts else model.plain_experts():
        logits: Tensor = model.module(inputs, **_without_cache(model)).logits
    return logits[0]


def _without_cache(model: LoadedModel) -> dict[str, Any]:
    # Masked models have none to be told of.
    return {} if model.mask_token is not None else {"use_cache": False}


def readout(model: LoadedModel, ids: Sequence[int]) -> int:
    return list(ids).index(model.mask_token) if model.mask_token is not None else len(ids) - 1


@torch.no_grad()
def logits_deviation(engine: Engine, ids: tuple[int, ...]) -> float:
    """The prompt, with and without a shared prefix, beside one of another length, in several rows."""
    worst = 0.0
    prompts, counts = check_prompts(engine, ids)
    plain = [plain_logits(engine.model, prompt) for prompt in prompts]
    for n_shared in (0, len(ids) // 2) if engine.shares_prefixes else (0,):
        rows = engine.rows(prompts, ids[:n_shared])
        # Twice: what is kept for all rows must be as it was.
        for _ in range(1 if n_shared else 2):
            for own_rv, plain_v in zip(torch.split(rows.run(counts), counts), plain, strict=True):
                worst = max(worst, deviation_of(own_rv, plain_v))
    engine.forget()
    return worst


def check_prompts(engine: Engine, ids: tuple[int, ...]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The prompt in two rows, beside a shorter one in one, where the engine runs several prompts together."""
    return ([ids, ids[: len(ids) - 2]], [2, 1]) if engine.runs_prompts_together else ([ids], [2])


@contextmanager
def short_limits(model: LoadedModel) -> Iterator[list[str]]:
    """Windows, chunks and the like shorter than the few tokens of a check, which would never meet them; their names."""
    before = []
    for part in (text_config(model.module.config), *model.feed_forward.layers.modules()):
        for name, value in part.__dict__.items():
            if _LIMIT.search(name) and type(value) is int and value > SHORT_LIMIT:
                before.append((part, name, value))
    try:
        for part, name, _ in before:
            setattr(part, name, SHORT_LIMIT)
        yield sorted({name for _, name, _ in before})
    finally:
        for part, name, value in before:
            setattr(part, name, value)


def longer_than_a_block(model: LoadedModel) -> int:
    """How many tokens are a bit more than two of the blocks that recurrent layers cut prompts into, or one, if long."""
    own = (text_config(model.module.config), *model.feed_forward.layers.modules())
    blocks = [size for part in own for name, size in part.__dict__.items() if _BLOCK.search(name) and type(size) is int]
    longest = max([_UNNAMED_BLOCK, *(size for size in blocks if size <= _LONGEST_BLOCK)])
    wanted = (2 * longest if longest <= _UNNAMED_BLOCK else longest) + SHORT_LIMIT
    return min(wanted, context_length(model.module) or wanted)


@torch.no_grad()
def neurons_deviation(model: LoadedModel, ids: tuple[int, ...]) -> float:
    """The input of MLPs' down projections against what it should be made of: the activation, times up if gated."""
    # Those made of experts' weights are compared with the experts.
    mlps = {site: mlp for site, mlp in model.feed_forward.mlp_at.items() if isinstance(mlp, Mlp)}
    points: dict[str, dict[Site, Point]] = {
        "act": {site: mlp.activated()[0] for site, mlp in mlps.items()},
        "paper": {site: mlp.point("paper") for site, mlp in mlps.items()},
        "hidden": {site: mlp.point("hidden") for site, mlp in mlps.items()},
    }
    seen: dict[tuple[str, Site], Tensor] = {}

    def keep(name: str) -> AbstractContextManager[None]:
        return hooks(points[name], lambda site, x: seen.update({(name, site): points[name][site].neurons(x)}))

    with keep("act"), keep("paper"), keep("hidden"):
        plain_logits(model, ids)
    worst = 0.0
    for site, mlp in mlps.items():
        rebuilt = mlp.activated()[1](seen["act", site])
        if mlp.layout.is_gated:
            rebuilt = rebuilt * seen["paper", site]
        worst = max(worst, deviation_of(rebuilt, seen["hidden", site]))
    return worst


@torch.no_grad()
def experts_deviation(engine: Engine, ids: tuple[int, ...]) -> float:
    """What own code makes of each layer's experts against the modeling code's loop, on what a plain pass gives them.

    Raises:
        MismatchError: experts that do not run by own code, or another number of them than is known.
    """
    model = engine.model
    n_chosen_of = {own.module: own.n_chosen for own in model.feed_forward.experts if own}
    deviations: dict[Any, float] = {}
    reasons: list[str] = []

    def compare(module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        # Here, where a layer's weights are in the precision of the pass.
        handles.pop(module).remove()
        with model.own_experts(), watching_routing() as routing:
            deviations[module] = deviation_of(summed(module, module(*args, **kwargs)), summed(module, output))
        if (expected := n_chosen_of.get(module)) is None:
            return
        if module not in routing:
            reasons.append(f"{type(module).__name__} does not go through transformers' experts interface")
        elif (n_chosen := routing[module].expert_tk.shape[1]) != expected:
            reasons.append(f"a token uses {n_chosen} experts, its configuration says {expected}")

    modules = model.feed_forward.experts_modules
    handles = {module: module.register_forward_hook(compare, with_kwargs=True) for module in modules}
    try:
        plain_logits(model, ids)
    finally:
        reasons += [f"{type(module).__name__} does not run in a plain pass" for module in handles]
        for handle in handles.values():
            handle.remove()
    if reasons:
        raise MismatchError(reasons[0])
    return max(deviations.values())


@torch.no_grad()
def readout_deviation(engine: Engine, ids: tuple[int, ...]) -> float:
    """The neurons that rows show at their readout position against those of the plain pass."""
    model = engine.model
    points = model.feed_forward.sites("hidden")
    seen: dict[Site, Tensor] = {}

    def keep(site: Site, x: Tensor) -> None:
        seen[site] = flat(x.contiguous())

    with hooks(points, keep):
        plain_logits(model, ids, shows_experts=True)
        plain = {site: seen[site][readout(model, ids)] for site in points}
        prompts, counts = check_prompts(engine, ids)
        rows = engine.rows(prompts)
        rows.run(counts)
    place = int(rows.positions(counts)[1])
    return max(deviation_of(seen[site][place], own) for site, own in plain.items())


def gradient_deviation(engine: Engine, ids: Sequence[int]) -> float:
    """Of d log p / d hidden state of each layer's input at the readout position, from that of the plain model's pass.

    The plain model runs its experts by the modeling code's own loop, through whose routers' weights gradients go too.
    """
    model = engine.model
    target = int(plain_logits(model, ids).topk(2).indices[1])
    rows = engine.rows([ids])

    def of_target(logits_v: Tensor) -> Tensor:
        return log_softmax(at_least_float32(logits_v[None]))[0, target]

    place = readout(model, ids)
    own = slopes_of_layers(model, lambda: of_target(rows.run([1])[0]), rows.tokens, int(rows.positions([1])))
    expected = slopes_of_layers(model, lambda: of_target(plain_sequence(model, ids)[place]), len(ids), place)
    if own.keys() != expected.keys():
        raise MismatchError("its passes run other layers than the plain model's")
    return max((deviation_of(own[layer], slope) for layer, slope in expected.items()), default=0.0)


def slopes_of_layers(model: LoadedModel, run: Callable[[], Tensor], n_tokens: int, place: int) -> dict[int, Tensor]:
    """d of what a pass gives [] / d input [F] of each layer that it depends on, at a place among the pass's tokens.

    F is all that a layer is given of a token: some have several streams of hidden states.
    """
    leaves: dict[int, Tensor] = {}

    def enter(index: int) -> Any:
        def hook(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(hidden, Tensor) or n_tokens not in hidden.shape[:-1]:
                return None
            # Where there are several streams their axis stands before that of the tokens, or behind it.
            axis = hidden.shape.index(n_tokens)
            of_tokens = hidden.movedim(axis, 0)
            leaves[index] = hidden.new_zeros(1, of_tokens[0].numel(), requires_grad=True)
            at = torch.tensor([place], device=hidden.device)
            moved = of_tokens.reshape(n_tokens, -1).index_add(0, at, leaves[index])
            moved = moved.view(of_tokens.shape).movedim(0, axis)
            return ((moved, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": moved})

        return hook

    with torch.enable_grad(), ExitStack() as stack:
        for index, layer in enumerate(model.feed_forward.layers):
            stack.callback(layer.register_forward_pre_hook(enter(index), with_kwargs=True).remove)
        slopes = torch.autograd.grad(run(), list(leaves.values()), allow_unused=True)
    return {layer: slope[0] for layer, slope in zip(leaves, slopes, strict=True) if slope is not None}


def finite_difference_deviation(engine: Engine, ids: Sequence[int], tolerance: float) -> float:
    """Of what a small shift does to the plain model, from what the engine's gradients say: the worst site's.

    At each site all neurons are moved by equal amounts, up or down as chance has it, both ways. The change of log p is
    compared with the sum of gradients, relative to the gradient's norm, which is what that sum is expected to be. The
    step that agrees best counts: a large one leaves the straight part of the curve, and a small one drowns in rounding,
    but gradients that are wrong agree at none. So the first that agrees clearly, within a tenth of `tolerance`, is
    enough. Where none does, as of neurons that hardly act and soon bend, a smaller one is tried in float64.
    """
    model = engine.model
    # A few tokens are enough for that, and each site has rows of its own.
    start = max(0, min(readout(model, ids) - 2, len(ids) - SHORT_LIMIT))
    ids = tuple(ids)[start : start + SHORT_LIMIT]
    logits_v = plain_logits(model, ids)
    # Not the most probable token: where that is certain, nothing moves its log p.
    target = int(logits_v.topk(2).indices[1])
    # Of larger logits float32 has fewer digits behind the point.
    unit = max(1.0, float(logits_v.abs().max()) / _LOGITS)
    points = model.feed_forward.sites("paper")
    found = target_gradients(engine.rows([ids]), [[target, 0]], points)
    draw = torch.Generator().manual_seed(0)
    checked = {
        site: _SiteCheck(gradient_rn[0].double().cpu(), draw)
        for site, gradient_rn in zip(points, found.gradient_srn, strict=True)
    }

    def compare(plain: Rows, changes: Iterable[float], enough: float, rounding: float) -> None:
        for change in changes:
            unsure = {site: own for site, own in checked.items() if not own.best <= enough}
            shifts = {site: own.step(change) * own.sign_n for site, own in unsure.items()}
            for site, (up, down) in _log_p_of_shifts(plain, points, shifts, target).items():
                unsure[site].compare(up - down, change, rounding)

    steps = (step * unit for step in _LOG_P_STEPS)
    compare(UnpaddedEngine(model).rows([ids]), steps, _CLEARLY * tolerance, _ROUNDING * unit)
    if any(not own.best <= tolerance for own in checked.values()):
        with in_precision(model.module, model.feed_forward.layers, torch.float64):
            compare(UnpaddedEngine(model).rows([ids]), [_STEP_IN_FLOAT64 * unit], tolerance, 0.0)
    return max(own.best for own in checked.values())


class _SiteCheck:
    """What is said of a site's neurons [N], moved together by equal amounts up or down, and how well it agreed.

    best: the smallest deviation of all steps tried.
    """

    def __init__(self, slope_n: Tensor, draw: torch.Generator) -> None:
        signs_xn = torch.randint(0, 2, (_DRAWS, *slope_n.shape), generator=draw).double() * 2 - 1
        # Of several draws the one that moves the most: a factor in all gradients shows in it best.
        self.sign_n = signs_xn[(signs_xn @ slope_n).abs().argmax()]
        self.best = float("inf")
        self._norm, self._expected = float(slope_n.norm()), float(slope_n @ self.sign_n)

    def step(self, change: float) -> float:
        """By how much each neuron moves, so that log p changes by about `change`."""
        return min(change / self._norm, _LARGEST_STEP) if self._norm else _STEP_OF_NOTHING

    def compare(self, difference: float, change: float, rounding: float) -> None:
        """Take note of what a step up and one down made of log p, the one less the other.

        rounding: what it alone makes of that.
        """
        way = 2 * self.step(change)
        off = max(0.0, abs(difference - way * self._expected) - rounding)
        agrees = off / (way * self._norm) if self._norm else float("inf")
        self.best = min(self.best, agrees if off else 0.0)


@torch.no_grad()
def _log_p_of_shifts(
    plain: Rows, points: Mapping[Site, Point], shift: Mapping[Site, Tensor], target: int
) -> dict[Site, tuple[float, float]]:
    """log p of a target with each site's neurons moved by its `shift` [N], up and down: one pass, two rows each."""
    if not shift:
        return {}
    rows = {site: 2 * i for i, site in enumerate(shift)}
    place_r = plain.positions([2 * len(shift)])

    def move(site: Site, x: Tensor) -> Tensor:
        moved = x.clone()
        own = points[site].neurons(flat(moved))
        step_n = shift[site].to(own.device, own.dtype)
        own[place_r[rows[site]]] += step_n
        own[place_r[rows[site] + 1]] -= step_n
        return moved

    with hooks({site: points[site] for site in shift}, move):
        logits_rv = plain.run([2 * len(shift)])
    log_p_r = logits_rv.double().log_softmax(-1)[:, target].cpu().tolist()
    return {site: (log_p_r[row], log_p_r[row + 1]) for site, row in rows.items()}


def deviation_of(found: Tensor, expected: Tensor) -> float:
    """The largest difference, against the largest expected value; infinite where either has NaN."""
    scale = expected.double().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    deviation = float((found.double() - expected.double()).abs().max() / scale)
    # The larger of NaN and a number may be the number.
    return math.inf if math.isnan(deviation) else deviation
