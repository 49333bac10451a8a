"""Prompts that are swept in one pass have what each has alone, also when memory ends or one of them is broken."""

from __future__ import annotations

import gc
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
import torch

from neg_service.config import NeuronsConfig
from neg_service.errors import DoesNotFit, NonFiniteError, OutOfMemory
from neg_service.measures import together
from neg_service.measures.interventions import Interventions
from neg_service.models.batches import Budget
from neg_service.models.engines.difference_program import Differences, Program
from neg_service.models.language_model import LanguageModel
from neg_service.prompts.prompt import Prompt
from tests.refusals import refused
from tests.sweeps import swept
from tests.tiny_models import tiny_model

HEADER = " ".join(f"w{i}" for i in range(1, 31))
# Of unequal lengths and numbers of targets, one of a single token, two with a common beginning.
PROMPTS = [
    Prompt("a", "w3 w14 w15 w9 w26 w5", (" w7", " w8", " w11")),
    Prompt("b", "w3 w14", (" w7", " w8")),
    Prompt("c", "w50", (" w1",)),
    Prompt("d", f"{HEADER} {HEADER} w31", (" w1", " w2")),
    Prompt("e", f"{HEADER} {HEADER} w32 w33", (" w4",)),
]


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts were prepared at a time, by the sweeps of the test."""
    sizes: list[int] = []
    real = together.prepared_together

    def watched(model: Any, prompts: Any, *given: Any) -> Any:
        sizes.append(len(prompts))
        return real(model, prompts, *given)

    monkeypatch.setattr("neg_service.measures.sweep.prepared_together", watched)
    return sizes


def alone(model: LanguageModel, neurons: NeuronsConfig, prompts: list[Prompt] = PROMPTS, **given: Any) -> pa.Table:
    """The sweeps of prompts one by one."""
    return pa.concat_tables([swept(model, neurons, [prompt], **given)["sweep"] for prompt in prompts])


def assert_same(found: pa.Table, expected: pa.Table, rtol: float = 2e-4) -> None:
    """The same rows, and the same numbers as far as these are known."""
    keys = ["prompt_id", "target", "layer", "neuron", "n_shifts", "is_resolved", "signs_agree"]
    order = [("prompt_id", "ascending"), ("target", "ascending"), ("layer", "ascending"), ("neuron", "ascending")]
    found, expected = found.sort_by(order), expected.sort_by(order)
    assert found.select(keys).equals(expected.select(keys))
    for name in ("neg", "r", "neurgrad", "gradient", "activation", "probability"):
        largest = np.abs(expected[name].to_numpy()).max()
        np.testing.assert_allclose(found[name], expected[name], rtol=rtol, atol=1e-6 * largest, err_msg=name)


@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("Llama 2", {}),
        ("Gemma 2", {"grid": "adaptive", "shifts": None}),
        ("GPT-2", {"grid": "coarse", "shifts": None, "shift": "signed"}),
        ("Qwen 3", {"readout": "log_odds"}),
        ("GPT-NeoX (Pythia)", {"grid": "adaptive", "shifts": None, "readout": "logit"}),
    ],
)
def test_prompts_together_have_what_each_has_alone(
    family: str, given: dict[str, Any], prepared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neg_service.models.batches.PASS_COST", 4)
    model = tiny_model(family)
    for neurons in (NeuronsConfig(choose="sample", count=4), NeuronsConfig(choose="top", count=5)):
        expected = alone(model, neurons, **given)
        model.forget_prefixes()
        assert_same(swept(model, neurons, PROMPTS, **given)["sweep"], expected)
    # Two share a beginning that is worth a pass of its own.
    assert sorted(prepared) == [2, 2, 3, 3]


def test_weights_of_low_precision_are_swept_together(prepared: list[int]) -> None:
    model, neurons = tiny_model("Llama 2", torch.bfloat16), NeuronsConfig(choose="sample", count=4)
    given = {"grid": "adaptive", "shifts": None}
    # What rounding does to bfloat16's own gradients depends on how many rows a product has.
    expected, found = alone(model, neurons, **given), swept(model, neurons, PROMPTS, **given)["sweep"]
    order = [("prompt_id", "ascending"), ("target", "ascending"), ("layer", "ascending"), ("neuron", "ascending")]
    neg, alike = (own.sort_by(order)["neg"].to_numpy() for own in (expected, found))
    np.testing.assert_allclose(alike, neg, rtol=1e-3, atol=1e-6 * np.abs(neg).max())
    assert sorted(prepared) == [2, 3]
    for name in ("neurgrad", "gradient"):
        ours, theirs = (own.sort_by(order)[name].to_numpy() for own in (expected, found))
        np.testing.assert_array_equal(ours, theirs)


def test_one_pass_serves_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model, neurons = tiny_model("Llama 2"), NeuronsConfig(choose="sample", count=2)
    model.ensure_checked()
    runs, rows = [], []
    real = Program.run
    monkeypatch.setattr(
        Program, "run", lambda self, prompts, *given: runs.append(len(prompts)) or real(self, prompts, *given)
    )
    layer = model.feed_forward.layers[0]
    layer.register_forward_pre_hook(lambda _m, i: rows.append(i[0].shape[1]))
    prompts = [Prompt(str(i), f"w{i} w3 w9", (" w7", " w8")) for i in range(6)]
    swept(model, neurons, prompts)
    # Prefixes and last tokens in float64, prefixes and gradients: a row for each target.
    assert (runs, rows) == ([6], [12, 1009, 12, 12])


def test_a_prompt_that_needs_more_does_not_keep_others_waiting() -> None:
    counts = {0: 4, 1: 100, 2: 6, 3: 80, 4: 3}
    assert list(together._alike(counts)) == [[1, 3], [0, 2, 4]]


def test_prompts_whose_interventions_fill_batches_run_alone(prepared: list[int]) -> None:
    model = tiny_model("Llama 2")
    row = model.engine.row_sizes(6).run
    few, many = (together.cost_of(model, 6, 0, 1, n) for n in (1000, 10_000))
    assert many - few == pytest.approx(9_000 * row / 8, rel=1e-3)
    swept(model, NeuronsConfig(), PROMPTS, budget=Budget(together.cost_of(model, 6, 0, 1, 10)))
    assert prepared == []


def test_prompts_of_very_different_length_do_not_run_together(prepared: list[int]) -> None:
    # Prefixes are padded to the longest.
    model, long = tiny_model("Llama 2"), " ".join(f"w{i % 90}" for i in range(100))
    prompts = [Prompt(str(i), f"w{i} {long if i % 3 == 0 else 'w4'}", (" w7",)) for i in range(6)]
    swept(model, NeuronsConfig(choose="sample", count=1), prompts)
    assert sorted(prepared) == [2, 4]


@pytest.mark.parametrize("shared", [False, True])
def test_what_prompts_take_is_foreseen(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neg_service.models.batches.PASS_COST", 4)
    model, n = tiny_model("Llama 2"), 80
    model.ensure_checked()
    header = tuple(i % 90 for i in range(n))
    prompts = [
        (*((90 + i) % 97 if not shared and k == 0 else own for k, own in enumerate(header)), i) for i in range(8)
    ]
    points, known = model.feed_forward.sites("paper"), header if shared else ()
    gc.collect()
    before = {id(own) for own in gc.get_objects() if type(own) is torch.Tensor}
    kept = model.engine.differences(prompts, known, points)
    model.forget_prefixes()
    found = {
        own.untyped_storage().data_ptr(): own.untyped_storage().nbytes()
        for own in gc.get_objects()
        if type(own) is torch.Tensor and id(own) not in before
    }
    foreseen = len(prompts) * model.engine.differences_bytes(n + 1, len(known))
    assert kept.head_bv.shape[0] == len(prompts)
    assert 0 < sum(found.values()) <= foreseen


def test_when_memory_ends_fewer_prompts_and_rows_run_and_nothing_changes(
    prepared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, neurons = tiny_model("Llama 2"), NeuronsConfig(choose="sample", count=4)
    expected = alone(model, neurons)
    real, sizes = Differences.run, []

    def small_memory(self: Any, n_rows: int, shifts: Any, prompts: Any = (0,)) -> Any:
        sizes.append((len(prompts), n_rows))
        # Three prompts are too many even with a row each.
        if len(prompts) * n_rows > 7 or len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, n_rows, shifts, prompts)

    monkeypatch.setattr(Differences, "run", small_memory)
    assert_same(swept(model, neurons, PROMPTS)["sweep"], expected)
    assert prepared[0] == 3
    assert {n for n, _ in sizes} >= {1, 3}

    monkeypatch.setattr(Differences, "run", Mock(side_effect=MemoryError("no memory")))
    with refused(OutOfMemory, setting=None, says="prompt '.' .* one intervention does not fit"):
        swept(model, neurons, PROMPTS)


def test_a_prompt_that_does_not_fit_beside_others_runs_alone(
    prepared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is one prompt's gradients, or the shifts of the last one that needs some, that find no room."""
    model, neurons = tiny_model("Llama 2"), NeuronsConfig(choose="sample", count=4)
    expected = alone(model, neurons)
    for name in ("neurgrad", "changes"):
        real = getattr(Interventions, name)

        def small_memory(self: Any, *given: Any, real: Any = real) -> Any:
            if self.by_differences.differences.head_bv.shape[0] > 2:
                raise DoesNotFit("what is kept of others takes the memory")
            return real(self, *given)

        prepared.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Interventions, name, small_memory)
            # One prompt at a time, so that each meets it.
            patch.setattr(together, "_alike", lambda counts: [[a] for a in counts])
            patch.setattr(together, "in_parts", lambda costs, run, *_: [(p, run(p)) for p in one_by_one(len(costs))])
            assert_same(swept(model, neurons, PROMPTS)["sweep"], expected)
        assert prepared[0] == 3
        assert all(n <= 2 for n in prepared[1:])


