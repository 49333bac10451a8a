"""The engine of difference arithmetic: every family in float64, what it refuses, and what it leaves in a model."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

import neg_service
from neg_service.config import NeuronsConfig
from neg_service.errors import ModelError
from neg_service.models import precision
from neg_service.models.engines.base import MismatchError
from neg_service.models.engines.difference_check import compared, deviation_of_rows
from neg_service.models.engines.difference_program import Shifts, Step
from neg_service.models.engines.difference_rules import RULES
from neg_service.models.engines.difference_trace import Trace, primes_for
from neg_service.models.engines.differences import DifferencesEngine
from neg_service.models.engines.shared_prefix import SharedPrefixEngine
from neg_service.models.feed_forward import Site
from neg_service.models.precision import in_precision
from neg_service.prompts.prompt import Prompt
from tests.families import bases_of, model_of
from tests.mixture_families import model_of as mixture_of
from tests.refusals import refused
from tests.sweeps import swept
from tests.tiny_models import FAMILIES, tiny_model

DENSE = [name for name, family in FAMILIES.items() if family.engine is DifferencesEngine]
IDS = tuple(range(3, 16))


@pytest.mark.parametrize("family", DENSE)
def test_in_float64_differences_are_those_of_rows(family: str) -> None:
    model = model_of(family)
    engine, rows_of = (kind(model._loaded) for kind in (DifferencesEngine, SharedPrefixEngine))
    # Each basis with another prefix: shared in part, all its own, none; and with prompts of other lengths beside it.
    together = (((IDS, IDS[:9]), 5), ((IDS[:6],), 0), ((IDS[:1], IDS[2:9], IDS[:4]), 0))
    for basis, (prompts, n_shared) in zip(bases_of(family), together, strict=False):
        points = model.feed_forward.sites(basis)
        with in_precision(model.model, model.feed_forward.layers, torch.float64):
            deviation = deviation_of_rows(engine, rows_of, prompts, IDS[:n_shared], points)
        engine.forget()
        rows_of.forget()
        assert deviation < 1e-10, basis


def test_a_rule_that_is_wrong_is_found_and_the_engine_of_before_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RULES["silu"]

    def wrong(trace: Trace, func: Any, args: Any, kwargs: Any) -> Any:
        found = right(trace, func, args, kwargs)
        found.slot = trace.step(lambda _n, d: 1.001 * d, found)
        return found

    monkeypatch.setitem(RULES, "silu", wrong)
    chosen = tiny_model("Llama 2").ensure_checked()
    assert type(chosen.engine) is SharedPrefixEngine
    assert "differences are" in chosen.rejected["differences"]
    with refused(ModelError, "model.engine", "differences", says="off those of shared_prefix in float64"):
        tiny_model("Llama 2", engine="differences").ensure_checked()


class _Rounding(LlamaMLP):
    """An MLP with a function that has no rule."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sin()


def test_a_function_without_a_rule_is_named_and_the_engine_of_before_runs() -> None:
    model = tiny_model("Llama 2")
    for layer in model.feed_forward.layers:
        layer.mlp.__class__ = _Rounding
    chosen = model.ensure_checked()
    assert type(chosen.engine) is SharedPrefixEngine
    assert chosen.rejected["differences"] == "sin has no rule for differences"


def test_experts_which_shifts_may_change_are_refused() -> None:
    chosen = mixture_of("Mixtral").ensure_checked()
    assert type(chosen.engine) is SharedPrefixEngine
    assert chosen.rejected["differences"].startswith("has experts")


@pytest.mark.parametrize("engine", ["differences", "shared_prefix", "kv_cache", "full_sequence"])
def test_the_engine_that_is_asked_for_runs(engine: str) -> None:
    model = tiny_model("Llama 2", torch.float64, engine=engine)
    assert model.engine.name == engine
    assert not model.ensure_checked().rejected
    auto = tiny_model("Llama 2", torch.float64)
    auto.ensure_checked()
    negs = []
    for own in (model, auto):
        # Without the float32 to which the model's own code rounds, which differences leave out.
        with in_precision(own.model, own.feed_forward.layers, torch.float64):
            negs.append(neg_service.neg(own, "w3 w14 w15", " w7", [(0, 3), (2, 5)], [-1.0, 0.5]).neg)
    np.testing.assert_allclose(negs[0], negs[1], rtol=1e-9)


