"""The measure `control`: its tables against the library, wishes of rows, and what it refuses before anything starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import neg_service
from neg_service.config import NeuronsConfig
from neg_service.errors import ConfigurationError, PromptError
from neg_service.measures import measure_of
from neg_service.measures.builtin.control import _token_against
from neg_service.measures.control.options import Wanted
from neg_service.neurons import NeuronSet
from neg_service.prompts.prompt import Prompt
from neg_service.prompts.tokens import encode
from tests.mixtures import tiny_mixture
from tests.refusals import refused
from tests.shards import INFO, PROMPTS, measured_shard
from tests.tiny_models import tiny_model, tiny_tokenizer


def scanned(prompts: list[Prompt] = PROMPTS, neurons: NeuronsConfig | None = None, **options: Any) -> Any:
    measure = measure_of({"name": "control", "tolerance": 1e-4, **options})
    measure.validate(INFO, neurons or NeuronsConfig(), prompts)
    return measured_shard(measure, tiny_model("Llama 2", torch.float64), prompts, neurons)


def test_rows_say_what_the_library_says() -> None:
    found = scanned(probability=[0.02, 0.05], keep_shift="all")
    rows = found["control"].to_pylist()
    assert [(row["prompt_id"], row["target"], row["wish"], row["wanted"]) for row in rows] == [
        (prompt.id, prompt.targets[prompt.answer or 0], wish, wanted)
        for prompt in PROMPTS
        for wish, wanted in enumerate((0.02, 0.05))
    ]
    model = tiny_model("Llama 2", torch.float64)
    texts = [prompt.text for prompt in PROMPTS for _ in range(2)]
    targets = [prompt.targets[prompt.answer or 0] for prompt in PROMPTS for _ in range(2)]
    own = neg_service.control(model, texts, targets, probability=[0.02, 0.05] * 3, tolerance=1e-4)
    for name in ("achieved", "first_shot", "probability_before", "probability", "passes", "norm", "largest"):
        np.testing.assert_allclose([row[name] for row in rows], getattr(own, name), rtol=1e-6, err_msg=name)
    np.testing.assert_allclose([row["predicted_by_neg"] for row in rows], own.predicted.by_neg, rtol=1e-6)
    shifts = found["control_shift"].to_pylist()
    by_neuron = np.zeros_like(own.shift)
    for row in shifts:
        place = next(
            i for i, one in enumerate(rows) if (one["prompt_id"], one["wish"]) == (row["prompt_id"], row["wish"])
        )
        by_neuron[place, row["layer"], row["neuron"]] = row["shift"]
    np.testing.assert_allclose(by_neuron, own.shift, rtol=1e-6, atol=1e-12)


def test_the_largest_shifts_alone_are_kept_largest_first() -> None:
    all_of_them = scanned(PROMPTS[:1], probability=0.02, keep_shift="all")["control_shift"]
    few = scanned(PROMPTS[:1], probability=0.02, top_k=5)["control_shift"]
    assert few["rank"].to_pylist() == [0, 1, 2, 3, 4]
    sizes = np.abs(all_of_them["shift"].to_numpy())
    np.testing.assert_array_equal(np.abs(few["shift"].to_numpy()), np.sort(sizes)[::-1][:5])


def test_a_row_says_what_is_wanted_of_it() -> None:
    wishes = [("probability", 0.03, None), ("top", 0.0, None), ("margin", -2.0, " w20")]
    prompts = [replace(prompt, wanted=own) for prompt, own in zip(PROMPTS, wishes, strict=True)]
    rows = scanned(prompts, probability=[0.1, 0.2])["control"].to_pylist()
    assert [(row["kind"], row["wanted"], row["against"]) for row in rows] == wishes
    assert all(row["reached"] for row in rows)
    assert rows[0]["probability"] == pytest.approx(0.03, abs=1e-4)
    assert rows[2]["achieved"] == pytest.approx(-2.0, abs=1e-4)


def test_what_a_margin_is_against_need_not_follow_wordings() -> None:
    # Of so many words none fits the context; that a text follows the prompt itself is all that it takes.
    long = replace(PROMPTS[2], wordings=((" ".join(["w3"] * 5000), None),))
    (encoded,) = encode(tiny_tokenizer(), [PROMPTS[2]], None)
    against = _token_against(
        tiny_model("Llama 2"), replace(encoded, prompt=long), Wanted("margin", -2.0, against=" w20")
    )
    assert against == 20


def test_all_targets_and_chosen_neurons() -> None:
    strongest = NeuronsConfig(choose="top", count=4, over="prompt")
    found = scanned(PROMPTS[:1], strongest, probability=0.02, keep="all")
    assert found["control"]["target"].to_pylist() == list(PROMPTS[0].targets)
    assert found["control"]["n_moved"].to_pylist() == [4, 4, 4]
    listed = NeuronsConfig(choose="list", list=NeuronSet.from_pairs([(1, 3), (2, 7)]))
    rows = scanned(PROMPTS[:1], listed, probability=0.02)["control_shift"].to_pylist()
    assert {(row["layer"], row["neuron"]) for row in rows} == {(1, 3), (2, 7)}


def test_a_mixture_names_experts() -> None:
    measure = measure_of({"name": "control", "probability": 0.005, "tolerance": 1e-4})
    found = measured_shard(measure, tiny_mixture("Mixtral", torch.float64), PROMPTS[:2])
    assert found["control"]["reached"].to_pylist() == [True, True]
    assert found["control_shift"]["expert"].null_count == 0


REFERENCES = [[f"w{i} w{i + 3} w{i + 7}", f" w{i + 1}"] for i in range(30, 42)]


def test_side_effects_are_those_of_the_library() -> None:
    found = scanned(PROMPTS[:2], probability=0.02, references=REFERENCES[:4])
    rows = found["control_side_effects"].to_pylist()
    assert [(row["prompt_id"], row["wish"], row["method"]) for row in rows] == [
        (prompt.id, 0, method) for prompt in PROMPTS[:2] for method in ("shift", "logit constant", "random neurons")
    ]
    model = tiny_model("Llama 2", torch.float64)
    texts, targets = (
        [prompt.text for prompt in PROMPTS[:2]],
        [prompt.targets[prompt.answer or 0] for prompt in PROMPTS[:2]],
    )
    result = neg_service.control(model, texts, targets, probability=0.02, tolerance=1e-4)
    own = neg_service.side_effects(model, result, texts, targets, [(a, b) for a, b in REFERENCES[:4]])
    for name in ("kl", "same_top", "target_probability", "answer_probability", "kl_low", "size"):
        np.testing.assert_allclose([row[name] for row in rows], own.table()[name].to_numpy(), rtol=1e-6, err_msg=name)


def test_texts_are_those_that_the_library_writes() -> None:
    rows = scanned(PROMPTS[:1], probability=0.2, write=4)["control"].to_pylist()
    model = tiny_model("Llama 2", torch.float64)
    result = neg_service.control(model, PROMPTS[0].text, " w8", probability=0.2, tolerance=1e-4)
    once, all_ = (neg_service.generate(model, PROMPTS[0].text, result, n_tokens=4, at=at) for at in ("readout", "all"))
    assert (rows[0]["text_before"], rows[0]["text"], rows[0]["text_everywhere"]) == (
        once.before,
        once.after,
        all_.after,
    )
    assert scanned(PROMPTS[:1], probability=0.2)["control"]["text"].to_pylist() == [None]


def test_half_of_the_references_are_held_and_the_others_measured() -> None:
    measure = measure_of(
        {"name": "control", "tolerance": 1e-4, "probability": 0.02, "references": REFERENCES, "holding": "references"}
    ).with_files_read()
    assert measure.options.holding == REFERENCES[::2]
    assert measure.options.references == REFERENCES[1::2]
    measure.validate(INFO, NeuronsConfig(), PROMPTS[:1])
    model = tiny_model("Llama 2", torch.float64)
    held = measured_shard(measure, model, PROMPTS[:1])
    plain = scanned(PROMPTS[:1], probability=0.02, references=REFERENCES[1::2])
    assert held["control"]["reached"].to_pylist() == [True]
    assert held["control"]["norm"][0].as_py() > plain["control"]["norm"][0].as_py()
    result = neg_service.control(
        model, PROMPTS[0].text, " w8", probability=0.02, tolerance=1e-4, holding=[(a, b) for a, b in REFERENCES[::2]]
    )
    np.testing.assert_allclose(held["control"]["norm"].to_numpy(), result.norm, rtol=1e-6)


def test_references_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "references.jsonl"
    file.write_text("".join(json.dumps({"prompt": a, "targets": [b], "answer": b}) + "\n" for a, b in REFERENCES))
    measure = measure_of({"name": "control", "references": str(file)}).with_files_read()
    assert measure.options.references == REFERENCES


@pytest.mark.parametrize(
    ("setting", "given"),
    [
        ("measure.references", {"references": REFERENCES[:1]}),
        ("measure.references", {"references": REFERENCES[:2], "holding": "references"}),
        ("measure.references", {"references": [["w1"]]}),
        ("measure.references", {"references": "nowhere.jsonl"}),
        ("measure.references", {"references": [[PROMPTS[0].text, " w8"], *REFERENCES]}),
        ("measure.holding", {"holding": [[PROMPTS[0].text, " w8"]]}),
        ("measure.holding", {"holding": "references"}),
        ("measure.references", {"references": REFERENCES, "holding": REFERENCES[:3]}),
    ],
)
def test_references_that_cannot_be(setting: str, given: dict[str, Any]) -> None:
    with refused(ConfigurationError, setting=setting):
        measure_of({"name": "control", **given}).with_files_read().validate(INFO, NeuronsConfig(), PROMPTS)


@pytest.mark.parametrize(
    ("setting", "given"),
    [
        ("measure.probability", {"probability": [0.5, 1.5]}),
        ("measure.probability", {"probability": []}),
        ("measure.tolerance", {"tolerance": 0.9}),
        ("measure.norm", {"norm": "l1"}),
        ("measure.keep_shift", {"keep_shift": "some"}),
        ("measure.max_passes", {"max_passes": 0}),
        ("measure.margin", {"margin": 1.0, "top": True}),
        ("measure.against", {"against": " w8"}),
        ("measure.against", {"margin": 1.0, "against": " w8"}),
    ],
)
def test_what_cannot_be_asked_for(setting: str, given: dict[str, Any]) -> None:
    with refused(ConfigurationError, setting=setting):
        scanned(**given)


def test_a_masked_model_writes_no_text() -> None:
    with refused(ConfigurationError, setting="measure.write", value=5):
        measure = measure_of({"name": "control", "write": 5})
        measure.validate(replace(INFO, is_masked=True), NeuronsConfig(), PROMPTS)


def test_prompts_without_answers() -> None:
    with refused(ConfigurationError, setting="measure.keep"):
        scanned([replace(PROMPTS[0], answer=None)])
    with pytest.raises(PromptError, match="compared with itself"):
        scanned([replace(PROMPTS[0], wanted=("margin", 1.0, " w8"))])
