"""What a batch takes of memory: no less is said than is measured; where nobody says it, what is free decides."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from neg_service import memory
from neg_service.measures.changes import Moved
from neg_service.measures.interventions import Interventions
from neg_service.memory import BUSY_BYTES, available_bytes, busy_bytes
from neg_service.models import room
from neg_service.models.engines.backward import target_gradients
from neg_service.models.feed_forward import Site
from neg_service.models.language_model import LanguageModel
from neg_service.prompts.prompt import EncodedPrompt, Prompt
from tests.families import random_ids
from tests.mixtures import MIXTURES, tiny_mixture
from tests.tiny_models import tiny_model

TOKENS = 12
FAMILIES = [
    "Llama 2",
    # With states.
    "Qwen 3.5",
    # Whole sequences of masked and of causal models, experts; of the same kinds, with indices of keys, with experts
    # beside states or of attention, and with layers that run again.
    *(
        pytest.param(own, marks=pytest.mark.faults)
        for own in (
            "BERT", "RecurrentGemma", "gpt-oss", "GPT-2", "GPT-J", "Gemma 2", "DeBERTa 2 and 3",
            "DeepSeek 3.2, above its limit", "Bamba", "Falcon-H1", "Jamba", "Mixtral", "DeepSeek 3", "Granite 4 MoE",
            "JetMoE", "LongCat Flash", "Inkling", "HRM", "ALBERT",
        )
    ),
]  # fmt: skip
# By how much estimates may be too high: the family that needs the most of its kind decides for all.
_GRAPH, _RUN = 4, 6


def fresh(family: str) -> LanguageModel:
    return tiny_mixture(family) if family in MIXTURES else tiny_model(family)


def kept_bytes(model: LanguageModel, n: int) -> int:
    """Bytes that graphs of `n` rows keep, without parameters, each storage once; masked models: of as many prompts."""
    known = {own.untyped_storage().data_ptr() for own in (*model.model.parameters(), *model.model.buffers())}
    found: dict[int, int] = {}
    # So that no storage takes the place of another.
    alive: list[torch.Tensor] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        alive.append(x.detach())
        if (place := x.untyped_storage().data_ptr()) not in known:
            found[place] = x.untyped_storage().nbytes()
        return x

    prompts = random_ids([TOKENS] * n, model.is_masked)
    targets = [[7]] * n if model.is_masked else [list(range(1, 1 + n))]
    rows = model.rows(prompts if model.is_masked else prompts[:1])
    points = model.feed_forward.sites("paper")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        target_gradients(rows, targets, points)
    return sum(found.values())


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that PyTorch's allocator had given at once while it ran, beside what there was."""
    run()
    gc.collect()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        run()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


# Of a causal model's whole sequence all targets share one graph.
@pytest.mark.parametrize("family", [own for own in FAMILIES if "RecurrentGemma" not in getattr(own, "values", ())])
def test_a_graph_keeps_no_more_than_is_said_and_not_far_less(family: str) -> None:
    model = fresh(family)
    model.ensure_checked()
    measured = (kept_bytes(model, 12) - kept_bytes(model, 4)) / 8
    said = model.engine.row_sizes(TOKENS)
    # The softmax of the logits is kept, too, and counted with the slopes.
    assert measured <= said.graph + 4 * model.n_output_ids
    assert said.graph <= _GRAPH * measured


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_take_no_more_than_is_said_with_and_without_a_graph(family: str) -> None:
    model = fresh(family)
    (ids,) = random_ids([TOKENS], model.is_masked)
    prompt = EncodedPrompt(Prompt("0", "-", (" w7",), 0), ids, (7,))
    interventions = Interventions(model, prompt, "paper")
    said = interventions.rows.sizes
    points = model.feed_forward.sites("paper")

    # Of a layer with experts, where there is one.
    site = next((own for own in points if own.is_experts), Site(0))

    def rows(n: int) -> int:
        return peak_bytes(lambda: interventions._run([Moved(site, torch.arange(n) % 14, torch.ones(n))]))

    def gradients(n: int) -> int:
        return peak_bytes(lambda: target_gradients(model.rows([ids]), [list(range(1, 1 + n))], points))

    run = (rows(30) - rows(10)) / 20
    assert run <= said.run <= _RUN * run
    slope = (gradients(12) - gradients(4)) / 8
    assert slope <= (said.slopes if interventions.rows.targets_share_rows else said.graph + said.slopes)


def test_what_is_automatic_keeps_the_device_busy_and_leaves_half_of_what_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("Llama 2")
    monkeypatch.setattr(room, "available_bytes", lambda: 64 * 2**30)
    assert room.auto_batch_bytes(model) == busy_bytes(0) == BUSY_BYTES
    # A row of 10 MiB: 128 of them, on a GPU eight times as many.
    assert busy_bytes(10 * 2**20) == 1280 * 2**20
    assert busy_bytes(10 * 2**20, is_gpu=True) == 8 * 1280 * 2**20
    for free, expected in ((2**20, 2**19), (0, 1)):
        monkeypatch.setattr(room, "available_bytes", lambda free=free: free)
        assert room.auto_batch_bytes(model) == expected
    monkeypatch.setattr(room, "available_bytes", lambda: None)
    assert room.auto_batch_bytes(model) == BUSY_BYTES


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        # 30 free, and 10 that PyTorch keeps and does not use.
        (1, 40),
        (4, 40),
        # Half of 80, of which 20 are used.
        (0.5, 20),
        (0.1, 0),
    ],
)
def test_of_a_gpu_a_replica_takes_its_share(gpus: float, expected: int) -> None:
    found = room.free_bytes(torch.device("cuda:1"), gpus, lambda _: (30, 80), lambda _: 30, lambda _: 20)
    assert found == expected


def test_a_containers_limit_counts_and_files_that_were_read_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CONTAINER", tmp_path)
    assert available_bytes() is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    5 kB\n")
    assert available_bytes() == 5 * 1024
    for name, text in (("max", "4000"), ("current", "3500"), ("stat", "anon 9\nactive_file 200\ninactive_file 100\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert available_bytes() == 800
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes() == 5 * 1024
