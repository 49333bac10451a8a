"""How prompts become tokens, and what of them is refused or left out.

Targets are encoded *in context*: the tokens of prompt + target, minus the tokens of the prompt. A tokenizer may
spell a word differently alone than after a text, and may merge across the seam; both would silently measure another
token, so both are refused here. Nothing in this file needs torch: a tokenizer is whatever turns texts into ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice

from neg_service.errors import ConfigurationError, PromptError, TargetError
from neg_service.prompts.added import added_by, read_once, readable, tell_what_is_odd
from neg_service.prompts.prompt import MASK, EncodedPrompt, EncodedWording, Prompt, Vocabulary
from neg_service.prompts.reading import AsWritten, Reading, Tokenizer, Unread, read_texts
from neg_service.prompts.spans import place_of
from neg_service.prompts.wordings import as_prompts


@dataclass(frozen=True)
class _Read:
    """A prompt as it is read: its tokens, and for each target those of the text with it, or why there are none."""

    prompt: Prompt
    ids: tuple[int, ...]
    with_targets: tuple[tuple[int, ...] | TargetError, ...]


@dataclass
class Skips:
    """What is left out in the place of an error, and how much has been.

    not_one_token: of targets that are not one token, and of the same token the later ones; of prompts whose answer is
    one, or that keep fewer than two of several targets. too_long: of prompts beyond the model's context.
    """

    not_one_token: bool = False
    too_long: bool = False
    n_not_one_token: int = 0
    n_targets: int = 0
    n_too_long: int = 0
    first_too_long: str | None = None


def encode(
    tokenizer: Tokenizer, prompts: Iterable[Prompt], context_length: int | None, mask_token: int | None = None,
    batch: int = 256, model: Vocabulary | None = None, skips: Skips | None = None, *, sequences: bool = False,
) -> Iterator[EncodedPrompt]:  # fmt: skip
    """Encode prompts and their targets in context, lazily and in order.

    A target follows the prompt; with `mask_token`, the id of a masked model's mask token, it stands in its place. A
    prompt may write that token as the model does (`<mask>`), or as `[MASK]` whatever the model. What the tokenizer adds
    to every text is there once, also where a prompt spells it, and is not there behind a prompt that a target follows;
    see `added.py`. To what a chat template wrote it adds nothing. `model` says which ids there are. What `skips` names
    is left out and counted there. With `sequences` targets may be several tokens.

    Raises:
        PromptError: a target that is not one token in context, or only the unknown one, two targets with the same
            token, an empty prompt, one longer than `context_length` tokens, one that has not exactly one mask token
            where one is needed, one that spells what the tokenizer adds in a way that is not clear, or ids that
            `model` does not have; names the prompt, the value, and the key to change.
        ConfigurationError: `sequences` of a masked model.
    """
    skips = skips or Skips()
    if sequences and mask_token is not None:
        raise ConfigurationError(
            "a masked model predicts one token in the place of its mask",
            setting="dataset.not_one_token",
            value="sequence",
            allowed="error or skip",
        )
    for read in _all_reads(tokenizer, prompts, mask_token, model, batch):
        prompt, tokens = read.prompt, None
        if skips.not_one_token:
            _check_length(prompt, read.ids, None)
            tokens = _one_token_targets(tokenizer, read, mask_token, model)
            if not tokens:
                skips.n_not_one_token += 1
                continue
            skips.n_targets += len(prompt.targets) - len(tokens)
            prompt = _with_targets(prompt, list(tokens))
        following = _checked_sequences(tokenizer, read, mask_token, model) if sequences else ()
        # A target's last token is predicted, and not read.
        longest = len(read.ids) + max((len(own) - 1 for own in following), default=0)
        worded: tuple[EncodedWording, ...] = ()
        if prompt.wordings and not sequences:
            # What is wrong with the prompt itself says more than what is wrong with a wording of it.
            tokens = tokens or _checked_targets(tokenizer, read, mask_token, model)
            worded = _wordings(tokenizer, prompt, None if skips.too_long else context_length, mask_token, model)
        longest_of_all = max((longest, *(len(own.ids) for own in worded)))
        if skips.too_long and context_length is not None and longest_of_all > context_length:
            skips.n_too_long += 1
            skips.first_too_long = skips.first_too_long or prompt.id
            continue
        _check_length(prompt, read.ids, context_length, longest)
        at = _place_of(tokenizer, prompt, read.ids, mask_token, model)
        if following:
            rest = tuple(own[1:] for own in following)
            yield EncodedPrompt(prompt, read.ids, tuple(own[0] for own in following), rest if any(rest) else (), at)
            continue
        tokens = tokens or _checked_targets(tokenizer, read, mask_token, model)
        yield EncodedPrompt(prompt, read.ids, tuple(tokens.values()), (), at, worded)


def _wordings(
    tokenizer: Tokenizer, prompt: Prompt, most: int | None, mask_token: int | None, model: Vocabulary | None
) -> tuple[EncodedWording, ...]:
    """The wordings of a prompt, each with its targets in context, which are one token there, too."""
    found = encode(tokenizer, as_prompts(prompt), most, mask_token, model=model)
    try:
        return tuple(EncodedWording(one.ids, one.target_ids) for one in found)
    except TargetError as error:
        # What leaves targets of the prompt out does not help here.
        said = str(error).partition(" (dataset.source")[0]
        raise TargetError(
            f"{said}; mend the wording, or leave all of them out by dataset.columns={{wordings: ''}}",
            change="dataset.columns",
        ) from error


def _place_of(
    tokenizer: Tokenizer, prompt: Prompt, ids: tuple[int, ...], mask_token: int | None, model: Vocabulary | None
) -> int | None:
    """Where a prompt's neurons are, if not at its readout position."""
    if prompt.at is None:
        return None
    if mask_token is not None:
        raise PromptError(
            f"prompt {prompt.id!r}: at: a change at a token of a masked model changes all others, so that neurons are "
            "shifted at its mask alone",
            change="model.source",
        )

    def read(text: str) -> tuple[int, ...]:
        (found,) = _all_reads(tokenizer, [replace(prompt, text=text, targets=())], None, model, 1)
        return found.ids

    return place_of(prompt.id, prompt.text, ids, prompt.at, read, is_chat=prompt.messages is not None)


