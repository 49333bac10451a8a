"""How fast: the engine against the floor; by batch size; every engine that fits; last the slow ways of others.

Engine and floor take turns on the same prompts, or with as many rows, because on a GPU a pass costs nearly the same
whether it holds few of them or many.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

import torch

from jobs.benchmarks import experts, ways
from jobs.benchmarks.gpu.pacing import FAILURES, Timed, Way, ratio_of, reason_of, take_turns
from jobs.benchmarks.gpu.subject import Subject, first_neurons
from neg_service.config import NeuronsConfig
from neg_service.measures.base import ShardInput
from neg_service.measures.batching import budget_of
from neg_service.measures.curves import sweep_prompt
from neg_service.measures.integrated_gradients import integrals
from neg_service.measures.interventions import Interventions
from neg_service.measures.noise import row_noise
from neg_service.measures.readouts import Readouts
from neg_service.measures.shifts import Sweep, adaptive_grid, full_grid
from neg_service.measures.sweep import sweep_rows
from neg_service.models.batches import Budget, without_frames
from neg_service.models.engines.base import LoadedModel, MismatchError
from neg_service.models.engines.select import Selection, candidates
from neg_service.models.engines.self_check import check_engine

# Of the floor the best of these numbers of rows, and of prompts with all that there are, is taken.
_FLOOR_ROWS, _FLOOR_PROMPTS = (1024, 4096, 16384), 16
# Of the part's time, what layers get: rows go through all layers above.
_BOTTOM, _MIDDLE, _TOP = 3.0, 2.0, 1.0
_EXPERT_ROWS = 160
_SCALES = (1 / 64, 1 / 16, 1 / 4, 1)
# Of integrated gradients; and the most prompts of a call.
_POINTS, _MOST_TOGETHER = 20, 32
# Least prompts, and neurons, of a call.
_PROMPTS, _NEURONS = 8, 4


def gradients(subject: Subject) -> dict[str, Any]:
    """Milliseconds a prompt of the gradients of all neurons for all targets, beside the floor on the same prompts."""
    model, prompts, most = subject.model, subject.data[0], subject.settings.prompts
    plain = _without_own_experts(subject)

    def engine(n: int) -> None:
        model.forget_prefixes()
        subject.gradients(range(n), budget_of(model))

    def floor(batch: int, n: int) -> None:
        model.forget_prefixes()
        ways.floor(plain, prompts[:n], subject.settings.header_tokens, batch)

    floors = {f"batches of {batch}": partial(floor, batch) for batch in (_FLOOR_PROMPTS, most)}
    found = _turns(
        subject,
        {
            "engine": Way(engine, _doublings(_PROMPTS, most), weight=2),
            "floor": Way(floors, as_many_as="engine"),
        },
        "gradients",
    )
    subject.engine["gradients"] = found["engine"]
    return _told(found, {"engine over floor": (found["engine"], found["floor"])})


def interventions(subject: Subject) -> dict[str, Any]:
    """Milliseconds an intervention in the first, the middle and the last layer, beside the floor with as many rows."""
    model = subject.model
    own, sweep = Interventions(model, subject.prompt, "paper"), Sweep(full_grid())
    n_shifts = len(sweep.grid.shifts)
    if model.feed_forward.has_experts:
        run_rows: Callable[[int, int], Any] = experts.Floor(_without_own_experts(subject), subject.prompt.ids).run
    else:
        run_rows = partial(ways.remaining_layers, own)

    def engine(layer: int, n: int) -> None:
        chosen = first_neurons(own, layer, n // n_shifts)
        sweep_prompt(own, chosen, sweep, budget_of(model), keep_curves=False)

    def floor(layer: int, batch: int, n: int) -> None:
        for start in range(0, n, batch):
            run_rows(layer, min(batch, n - start))

    most = min(subject.settings.neurons, *(len(x) for x in own.activation.values()))
    counts = tuple(n_shifts * n for n in _doublings(_NEURONS, most))
    ways_of: dict[str, Way] = {}
    for layer, weight in zip(subject.layers.values(), (_BOTTOM, _MIDDLE, _TOP), strict=True):
        ways_of[f"engine, layer {layer}"] = Way(partial(engine, layer), counts, weight=weight)
        floors = {f"batches of {batch}": partial(floor, layer, batch) for batch in _FLOOR_ROWS}
        ways_of[f"floor, layer {layer}"] = Way(floors, as_many_as=f"engine, layer {layer}", weight=weight)
    found = _turns(subject, ways_of, "interventions")
    subject.engine["interventions"] = found[f"engine, layer {subject.layers['middle']}"]
    pairs = {
        f"engine over floor, layer {layer}": (found[f"engine, layer {layer}"], found[f"floor, layer {layer}"])
        for layer in subject.layers.values()
    }
    return _told(found, pairs)


def prompts_together(subject: Subject) -> dict[str, Any]:
    """Milliseconds a prompt of a few neurons' sweeps, and of integrated gradients: prompts together, and one by one."""
    model, prompts = subject.model, subject.encoded
    sweep, noise = Sweep(adaptive_grid()), row_noise(model, "paper")
    neurons, layers = NeuronsConfig(choose="sample", count=1), range(model.feed_forward.n_layers)

    def swept(at_once: int, n: int) -> None:
        for start in range(0, n, at_once):
            shard = ShardInput(model, prompts[start : min(n, start + at_once)], neurons, budget=budget_of(model))
            assert len(dict(sweep_rows(shard, sweep, noise, False, Readouts()))) == len(shard.prompts)

    def integrated(at_once: int, n: int) -> None:
        for start in range(0, n, at_once):
            own = prompts[start : min(n, start + at_once)]
            found = integrals(model, own, [(0,)] * len(own), "paper", layers, _POINTS, budget_of(model))
            assert len(dict(found)) == len(own)

    counts = _doublings(_PROMPTS, min(_MOST_TOGETHER, len(prompts)))
    ways_of: dict[str, Way] = {}
    pairs: dict[str, tuple[str, str]] = {}
    for name, run in (("sweep", swept), ("integrated gradients", integrated)):
        together, alone = f"{name}, together", f"{name}, one by one"
        ways_of |= {together: Way(partial(run, len(prompts)), counts), alone: Way(partial(run, 1), as_many_as=together)}
        pairs[f"{name}, one by one over together"] = alone, together
    found = _turns(subject, ways_of, "prompts together")
    return _told(found, {name: (found[over], found[under]) for name, (over, under) in pairs.items()})


