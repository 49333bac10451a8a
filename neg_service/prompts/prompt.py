"""A prompt: text, its target tokens, and the right one if there is one; and how it becomes tokens.

Targets are encoded *in context*: the tokens of prompt + target, minus the tokens of the prompt. A tokenizer may
spell a word differently alone than after a text, and may merge across the seam; both would silently measure another
token, so both are refused here. Nothing in this file needs torch: a tokenizer is whatever turns texts into ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Protocol

from neg_service.errors import PromptError, TargetError

# What a prompt may write for the mask token of any masked model.
MASK = "[MASK]"


@dataclass(frozen=True)
class Prompt:
    """A text, the targets that may follow it verbatim, and the index of the right one, if known."""

    id: str
    text: str
    targets: tuple[str, ...]
    answer: int | None = None


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as token ids; `target_ids[k]` is the one token of target k after the prompt."""

    prompt: Prompt
    ids: tuple[int, ...]
    target_ids: tuple[int, ...]


class Tokenizer(Protocol):
    """What is used of a tokenizer; those of transformers fit."""

    def __call__(self, text: list[str]) -> Any:
        """Token ids of each text, under `input_ids`, special tokens included."""
        ...

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """The tokens behind the ids, for messages."""
        ...


def digest(prompts: Iterable[Prompt]) -> str:
    """SHA-256 over the content of prompts in order; the identity of a data set."""
    sha = hashlib.sha256()
    for prompt in prompts:
        sha.update(json.dumps(asdict(prompt), sort_keys=True, ensure_ascii=False).encode())
        sha.update(b"\n")
    return sha.hexdigest()


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Refuse what needs no tokenizer to be wrong: no prompts, repeated ids, empty texts, bad targets.

    Raises:
        PromptError: naming the prompt.
    """
    if not prompts:
        raise PromptError("there are 0 prompts, at least 1 is needed: check dataset.source and job.limit")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise PromptError(f"prompt id {prompt.id!r} appears twice; ids must differ (dataset.source)")
        seen.add(prompt.id)
        if not prompt.text:
            raise PromptError(f"prompt {prompt.id!r} is empty; it needs at least one token (dataset.source)")
        if any(_is_not_text(text) for text in (prompt.id, prompt.text, *prompt.targets)):
            raise PromptError(f"prompt {prompt.id!r} holds a lone surrogate, which no text has (dataset.source)")
        if not prompt.targets:
            raise PromptError(f"prompt {prompt.id!r} has no targets; it needs at least one (dataset.source)")
        if prompt.answer is not None and not 0 <= prompt.answer < len(prompt.targets):
            raise PromptError(
                f"prompt {prompt.id!r} has answer {prompt.answer}, but its {len(prompt.targets)} targets are "
                f"numbered from 0 (dataset.source)"
            )


def check_texts(prompts: Sequence[str], targets: Sequence[Sequence[str]]) -> None:
    """Refuse a text where a list of texts is meant, whose letters would be taken for prompts or targets.

    Raises:
        PromptError: saying what is meant.
    """
    if isinstance(prompts, str) or isinstance(targets, str) or any(isinstance(own, str) for own in targets):
        raise PromptError('prompts must be a list of texts, and targets a list of texts for each: ["..."], [[" a"]]')


def _is_not_text(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def encode(
    tokenizer: Tokenizer,
    prompts: Iterable[Prompt],
    context_length: int | None,
    mask_token: int | None = None,
    batch: int = 256,
) -> Iterator[EncodedPrompt]:
    """Encode prompts and their targets in context, lazily and in order.

    A target follows the prompt; with `mask_token`, the id of a masked model's mask token, it stands in its place. A
    prompt may write that token as the model does (`<mask>`), or as `[MASK]` whatever the model.

    Raises:
        PromptError: a target that is not one token in context, or only the unknown one, two targets with the same
            token, an empty prompt, one longer than `context_length` tokens, or one that has not exactly one mask token
            where one is needed; names the prompt, the value, and the key to change.
    """
    remaining = iter(prompts)
    while group := list(islice(remaining, batch)):
        texts = [text for p in group for text in _texts(tokenizer, p, mask_token)]
        encoded = iter(tokenizer(texts)["input_ids"])
        for prompt in group:
            ids = tuple(next(encoded))
            with_targets = [tuple(next(encoded)) for _ in prompt.targets]
            _check_length(prompt, ids, context_length)
            own_of = _after if mask_token is None else partial(_instead_of, mask_token)
            yield EncodedPrompt(prompt, ids, _target_ids(tokenizer, prompt, ids, with_targets, own_of))


def speakable(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], mask_token: int | None = None
) -> Iterator[tuple[Prompt, int]]:
    """Each prompt with those of its targets that are one token, and how many were left out.

    Of targets with the same token the first stays, but for the right answer, which goes before all others. A prompt
    whose answer goes, or that keeps fewer than two of several targets, keeps none.

    Raises:
        PromptError: what is wrong with a prompt itself; see `encode`.
    """
    for prompt in prompts:
        token_of: dict[int, int] = {}
        for index in sorted(range(len(prompt.targets)), key=lambda own: own != prompt.answer):
            alone = replace(prompt, targets=(prompt.targets[index],), answer=None)
            try:
                (one,) = encode(tokenizer, [alone], None, mask_token)
            except TargetError:
                continue
            token_of.setdefault(one.target_ids[0], index)
        kept = sorted(token_of.values())
        if len(kept) < min(2, len(prompt.targets)) or (prompt.answer is not None and prompt.answer not in kept):
            kept = []
        answer = kept.index(prompt.answer) if prompt.answer is not None and kept else None
        targets = tuple(prompt.targets[index] for index in kept)
        yield replace(prompt, targets=targets, answer=answer), len(prompt.targets) - len(kept)


def fits(tokenizer: Tokenizer, prompts: Sequence[Prompt], context_length: int | None, batch: int = 256) -> list[bool]:
    """Whether each prompt is within the model's context."""
    if context_length is None:
        return [True] * len(prompts)
    return [
        len(ids) <= context_length
        for start in range(0, len(prompts), batch)
        for ids in tokenizer([prompt.text for prompt in prompts[start : start + batch]])["input_ids"]
    ]


