"""Prompts with tokens: those that are given, and what `encode` leaves out, prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from neg_service.prompts.prompt import EncodedPrompt, Prompt, Vocabulary
from neg_service.prompts.reading import Tokenizer
from neg_service.prompts.tokens import Skips, encode


def one_token_targets(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], mask_token: int | None = None, model: Vocabulary | None = None
) -> list[tuple[Prompt, int]]:
    """Each prompt with the targets that it keeps, and how many it does not."""
    skips = Skips(not_one_token=True)
    kept = {one.prompt.id: one.prompt for one in encode(tokenizer, prompts, None, mask_token, model=model, skips=skips)}
    assert skips.n_not_one_token == len(prompts) - len(kept)
    found = [kept.get(prompt.id, replace(prompt, targets=(), answer=None)) for prompt in prompts]
    return [(own, len(prompt.targets) - len(own.targets)) for prompt, own in zip(prompts, found, strict=True)]


def within_context(
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    context_length: int,
    mask_token: int | None = None,
    model: Vocabulary | None = None,
) -> list[bool]:
    """Whether each prompt is."""
    alone, skips = [replace(prompt, targets=(), answer=None) for prompt in prompts], Skips(too_long=True)
    kept = {one.prompt.id for one in encode(tokenizer, alone, context_length, mask_token, model=model, skips=skips)}
    assert skips.n_too_long == len(prompts) - len(kept)
    return [prompt.id in kept for prompt in prompts]


def encoded(ids: Sequence[int], target_ids: Sequence[int], name: str = "p") -> EncodedPrompt:
    """A prompt whose tokens are given, whatever its text."""
    return EncodedPrompt(Prompt(name, "-", tuple(f"t{t}" for t in target_ids)), tuple(ids), tuple(target_ids))
