"""What probing costs: scans of few-shot tasks against plain forward passes, and ranking against reading.

A plain forward pass of the same full prompts, one after the other and in batches of 8, gives no gradients at all; the
better of the two counts. Ranking reads parts of NeurGrad as a probe does; reading is pyarrow's own, of the same parts.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.benchmarks import ways
from jobs.benchmarks.figures import bar, figure, ratio, taking_turns
from neg_service import load_model, schema
from neg_service.config import DatasetConfig
from neg_service.measures.batching import budget_of
from neg_service.measures.gradients import gradients
from neg_service.measures.tables import fixed_size, table_of
from neg_service.models.language_model import LanguageModel
from neg_service.models.loading import set_threads
from neg_service.prompts.mceval8k import load_tasks
from neg_service.prompts.prompt import EncodedPrompt
from neg_service.prompts.tokens import encode
from neg_service.storage.parts import encode_part, part_key
from neg_service.storage.reader import Run, open_run
from neg_service.storage.run import fingerprint_of, write_or_match
from neg_service.storage.stores import open_store
from neg_service.studies.skills.scores import read_scores

_BATCH = 8


@dataclass
class Settings:
    """See `conf/benchmark/skills.yaml`."""

    name: str
    model: str
    source: str
    tasks: list[str]
    threads: int
    repeats: int
    prompts: int
    ranked_prompts: int
    labels: int
    layers: int
    neurons: int
    shard_size: int


def run(settings: Settings) -> dict[str, Any]:
    """Measure; the result's `bars` say what was reached."""
    found: dict[str, Any] = {}
    bars = []
    for task in settings.tasks:
        ways_of: dict[str, Callable[[LanguageModel, list[EncodedPrompt]], None]] = {
            "all gradients": _all_gradients,
            "plain forward, one prompt at a time": partial(_plain, batch=1),
            "plain forward, batches of 8": partial(_plain, batch=_BATCH),
        }
        seconds, _ = taking_turns(
            {name: partial(_prepare, settings, task, way) for name, way in ways_of.items()}, settings.repeats
        )
        engine, *plain = seconds.values()
        best = [min(pair) for pair in zip(*plain, strict=True)]
        gain = ratio(best, engine)
        speeds = {name: figure([1 / one for one in own], "prompts/s") for name, own in seconds.items()}
        found[task] = {"speed": speeds, "plain forward over all gradients": gain}
        bars.append(bar(f"plain forward over all gradients, {task}", gain["median"], 2, at_most=False))
    ranking = _ranking(settings)
    bars.append(bar("ranking, speed of reading alone", ranking["share"]["median"], 0.5, at_most=False))
    return {"tasks": found, "ranking": ranking, "bars": bars}


def _prepare(
    settings: Settings, task: str, way: Callable[[LanguageModel, list[EncodedPrompt]], None]
) -> Callable[[], float]:
    set_threads(settings.threads)
    model = load_model(settings.model, device="cpu")
    model.ensure_checked()
    prompts = load_tasks(DatasetConfig(source=settings.source, task=task, limit=settings.prompts))
    encoded = list(encode(model.tokenizer, prompts, model.context_length, model=model))
    sys.stderr.write(f"ready: {task}, {sum(len(own.ids) for own in encoded) / len(encoded):.0f} tokens a prompt\n")

    def once() -> float:
        model.forget_prefixes()
        began = time.perf_counter()
        way(model, encoded)
        return (time.perf_counter() - began) / len(encoded)

    return once


def _all_gradients(model: LanguageModel, prompts: list[EncodedPrompt]) -> None:
    wanted = [range(len(own.target_ids)) for own in prompts]
    layers = range(model.feed_forward.n_layers)
    for _ in gradients(model, prompts, wanted, "paper", layers, budget_of(model)):
        pass


def _plain(model: LanguageModel, prompts: list[EncodedPrompt], batch: int) -> None:
    ways.plain_forward(model.model, [own.ids for own in prompts], batch)


def _ranking(settings: Settings) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        stored = _stored(settings, Path(place))
        rank, read = [], []
        for turn in range(settings.repeats + 1):
            seconds = _seconds(lambda: read_scores(stored)), _seconds(lambda: _read(stored))
            sys.stderr.write(f"ranking {seconds[0]:.2f} s, reading alone {seconds[1]:.2f} s\n")
            if turn:
                rank.append(seconds[0])
                read.append(seconds[1])
        size = sum(entry.size for name in stored.tables for entry in stored.directory.store.list(name))
    return {
        "stored_MB": round(size / 1e6),
        "seconds": figure(rank, "s"),
        "reading_alone": figure(read, "s"),
        "share": ratio(read, rank),
    }


def _read(stored: Run) -> None:
    for name in ("neurgrad", "activations"):
        for _ in stored.table(name).to_batches():
            pass


def _seconds(way: Callable[[], Any]) -> float:
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


def _stored(settings: Settings, place: Path) -> Run:
    """A run whose parts hold random numbers: of each prompt and layer NeurGrad of all labels, and activations."""
    n, k, layers = settings.neurons, settings.labels, settings.layers
    tables = {"activations": schema.activations(n), "neurgrad": schema.neurgrad(n)}
    shards = -(-settings.ranked_prompts // settings.shard_size)
    identity = {
        "measure": {"name": "neurgrad", "keep": "all"},
        "neurons": {"layers": list(range(layers))},
        "plan": {"shard_size": settings.shard_size, "shards": shards},
    }
    store = open_store(str(place))
    write_or_match(store, identity, tables, {"model": {"neurons_a_layer": n}}, {})
    draw = np.random.default_rng(0)
    for shard in range(shards):
        ids = [f"random/train/{shard * settings.shard_size + i:06d}" for i in range(settings.shard_size)]
        p = len(ids)
        prompt_r = pa.array(np.repeat(ids, k).tolist() * layers)
        target_r = np.tile(np.arange(k), p * layers)
        answer_r = np.repeat(np.tile(draw.integers(0, k, p), layers), k)
        parts = {
            "activations": table_of(
                tables["activations"],
                p * layers,
                prompt_id=pa.array(ids * layers),
                layer=np.repeat(np.arange(layers), p),
                basis="paper",
                activation=fixed_size(draw.normal(size=(p * layers, n)).astype(np.float32)),
            ),
            "neurgrad": table_of(
                tables["neurgrad"],
                p * k * layers,
                prompt_id=prompt_r,
                target_index=target_r,
                target=pa.array([f" {own}" for own in target_r]),
                is_answer=target_r == answer_r,
                layer=np.repeat(np.arange(layers), p * k),
                basis="paper",
                probability=np.full(p * k * layers, 1 / k),
                neurgrad=fixed_size(1e-4 * draw.normal(size=(p * k * layers, n)).astype(np.float32)),
            ),
        }
        for name, table in parts.items():
            store.put(part_key(name, shard), encode_part(name, table, fingerprint_of(identity), shard))
    return open_run(str(place))
