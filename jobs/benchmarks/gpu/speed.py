"""How fast: the engine against the floor, the textbook and an expert's way; by batch size; every engine that fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import torch

from jobs.benchmarks import experts, ways
from jobs.benchmarks.gpu.pacing import FAILURES, Timed, Way, ratio_of, reason_of, take_turns
from jobs.benchmarks.gpu.subject import Subject, first_neurons
from neg_service.measures.batching import budget_of
from neg_service.measures.interventions import Interventions
from neg_service.measures.neg import sweep_prompt
from neg_service.measures.shifts import Sweep, full_grid
from neg_service.models.batches import Budget, without_frames
from neg_service.models.engines.base import LoadedModel, MismatchError
from neg_service.models.engines.select import Selection, candidates
from neg_service.models.engines.self_check import check_engine

# Of one floor so many rows, of the other as many as the time allows.
_FEW_ROWS, _MANY_ROWS = 256, (1024, 4096, 16384)
# The engine gets so much more time than others: it has to fill batches.
_ENGINE_WEIGHT = 4.0
_EXPERT_ROWS = 160
_SCALES = (1 / 256, 1 / 64, 1 / 16, 1 / 4, 1)


def gradients(subject: Subject) -> dict[str, Any]:
    """Milliseconds a prompt of the gradients of all neurons for all targets; the slow ways run fewer prompts."""
    model, (prompts, targets), most = subject.model, subject.data, subject.settings.prompts
    header = subject.settings.header_tokens
    floor = _without_own_experts(subject)

    def textbook(n: int, batch: int) -> None:
        if model.feed_forward.has_experts:
            experts.textbook_gradients(model.model, prompts[:n], targets[:n])
        else:
            ways.textbook(model.model, prompts[:n], targets[:n], batch)

    def engine(n: int) -> None:
        model.forget_prefixes()
        subject.gradients(range(n), budget_of(model))

    many = _up_to(most, (8, 32, 128))
    ways_of = {
        "engine": Way(engine, many, weight=_ENGINE_WEIGHT),
        # Of every four prompts lengths have the same mean.
        "textbook, one prompt at a time": Way(lambda n: textbook(n, 1), (4,)),
    }
    if not model.feed_forward.has_experts:
        ways_of["textbook, batches of 8"] = Way(lambda n: textbook(n, 8), (8,))
        ways_of["expert"] = Way(lambda n: _drop(ways.expert(model.model, prompts[:n], targets[:n])), (4,))
    ways_of["plain forward, batches of 8"] = Way(lambda n: ways.plain_forward(model.model, prompts[:n], 8), (8,))

    def run_floor(batch: int, n: int) -> None:
        model.forget_prefixes()
        ways.floor(floor, prompts[:n], header, batch)

    for batch in (16, most):
        ways_of[f"floor, batches of {batch}"] = Way(partial(run_floor, batch), as_many_as="engine")
    found = _turns(subject, ways_of, "gradients")
    floors = [own for name, own in found.items() if name.startswith("floor")]
    return _told(found, {"engine over floor": (found["engine"], _fastest(floors))}, found["engine"])


def interventions(subject: Subject) -> dict[str, Any]:
    """Milliseconds an intervention in the first, the middle and the last layer."""
    model, ids, target = subject.model, subject.prompt.ids, subject.prompt.target_ids[0]
    own, sweep = Interventions(model, subject.prompt, "paper"), Sweep(full_grid())
    shifts = sweep.grid.shifts.tolist()
    if model.feed_forward.has_experts:
        run_floor: Callable[[int, int], Any] = experts.Floor(_without_own_experts(subject), ids).run
    else:
        run_floor = partial(ways.remaining_layers, own)

    def engine(layer: int, n: int) -> None:
        chosen = first_neurons(own, layer, n // len(shifts))
        sweep_prompt(own, chosen, sweep, budget_of(model), keep_curves=False)

    most = min(subject.settings.neurons, *(len(x) for x in own.activation.values()))
    counts = tuple(len(shifts) * n for n in _up_to(most, (4, 16, 64, 256)))
    ways_of: dict[str, Way] = {}
    for layer in subject.layers.values():
        ways_of[f"engine, layer {layer}"] = Way(partial(engine, layer), counts, weight=_ENGINE_WEIGHT)
        for name, rows in (("few", (_FEW_ROWS,)), ("many", _MANY_ROWS)):
            ways_of[f"floor, layer {layer}, {name} rows"] = Way(partial(run_floor, layer), rows)
    ways_of |= _slow_interventions(subject, ids, target, shifts)
    found = _turns(subject, ways_of, "interventions")
    pairs: dict[str, tuple[Timed, Timed]] = {}
    for layer in subject.layers.values():
        floors = [one for name, one in found.items() if name.startswith(f"floor, layer {layer},")]
        pairs[f"engine over floor, layer {layer}"] = found[f"engine, layer {layer}"], _fastest(floors)
    return _told(found, pairs, found[f"engine, layer {subject.layers['middle']}"])


def _slow_interventions(subject: Subject, ids: tuple[int, ...], target: int, shifts: list[float]) -> dict[str, Way]:
    module, layer = subject.model.model, subject.layers["middle"]
    if subject.model.feed_forward.has_experts:
        # Without hooks, which cost nothing beside a pass.
        return {"textbook, one at a time": Way(lambda n: [_plain_pass(module, ids) for _ in range(n)], (1, 4, 16))}

    def textbook(batch: int, n: int) -> None:
        shifted = [(layer, place // len(shifts), shifts[place % len(shifts)]) for place in range(n)]
        ways.textbook_interventions(module, ids, target, shifted, batch, 1 if batch > 1 else 0)

    kept: list[ways.Cached] = []

    def expert(n: int) -> None:
        if not kept:
            kept.append(ways.Cached(module, ids, n))
        kept[0].interventions(target, [(layer, place // 40, shifts[place % 40]) for place in range(n)])

    return {
        "textbook, one at a time": Way(partial(textbook, 1), (1, 4, 16)),
        "textbook, 40 shifts in a batch": Way(partial(textbook, len(shifts)), (len(shifts),)),
        "expert": Way(expert, (_EXPERT_ROWS,)),
    }


def batch_sizes(subject: Subject) -> dict[str, Any]:
    """What gradients and interventions take with parts of the memory that a batch takes by itself."""
    own, whole = Interventions(subject.model, subject.prompt, "paper"), budget_of(subject.model).bytes
    prompts = _up_to(subject.settings.prompts, (8, 32))
    middle = subject.layers["middle"]

    def gradients_in(size: int, n: int) -> None:
        subject.gradients(range(n), Budget(size))

    def interventions_in(size: int, n: int) -> None:
        subject.run_interventions(own, middle, n, Budget(size))

    ways_of: dict[str, Way] = {}
    for scale in _SCALES:
        size = max(1, int(whole * scale))
        name = f"{size / 2**20:.3g} MiB"
        ways_of[f"gradients, {name}"] = Way(partial(gradients_in, size), prompts)
        ways_of[f"interventions, {name}"] = Way(partial(interventions_in, size), (160, 1280, 10240))
    return _told(_turns(subject, ways_of, "batch sizes"), {}, None)


def engines(subject: Subject) -> dict[str, Any]:
    """Every engine that takes the model: whether it passes the self-check, and its time; why the others do not."""
    model, chosen = subject.model, subject.model.ensure_checked()
    found: dict[str, Any] = {}
    ways_of: dict[str, Way] = {}
    for kind, refusal in candidates(model.model, model._loaded.read_at).items():
        if refusal is not None:
            found[kind.name] = {"refused": refusal}
            continue
        try:
            engine = kind(model._loaded)
            selection = chosen if kind is type(chosen.engine) else Selection(engine, check_engine(engine))
            model.adopt(selection)
            own = Interventions(model, subject.prompt, "paper")
        except MismatchError as error:
            found[kind.name] = {"does not fit": str(error)}
            continue
        except FAILURES as error:
            found[kind.name] = {"failed": reason_of(without_frames(error))}
            continue

        def gradients_by(n: int, selection: Selection = selection) -> None:
            model.adopt(selection)
            model.forget_prefixes()
            subject.gradients(range(n), budget_of(model))

        def interventions_by(n: int, own: Interventions = own) -> None:
            subject.run_interventions(own, subject.layers["middle"], n, budget_of(model))

        found[kind.name] = {"self-check": {"logits": selection.check.logits, "gradients": selection.check.gradients}}
        ways_of[f"{kind.name}: gradients"] = Way(gradients_by, (1, 8))
        ways_of[f"{kind.name}: interventions"] = Way(interventions_by, (1, 8, 40, 160, 1280))
    try:
        timed = _turns(subject, ways_of, "engines")
    finally:
        model.adopt(chosen)
    for name, one in timed.items():
        engine_name, _, what = name.partition(": ")
        found[engine_name][what] = one.told()
    return found


def _turns(subject: Subject, ways_of: dict[str, Way], what: str) -> dict[str, Timed]:
    settings = subject.settings
    return take_turns(
        ways_of, subject.device, settings.repeats, settings.part_seconds, f"{subject.title}, {what} (ms an item)"
    )


def _told(found: dict[str, Timed], pairs: dict[str, tuple[Timed, Timed]], engine: Timed | None) -> dict[str, Any]:
    """Figures of all ways, and ratios: those given, and of all that is neither engine nor floor over the engine."""
    pairs = dict(pairs)
    if engine is not None:
        for name, own in found.items():
            if not name.startswith(("engine", "floor")):
                pairs[f"{name}, over engine"] = own, engine
    ratios = {
        name: ratio_of(over, under)
        for name, (over, under) in pairs.items()
        if over.failed is None and under.failed is None
    }
    return {"milliseconds": {name: own.told() for name, own in found.items()}, "ratios": ratios}


def _fastest(floors: list[Timed]) -> Timed:
    """By the sum of its repeats; one that failed only where all did."""
    return min(floors, key=lambda own: math.inf if own.failed is not None else sum(own.seconds) / len(own.seconds))


def _without_own_experts(subject: Subject) -> LoadedModel:
    loaded = subject.model._loaded
    if not subject.model.feed_forward.has_experts:
        return loaded
    return experts.PlainExperts(**{own.name: getattr(loaded, own.name) for own in fields(LoadedModel)})


@torch.no_grad()
def _plain_pass(module: Any, ids: tuple[int, ...]) -> None:
    module(torch.tensor([list(ids)], device=module.device), use_cache=False, logits_to_keep=1)


def _up_to(most: int, counts: tuple[int, ...]) -> tuple[int, ...]:
    return (*(n for n in counts if n < most), most)


def _drop(_result: Any) -> None:
    """Results are not to be held while memory is measured."""
