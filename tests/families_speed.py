"""The engine over the textbook way on a tiny model of every family, to catch one that fell off the fast path.

`python -m tests.families_speed` prints it as JSON; `make bench` runs it beside the benchmarks of `jobs.bench`, which
measure real models on a person's machine. All models here have the same few neurons, so that what is timed is how often
a model is called and how much each call does, not arithmetic; the ratios of families compare with each other, not with
those of large models.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from jobs.benchmarks.figures import bar, figure, ratio
from neg_service.measures.gradients import gradients
from neg_service.measures.interventions import Interventions
from neg_service.models.batches import Budget
from neg_service.models.engines.differences import DifferencesEngine
from neg_service.models.engines.full_sequence import FullSequenceEngine
from neg_service.models.engines.kv_cache import KeyValueCacheEngine
from neg_service.models.feed_forward import Site, hooks
from neg_service.models.language_model import LanguageModel
from neg_service.models.loading import set_threads
from neg_service.prompts.prompt import EncodedPrompt, Prompt
from tests.tiny_models import FAMILIES, MASK, VOCABULARY, tiny_model

# The least speed-up of each engine, gradients and interventions: far below what is measured, far above no gain.
LEAST = {DifferencesEngine: (3.0, 4.0), KeyValueCacheEngine: (0.8, 4.0), FullSequenceEngine: (2.5, 4.0)}
NEURON = 5


@dataclass(frozen=True)
class Settings:
    """tokens: of the longest prompt; the shortest has a half of it."""

    threads: int = 1
    repeats: int = 3
    prompts: int = 16
    tokens: int = 32
    targets: int = 4
    interventions: int = 40


def run(settings: Settings) -> dict[str, Any]:
    """Measure; the result's `bars` name the slowest family of each engine."""
    set_threads(settings.threads)
    found: dict[str, dict[str, Any]] = {}
    for name in FAMILIES:
        found[name] = _family(name, settings)
        gains = [found[name][what]["median"] for what in ("gradients", "interventions")]
        sys.stderr.write(
            f"{name}: {found[name]['engine']}, gradients {gains[0]} x and interventions {gains[1]} x as fast "
            f"as the textbook way\n"
        )
    others = [name for name, one in found.items() if one["engine"] != FAMILIES[name].engine.name]
    bars = [bar(f"families that fell off their engine: {', '.join(others) or 'none'}", len(others), 0, at_most=True)]
    least_of = {engine.name: least for engine, least in LEAST.items()}
    for engine, least in least_of.items():
        own = {name: one for name, one in found.items() if one["engine"] == engine}
        if not own:
            continue
        for what, limit in zip(("gradients", "interventions"), least, strict=True):
            slowest = min(own, key=lambda name, what=what, own=own: own[name][what]["median"])  # type: ignore[misc]
            value = own[slowest][what]["median"]
            bars.append(bar(f"{what} of {engine}, the slowest family: {slowest}", value, limit, at_most=False))
    middle = {
        engine: {what: figure([one[what]["median"] for one in found.values() if one["engine"] == engine], "ratio")
                 for what in ("gradients", "interventions")}
        for engine in least_of
        if any(one["engine"] == engine for one in found.values())
    }  # fmt: skip
    return {"families": found, "engines": middle, "bars": bars}


def _family(name: str, settings: Settings) -> dict[str, Any]:
    model = tiny_model(name)
    model.ensure_checked()
    prompts = _prompts(settings, model.is_masked)
    layers = list(range(model.feed_forward.n_layers))
    wanted = [range(settings.targets)] * len(prompts)
    middle = len(layers) // 2
    shifts = torch.linspace(-2, 2, settings.interventions)

    def engine_gradients() -> None:
        model.forget_prefixes()
        for _ in gradients(model, prompts, wanted, "paper", layers, Budget(2**28)):
            pass

    def engine_interventions() -> None:
        one = Interventions(model, prompts[0], "paper")
        neurons = torch.full((settings.interventions,), NEURON)
        one.delta_log_p(Site(middle), neurons, shifts, Budget(2**28))

    pairs: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "gradients": (lambda: _textbook_gradients(model, prompts), engine_gradients),
        "interventions": (lambda: _textbook_interventions(model, prompts[0], middle, shifts), engine_interventions),
    }
    result: dict[str, Any] = {"engine": model.engine.name}
    for what, (textbook, engine) in pairs.items():
        slow, fast = [], []
        for turn in range(settings.repeats + 1):
            seconds = _seconds(textbook), _seconds(engine)
            if turn:
                slow.append(seconds[0])
                fast.append(seconds[1])
        result[what] = ratio(slow, fast) | {"engine_ms": round(1000 * median(fast), 2)}
    return result


def _seconds(way: Callable[[], None]) -> float:
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


def _prompts(settings: Settings, is_masked: bool) -> list[EncodedPrompt]:
    draw = random.Random(0)
    found = []
    for index in range(settings.prompts):
        length = settings.tokens - index * settings.tokens // (2 * settings.prompts)
        ids = [draw.randrange(3, MASK) for _ in range(length)]
        if is_masked:
            ids[length // 2] = MASK
        targets = draw.sample(range(VOCABULARY), settings.targets)
        prompt = Prompt(str(index), "-", tuple(map(str, targets)))
        found.append(EncodedPrompt(prompt, tuple(ids), tuple(targets)))
    return found


def _textbook_gradients(model: LanguageModel, prompts: list[EncodedPrompt]) -> None:
    """A whole sequence with a graph, one prompt at a time, one forward pass and a backward pass a label."""
    points = model.feed_forward.sites("paper")
    for prompt in prompts:
        seen: dict[Site, Tensor] = {}

        def capture(site: Site, x: Tensor, seen: dict[Site, Tensor] = seen) -> Tensor:
            seen[site] = x if x.requires_grad else x.detach().requires_grad_()
            return seen[site]

        with torch.enable_grad(), hooks(points, capture):
            log_p = model.model(torch.tensor([prompt.ids])).logits[0, _readout(model, prompt)].log_softmax(-1)
            for token in prompt.target_ids:
                torch.autograd.grad(log_p[token], list(seen.values()), retain_graph=True)


@torch.no_grad()
def _textbook_interventions(model: LanguageModel, prompt: EncodedPrompt, layer: int, shifts: Tensor) -> None:
    """A hook on one neuron and a full forward pass, one shift at a time."""
    point, place = model.feed_forward.sites("paper")[Site(layer)], _readout(model, prompt)
    inputs = torch.tensor([prompt.ids])
    for shift in shifts:

        def move(_layer: int, x: Tensor, shift: Tensor = shift) -> Tensor:
            moved = x.clone()
            point.neurons(moved.view(-1, moved.shape[-1]))[place, NEURON] += shift
            return moved

        with hooks({layer: point}, move):
            model.model(inputs).logits[0, place].softmax(-1)


def _readout(model: LanguageModel, prompt: EncodedPrompt) -> int:
    return prompt.ids.index(MASK) if model.is_masked else len(prompt.ids) - 1


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run(Settings()), indent=1) + "\n")
