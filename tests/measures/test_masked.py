"""Masked models through the same interfaces as causal ones; that the numbers are right: `models/test_families.py`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing
from transformers import AutoModelForMaskedLM, BertConfig, PreTrainedTokenizerFast

import neg_service
from neg_service.cluster.messages import Shard, WorkerSpec
from neg_service.cluster.prepare import prepare
from neg_service.cluster.worker import ScanWorker
from neg_service.config import ScanConfig, typed
from neg_service.errors import ModelError, PromptError
from neg_service.models.inspection import inspect_model
from neg_service.models.language_model import LanguageModel
from neg_service.models.source import fetch
from neg_service.prompts import facts
from neg_service.prompts.prompt import Prompt
from neg_service.prompts.tokens import encode
from tests.refusals import ANY, refused
from tests.tiny_models import MASK, tiny_model, tiny_tokenizer

TEXT = "w3 w14 w96 w9 w26 w5 w35 w8"


def test_layers_below_an_intervention_do_not_run() -> None:
    model = tiny_model("BERT")
    # Measures the noise, too.
    neg_service.neg(model, TEXT, "w7", [(2, 0)], [1.0])
    ran: list[int] = []
    for index, layer in enumerate(model.feed_forward.layers):
        layer.register_forward_pre_hook(lambda _m, _a, index=index: ran.append(index))
    neg_service.neg(model, TEXT, "w7", [(2, 0)], [1.0])
    # Once each for the baseline prompt, then the layer of the intervention alone.
    assert ran == [0, 1, 2, 2]


@pytest.mark.parametrize(
    ("text", "target", "refusal"),
    [
        (
            "w1 w2",
            "w7",
            (
                "dataset.source",
                ANY,
                "prompt 'a' has 0 mask tokens, a masked model needs exactly 1, written as 'w96' or ",
            ),
        ),
        ("w1 w96 w2 w96", "w7", ("dataset.source", ANY, "prompt 'a' has 2 mask tokens")),
        ("w1 w96 w2", "w7 w8", ("dataset.source", ANY, "target 'w7 w8' is 2 tokens")),
        ("w1 w96 w2", "", ("dataset.source", ANY, "target '' is 0 tokens")),
    ],
)
def test_prompts_without_one_mask_token_or_with_longer_targets_are_refused(
    text: str, target: str, refusal: tuple[Any, ...]
) -> None:
    with refused(PromptError, *refusal):
        list(encode(tiny_tokenizer(), [Prompt("a", text, (target,))], None, MASK))


def test_a_target_is_encoded_in_the_place_of_the_mask() -> None:
    (found,) = encode(tiny_tokenizer(), [Prompt("a", "w1 w96 w2", ("w7", "w9"))], None, MASK)
    assert (found.ids, found.target_ids) == ((1, MASK, 2), (7, 9))


def test_a_checkpoint_says_whether_it_is_masked(tmp_path: Path) -> None:
    tiny_model("BERT").model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert inspect_model(fetch(str(tmp_path))).is_masked
    model = neg_service.load_model(str(tmp_path))
    assert model.is_masked
    assert model.mask_token == MASK
    assert model.ensure_checked().check.logits < 1e-5


def test_a_masked_model_without_a_mask_token_is_refused() -> None:
    with refused(ModelError, "model.source", says="has no mask token"):
        LanguageModel(tiny_model("BERT").model)


def test_a_prompt_may_write_the_mask_of_any_model() -> None:
    (found,) = encode(tiny_tokenizer(), [Prompt("a", "w1 [MASK] w2", ("w7",))], None, MASK)
    assert (found.ids, found.target_ids, found.prompt.text) == ((1, MASK, 2), (7,), "w1 [MASK] w2")


def test_the_masked_facts_are_scanned_like_any_data_set(tmp_path: Path) -> None:
    words = re.findall(r"\w+|[^\w\s]", " ".join(f"{p.text} {' '.join(p.targets)}" for p in facts.load()))
    vocabulary = {
        word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({".", *words})])
    }
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, mask_token="[MASK]", pad_token="[PAD]", unk_token="[UNK]"
    )
    fast.save_pretrained(tmp_path)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40
    )
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    asked = {"model": {"source": str(tmp_path)}, "dataset": {"source": "facts-masked"}}
    sweep = {"measure": {"name": "sweep", "shifts": [-1, 1]}, "neurons": {"choose": "sample", "count": 5}}
    for measured in ({"measure": {"name": "neurgrad"}}, sweep):
        prepared = prepare(typed(ScanConfig, {**asked, **measured}))
        assert prepared.info.is_masked
        worker = ScanWorker(WorkerSpec(prepared.config, prepared.info.identity, 2, prepared.encoding[:1]))
        assert worker.start().engine == "full_sequence"
        found = worker.compute(Shard(0, tuple(prepared.encoding[::200])), 1.0, worker.calibrate())
        assert {name: table.schema for name, table in found.items()} == prepared.tables
        (first, *_) = found["prompts"].to_pylist()
        assert first["prompt"] == "The capital of France is [MASK]."
        assert fast.convert_ids_to_tokens(first["target_tokens"]) == first["targets"]