def _checked_targets(
    tokenizer: Tokenizer, read: _Read, mask_token: int | None, model: Vocabulary | None
) -> dict[int, int]:
    """The token of each target, by its place; all of them are one, and differ."""
    place_of: dict[int, int] = {}
    targets = read.prompt.targets
    for place, (target, full) in enumerate(zip(targets, read.with_targets, strict=True)):
        token = _target_id(tokenizer, read, target, full, mask_token, model)
        if token in place_of:
            raise TargetError(
                f"prompt {read.prompt.id!r}: targets {targets[place_of[token]]!r} and {target!r} are the same "
                f"token {_tokens(tokenizer, [token])}; targets must differ",
                change="dataset.source",
            )
        place_of[token] = place
    return {place: token for token, place in place_of.items()}


def _one_token_targets(
    tokenizer: Tokenizer, read: _Read, mask_token: int | None, model: Vocabulary | None
) -> dict[int, int]:
    """The tokens of those targets that are one, by their places; none where the answer or too many others are not.

    Of targets with the same token the first stays, but for the right answer, which goes before all others.
    """
    prompt = read.prompt
    place_of: dict[int, int] = {}
    for place in sorted(range(len(prompt.targets)), key=lambda own: own != prompt.answer):
        try:
            token = _target_id(tokenizer, read, prompt.targets[place], read.with_targets[place], mask_token, model)
        except TargetError:
            continue
        place_of.setdefault(token, place)
    found = {place: token for token, place in sorted(place_of.items(), key=lambda one: one[1])}
    has_answer = prompt.answer is None or prompt.answer in found
    return found if has_answer and len(found) >= min(2, len(prompt.targets)) else {}


def _with_targets(prompt: Prompt, places: list[int]) -> Prompt:
    """The prompt with some of its targets."""
    answer = None if prompt.answer is None else places.index(prompt.answer)
    return replace(prompt, targets=tuple(prompt.targets[place] for place in places), answer=answer)


def _all_reads(
    tokenizer: Tokenizer, prompts: Iterable[Prompt], mask_token: int | None, model: Vocabulary | None, batch: int
) -> Iterator[_Read]:
    """Prompts as they are read; a text of a chat template has its first token already."""
    for is_templated, alike in groupby(prompts, lambda prompt: prompt.messages is not None):
        yield from _reads(AsWritten(tokenizer) if is_templated else tokenizer, alike, mask_token, model, batch)


