"""Text that a model generates without and with a shift: what a dial for one answer does to what follows.

The library's own greedy generation runs, over its own cache, by the plain model. Where the shift acts:

| at        | the shift is added                                                                              |
|-----------|-------------------------------------------------------------------------------------------------|
| `readout` | once, at the prompt's last token; later tokens see it through the cache alone                   |
| `all`     | at every position, of the prompt and of the text, as the bias of a projection is                |

So `readout` is what `control` steered, and `all` is another intervention: what is least at one position is often far
too much at all of them. Both give what passes over the whole text, without a cache, would give.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig

from neg_service.errors import ConfigurationError, ModelError, told_by_parameters
from neg_service.measures.control.control import ControlResult
from neg_service.measures.control.exported import ExportedShift
from neg_service.measures.control.plain_passes import (
    READOUT,
    adding,
    check_index,
    check_place,
    encoded,
    experts_for,
    moved_by,
)
from neg_service.models.language_model import LanguageModel
from neg_service.prompts.prompt import Asked


class Generated(NamedTuple):
    """What a model writes behind a prompt, without and with a shift; special tokens are left out."""

    before: str
    after: str


@told_by_parameters(
    model__source="model", dataset__source="prompt", dataset__chat_template="model.tokenizer.chat_template"
)
def generate(
    model: LanguageModel,
    prompt: Asked,
    shift: ControlResult | ExportedShift,
    index: int = 0,
    *,
    n_tokens: int = 20,
    at: str = READOUT,
) -> Generated:
    """Let a model write some tokens behind a prompt, the most probable one each time, without and with a shift.

    Args:
        model: from `load_model`; a causal one.
        prompt: a text or messages; the one that was steered, or another one.
        shift: what `control` gave, or `load_shift`.
        index: which prompt's shift, of a result of several.
        n_tokens: how many tokens at most; fewer where the model ends its text.
        at: `readout` or `all`; see the module's header.

    Raises:
        ConfigurationError: an unknown `at`, no such index, no number of tokens, or more than the context holds.
        PromptError: an unusable prompt. ModelError: a model that does not generate text.
    """
    check_place(at)
    if not isinstance(n_tokens, int) or isinstance(n_tokens, bool) or n_tokens < 1:
        raise ConfigurationError(setting="n_tokens", value=n_tokens, allowed="at least 1")
    require_generator(model)
    return written(model, encoded(model, prompt).ids, shift, index, n_tokens, at)


def written(
    model: LanguageModel, ids: Sequence[int], shift: ControlResult | ExportedShift, index: int, n_tokens: int, at: str
) -> Generated:
    """The same behind the tokens of a prompt, of a model that generates.

    Raises:
        ConfigurationError: more tokens than the context holds, or no such index.
    """
    if model.context_length is not None and len(ids) + n_tokens > model.context_length:
        raise ConfigurationError(
            f"the context of {model.name} holds {model.context_length} tokens, the prompt has {len(ids)}",
            setting="n_tokens",
            value=n_tokens,
        )
    if isinstance(shift, ExportedShift):
        check_index(index, 1)
        additions = []
        shifting: AbstractContextManager[None] = shift.applied(model.model, at)
    else:
        additions = list(moved_by(model, shift, index).values())
        shifting = adding(model.model, additions, at)
    with experts_for(model, additions), _greedy(model.model, n_tokens):
        before = _text(model, ids)
        with shifting:
            after = _text(model, ids)
    return Generated(before, after)


def require_generator(model: LanguageModel) -> None:
    """Refuse a model that writes no text.

    Raises:
        ModelError: saying what it is.
    """
    if model.is_masked or not model.model.can_generate():
        kind = "a masked model" if model.is_masked else type(model.model).__name__
        raise ModelError(f"{model.name} is {kind}, which generates no text: choose a causal one", change="model.source")


@contextmanager
def _greedy(model: Any, n_tokens: int) -> Iterator[None]:
    """Let the most probable tokens be taken, whatever a checkpoint's own settings of generation say."""
    own = model.generation_config
    ends = own.eos_token_id
    first_end = ends[0] if isinstance(ends, Sequence) and ends else ends
    model.generation_config = GenerationConfig(
        do_sample=False, num_beams=1, use_cache=True, max_new_tokens=n_tokens, eos_token_id=ends,
        bos_token_id=own.bos_token_id,
        # Of one prompt nothing is padded; without one the library warns.
        pad_token_id=own.pad_token_id if own.pad_token_id is not None else first_end,
    )  # fmt: skip
    try:
        yield
    finally:
        model.generation_config = own


@torch.no_grad()
def _text(model: LanguageModel, ids: Sequence[int]) -> str:
    """What is generated behind some tokens."""
    prompt = torch.tensor([list(ids)], device=model.device)
    generator: Any = model.model
    # Given as well, because without it a model is refused whose configuration holds settings of generation.
    own = generator.generation_config
    found = generator.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=own)[0].tolist()
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    # Behind the prompt's text, because a tokenizer may write the first token of a text without its space.
    whole, begin = (model.tokenizer.decode(own, **options) for own in (found, list(ids)))
    return str(whole[len(begin) :] if whole.startswith(begin) else model.tokenizer.decode(found[len(ids) :], **options))
