"""Tiny tokenizers of every kind, which add to texts what they are told to add."""

from __future__ import annotations

import json
from collections.abc import Callable

import transformers as hf
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE, WordLevel, WordPiece
from tokenizers.normalizers import BertNormalizer, Prepend, Replace, Sequence
from tokenizers.pre_tokenizers import BertPreTokenizer, ByteLevel, Metaspace, Whitespace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from neg_service.prompts.prompt import Prompt
from neg_service.prompts.tokens import encode
from tests.tiny_models import VOCABULARY

Made = Callable[[], hf.PreTrainedTokenizerFast]
TEXT = "The capital of France is Paris, the capital of Italy is Rome\nParis"
IS, END = " is", "</s>"


def byte_level(template: str | None = None, special: tuple[str, ...] = ("<s>", END), **options: bool) -> Made:
    """As GPT-2, Llama 3 and Qwen have it: no text is unknown, a space belongs to the word behind it."""
    own = Tokenizer(BPE())
    own.pre_tokenizer = ByteLevel(add_prefix_space=options.pop("add_prefix_space", False))
    trainer = BpeTrainer(
        vocab_size=400, special_tokens=list(special), initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    return _trained(own, trainer, template, **options)


def metaspace(template: str, scheme: str = "first") -> Made:
    """As Llama 2 and Gemma have it; `normalizer`, as their older files do, gives every stretch a space of its own."""
    own = Tokenizer(BPE(unk_token="<unk>"))
    if scheme == "normalizer":
        own.normalizer = Sequence([Prepend("▁"), Replace(" ", "▁")])
        own.pre_tokenizer = Metaspace(prepend_scheme="never")
    else:
        own.pre_tokenizer = Metaspace(prepend_scheme=scheme)
    special = ["<unk>", "<s>", END]
    trainer = BpeTrainer(vocab_size=200, special_tokens=special, initial_alphabet=["\n", "?"], show_progress=False)
    return _trained(own, trainer, template)


def _trained(own: Tokenizer, trainer: BpeTrainer, template: str | None, **options: bool) -> Made:
    own.train_from_iterator([TEXT] * 3, trainer)
    if template is not None:
        own.post_processor = TemplateProcessing(
            single=template,
            special_tokens=[(token, own.token_to_id(token)) for token in set(template.split()) - {"$A"}],
        )
    return hf.PreTrainedTokenizerFast(tokenizer_object=own, **options)


def llama(**options: bool) -> hf.PreTrainedTokenizerFast:
    """The class of Llama 2 itself, which makes its template from its options."""
    trained = json.loads(metaspace("$A").backend_tokenizer.to_str())["model"]
    return hf.LlamaTokenizer(vocab=trained["vocab"], merges=[tuple(pair) for pair in trained["merges"]], **options)


def word_piece(is_registered: bool = True) -> hf.PreTrainedTokenizerFast:
    """As BERT has it; not registered, `[CLS]` is put in front of a text and cannot be written in one."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "capital", "of", "is", "paris", "."]
    own = Tokenizer(WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    own.normalizer, own.pre_tokenizer = BertNormalizer(), BertPreTokenizer()
    own.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]"} if is_registered else {}
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=own, mask_token="[MASK]", unk_token="[UNK]", pad_token="[PAD]", **special
    )


def roberta() -> hf.PreTrainedTokenizerFast:
    """As RoBERTa has it: the mask token takes the space before it."""
    found = byte_level("<s> $A </s>", ("<s>", END))
    found.add_special_tokens({"mask_token": AddedToken("<mask>", lstrip=True, special=True)})
    return found


def words_of_tiny_models(template: str) -> hf.PreTrainedTokenizerFast:
    """A word a token for tiny models, of which two are `<s>` and `</s>`."""
    words = {f"w{i}": i for i in range(VOCABULARY) if i not in (1, 2)} | {"<s>": 1, END: 2}
    own = Tokenizer(WordLevel(words, unk_token="w0"))
    own.pre_tokenizer = Whitespace()
    own.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 1), (END, 2)])
    return hf.PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token=END)


def ids_of(tokenizer: hf.PreTrainedTokenizerFast, text: str, target: str = IS) -> tuple[tuple[int, ...], int]:
    """The prompt's tokens, and the target's."""
    (found,) = encode(tokenizer, [Prompt("x", text, (target,))], None)
    return found.ids, found.target_ids[0]


def without_unknown() -> hf.PreTrainedTokenizerFast:
    """Fails at a word that it does not know, as at the letters of probes."""
    own = Tokenizer(WordLevel({"the": 0, "capital": 1, "paris": 2, "rome": 3}))
    own.pre_tokenizer = Whitespace()
    return hf.PreTrainedTokenizerFast(tokenizer_object=own)