@pytest.mark.parametrize(
    ("family", "engine", "reason"),
    [
        ("GPT-J", "differences", "3 of the 3 layers do not go through transformers' attention interface"),
        ("BERT", "differences", "is read at its mask token"),
        ("Llama 2", "recurrent_state", "has no recurrent"),
    ],
)
def test_an_engine_that_does_not_fit_is_refused_with_its_reason(family: str, engine: str, reason: str) -> None:
    with refused(ModelError, "model.engine", engine, says=reason):
        tiny_model(family, engine=engine).ensure_checked()


def test_nothing_stays_in_a_model_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Gemma 2")
    engine, points = DifferencesEngine(model._loaded), model.feed_forward.sites("paper")
    state = copy.deepcopy(model.model.state_dict())
    engine.differences([IDS], (), points)
    monkeypatch.delitem(RULES, "gelu")
    with pytest.raises(MismatchError, match="gelu has no rule"):
        engine.differences([IDS], (), points)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules()) == 0
    assert model.model.config._attn_implementation == "eager"
    assert all(torch.equal(state[name], value) for name, value in model.model.state_dict().items())


def test_rows_do_not_change_each_other_and_the_layers_below_do_not_run() -> None:
    model = tiny_model("Qwen 3")
    engine, points = DifferencesEngine(model._loaded), model.feed_forward.sites("paper")
    found = engine.differences([IDS], (), points)
    rows_r, neurons_r, shifts_r = torch.arange(50), torch.randint(40, (50,)), torch.randn(50)
    (together,) = found.run(50, {Site(1): Shifts(rows_r, neurons_r, shifts_r)})
    for row in (0, 17, 49):
        one = Shifts(torch.tensor([0]), neurons_r[row : row + 1], shifts_r[row : row + 1])
        torch.testing.assert_close(found.run(1, {Site(1): one})[0, 0], together[row], rtol=1e-4, atol=1e-7)
    # Without its products a run gives zeros: those below the site are not asked for.
    ran: list[tuple[int, ...]] = []
    steps = found._program.steps
    start = next(i for i, step in enumerate(steps) if getattr(step, "site", None) == Site(1))
    for step in steps[:start]:
        if hasattr(step, "run"):
            object.__setattr__(step, "run", lambda *given: ran.append(given))
    torch.testing.assert_close(found.run(50, {Site(1): Shifts(rows_r, neurons_r, shifts_r)})[0], together)
    assert not ran


def test_rows_of_all_layers_make_up_one_batch_at_the_price_of_each_ones_own_layers() -> None:
    model = tiny_model("Qwen 3")
    engine, points = DifferencesEngine(model._loaded), model.feed_forward.sites("paper")
    found = engine.differences([IDS], (), points)
    of_site = {}
    for site, at, n_rows in ((Site(0), range(7), 7), (Site(1), range(7, 12), 12), (Site(2), range(12, 32), 32)):
        of_site[site] = Shifts(torch.tensor(at), torch.randint(40, (len(at),)), torch.randn(len(at)), n_rows)
    seen: list[int] = []
    for step in found._program.steps:
        if isinstance(step, Step):
            run = lambda batch, *given, own=step.run: seen.append(batch.n) or own(batch, *given)  # noqa: E731
            object.__setattr__(step, "run", run)
    (together,) = found.run(32, of_site)
    assert sorted(set(seen)) == [7, 12, 32]
    for site, own in of_site.items():
        alone = Shifts(torch.arange(len(own.rows_i)), own.neurons_i, own.shifts_i)
        (expected,) = found.run(len(own.rows_i), {site: alone})
        torch.testing.assert_close(together[own.rows_i], expected, rtol=1e-4, atol=1e-7)
    # Where what is met at a site has no axis of rows alone, all run from the lowest site on.
    found._program._mixes_at_sites = True
    seen.clear()
    torch.testing.assert_close(found.run(32, of_site)[0], together, rtol=1e-4, atol=1e-7)
    assert set(seen) == {32}