def one_by_one(n: int) -> list[range]:
    """The parts of items that all run alone."""
    return [range(place, place + 1) for place in range(n)]


def test_when_memory_ends_while_prompts_are_prepared_fewer_are() -> None:
    model, neurons = tiny_model("Llama 2"), NeuronsConfig(choose="sample", count=4)
    expected = alone(model, neurons)
    real, tried = model.engine.differences, []

    def small_memory(prompts: Any, *given: Any) -> Any:
        tried.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(prompts, *given)

    model.engine.differences = small_memory  # type: ignore[method-assign]
    assert_same(swept(model, neurons, PROMPTS)["sweep"], expected)
    assert tried[0] == 3
    assert max(tried[1:]) <= 2


def test_a_prompt_whose_prefix_does_not_fit_for_gradients_is_named() -> None:
    model = tiny_model("Llama 2")
    model.ensure_checked()
    model.engine.rows = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))  # type: ignore[method-assign]
    with refused(OutOfMemory, setting=None, says="prompt 'b' .* its tokens do not fit"):
        swept(model, NeuronsConfig(choose="sample", count=1), PROMPTS[1:2])


def test_a_prompt_that_is_broken_is_named() -> None:
    model = tiny_model("Llama 2")
    model.ensure_checked()
    model.model.model.embed_tokens.weight[96] = float("nan")
    prompts = [*PROMPTS[:3], Prompt("broken", "w3 w96", (" w7",))]
    with refused(NonFiniteError, setting=None, says="prompt 'broken'"):
        swept(model, NeuronsConfig(choose="sample", count=4), prompts)


def test_what_float32_does_not_hold_is_read_again_of_its_own_prompt() -> None:
    model = tiny_model("Llama 2")
    model.ensure_checked()
    model.model.lm_head.weight.mul_(300)
    neurons, given = NeuronsConfig(choose="list", list=[[2, 3], [2, 5]]), {"shifts": [-40.0, -1.0, 1.0, 40.0]}
    assert_same(swept(model, neurons, PROMPTS[:3], **given)["sweep"], alone(model, neurons, PROMPTS[:3], **given))
