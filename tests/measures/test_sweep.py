"""The measure `sweep`: rows against the library's `neg` and `neurgrad`, its choices, its marks, its noise."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM

import neg_service
from neg_service import schema
from neg_service.config import NeuronsConfig
from neg_service.errors import ConfigurationError, NonFiniteError, OutOfMemory
from neg_service.measures import interventions, measure_of
from neg_service.measures.base import Measure
from neg_service.measures.builtin.aggregate_importance import total
from neg_service.measures.noise import measure_noise, resolution
from neg_service.measures.shifts import Sweep, full_grid
from neg_service.models.batches import Budget
from neg_service.models.inspection import ModelInfo
from neg_service.models.language_model import LanguageModel
from neg_service.models.precision import in_precision
from neg_service.prompts.prompt import Prompt, encode
from tests import oracle
from tests.shards import measured_shard
from tests.tiny_models import tiny_model, tiny_tokenizer

PROMPTS = [
    Prompt("a", "w3 w14 w15 w9 w26 w5", (" w7", " w8", " w11"), 1),
    Prompt("b", "w3 w14 w15 w9 w2", (" w7", " w8"), None),
    Prompt("c", "w50 w51", (" w1",), 0),
]
SHIFTS = [-2.0, -0.5, 0.5, 2.0]
INFO = ModelInfo("tiny", "sha256:0", "LlamaForCausalLM", 3, 40, 64, 1, is_gated=True, is_masked=False, row_values=1000)


def swept(
    model: LanguageModel, neurons: NeuronsConfig, prompts: list[Prompt] = PROMPTS, sigma: float = 0.0, **given: Any
) -> dict[str, pa.Table]:
    measure = sweep_of(**{"shifts": SHIFTS, **given})
    measure.validate(INFO, neurons, prompts)
    return measured_shard(measure, model, prompts, neurons, {"noise": {"sigma": sigma}})


def sweep_of(**given: Any) -> Measure[Any]:
    return measure_of({"name": "sweep", **given})


@pytest.mark.parametrize("family", ["Llama 2", "BERT"])
@pytest.mark.parametrize("shift", ["magnitude", "signed"])
def test_rows_are_what_the_library_gives_for_each_target_alone(family: str, shift: str) -> None:
    model = tiny_model(family, torch.float64)
    texts = {p.id: p.text if family == "Llama 2" else f"{p.text} w96" for p in PROMPTS}
    prompts = [Prompt(p.id, texts[p.id], p.targets, p.answer) for p in PROMPTS]
    table = swept(model, NeuronsConfig(choose="sample", count=4), prompts, shift=shift, keep_curves=True)["sweep"]
    assert table.num_rows == (3 + 2 + 1) * 12
    frame = table.to_pylist()
    for prompt in prompts:
        for k, target in enumerate(prompt.targets):
            rows = [r for r in frame if r["prompt_id"] == prompt.id and r["target_index"] == k]
            assert {(r["target"], r["is_answer"]) for r in rows} == {
                (target, None if prompt.answer is None else k == prompt.answer)
            }
            pairs = [(r["layer"], r["neuron"]) for r in rows]
            alone = neg_service.neg(model, prompt.text, target, pairs, SHIFTS, shift=shift)
            estimate = neg_service.neurgrad(model, [prompt.text], [[target]])
            neurgrad_n = np.array([estimate.neurgrad[0, 0, layer, n] for layer, n in pairs])
            for column, expected in (
                ("neg", alone.neg),
                ("r", alone.r),
                ("r2", alone.r2),
                ("activation", alone.activation),
                ("delta_p", alone.delta_p),
                ("largest_delta_p", np.abs(alone.delta_p).max(1)),
                ("probability", np.full(12, alone.probability)),
                ("gradient", np.where(alone.activation < 0, -1, 1) * neurgrad_n),
                ("neurgrad", neurgrad_n),
            ):
                np.testing.assert_allclose([r[column] for r in rows], expected, rtol=2e-5, atol=1e-12, err_msg=column)
            signs = np.sign(alone.neg) == np.sign(
                [r["neurgrad"] * (np.sign(r["activation"]) if shift == "signed" else 1) for r in rows]
            )
            assert [r["signs_agree"] for r in rows] == signs.tolist()
            assert {(r["basis"], r["shift"], r["dtype"]) for r in rows} == {("paper", shift, "float64")}


def test_each_prompts_strongest_neurons_are_swept() -> None:
    model = tiny_model("Llama 2")
    table = swept(model, NeuronsConfig(choose="top", count=5, layers=[0, 2]))["sweep"]
    for prompt in PROMPTS:
        estimate = np.abs(neg_service.neurgrad(model, [prompt.text], [prompt.targets], layers=[0, 2]).neurgrad[0])
        best = np.argsort(-estimate.max(0).ravel(), kind="stable")[:5]
        expected = {((0, 2)[i // 40], i % 40) for i in best.tolist()}
        rows = table.filter(pc.field("prompt_id") == prompt.id)
        assert set(zip(rows["layer"].to_pylist(), rows["neuron"].to_pylist(), strict=True)) == expected


def test_strength_over_a_data_set_is_the_sum_of_each_prompts_largest() -> None:
    model = tiny_model("Llama 2")
    strength = measure_of({"name": "strength"})
    tables = [
        measured_shard(strength, model, part, NeuronsConfig([1, 2]))["strength"] for part in (PROMPTS[:2], PROMPTS[2:])
    ]
    layers, found = total(pa.concat_tables(tables))
    expected = sum(
        np.abs(neg_service.neurgrad(model, [p.text], [p.targets], layers=[1, 2]).neurgrad[0].astype(float)).max(0)
        for p in PROMPTS
    )
    assert layers == [1, 2]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_neither_batches_nor_shards_nor_other_neurons_change_the_rows() -> None:
    model = tiny_model("Llama 2", torch.float64)
    neurons = NeuronsConfig(choose="list", list=[[0, 1], [1, 5], [1, 6], [2, 39]])
    whole = swept(model, neurons)["sweep"]
    each = [swept(model, neurons, [prompt])["sweep"] for prompt in PROMPTS]
    small = swept(model, neurons, batch_bytes=20_000)["sweep"]
    everything = swept(model, NeuronsConfig())["sweep"]
    listed = [tuple(pair) for pair in neurons.list]
    keep = [pair in listed for pair in zip(*(everything[c].to_pylist() for c in ("layer", "neuron")), strict=True)]
    for other in (pa.concat_tables(each), small, everything.filter(pa.array(keep))):
        assert other.select(["prompt_id", "target", "layer", "neuron"]) == whole.select(
            ["prompt_id", "target", "layer", "neuron"]
        )
        for column in ("neg", "r", "r2", "largest_delta_p", "neurgrad"):
            np.testing.assert_allclose(other[column], whole[column], rtol=1e-5, atol=1e-12, err_msg=column)


def test_a_neg_below_the_resolution_has_no_sign() -> None:
    model = tiny_model("Llama 2", torch.float64)
    exact = swept(model, NeuronsConfig())["sweep"]
    assert pc.all(exact["is_resolved"]).as_py()
    # With this σ, half of the NEGs of each target are below 2·p·σ/√(Σ δ²).
    relative = np.abs(exact["neg"].to_numpy()) / exact["probability"].to_numpy()
    sigma = float(np.median(relative)) * np.sqrt(np.square(SHIFTS).sum()) / 2
    noisy = swept(model, NeuronsConfig(), sigma=sigma)["sweep"]
    below = relative < np.median(relative)
    np.testing.assert_array_equal(noisy["is_resolved"].to_numpy(), ~below)
    np.testing.assert_array_equal(np.array([s is None for s in noisy["signs_agree"].to_pylist()]), below)
    np.testing.assert_allclose(noisy["resolution"], np.median(relative) * noisy["probability"].to_numpy(), rtol=1e-6)


def test_noise_is_measured_and_low_precision_is_marked() -> None:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model("Llama 2", dtype)
        neurons = NeuronsConfig(choose="sample", count=9)
        encoded = list(encode(model.tokenizer, PROMPTS, None))
        found[dtype] = sweep_of().calibrate(model, encoded, neurons)["noise"]
        marked = swept(model, neurons)["sweep"]["dtype"].unique().to_pylist()
        assert marked == [str(dtype).removeprefix("torch.")]
    assert found[torch.float32]["reference"] == "float64"
    assert found[torch.bfloat16]["reference"] == "float32"
    assert 1e-9 < found[torch.float32]["sigma"] < 1e-5
    assert found[torch.float32]["neg_error"] < 1e-4
    assert found[torch.float32]["signs_agree"] == 1
    assert 1e-4 < found[torch.bfloat16]["sigma"] < 1
    assert found[torch.bfloat16]["neg_error"] > 100 * found[torch.float32]["neg_error"]


def test_sigma_is_the_spread_of_the_error_against_float64() -> None:
    model = tiny_model("Llama 2")
    exact = tiny_model("Llama 2", torch.float64)
    pairs = [(layer, n) for layer in range(3) for n in range(4)]
    (encoded,) = encode(model.tokenizer, [Prompt("a", PROMPTS[0].text, (" w7",))], None)
    noise = measure_noise(model, [encoded], np.array(pairs), Sweep(full_grid()), 10**7)
    error = []
    for own in (model, exact):
        result = neg_service.neg(own, PROMPTS[0].text, " w7", pairs)
        error.append(np.log1p(result.delta_p / result.probability))
    # The reference here lets norms round to float32, as the model's own code says; that of the check does not.
    assert noise.sigma == pytest.approx(np.std(error[0] - error[1]), rel=0.5)
    square = 2 * sum((s / 10) ** 2 for s in range(1, 21))
    assert resolution(full_grid(), 0.1) == pytest.approx(2 * 0.1 / np.sqrt(square))


def test_another_precision_leaves_no_trace() -> None:
    model = tiny_model("Gemma 2").model
    before = {name: (t, t.data_ptr(), t.dtype) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    ids = torch.tensor([[3, 1, 4]])
    plain = model(ids).logits
    with in_precision(model, model.model.layers, torch.float64):
        exact = model(ids).logits
        assert exact.dtype == torch.float64
        assert {p.dtype for p in model.model.layers[0].parameters()} == {torch.float32}
    assert not torch.equal(exact.float(), plain)
    torch.testing.assert_close(exact.float(), plain)

    def stop(*_: Any) -> None:
        raise ValueError("stop")

    handle = model.model.layers[1].mlp.register_forward_hook(stop)
    with pytest.raises(ValueError, match="stop"), in_precision(model, model.model.layers, torch.float64):
        model(ids)
    handle.remove()
    gc.collect()
    assert {
        name: (t, t.data_ptr(), t.dtype) for name, t in [*model.named_parameters(), *model.named_buffers()]
    } == before
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0
    assert torch.equal(model(ids).logits, plain)


def test_float64_in_a_moment_is_truly_float64() -> None:
    # A norm that casts to float32 on its own would leave 1e-8 here.
    model = tiny_model("Llama 2").model
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    seen: list[torch.Tensor] = []
    with in_precision(model, model.model.layers, torch.float64):
        handle = model.model.norm.register_forward_hook(lambda _m, i, out: seen.extend((i[0], out)))
        model(ids)
        handle.remove()
        x, found = seen
        expected = x / (x.square().mean(-1, keepdim=True) + model.model.norm.variance_epsilon).sqrt()
        torch.testing.assert_close(found, expected * model.model.norm.weight, rtol=1e-13, atol=0)


def test_pressure_on_memory_never_stops_a_run_as_if_it_were_a_setting() -> None:
    model = tiny_model("BERT", torch.float64)
    prompts = [Prompt("a", "w1 " * 50 + "w96", ("w2",)), Prompt("b", "w1 w96", ("w2",))]
    neurons, measure = NeuronsConfig(choose="sample", count=1), sweep_of(shifts=SHIFTS)
    noise = {"noise": {"sigma": 0.0}}
    easy = measured_shard(measure, model, prompts, neurons, noise)["sweep"]
    hard = measured_shard(measure, model, prompts, neurons, noise, Budget(4096, 1e-9))["sweep"]
    np.testing.assert_allclose(hard["neg"], easy["neg"], rtol=1e-6)


def test_rows_share_what_prompts_begin_with_and_targets_share_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama 2", torch.float64)
    model.ensure_checked()
    header = " ".join(f"w{i}" for i in range(1, 31))
    # Three prompts with a common beginning that is worth a pass of its own.
    prompts = [
        Prompt(str(i), f"{header} {header} w{i} w{i + 10} w{i + 20}", (" w7", " w8", " w9")) for i in range(2, 5)
    ]
    monkeypatch.setattr("neg_service.models.batches.PASS_COST", 4)
    passes: list[int] = []
    tokens: list[int] = []
    layer = model.feed_forward.layers[1]
    layer.register_forward_hook(lambda _m, i, out: passes.append(1))
    layer.register_forward_pre_hook(lambda _m, i: tokens.append(i[0].shape[1]))
    table = swept(model, NeuronsConfig(choose="list", list=[[1, 3]]), prompts)["sweep"]
    # The header once; then for each prompt the rest of its prefix, the last token, rows for gradients, and one batch.
    assert max(tokens) == 60
    assert sum(count >= 60 for count in tokens) == 1
    assert len(passes) == 1 + 3 * 4
    model.forget_prefixes()
    for i, prompt in enumerate(prompts):
        alone = neg_service.neg(model, prompt.text, " w8", [(1, 3)], SHIFTS)
        np.testing.assert_allclose(table["neg"].to_numpy()[3 * i + 1], alone.neg[0], rtol=1e-6)


def test_every_batch_has_an_baseline_row_and_layers_below_do_not_run() -> None:
    model = tiny_model("Llama 2")
    model.ensure_checked()
    ran: list[tuple[int, int]] = []
    for index, layer in enumerate(model.feed_forward.layers):
        layer.register_forward_pre_hook(lambda _m, i, index=index: ran.append((index, i[0].shape[1])))
    heads: list[torch.Tensor] = []
    model.model.lm_head.register_forward_hook(lambda _m, i, _o: heads.append(i[0][0]))
    neg_service.neg(model, "w3 w14 w15", " w7", [(1, 2), (1, 3)], [1.0, 2.0], batch_bytes=2 * 4 * model.row_values)
    # The prefix of two tokens, the last token; then a pass an intervention, whose rows begin in layer 1 as one.
    assert ran == [(0, 2), (1, 2), (2, 2), (0, 1), (1, 1), (2, 1), *[(1, 1), (2, 2)] * 4]
    # The head is given the baseline row, the same each time, and differences from it, all different.
    plain, *batches = heads
    for batch in batches:
        torch.testing.assert_close(batch[0], plain[0])
        assert batch[1].abs().max() < 0.5 * batch[0].abs().max()
    assert len({tuple(batch[1].tolist()) for batch in batches}) == 4


@pytest.mark.parametrize("family", ["Llama 2", "Gemma 2", "BERT"])
def test_effects_beyond_the_range_of_exponentials_are_right(family: str) -> None:
    model = tiny_model(family)
    model.model.get_output_embeddings().weight.mul_(30)
    text = "w3 w14 w15 w96" if model.is_masked else "w3 w14 w15"
    ids = [int(word[1:]) for word in text.split()]
    shifts = [-30.0, 30.0]
    for target in (7, 8, 9, 50):
        found = neg_service.neg(model, text, f" w{target}", [(2, 3), (1, 4)], shifts, shift="signed")
        for i, (layer, n) in enumerate(found.neurons.tolist()):
            before, *after = (
                oracle.probability_with_shift(model.model, ids, target, "paper", layer, n, s) for s in (0.0, *shifts)
            )
            np.testing.assert_allclose(found.delta_p[i], np.array(after) - before, atol=2e-3)
        assert np.isfinite(found.r).all()


def test_when_memory_ends_batches_shrink_and_rows_stay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama 2", torch.float64)
    whole = swept(model, NeuronsConfig(choose="sample", count=4))["sweep"]
    real, sizes = interventions.Interventions._run, []

    def small_memory(self: Any, layer: int, neurons_r: torch.Tensor, shifts_r: torch.Tensor) -> torch.Tensor:
        sizes.append(len(shifts_r))
        if len(shifts_r) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, layer, neurons_r, shifts_r)

    monkeypatch.setattr(interventions.Interventions, "_run", small_memory)
    shrunk = swept(model, NeuronsConfig(choose="sample", count=4))["sweep"]
    np.testing.assert_allclose(shrunk["neg"], whole["neg"], rtol=1e-6)
    # Halved at the first prompt, and remembered for the next ones.
    assert [size for size in sizes if size > 3] == [16, 8, 4]

    monkeypatch.setattr(interventions.Interventions, "_run", lambda *_: (_ for _ in ()).throw(MemoryError("no memory")))
    with pytest.raises(OutOfMemory, match=r"prompt '.' .* one intervention does not fit"):
        swept(model, NeuronsConfig(choose="sample", count=4))


def test_prompts_with_bad_logits_are_named_and_skipped_by_the_noise_check() -> None:
    model = tiny_model("Llama 2")
    with torch.no_grad():
        model.model.model.embed_tokens.weight[51] = float("inf")
    encoded = list(encode(model.tokenizer, PROMPTS, None))
    neurons = np.array([[0, 1], [2, 3]])
    assert measure_noise(model, encoded, neurons, Sweep(full_grid()), 10**7).n_prompts == 2
    with pytest.raises(NonFiniteError, match="prompt 'c'"):
        measure_noise(model, encoded[2:], neurons, Sweep(full_grid()), 10**7)
    with pytest.raises(NonFiniteError, match="prompt 'c'"):
        swept(model, NeuronsConfig(choose="sample", count=1))


@pytest.mark.parametrize("failing", [torch.float32, torch.float64])
def test_prompts_that_do_not_fit_are_left_out_by_the_noise_check_in_either_precision(
    failing: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("Llama 2")
    run, head = interventions.Interventions._run, model.model.get_output_embeddings()
    full: list[str] = []

    def short_of_memory(self: interventions.Interventions, *arguments: Any) -> Any:
        if any(f"prompt {name!r}" in self._who for name in full) and head.weight.dtype == failing:
            raise MemoryError("no memory")
        return run(self, *arguments)

    monkeypatch.setattr(interventions.Interventions, "_run", short_of_memory)
    encoded = list(encode(model.tokenizer, PROMPTS, None))
    neurons = np.array([[0, 1], [2, 3]])
    full.append(encoded[0].prompt.id)
    assert measure_noise(model, encoded, neurons, Sweep(full_grid()), 10**7).n_prompts == len(encoded) - 1
    full.extend(own.prompt.id for own in encoded)
    with pytest.raises(OutOfMemory):
        measure_noise(model, encoded, neurons, Sweep(full_grid()), 10**7)


def test_the_identity_names_the_grid_by_its_shifts() -> None:
    by_range = sweep_of(max_shift=0.2, step=0.1).fingerprint_inputs()
    assert by_range["shifts"] == [-0.2, -0.1, 0.1, 0.2]
    assert by_range == sweep_of(shifts=[-0.2, -0.1, 0.1, 0.2]).fingerprint_inputs()
    assert by_range == sweep_of(max_shift=0.2, batch_bytes=10**9).fingerprint_inputs()
    assert by_range != sweep_of(max_shift=0.2, shift="signed").fingerprint_inputs()
    assert sweep_of(grid="coarse").fingerprint_inputs()["max_shift"] == 2.0


@pytest.mark.parametrize(
    ("options", "neurons", "message"),
    [
        ({"basis": "bias"}, {}, "measure.basis=bias is unknown"),
        ({"shift": "up"}, {}, "measure.shift=up is unknown"),
        ({"grid": "fine"}, {}, "measure.grid=fine is unknown; known are full, coarse"),
        ({"grid": "coarse", "shifts": [1.0]}, {}, "measure.grid=coarse: places its own shifts"),
        ({"shifts": [0.0]}, {}, "0 is no shift"),
        ({"shifts": "1,2"}, {}, "measure.shifts=1,2: must be a list"),
        ({"step": 3.0}, {}, "measure.step=3.0"),
        ({"batch_bytes": "lots"}, {}, "measure.batch_bytes=lots: must be auto or"),
        ({"batch_bytes": 7999}, {}, "measure.batch_bytes=7999: holds 1 rows of 4000 bytes, at least 2 are needed"),
        ({"shifts": [0.5, "a"]}, {}, "must be numbers"),
        ({}, {"choose": "sample", "count": 1, "seed": -1}, "neurons.seed=-1: must be 0 or more"),
        ({}, {"choose": "top", "count": 121}, "neurons.count=121"),
    ],
)
def test_bad_requests_are_refused_before_anything_starts(
    options: dict[str, Any], neurons: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        sweep_of(**options).validate(INFO, NeuronsConfig(**neurons), PROMPTS)


def test_measures_of_whole_layers_refuse_single_neurons() -> None:
    for name in ("neurgrad", "strength"):
        with pytest.raises(ConfigurationError, match=r"is for measure=sweep; measure=[a-z]+ takes neurons=all"):
            measure_of({"name": name}).validate(INFO, NeuronsConfig(choose="sample", count=3), PROMPTS)


def test_the_cost_counts_interventions_and_curves() -> None:
    cost = sweep_of().cost(INFO, NeuronsConfig(choose="sample", count=5), 4.0)
    assert cost.rows == 15 * 40
    five = NeuronsConfig(choose="sample", count=5)
    with_curves = sweep_of(keep_curves=True).cost(INFO, five, 4.0)
    assert with_curves.bytes["sweep"] - cost.bytes["sweep"] == 4 * 40 * 15 * 4
    assert "delta_p" in sweep_of(keep_curves=True).tables(INFO)["sweep"].schema.names
    assert "delta_p" not in schema.sweep().names


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_a_constant_factor_after_the_head_passes_through(factor: float) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4}
    config = GraniteConfig(**sizes, num_key_value_heads=2, num_hidden_layers=3, logits_scaling=1 / factor)
    own = GraniteForCausalLM(config).double()
    model = LanguageModel(own, tiny_tokenizer())
    found = neg_service.neg(model, "w3 w14 w15", " w7", [(0, 3)], [1.5], shift="signed")
    before, after = (oracle.probability_with_shift(own, (3, 14, 15), 7, "paper", 0, 3, shift) for shift in (0.0, 1.5))
    assert found.delta_p[0, 0] == pytest.approx(after - before, rel=1e-5)