def _reads(
    tokenizer: Tokenizer,
    prompts: Iterable[Prompt],
    mask_token: int | None,
    model: Vocabulary | None,
    batch: int = 256,
) -> Iterator[_Read]:
    """Prompts as they are read, with each of their targets."""
    remaining, is_masked, added = iter(prompts), mask_token is not None, None
    while group := list(islice(remaining, batch)):
        asked = [_with_models_mask(tokenizer, prompt, mask_token) for prompt in group]
        readings = [
            readable(prompt.id, found) for prompt, found in zip(group, read_texts(tokenizer, asked), strict=True)
        ]
        added = added or added_by(tokenizer, [reading.ids for reading in readings])
        read = [
            read_once(tokenizer, prompt.id, text, reading, added, keeps_after=is_masked)
            for prompt, text, reading in zip(group, asked, readings, strict=True)
        ]
        tell_what_is_odd(added, read)
        mask = _mask(tokenizer, mask_token)
        texts = [
            once.text + target if mask is None else once.text.replace(mask, target)
            for prompt, once in zip(group, read, strict=True)
            for target in prompt.targets
        ]
        full = iter(zip(texts, read_texts(tokenizer, texts), strict=True))
        for prompt, once in zip(group, read, strict=True):
            _check_known(tokenizer, prompt, once.ids, model)
            with_targets: list[tuple[int, ...] | TargetError] = []
            for target, (text, found) in zip(prompt.targets, islice(full, len(prompt.targets)), strict=True):
                reading = _read_with(prompt, target, found, once.n_dropped)
                with_targets.append(
                    once.ids_of(added, text, reading.ids, is_masked) if isinstance(reading, Reading) else reading
                )
            yield _Read(prompt, once.ids, tuple(with_targets))


def _read_with(prompt: Prompt, target: str, found: Reading | Unread, n_dropped: int) -> Reading | TargetError:
    """A prompt with a target as it is read, or why the target cannot be; of the prompt, `n_dropped` have no token."""
    skip = "(dataset.source, model.source; dataset.not_one_token=skip leaves it out)"
    if isinstance(found, Unread):
        return TargetError(
            f"prompt {prompt.id!r}: the model's tokenizer cannot read target {target!r}: {found.words} {skip}"
        )
    if found.n_dropped > n_dropped:
        return TargetError(
            f"prompt {prompt.id!r}: the model's tokenizer has no token for {found.n_dropped - n_dropped} of the "
            f"characters of target {target!r}, and would measure what is left of it {skip}"
        )
    return found


def _with_models_mask(tokenizer: Tokenizer, prompt: Prompt, mask_token: int | None) -> str:
    """A prompt's text with the mask token as the model writes it."""
    mask = _mask(tokenizer, mask_token)
    if mask is None:
        return prompt.text
    text = prompt.text.replace(MASK, mask)
    if text.count(mask) != 1:
        either = repr(mask) if mask == MASK else f"{mask!r} or {MASK!r}"
        raise PromptError(
            f"prompt {prompt.id!r} has {text.count(mask)} mask tokens, a masked model needs exactly 1, written as "
            f"{either} (dataset.source; dataset=facts-masked has facts with masks)",
            change="dataset.source",
        )
    return text


def _mask(tokenizer: Tokenizer, mask_token: int | None) -> str | None:
    return None if mask_token is None else tokenizer.convert_ids_to_tokens([mask_token])[0]


def _check_known(tokenizer: Tokenizer, prompt: Prompt, ids: tuple[int, ...], model: Vocabulary | None) -> None:
    """Refuse tokens that the model's embedding does not have: on a GPU they would end the process."""
    if model is None or model.n_input_ids is None:
        return
    strange = next((token for token in ids if token >= model.n_input_ids), None)
    if strange is not None:
        raise PromptError(
            f"prompt {prompt.id!r}: its token {_tokens(tokenizer, [strange])[0]!r} has the id {strange}, but "
            f"{model.name} embeds only the ids below {model.n_input_ids}: the tokenizer beside the weights is "
            "another model's",
            change="model.source",
        )


def _check_length(prompt: Prompt, ids: tuple[int, ...], context_length: int | None, longest: int | None = None) -> None:
    """Refuse a prompt without tokens, or one that is beyond the context, with its `longest` target where it is read."""
    if not ids:
        raise PromptError(f"prompt {prompt.id!r} has no tokens; it needs at least one", change="dataset.source")
    n = len(ids) if longest is None else longest
    if context_length is not None and n > context_length:
        beside = f" with {n - len(ids)} of its longest target" if n > len(ids) else ""
        raise PromptError(
            f"prompt {prompt.id!r} has {n} tokens{beside}, the model's context holds {context_length}: shorten it, "
            "choose another model.source, or leave such prompts out with dataset.too_long=skip",
            change="model.source",
        )