def other_ways(subject: Subject) -> dict[str, Any]:
    """The textbook way, an expert's and a plain forward pass: one call each, over what the engine took before."""
    found = _turns(subject, _other_gradients(subject) | _other_interventions(subject), "other ways", repeats=1)
    pairs = {}
    for name, own in found.items():
        engine = subject.engine.get(name.partition(":")[0])
        if engine is not None and engine.seconds:
            pairs[f"{name}, over engine"] = own, engine
    return _told(found, pairs)


def _other_gradients(subject: Subject) -> dict[str, Way]:
    module, (prompts, targets) = subject.model.model, subject.data
    plain_forward = Way(lambda n: ways.plain_forward(module, prompts[:n], n), (8,), is_slow=True)
    if subject.model.feed_forward.has_experts:
        textbook = Way(
            lambda n: _drop(experts.textbook_gradients(module, prompts[:n], targets[:n])), (1, 4), is_slow=True
        )
        return {
            "gradients: textbook, one prompt at a time": textbook,
            "gradients: plain forward, in a batch": plain_forward,
        }

    def alone(n: int) -> None:
        ways.textbook(module, prompts[:n], targets[:n], 1)

    def together(n: int) -> None:
        ways.textbook(module, prompts[:n], targets[:n], n)

    return {
        "gradients: textbook, one prompt at a time": Way(alone, (1, 4), is_slow=True),
        "gradients: textbook, in a batch": Way(together, (2, 4, 8), is_slow=True),
        "gradients: expert": Way(lambda n: _drop(ways.expert(module, prompts[:n], targets[:n])), (1, 4), is_slow=True),
        "gradients: plain forward, in a batch": plain_forward,
    }