def test_some_of_the_prompts_that_run_together_have_what_they_have_alone() -> None:
    model = tiny_model("Gemma 2")
    engine, points = DifferencesEngine(model._loaded), model.feed_forward.sites("paper")
    prompts = (IDS, IDS[2:9], IDS[:1])
    found = engine.differences(prompts, (), points)
    # Rows of two layers, of which the first prompt that runs has none in the lower one.
    at_0 = Shifts(torch.arange(3), torch.tensor([3, 8, 21]), torch.tensor([0.5, -1.0, 2.0]), 3, torch.ones(3).long())
    at_2 = Shifts(torch.tensor([0, 1, 3]), torch.tensor([5, 1, 1]), torch.tensor([1.0, -0.3, 2.0]), 4,
                  torch.tensor([0, 0, 1]))  # fmt: skip
    for asked in ((0, 1), (2, 0), (1, 2)):
        together = found.run(4, {Site(0): at_0, Site(2): at_2}, asked)
        for place, own in enumerate(asked):
            alone = engine.differences([prompts[own]], (), points)
            is_own_0, is_own_2 = (x.prompts_i == place for x in (at_0, at_2))
            shifts = {Site(2): Shifts(at_2.rows_i[is_own_2], at_2.neurons_i[is_own_2], at_2.shifts_i[is_own_2])}
            if is_own_0.any():
                shifts[Site(0)] = Shifts(at_0.rows_i[is_own_0], at_0.neurons_i[is_own_0], at_0.shifts_i[is_own_0])
            torch.testing.assert_close(together[place], alone.run(4, shifts)[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("wrong", ["nothing", "refused", "off", "broken", "no room"])
def test_what_several_prompts_have_wrong_is_found_and_each_runs_alone(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Trace.step_of
    errors = {
        "refused": MismatchError("rows share an axis with something else"),
        "broken": RuntimeError("shapes cannot be multiplied"),
        "no room": torch.OutOfMemoryError("CUDA out of memory"),
    }

    def step_of(self: Trace, what: str, make: Any, rows: Any, *given: Any) -> int | None:
        if self.prompts == 1 or wrong == "nothing":
            return right(self, what, make, rows, *given)
        if wrong == "off":
            rows = [1.01 * row for row in rows]
        else:
            raise errors[wrong]
        return right(self, what, make, rows, *given)

    monkeypatch.setattr(Trace, "step_of", step_of)
    model = tiny_model("Llama 2")
    found = model.ensure_checked()
    assert (type(found.engine), found.check.together) == (DifferencesEngine, wrong == "nothing")
    # Which is what a measure goes by.
    ran = Mock(wraps=found.engine.differences)
    monkeypatch.setattr(found.engine, "differences", ran)
    prompts = [Prompt(str(i), f"w{i} w3 w9", (" w7",)) for i in range(4)]
    swept(model, NeuronsConfig(choose="sample", count=1), prompts)
    assert [len(call.args[0]) for call in ran.call_args_list] == ([4] if wrong == "nothing" else [1] * 4)


def test_what_was_traced_goes_as_soon_as_nobody_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama 2")
    engine, points = DifferencesEngine(model._loaded), model.feed_forward.sites("paper")
    gc.collect()
    gc.disable()
    try:
        found = engine.differences([IDS, IDS[:4]], (), points)
        known = [weakref.ref(found._program), weakref.ref(next(iter(found._program.sites.values())).row)]
        assert all(own() is not None for own in known)
        del found
        assert all(own() is None for own in known)
        # Also of a pass that ended on the way.
        seen: list[weakref.ref[Any]] = []
        right = RULES["silu"]

        def breaks(trace: Trace, func: Any, args: Any, kwargs: Any) -> Any:
            seen.append(weakref.ref(trace))
            if len(seen) == 3:
                raise MemoryError("no memory")
            return right(trace, func, args, kwargs)

        monkeypatch.setitem(RULES, "silu", breaks)
        with pytest.raises(MemoryError):
            engine.differences([IDS, IDS[:4]], (), points)
        assert all(own() is None for own in seen)
    finally:
        gc.enable()


def test_the_number_of_rows_divides_no_size() -> None:
    assert primes_for([576, 49152]) == 1009
    assert primes_for([2018, 1013]) == 1019
    with pytest.raises(MismatchError):
        primes_for([1009 * 1013 * 1019 * 1021 * 1031 * 1033 * 1039 * 1049 * 1051 * 1061])


def test_rows_that_meet_are_refused() -> None:
    class Meeting(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) - x.transpose(1, 2).mean(-1).unsqueeze(1)

    model = tiny_model("Llama 2")
    engine = DifferencesEngine(model._loaded)
    model.feed_forward.layers[1].mlp.__class__ = Meeting
    with pytest.raises(MismatchError, match="rows are mixed"):
        compared(engine, SharedPrefixEngine(model._loaded))
    assert isinstance(model.model.get_output_embeddings(), nn.Linear)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_that_are_converted_in_pieces_are_multiplied_with(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As those of large vocabularies are while the check computes in float64.
    monkeypatch.setattr(precision, "PIECE_BYTES", 1000)
    assert tiny_model("Llama 2", dtype).ensure_checked().rejected == {}