# A target's own tokens within the tokens of the prompt with it, or None where these do not match the prompt's.
def _after(ids: tuple[int, ...], full: tuple[int, ...]) -> tuple[int, ...] | None:
    return full[len(ids) :] if full[: len(ids)] == ids else None


def _instead_of(mask_token: int, ids: tuple[int, ...], full: tuple[int, ...]) -> tuple[int, ...] | None:
    place = ids.index(mask_token)
    after = len(ids) - place - 1
    if full[:place] != ids[:place] or len(full) < len(ids) - 1 or full[len(full) - after :] != ids[place + 1 :]:
        return None
    return full[place : len(full) - after]


def _target_id(
    tokenizer: Tokenizer,
    read: _Read,
    target: str,
    full: tuple[int, ...] | TargetError,
    mask_token: int | None,
    model: Vocabulary | None,
) -> int:
    """The one token of a target after its prompt, or in the place of its mask."""
    own = _target_ids(tokenizer, read, target, full, mask_token, model)
    if len(own) != 1:
        beside = "" if mask_token is not None else ", sequence reads it token by token"
        raise TargetError(
            f"prompt {read.prompt.id!r}: target {target!r} is {len(own)} tokens {_tokens(tokenizer, own)}, it must be "
            "exactly 1 (dataset.source; of a task, dataset.template; dataset.not_one_token=skip leaves it out"
            f"{beside})",
            change="dataset.source",
        )
    return own[0]


def _target_ids(
    tokenizer: Tokenizer,
    read: _Read,
    target: str,
    full: tuple[int, ...] | TargetError,
    mask_token: int | None,
    model: Vocabulary | None,
) -> tuple[int, ...]:
    """The tokens of a target after its prompt, or in the place of its mask; all of them the model's own."""
    if isinstance(full, TargetError):
        raise full
    prompt, ids = read.prompt, read.ids
    own = _after(ids, full) if mask_token is None else _instead_of(mask_token, ids, full)
    if own is None:
        # The tokens from where the two texts part.
        seam = next((i for i, (a, b) in enumerate(zip(ids, full, strict=False)) if a != b), len(ids)) - 1
        raise TargetError(
            f"prompt {prompt.id!r}: target {target!r} merges with the text beside it "
            f"{_tokens(tokenizer, ids[max(0, seam) : seam + 2])} into "
            f"{_tokens(tokenizer, full[max(0, seam) : seam + 3])}; move the space between them from the prompt to "
            "the target, or away",
            change="dataset.source",
        )
    unknown = (getattr(tokenizer, "unk_token_id", None), getattr(tokenizer, "mask_token_id", None))
    if any(token in unknown for token in own):
        raise TargetError(
            f"prompt {prompt.id!r}: the model has no token for target {target!r}, only {_tokens(tokenizer, own)}",
            change="dataset.source",
        )
    # All are predicted, and all but the last are read.
    limit = None if model is None else model.n_output_ids
    strange = None if limit is None else next((token for token in own if token >= limit), None)
    if model is not None and strange is not None:
        raise PromptError(
            f"prompt {prompt.id!r}: target {target!r} is the token {_tokens(tokenizer, [strange])[0]!r} with the id "
            f"{strange}, but {model.name} predicts only the ids below {limit}: the tokenizer beside the weights is "
            "another model's",
            change="model.source",
        )
    _check_known(tokenizer, prompt, own[:-1], model)
    return own


def _checked_sequences(
    tokenizer: Tokenizer, read: _Read, mask_token: int | None, model: Vocabulary | None
) -> tuple[tuple[int, ...], ...]:
    """The tokens of each target; one target may begin with all of another."""
    place_of: dict[tuple[int, ...], int] = {}
    prompt, targets = read.prompt, read.prompt.targets
    for place, (target, full) in enumerate(zip(targets, read.with_targets, strict=True)):
        own = _target_ids(tokenizer, read, target, full, mask_token, model)
        if not own:
            raise TargetError(
                f"prompt {prompt.id!r}: target {target!r} is no token at all behind the prompt; it needs at least one",
                change="dataset.source",
            )
        if own in place_of:
            raise TargetError(
                f"prompt {prompt.id!r}: targets {targets[place_of[own]]!r} and {target!r} are the same tokens "
                f"{_tokens(tokenizer, own)}; targets must differ",
                change="dataset.source",
            )
        place_of[own] = place
    return tuple(place_of)


def _tokens(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    return [str(token) for token in tokenizer.convert_ids_to_tokens(list(ids))]