def _other_interventions(subject: Subject) -> dict[str, Way]:
    module, layer = subject.model.model, subject.layers["middle"]
    ids, target, shifts = subject.prompt.ids, subject.prompt.target_ids[0], full_grid().shifts.tolist()
    alone = "interventions: textbook, one at a time"
    if subject.model.feed_forward.has_experts:
        # Without hooks, which cost nothing beside a pass.
        return {alone: Way(lambda n: [_plain_pass(module, ids) for _ in range(n)], (1, 4, 16), is_slow=True)}

    def shifted(n: int) -> list[tuple[int, int, float]]:
        return [(layer, place // len(shifts), shifts[place % len(shifts)]) for place in range(n)]

    def textbook(batch: int | None, n: int) -> None:
        ways.textbook_interventions(module, ids, target, shifted(n), batch or n, 1 if batch is None else 0)

    return {
        alone: Way(partial(textbook, 1), (1, 4, 16), is_slow=True),
        "interventions: textbook, a neuron's shifts in a batch": Way(
            partial(textbook, None), (10, len(shifts)), is_slow=True
        ),
        "interventions: expert": Way(
            lambda n: ways.Cached(module, ids, n).interventions(target, shifted(n)), (_EXPERT_ROWS,), is_slow=True
        ),
    }


def batch_sizes(subject: Subject) -> dict[str, Any]:
    """What gradients and interventions take with parts of the memory that a batch takes by itself."""
    own, whole = Interventions(subject.model, subject.prompt, "paper"), budget_of(subject.model).bytes
    prompts = _doublings(_PROMPTS, subject.settings.prompts)
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
        ways_of[f"interventions, {name}"] = Way(partial(interventions_in, size), _doublings(160, 10240))
    return _told(_turns(subject, ways_of, "batch sizes", repeats=1), {})


def engines(subject: Subject) -> dict[str, Any]:
    """Every engine that takes the model: whether it passes the self-check, and its time; why the others do not."""
    model, chosen = subject.model, subject.model.ensure_checked()
    began = time.monotonic()
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
        ways_of[f"{kind.name}: gradients"] = Way(gradients_by, (1, 2, 4, 8))
        ways_of[f"{kind.name}: interventions"] = Way(interventions_by, _doublings(5, 1280))
    # What their self-checks leave.
    subject.seconds -= time.monotonic() - began
    try:
        timed = _turns(subject, ways_of, "engines", repeats=1)
    finally:
        model.adopt(chosen)
    for name, one in timed.items():
        engine_name, _, what = name.partition(": ")
        found[engine_name][what] = one.told()
    return found


def _turns(subject: Subject, ways_of: dict[str, Way], what: str, repeats: int | None = None) -> dict[str, Timed]:
    repeats = subject.settings.repeats if repeats is None else repeats
    return take_turns(
        ways_of, subject.device, repeats, max(0.0, subject.seconds), f"{subject.title}, {what} (ms an item)"
    )


def _told(found: dict[str, Timed], pairs: dict[str, tuple[Timed, Timed]]) -> dict[str, Any]:
    """Figures of all ways, and ratios of the pairs of which none failed."""
    ratios = {
        name: ratio_of(over, under)
        for name, (over, under) in pairs.items()
        if over.failed is None and under.failed is None
    }
    return {"milliseconds": {name: own.told() for name, own in found.items()}, "ratios": ratios}


def _without_own_experts(subject: Subject) -> LoadedModel:
    loaded = subject.model._loaded
    if not subject.model.feed_forward.has_experts:
        return loaded
    return experts.PlainExperts(**{own.name: getattr(loaded, own.name) for own in fields(LoadedModel)})


@torch.no_grad()
def _plain_pass(module: Any, ids: tuple[int, ...]) -> None:
    module(torch.tensor([list(ids)], device=module.device), use_cache=False, logits_to_keep=1)


def _doublings(least: int, most: int) -> tuple[int, ...]:
    found = [least]
    while 2 * found[-1] < most:
        found.append(2 * found[-1])
    return (*(n for n in found if n < most), most)


def _drop(_result: Any) -> None:
    """Results are not to be held while memory is measured."""
