"""Coverage by the same code that counts it, on a few cheap configurations; and that its table leaves none out."""

from __future__ import annotations

import re

import pytest

from tests import coverage
from tests.configurations import model_types
from tests.rare import one_of


@pytest.mark.parametrize(
    ("model_type", "read_as", "engine"),
    one_of(
        2,
        [
            ("lfm2", "causal", "recurrent_state"),
            ("llama", "causal", "differences"),
            ("zamba2", "causal", "recurrent_state"),
            ("nemotron_h", "causal", "recurrent_state"),
            ("blenderbot", "causal", "kv_cache"),
            # Experts that gate in their own way.
            ("beam", "causal", "shared_prefix"),
            ("inkling2_text", "causal", "recurrent_state"),
            # Experts that are always on, and weighed; several MLPs a layer, and identities among the experts.
            ("inkling_text", "causal", "recurrent_state"),
            ("longcat_flash", "causal", "shared_prefix"),
            # Attention that chooses experts, too; layers that run again.
            ("jetmoe", "causal", "shared_prefix"),
            ("hrm_text", "causal", "differences"),
            ("albert", "masked", "full_sequence"),
            # Layers in two lists, around a transformer that runs on patches of several tokens.
            ("blt", "causal", "full_sequence"),
            ("bert", "masked", "full_sequence"),
        ],
    ),
)
def test_a_configuration_is_measured_as_the_plain_model_says(model_type: str, read_as: str, engine: str) -> None:
    found = coverage.cover(model_type, read_as)
    assert (found.status, found.engine) == (coverage.MEASURED, engine), str(found)
    # Far below what would still count as right, and not zero: something was compared.
    assert 0 < found.neurgrad < 1e-4
    assert 0 < found.intervention < 1e-3


@pytest.mark.parametrize(
    ("model_type", "status", "says"),
    [
        ("mamba", coverage.WITHOUT, "has no feed-forward layers"),
        ("xlnet", coverage.REFUSED, "looks at later tokens too"),
        ("musicgen", coverage.APART, "predicts codes of sound"),
    ],
)
def test_what_is_not_measured_says_why(model_type: str, status: str, says: str) -> None:
    found = coverage.cover(model_type, "causal")
    assert found.status == status
    assert says in found.reason


def test_a_traceback_and_a_deviation_count_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "deviations", lambda _: (1e-6, 0.5))
    wrong = coverage.cover("llama", "causal")
    assert wrong.status == coverage.WRONG

    def fail(_: object) -> None:
        raise IndexError("by intent")

    monkeypatch.setattr(coverage, "deviations", fail)
    broken = coverage.cover("llama", "causal")
    assert (broken.status, broken.reason) == (coverage.WRONG, "IndexError: by intent")
    assert "of these 0 are measured (0 %), 1 wrongly" in coverage.counted([wrong, broken])


def test_the_table_names_every_configuration_of_the_installed_version() -> None:
    named = set(re.findall(r"`([\w-]+)`", coverage.shown()))
    assert set(model_types()) <= named


def test_the_sentence_counts_what_the_table_has() -> None:
    outcomes = [
        coverage.Outcome("a", "causal", coverage.MEASURED, "", "kv_cache", 1e-6, 2e-6),
        coverage.Outcome("a", "masked", coverage.REFUSED, "is odd"),
        coverage.Outcome("b", "masked", coverage.REFUSED, "is odd"),
        coverage.Outcome("c", "causal", coverage.WITHOUT, coverage.NO_LAYERS),
        coverage.Outcome("d", "causal", coverage.APART, "is not built"),
    ]
    lines = coverage.table(outcomes)
    sentences = " ".join(lines[: lines.index("")])
    assert "4 configurations, 1 of which are no language models of text by themselves, 1 have no" in sentences
    assert "2 have; of these 1 are measured (50 %)." in sentences
    assert sentences.endswith("1 of 3 ways are measured.")
    assert "| kv_cache | last token | 1e-06 | 2e-06 | `a` |" in lines
    assert "| `a`, masked, `b`, masked | is odd |" in lines
    readme = "a - b\n<!-- coverage -->\n-\n<!-- /coverage -->\n"
    assert coverage.written(readme, lines[:1]) == f"a - b\n<!-- coverage -->\n{lines[0]}\n<!-- /coverage -->\n"
