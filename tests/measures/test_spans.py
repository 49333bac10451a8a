"""Neurons at a token before the readout position, against plain passes that shift them there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import neg_service
from neg_service.config import DatasetConfig, NeuronsConfig
from neg_service.errors import ConfigurationError, PromptError
from neg_service.measures import measure_of
from neg_service.measures.base import ShardInput
from neg_service.models.batches import Budget
from neg_service.models.precision import in_precision
from neg_service.prompts.encoding import Encoding
from neg_service.prompts.prompt import Prompt, digest
from neg_service.prompts.sources import load_dataset
from neg_service.prompts.tokens import encode
from tests import oracle
from tests.mixtures import tiny_mixture
from tests.refusals import refused
from tests.shards import measured_shard
from tests.tiny_models import tiny_model

TEXT, IDS = "w3 w14 w9 w26 w35 w8", [3, 14, 9, 26, 35, 8]
NEURONS, SHIFTS = [(0, 3), (1, 5), (2, 7)], [-1.5, -0.5, 0.5, 1.5]


@pytest.mark.parametrize("family", ["Llama 2", pytest.param("Gemma 2", marks=pytest.mark.faults), "GPT-2", "Qwen 3.5"])
def test_neurons_are_shifted_and_differentiated_there_and_answers_read_at_the_end(family: str) -> None:
    model = tiny_model(family, torch.float64)
    model.ensure_checked()
    h = 1e-3
    for at, place in (("w9", 2), ((3, 6), 1), (-6, 0)):
        # Without the float32 to which models' own code rounds.
        with in_precision(model.model, model.feed_forward.layers, torch.float64):
            p = {
                (*one, shift): oracle.probability_with_shift(model.model, IDS, 8, "paper", *one, shift, place, -1)
                for one in NEURONS
                for shift in (*SHIFTS, 0.0, -2 * h, -h, h, 2 * h)
            }
            found = neg_service.neg(model, TEXT, " w8", NEURONS, SHIFTS, shift="signed", neurons_at=at)
            gradient = neg_service.neurgrad(model, [TEXT], [[" w7", " w8"]], neurons_at=[at])
        expected = np.array([[p[*one, shift] - p[*one, 0.0] for shift in SHIFTS] for one in NEURONS])
        np.testing.assert_allclose(found.delta_p, expected, rtol=1e-6, atol=1e-12)
        assert found.probability == pytest.approx(p[0, 3, 0.0], rel=1e-6)
        for (layer, neuron), activation in zip(NEURONS, found.activation, strict=True):
            two, one = (p[layer, neuron, s * h] - p[layer, neuron, -s * h] for s in (2, 1))
            slope = (8 * one - two) / (12 * h) * (-1 if activation < 0 else 1)
            assert gradient.neurgrad[0, 1, layer, neuron] == pytest.approx(slope, rel=1e-4, abs=1e-8)


def test_the_last_token_is_the_readout_position_and_sequences_are_read_behind_it() -> None:
    model = tiny_model("Llama 2", torch.float64)
    plain = neg_service.neg(model, TEXT, " w7", NEURONS, SHIFTS)
    for at in ("w35 w8", 5, -1, (15, 20)):
        np.testing.assert_array_equal(
            neg_service.neg(model, TEXT, " w7", NEURONS, SHIFTS, neurons_at=at).neg, plain.neg
        )
    sequence = neg_service.neurgrad(
        model, [TEXT], [[" w7 w9", " w7", " w8"]], not_one_token="sequence", neurons_at=["w14"]
    )
    single = neg_service.neurgrad(model, [TEXT, f"{TEXT} w7"], [[" w7", " w8"], [" w9"]], neurons_at=["w14", "w14"])
    p = single.probability
    assert sequence.probability[0, 0] == pytest.approx(p[0, 0] * p[1, 0], rel=1e-5)
    expected = single.neurgrad[0, 0] * p[1, 0] + p[0, 0] * single.neurgrad[1, 0]
    np.testing.assert_allclose(sequence.neurgrad[0, 0], expected, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(sequence.neurgrad[0, 1:], single.neurgrad[0], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("readout", "against", "value"),
    [
        ("logit", None, lambda z: z[8]),
        ("log_odds", None, lambda z: torch.logit(z.softmax(-1)[8])),
        ("log_odds", " w7", lambda z: z[8] - z[7]),
        ("log_probability", None, lambda z: z.log_softmax(-1)[8]),
    ],
)
def test_whatever_is_read_at_the_end(readout: str, against: str | None, value: Callable[[Tensor], Tensor]) -> None:
    model = tiny_model("Llama 2", torch.float64)
    model.ensure_checked()
    h, (layer, neuron) = 1e-3, (1, 5)
    with in_precision(model.model, model.feed_forward.layers, torch.float64):
        at = {
            shift: float(value(oracle.logits_with_shift(model.model, IDS, "paper", layer, neuron, shift, 2, -1)))
            for shift in (*SHIFTS, 0.0, -2 * h, -h, h, 2 * h)
        }
        found = neg_service.neg(
            model, TEXT, " w8", [(layer, neuron)], SHIFTS, shift="signed", readout=readout, against=against,
            neurons_at="w9",
        )  # fmt: skip
    np.testing.assert_allclose(found.delta_p[0], [at[shift] - at[0.0] for shift in SHIFTS], rtol=1e-6, atol=1e-12)
    gradient = neg_service.neurgrad(
        model, [TEXT], [[" w8", " w7"]], readout=readout, against=against, neurons_at=["w9"]
    ).neurgrad[0, 0, layer, neuron]
    slope = (8 * (at[h] - at[-h]) - (at[2 * h] - at[-2 * h])) / (12 * h)
    assert abs(gradient) == pytest.approx(abs(slope), rel=1e-4)


def test_near_certainty_log_odds_are_as_exact_as_without_a_row_of_several_tokens() -> None:
    model = tiny_model("Llama 2")
    model.ensure_checked()
    best = int(oracle.logits_with_shift(model.model, IDS, "paper", 0, 0, 0.0).argmax())
    asked: Any = {"readout": "log_odds"}
    with torch.no_grad():
        while oracle.logits_with_shift(model.model, IDS, "paper", 0, 0, 0.0).double().softmax(-1)[best] < 1 - 2e-6:
            model.model.lm_head.weight *= 1.2
    alone = neg_service.neurgrad(model, [TEXT], [[f" w{best}"]], **asked)
    assert 1e-7 < 1 - alone.probability[0, 0] < 3e-6
    beside = neg_service.neurgrad(
        model, [TEXT], [[f" w{best}", " w3 w4" if best != 3 else " w5 w4"]], not_one_token="sequence", **asked
    )
    np.testing.assert_allclose(beside.neurgrad[0, 0], alone.neurgrad[0, 0], rtol=1e-2, atol=1e-2)


def test_a_sweep_is_calibrated_on_rows_of_one_token() -> None:
    model = tiny_model("Llama 2")
    prompts = [
        Prompt("a", TEXT, (" w7",), 0, at="w26"),
        Prompt("b", TEXT, (" w7",), 0),
        Prompt("c", "w3 w4", (" w7",), 0),
    ]
    measure = measure_of({"name": "sweep", "shifts": [-1.0, 1.0]})
    few = NeuronsConfig(choose="list", list=[[1, 5]])
    found = measure.calibrate(model, list(encode(model.tokenizer, prompts, None)), few)
    assert 0 < found["noise"]["sigma"] < 1e-3
    table = measured_shard(measure, model, prompts, few, found)["sweep"]
    assert table.num_rows == 3


def test_what_is_too_improbable_for_float32_is_still_predicted() -> None:
    model = tiny_model("Llama 2")
    # The second one is the more probable.
    long = [" w3" + " w4" * 40, " w3" + " w4" * 30]
    prompts = [Prompt("a", TEXT, tuple(long), 1), Prompt("b", TEXT, tuple(reversed(long)), 0)]
    encoded = list(encode(model.tokenizer, prompts, None, sequences=True))
    shard = ShardInput(model, encoded, NeuronsConfig(), budget=Budget(2**28), calibration={})
    table = measure_of({"name": "neurgrad", "readout": "log_odds", "against": "others"}).tables_of(shard)
    assert table["prompts"]["prediction"].to_pylist() == [1, 0]
    assert max(table["prompts"]["probabilities"][0].as_py()) < 1e-38
    values = np.stack(table["neurgrad"]["neurgrad"].to_pylist())
    assert np.isfinite(values).all()
    assert np.abs(values).max() > 0


def test_of_a_mixture_neurons_are_those_of_the_experts_that_the_token_uses() -> None:
    model = tiny_mixture("OLMoE", torch.float64)
    found = neg_service.neurgrad(model, [TEXT], [[" w7"]], neurons_at=[2])
    layer, slot = np.unravel_index(np.nanargmax(np.abs(found.neurgrad[0, 0])), found.neurgrad.shape[2:])
    neuron = (int(layer), int(found.neuron[0, layer, slot]), int(found.expert[0, layer, slot]))
    small = neg_service.neg(model, TEXT, " w7", [neuron], [-1e-2, 1e-2], neurons_at=2)
    assert small.neg[0] == pytest.approx(found.neurgrad[0, 0, layer, slot], rel=1e-3)


def test_a_scan_says_where_neurons_were() -> None:
    model = tiny_model("Llama 2")
    prompts = [
        Prompt("a", TEXT, (" w7", " w8"), 0, at="w26"),
        Prompt("b", TEXT, (" w7",), 0),
        Prompt("c", TEXT, (" w7",), 0, at=-1),
    ]
    tables = measured_shard(measure_of({"name": "neurgrad"}), model, prompts)
    assert tables["prompts"]["position"].to_pylist() == [3, None, None]
    alone = neg_service.neurgrad(model, [TEXT], [[" w7", " w8"]], neurons_at=["w26"])
    np.testing.assert_allclose(
        np.stack(tables["neurgrad"]["neurgrad"].to_pylist())[:3], alone.neurgrad[0, 0], rtol=1e-4
    )
    few = NeuronsConfig(choose="list", list=[[1, 5]])
    edit = {"neurons": [[1, 5]], "shift": 0.5, "name": "one"}
    swept = measured_shard(
        measure_of({"name": "sweep", "shifts": [0.5]}),
        model,
        prompts,
        few,
        {"noise": {"sigma": 0.0}},
    )["sweep"]
    joint = neg_service.intervene(model, [TEXT], [[" w7", " w8"]], [edit])
    # Edits of the library are at the readout position; those of the sweep's first prompt are not.
    assert swept["neg"][0].as_py() != pytest.approx(2 * joint.delta_p[0, 0, 0], rel=1e-3)
    assert swept["neg"][2].as_py() == pytest.approx(2 * joint.delta_p[0, 0, 0], rel=1e-3)


def test_encoded_ahead_or_later_the_place_is_the_same_and_part_of_the_identity() -> None:
    tokenizer = tiny_model("Llama 2").tokenizer
    prompts = [
        Prompt("a", TEXT, (" w7",), at="w14"),
        Prompt("b", TEXT, (" w7",)),
        Prompt("c", TEXT, (" w7",), at=(0, 2)),
    ]
    encoding = Encoding(prompts, lambda own: encode(tokenizer, own, None))
    later = [own.at for own in encoding[:]]
    encoding.encode_all()
    assert later == [own.at for own in encoding[:]] == [1, None, 0]
    assert len({digest([prompt]) for prompt in prompts}) == 3


def test_files_say_it_in_a_column(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": TEXT, "targets": [" w7"], "at": own} for own in ("w9", [3, 6], -2, None)]
    jsonl, csv = tmp_path / "a.jsonl", tmp_path / "a.csv"
    jsonl.write_text("\n".join(map(json.dumps, rows)))
    csv.write_text(f'prompt,targets,at\n{TEXT},"["" w7""]",w9\n{TEXT},"["" w7""]","[3, 6]"\n{TEXT},"["" w7""]",-2\n')
    expected = ["w9", (3, 6), -2]
    assert [own.at for own in load_dataset(DatasetConfig(str(jsonl)), None)] == [*expected, None]
    assert [own.at for own in load_dataset(DatasetConfig(str(csv)), None)] == expected
    jsonl.write_text(json.dumps({"prompt": TEXT, "targets": [" w7"], "at": [6, 3], "id": "q"}))
    with pytest.raises(PromptError, match=r"prompt 'q': at must be a text, a range of characters .* not \[6, 3\]"):
        list(load_dataset(DatasetConfig(str(jsonl)), None))


@pytest.mark.parametrize(
    ("at", "says"),
    [
        ("w77", "'w77' is not in the prompt"),
        ("w", r"'w' is there 6 times, from \[0, 3, 7, "),
        ("w1", "ends within a token"),
        ((3, 99), r"characters \[3, 99\] end beyond the prompt, which has 20"),
        (6, "token 6 does not exist, the prompt has 6"),
        (-7, "token -7 does not exist"),
        (True, "at must be a text"),
        ((2, 2), "at must be a text"),
    ],
)
def test_what_is_no_place_is_refused(at: Any, says: str) -> None:
    with pytest.raises(PromptError, match=f"prompt '0': .*{says}"):
        neg_service.neurgrad(tiny_model("Llama 2"), [TEXT], [[" w7"]], neurons_at=[at])


def test_places_are_a_list_and_blanks_are_no_tokens() -> None:
    model, two = tiny_model("Llama 2"), ([TEXT, TEXT], [[" w7"], [" w7"]])
    for given in (-2, "w1", (0, 2)):
        with refused(ConfigurationError, "neurons_at", given, says="a list with one for each prompt"):
            neg_service.neurgrad(model, *two, neurons_at=given)  # type: ignore[arg-type]
    for at in ((2, 3), "w3 "):
        with pytest.raises(PromptError, match="ends with white space, which is no token of its own"):
            neg_service.neurgrad(model, [TEXT], [[" w7"]], neurons_at=[at])


def test_of_a_chat_a_text_alone_says_it() -> None:
    tokenizer = tiny_model("Llama 2").tokenizer
    chat = [Prompt("a", "w40 w3 w9 w41", (" w7",), messages=(("user", "w3 w9"),), at=own) for own in ("w9", 1, (0, 2))]
    assert [own.at for own in encode(tokenizer, chat[:1], None)] == [2]
    for prompt in chat[1:]:
        with pytest.raises(PromptError, match=r"prompt 'a': at: .* would count what the chat template writes"):
            list(encode(tokenizer, [prompt], None))


def test_who_has_no_use_for_it_says_so() -> None:
    prompts = [Prompt("a", TEXT, (" w7",), 0), Prompt("b", TEXT, (" w7",), 0, at=1)]
    for options, says in (
        ({"name": "skill_scores"}, "measure=skill_scores has no use for that"),
        ({"name": "neurgrad", "at": "each"}, "measure.at=each moves neurons at several"),
    ):
        with pytest.raises(PromptError, match=f"prompt 'b' says at which token its neurons are .at., and {says}"):
            measure_of(options).check_places(prompts)
    model = tiny_model("BERT")
    with pytest.raises(PromptError, match="masked model"):
        neg_service.neurgrad(model, ["w3 [MASK] w9"], [["w7"]], neurons_at=[0])
    with pytest.raises(ConfigurationError, match="leave one of both out"):
        neg_service.neurgrad(tiny_model("Llama 2"), [TEXT], [[" w7"]], neurons_at=[0], at="each")
