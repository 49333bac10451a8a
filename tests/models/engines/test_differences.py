"""The engine of difference arithmetic: every family in float64, what it refuses, and what it leaves in a model."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

import neg_service
from neg_service.errors import ModelError
from neg_service.models import precision
from neg_service.models.engines.base import MismatchError
from neg_service.models.engines.difference_check import deviation_of_rows, differences_deviation
from neg_service.models.engines.difference_program import Shifts, Step
from neg_service.models.engines.difference_rules import RULES
from neg_service.models.engines.difference_trace import Trace, primes_for
from neg_service.models.engines.differences import DifferencesEngine
from neg_service.models.engines.shared_prefix import SharedPrefixEngine
from neg_service.models.feed_forward import Site
from neg_service.models.precision import in_precision
from tests.families import bases_of, model_of
from tests.mixture_families import model_of as mixture_of
from tests.refusals import refused
from tests.tiny_models import FAMILIES, tiny_model

DENSE = [name for name, family in FAMILIES.items() if family.engine is DifferencesEngine]
IDS = tuple(range(3, 16))


@pytest.mark.parametrize("family", DENSE)
def test_in_float64_differences_are_those_of_rows(family: str) -> None:
    model = model_of(family)
    engine, rows_of = (kind(model._loaded) for kind in (DifferencesEngine, SharedPrefixEngine))
    # Each basis with another prefix: shared in part, all its own, none.
    for basis, ids, n_shared in zip(bases_of(family), (IDS, IDS[:6], IDS[:1]), (5, 0, 0), strict=False):
        points = model.feed_forward.sites(basis)
        with in_precision(model.model, model.feed_forward.layers, torch.float64):
            deviation = deviation_of_rows(engine, rows_of, ids, ids[:n_shared], points)
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
    rows = engine.rows([IDS])
    engine.differences(rows, IDS, (), points)
    monkeypatch.delitem(RULES, "gelu")
    with pytest.raises(MismatchError, match="gelu has no rule"):
        engine.differences(rows, IDS, (), points)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules()) == 0
    assert model.model.config._attn_implementation == "eager"
    assert all(torch.equal(state[name], value) for name, value in model.model.state_dict().items())


def test_rows_do_not_change_each_other_and_the_layers_below_do_not_run() -> None:
    model = tiny_model("Qwen 3")
    engine, points = DifferencesEngine(model._loaded), model.feed_forward.sites("paper")
    found = engine.differences(engine.rows([IDS]), IDS, (), points)
    rows_r, neurons_r, shifts_r = torch.arange(50), torch.randint(40, (50,)), torch.randn(50)
    together = found.run(50, {Site(1): Shifts(rows_r, neurons_r, shifts_r)})
    for row in (0, 17, 49):
        one = Shifts(torch.tensor([0]), neurons_r[row : row + 1], shifts_r[row : row + 1])
        torch.testing.assert_close(found.run(1, {Site(1): one})[0], together[row], rtol=1e-4, atol=1e-7)
    # Without its products a run gives zeros: those below the site are not asked for.
    ran: list[tuple[int, ...]] = []
    steps = found._program.steps
    start = next(i for i, step in enumerate(steps) if getattr(step, "site", None) == Site(1))
    for step in steps[:start]:
        if hasattr(step, "run"):
            object.__setattr__(step, "run", lambda *given: ran.append(given))
    torch.testing.assert_close(found.run(50, {Site(1): Shifts(rows_r, neurons_r, shifts_r)}), together)
    assert not ran


def test_rows_of_all_layers_make_up_one_batch_at_the_price_of_each_ones_own_layers() -> None:
    model = tiny_model("Qwen 3")
    engine, points = DifferencesEngine(model._loaded), model.feed_forward.sites("paper")
    found = engine.differences(engine.rows([IDS]), IDS, (), points)
    of_site = {}
    for site, at, n_rows in ((Site(0), range(7), 7), (Site(1), range(7, 12), 12), (Site(2), range(12, 32), 32)):
        of_site[site] = Shifts(torch.tensor(at), torch.randint(40, (len(at),)), torch.randn(len(at)), n_rows)
    seen: list[int] = []
    for step in found._program.steps:
        if isinstance(step, Step):
            run = lambda n_rows, *given, own=step.run: seen.append(n_rows) or own(n_rows, *given)  # noqa: E731
            object.__setattr__(step, "run", run)
    together = found.run(32, of_site)
    assert sorted(set(seen)) == [7, 12, 32]
    for site, own in of_site.items():
        alone = Shifts(torch.arange(len(own.rows_i)), own.neurons_i, own.shifts_i)
        expected = found.run(len(own.rows_i), {site: alone})
        torch.testing.assert_close(together[own.rows_i], expected, rtol=1e-4, atol=1e-7)
    # Where what is met at a site has no axis of rows alone, all run from the lowest site on.
    found._program._mixes_at_sites = True
    seen.clear()
    torch.testing.assert_close(found.run(32, of_site), together, rtol=1e-4, atol=1e-7)
    assert set(seen) == {32}


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
        differences_deviation(engine, SharedPrefixEngine(model._loaded))
    assert isinstance(model.model.get_output_embeddings(), nn.Linear)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_that_are_converted_in_pieces_are_multiplied_with(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As those of large vocabularies are while the check computes in float64.
    monkeypatch.setattr(precision, "PIECE_BYTES", 1000)
    assert tiny_model("Llama 2", dtype).ensure_checked().rejected == {}