def _texts(tokenizer: Tokenizer, prompt: Prompt, mask_token: int | None) -> list[str]:
    """The prompt, and the prompt with each of its targets."""
    if mask_token is None:
        return [prompt.text, *(prompt.text + target for target in prompt.targets)]
    (mask,) = tokenizer.convert_ids_to_tokens([mask_token])
    text = prompt.text.replace(MASK, mask)
    if text.count(mask) != 1:
        either = repr(mask) if mask == MASK else f"{mask!r} or {MASK!r}"
        raise PromptError(
            f"prompt {prompt.id!r} has {text.count(mask)} mask tokens, a masked model needs exactly 1, written as "
            f"{either} (dataset.source; dataset=facts-masked has facts with masks)"
        )
    return [text, *(text.replace(mask, target) for target in prompt.targets)]


def _check_length(prompt: Prompt, ids: tuple[int, ...], context_length: int | None) -> None:
    if not ids:
        raise PromptError(f"prompt {prompt.id!r} has no tokens; it needs at least one (dataset.source)")
    if context_length is not None and len(ids) > context_length:
        raise PromptError(
            f"prompt {prompt.id!r} has {len(ids)} tokens, the model's context holds {context_length}: "
            f"shorten it, choose another model.source, or leave such prompts out with dataset.too_long=skip"
        )


# Gives a target's own tokens within the tokens of the prompt with it, or None where these do not match the prompt's.
_OwnTokens = Callable[[tuple[int, ...], tuple[int, ...]], tuple[int, ...] | None]


def _after(ids: tuple[int, ...], full: tuple[int, ...]) -> tuple[int, ...] | None:
    return full[len(ids) :] if full[: len(ids)] == ids else None


def _instead_of(mask_token: int, ids: tuple[int, ...], full: tuple[int, ...]) -> tuple[int, ...] | None:
    place = ids.index(mask_token)
    after = len(ids) - place - 1
    if full[:place] != ids[:place] or len(full) < len(ids) - 1 or full[len(full) - after :] != ids[place + 1 :]:
        return None
    return full[place : len(full) - after]


def _target_ids(
    tokenizer: Tokenizer,
    prompt: Prompt,
    ids: tuple[int, ...],
    with_targets: list[tuple[int, ...]],
    own_tokens: _OwnTokens,
) -> tuple[int, ...]:
    target_of: dict[int, str] = {}
    for target, full in zip(prompt.targets, with_targets, strict=True):
        own = own_tokens(ids, full)
        if own is None:
            # The tokens from where the two texts part.
            seam = next((i for i, (a, b) in enumerate(zip(ids, full, strict=False)) if a != b), len(ids)) - 1
            raise TargetError(
                f"prompt {prompt.id!r}: target {target!r} merges with the text beside it "
                f"{_tokens(tokenizer, ids[max(0, seam) : seam + 2])} into "
                f"{_tokens(tokenizer, full[max(0, seam) : seam + 3])}; "
                f"move the space between them from the prompt to the target, or away (dataset.source)"
            )
        if len(own) != 1:
            raise TargetError(
                f"prompt {prompt.id!r}: target {target!r} is {len(own)} tokens {_tokens(tokenizer, own)}, "
                f"it must be exactly 1 (dataset.source; of a task, dataset.wording; dataset.not_one_token=skip leaves "
                f"it out)"
            )
        if own[0] in (getattr(tokenizer, "unk_token_id", None), getattr(tokenizer, "mask_token_id", None)):
            raise TargetError(
                f"prompt {prompt.id!r}: the model has no token for target {target!r}, only {_tokens(tokenizer, own)} "
                f"(dataset.source)"
            )
        if own[0] in target_of:
            raise TargetError(
                f"prompt {prompt.id!r}: targets {target_of[own[0]]!r} and {target!r} are the same token "
                f"{_tokens(tokenizer, own)}; targets must differ (dataset.source)"
            )
        target_of[own[0]] = target
    return tuple(target_of)


def _tokens(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    return [str(token) for token in tokenizer.convert_ids_to_tokens(list(ids))]
