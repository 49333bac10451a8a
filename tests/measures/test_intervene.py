"""Joint interventions: against full forward passes with every neuron changed by hand, and against sums of NEGs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import neg_service
from neg_service import Edit, LanguageModel
from neg_service.errors import ConfigurationError, NonFiniteError, OutOfMemory
from neg_service.measures import intervene, measure_of
from neg_service.measures.builtin.intervene import Intervene, InterveneOptions
from neg_service.measures.edits import checked_edits, read_edits
from neg_service.models.batches import Budget
from neg_service.prompts.prompt import Prompt
from tests import oracle
from tests.families import EDITED, probabilities_by_hand
from tests.refusals import ANY, refused
from tests.shards import measured_shard
from tests.tiny_models import tiny_model

TEXTS = ["w3 w14 w15 w9 w26 w5", "w3 w14 w2", "w50 w51 w52 w53 w54 w55 w56"]
TARGETS = [[" w7", " w8", " w11"], [" w7", " w8"], [" w1"]]
EDITS: list[dict[str, Any]] = [
    {"name": "shift", "neurons": EDITED, "shift": 0.7},
    {"name": "each its own", "neurons": EDITED, "shift": [0.1, -0.2, 0.3, -0.4]},
    {"name": "signed", "neurons": EDITED, "shift": 0.7, "signed": True},
    {"name": "off", "neurons": EDITED[1:], "scale": 0},
    {"name": "double", "neurons": EDITED, "scale": 2.0},
    {"name": "set", "neurons": EDITED, "set": 1.5},
    {"name": "enhance", "neurons": EDITED, "enhance": 0.5},
    {"name": "suppress", "neurons": EDITED, "suppress": 0.5},
    {"name": "by polarity", "neurons": EDITED, "enhance": 0.5, "polarity": [1, -1, -1, 1]},
]


@pytest.mark.parametrize("family", ["Llama 2", "Phi-3 and 4", "BERT"])
def test_equals_a_full_forward_pass_with_every_neuron_changed_by_hand(family: str) -> None:
    model = tiny_model(family, torch.float64)
    texts = [f"{text} w96" if model.is_masked else text for text in TEXTS]
    found = neg_service.intervene(model, texts, TARGETS, EDITS, answers=[2, None, 0])
    assert found.edits == tuple(edit["name"] for edit in EDITS)
    assert found.n_targets.tolist() == [3, 2, 1]
    for p, text in enumerate(texts):
        ids = [int(word[1:]) for word in text.split()]
        targets = [int(target.strip()[1:]) for target in TARGETS[p]]
        k = len(targets)
        before, _, _ = oracle.gradients(model.model, ids, targets, "paper")
        np.testing.assert_allclose(found.probability_before[p, :k], before, rtol=1e-8)
        assert np.isnan(found.probability_before[p, k:]).all()
        assert found.prediction_before[p] == before.argmax()
        by_hand = probabilities_by_hand(model.model, ids, targets, EDITS, [2, 0, 0][p], len(ids) - 1, "paper")
        for e, after in enumerate(by_hand):
            np.testing.assert_allclose(found.probability[p, e, :k], after, rtol=1e-8, err_msg=EDITS[e]["name"])
            assert found.prediction[p, e] == after.argmax()


def test_batches_do_not_change_results() -> None:
    model = tiny_model("Llama 2", torch.float64)
    whole = neg_service.intervene(model, TEXTS, TARGETS, EDITS)
    alone = neg_service.intervene(model, TEXTS, TARGETS, EDITS, batch_bytes=1)
    np.testing.assert_allclose(alone.delta_p, whole.delta_p, rtol=1e-6)
    for e, edit in enumerate(EDITS):
        one = neg_service.intervene(model, TEXTS, TARGETS, [Edit(**edit)])
        np.testing.assert_allclose(one.delta_p[:, 0], whole.delta_p[:, e], rtol=1e-6)


def test_very_many_edits_run_a_part_at_a_time() -> None:
    model = tiny_model("Llama 2", torch.float64)
    edits = [{"neurons": [(i % 3, i % 40)], "shift": 0.01 * (i + 1)} for i in range(130)]
    found = neg_service.intervene(model, TEXTS, TARGETS, edits)
    for e in (0, 63, 64, 129):
        alone = neg_service.intervene(model, TEXTS, TARGETS, [edits[e]])
        np.testing.assert_allclose(alone.delta_p[:, 0], found.delta_p[:, e], rtol=1e-6)


def test_the_neurons_of_a_sweep_can_be_edited_as_they_are() -> None:
    # Joint edits run as rows, whose norms round to float32 as the modeling code says.
    model = tiny_model("Llama 2", torch.float64, engine="shared_prefix")
    single = neg_service.neg(model, TEXTS[0], " w7", [(1, 5), (2, 3)], [0.3])
    joint = neg_service.intervene(model, TEXTS[:1], [[" w7"]], [Edit(single.neurons[:1], shift=0.3)])
    assert joint.delta_p[0, 0, 0] == pytest.approx(single.delta_p[0, 0], rel=1e-9)


def test_a_joint_shift_of_one_neuron_is_a_point_of_its_curve() -> None:
    model = tiny_model("GPT-2", torch.float64)
    curve = neg_service.neg(model, TEXTS[0], " w7", [(1, 5)], [-0.5, 0.3])
    edits = [{"neurons": [(1, 5)], "shift": shift} for shift in (-0.5, 0.3)]
    joint = neg_service.intervene(model, TEXTS[:1], [[" w7"]], edits)
    np.testing.assert_allclose(joint.delta_p[0, :, 0], curve.delta_p[0], rtol=1e-9)


def test_the_sum_of_single_negs_predicts_small_joint_shifts_and_errs_with_their_square() -> None:
    model = tiny_model("Llama 2", torch.float64)
    neurons = [(layer, n) for layer in range(3) for n in (1, 8, 21, 30)]
    errors = []
    for size in (1e-1, 1e-2, 1e-3):
        single = neg_service.neg(model, TEXTS[0], " w7", neurons, [-size, size])
        joint = neg_service.intervene(model, TEXTS[:1], [[" w7"]], [{"neurons": neurons, "shift": size}])
        errors.append(abs(joint.delta_p[0, 0, 0] - size * single.neg.sum()))
    # Ten times smaller shifts: the effect is ten times smaller, what the sum misses a hundred times.
    for larger, smaller in pairwise(errors):
        assert 50 < larger / smaller < 200


@pytest.mark.model
def test_on_the_default_model_single_negs_add_up(smollm2: LanguageModel) -> None:
    text, target = "The capital of France is", " Paris"
    draw = np.random.default_rng(0)
    neurons = [(layer, int(n)) for layer in range(0, 30, 3) for n in draw.choice(1536, 6, replace=False)]
    single = neg_service.neg(smollm2, text, target, neurons, [-0.02, 0.02])
    sizes = np.array([0.01, 0.1, 1.0])
    edits = [{"neurons": neurons, "enhance": size} for size in sizes.tolist()]
    found = neg_service.intervene(smollm2, [text], [[target]], edits)
    predicted = sizes * np.abs(single.neg).sum()
    errors = np.abs(found.delta_p[0, :, 0] / predicted - 1)
    # Of 60 neurons at once: half a per cent off at a shift of 0.01, five at 0.1, and far off at 1.
    assert errors[0] < 0.01
    assert errors[1] < 0.1
    assert errors[0] < errors[1] < errors[2]


def test_enhancing_raises_and_suppressing_lowers_the_answer() -> None:
    model = tiny_model("Llama 2")
    estimate = np.abs(neg_service.neurgrad(model, TEXTS[:1], [[" w7"]]).neurgrad[0, 0])
    best = [divmod(int(i), 40) for i in np.argsort(-estimate, axis=None)[:10]]
    edits = [Edit(best, enhance=0.05), Edit(best, suppress=0.05)]
    found = neg_service.intervene(model, TEXTS[:1], [[" w8", " w7"]], edits, answers=[1])
    assert found.delta_p[0, 0, 1] > 0 > found.delta_p[0, 1, 1]


def test_the_measure_gives_a_row_for_each_edit_and_target() -> None:
    model = tiny_model("Llama 2", torch.float64)
    prompts = [Prompt(str(i), text, tuple(own)) for i, (text, own) in enumerate(zip(TEXTS, TARGETS, strict=True))]
    tables = measured_shard(Intervene(InterveneOptions(edits=EDITS)), model, prompts, budget=Budget(99))
    found = neg_service.intervene(model, TEXTS, TARGETS, EDITS)
    rows = tables["intervene"].to_pylist()
    assert len(rows) == len(EDITS) * 6
    assert tables["prompts"]["prompt_id"].to_pylist() == ["0", "1", "2"]
    for row in rows:
        p, e, k = int(row["prompt_id"]), found.edits.index(row["edit"]), row["target_index"]
        assert row["delta_p"] == pytest.approx(found.delta_p[p, e, k], rel=1e-6)
        assert row["probability"] == pytest.approx(found.probability[p, e, k], rel=1e-6)
        assert row["probability_before"] == pytest.approx(found.probability_before[p, k], rel=1e-6)
        assert (row["prediction_before"], row["prediction"]) == (found.prediction_before[p], found.prediction[p, e])


def test_edits_are_read_from_a_file_into_the_options(tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text('[{"neurons": [[0, 1]], "scale": 0}]')
    (tmp_path / "e.jsonl").write_text('{"neurons": [[0, 1]], "scale": 0}\n\n')
    expected = [{"neurons": [[0, 1]], "scale": 0}]
    for name in ("e.json", "e.jsonl"):
        asked = measure_of({"name": "intervene", "edits": str(tmp_path / name)})
        assert asked.with_files_read().options.edits == expected
    assert measure_of({"name": "intervene", "edits": expected}).with_files_read().options.edits == expected
    with refused(ConfigurationError, "measure.edits", tmp_path / "none.json", says="cannot be read"):
        read_edits(str(tmp_path / "none.json"))
    # A folder would be that of a table of shifts.
    with refused(ConfigurationError, "measure.edits", tmp_path, says="has no rows of shifts"):
        read_edits(str(tmp_path))
    (tmp_path / "bad.json").write_text("[")
    with refused(ConfigurationError, "measure.edits", tmp_path / "bad.json", says="is not JSON"):
        read_edits(str(tmp_path / "bad.json"))


@pytest.mark.parametrize(
    ("edits", "refusal"),
    [
        ([], ("measure.edits", "[]", "a list of at least one edit")),
        ({"neurons": [[0, 1]], "shift": 1}, ("measure.edits", "{'neurons': [[0, 1]], 'shift': 1}", "a list")),
        ([7], ("measure.edits[0]", ANY, "must be an edit")),
        ([{"neurons": [[0, 1]]}], ("measure.edits[0]", ANY, "has 0 operations, needs one of shift, add, scale")),
        ([{"neurons": [[0, 1]], "shift": 1, "scale": 0}], ("measure.edits[0]", ANY, "has 2 operations")),
        (
            [{"neurons": [[0, 1]], "shift": 1}, {"neurons": [[0, 1]], "move": 1}],
            ("measure.edits[1]", ANY, "move is unknown"),
        ),
        ([{"neurons": [], "shift": 1}], ("measure.edits[0].neurons", ANY, "the choice is empty")),
        ([{"neurons": [[3, 0]], "shift": 1}], ("measure.edits[0].neurons", ANY, r"\(3, 0\) does not exist")),
        ([{"neurons": [[0, 1], [0, 1]], "shift": 1}], ("measure.edits[0]", ANY, "a neuron is given twice")),
        ([{"neurons": [[0, 1]], "shift": float("nan")}], ("measure.edits[0].shift", ANY, "nan is not finite")),
        ([{"neurons": [[0, 1]], "shift": [1, 2]}], ("measure.edits[0].shift", "[1, 2]", "a number, or 1 numbers")),
        ([{"neurons": [[0, 1]], "shift": "much"}], ("measure.edits[0].shift", "'much'", "a number")),
        (
            [{"neurons": [[0, 1]], "shift": 1, "polarity": [1]}],
            ("measure.edits[0]", ANY, "polarity goes with enhance or suppress"),
        ),
        (
            [{"neurons": [[0, 1]], "enhance": 1, "polarity": [0]}],
            ("measure.edits[0]", ANY, r"polarity must be \+1 or -1"),
        ),
        ([{"neurons": [[0, 1]], "scale": 1, "signed": True}], ("measure.edits[0]", ANY, "signed goes with shift")),
        ([{"neurons": [[0, 1]], "shift": 1, "name": "a"}] * 2, ("measure.edits", ANY, "two edits are named 'a'")),
        (
            [{"neurons": [[0, True]], "shift": 1}],
            ("measure.edits[0].neurons", "[[0, True]]", "must be a list of"),
        ),
        ([{"neurons": [[0, 3.7]], "shift": 1}], ("measure.edits[0].neurons", ANY, "must be a list of")),
        ([{"neurons": None, "shift": 1}], ("measure.edits[0].neurons", ANY, "must be a list of")),
        ([{"neurons": [[0, 1]], "shift": True}], ("measure.edits[0].shift", "True", "a number")),
        ([{"neurons": [[0, 1], [0, 2]], "shift": [1.0, True]}], ("measure.edits[0].shift", "[1.0, True]", "a number")),
        ([{"neurons": [[0, 1]], "shift": "0.5"}], ("measure.edits[0].shift", "'0.5'", "a number")),
        (
            [{"neurons": [[0, 1], [0, 2]], "shift": [1.0]}],
            ("measure.edits[0].shift", "[1.0]", "a number, or 2 numbers"),
        ),
        ([{"neurons": [[0, 1]], "shift": {"by": 1}}], ("measure.edits[0].shift", "{'by': 1}", "a number")),
        (
            [{"neurons": [[0, 1]], "shift": 10**400}],
            ("measure.edits[0].shift", "100000000000000000...0000000000000000000", "a number"),
        ),
        ([{"neurons": [[0, 1]], "shift": float("inf")}], ("measure.edits[0].shift", ANY, "inf is not finite")),
        (
            [{"neurons": [[0, 1]], "enhance": 1, "polarity": [True]}],
            ("measure.edits[0].polarity", "[True]", "a number"),
        ),
        (
            [{"neurons": [[0, 1]], "shift": 1, "signed": "false"}],
            ("measure.edits[0].signed", "'false'", "true or false"),
        ),
        ([{"neurons": [[0, 1]], "shift": 1, "signed": 0}], ("measure.edits[0].signed", "0", "true or false")),
        ([{"neurons": [[0, 1]], "shift": 1, "name": ["a"]}], ("measure.edits[0].name", "['a']", "a text")),
        (
            [{"neurons": [[0, 1]], "shift": 1, "name": "\ud800"}],
            ("measure.edits[0].name", r"'\ud800'", "holds a lone surrogate"),
        ),
        ([{"neurons": [[0, 1]], "shift": 1, 5: 1, "move": 2}], ("measure.edits[0]", ANY, "5 is unknown")),
    ],
)
def test_bad_edits_are_refused(edits: Any, refusal: tuple[Any, ...]) -> None:
    with refused(ConfigurationError, *refusal):
        checked_edits(edits, [40] * 3)


def test_numbers_of_every_kind_that_numpy_has_are_numbers() -> None:
    neurons = np.array([[0, 1], [2, 3]])
    for shift in (1, 1.0, np.float32(1), np.array([1, 1]), (1.0, 1), [np.int64(1), 1.0]):
        (edit,) = checked_edits([{"neurons": neurons, "shift": shift, "signed": None, "name": 7}], [40] * 3)
        assert edit.values.tolist() == [1.0, 1.0]
        assert edit.name == "7"


def test_bad_requests_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama 2")
    with refused(ConfigurationError, setting=None, says="3 prompts, targets for 1 and answers for 3"):
        neg_service.intervene(model, TEXTS, TARGETS[:1], EDITS)
    with refused(ConfigurationError, setting=None, says="targets a list of texts for each"):
        neg_service.intervene(model, TEXTS[:1], [" w7"], EDITS)  # type: ignore[list-item]
    wrong: list[tuple[Any, Any]] = [
        ([b"w1"], [[" w7"]]),
        ([None], [[" w7"]]),
        (["w1"], [[7]]),
        (["w1"], [7]),
        (None, None),
    ]
    for texts, targets in wrong:
        with refused(ConfigurationError, setting=None, says="targets a list of texts for each"):
            neg_service.intervene(model, texts, targets, EDITS)
    with refused(ConfigurationError, "batch_bytes", "0", allowed="at least 1"):
        neg_service.intervene(model, TEXTS, TARGETS, EDITS, batch_bytes=0)
    monkeypatch.setattr(intervene, "_run_batch", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with refused(OutOfMemory, setting=None, says="its 10 rows do not fit"):
        neg_service.intervene(model, TEXTS, TARGETS, EDITS)


def test_logits_that_are_not_finite_are_refused_by_prompt() -> None:
    model = tiny_model("Llama 2")
    with torch.no_grad():
        model.model.model.embed_tokens.weight[51] = float("inf")
    with refused(NonFiniteError, setting=None, says="prompt '2'"):
        neg_service.intervene(model, TEXTS, TARGETS, EDITS)
