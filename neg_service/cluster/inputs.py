"""What a scan is of, loaded: the prompts of its data set, a model's files without weights, and the encoding.

Prompts are encoded here where settings leave some out, which decides the plan; else later (`prepare.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from neg_service.cluster import extension
from neg_service.config import DatasetConfig, ModelConfig, ScanConfig
from neg_service.errors import ConfigurationError
from neg_service.models.folder import LocalModel
from neg_service.models.inspection import ModelInfo, inspect_model, mask_token_of
from neg_service.models.loading import load_tokenizer
from neg_service.models.source import fetch
from neg_service.prompts.chat import Chat, MakeChat, chat_of, no_chats
from neg_service.prompts.encoding import Encode, Encoding, Ids
from neg_service.prompts.facts import BUILT_IN
from neg_service.prompts.hub import revision_of
from neg_service.prompts.mceval8k import as_masked
from neg_service.prompts.prompt import EncodedPrompt, Prompt, check_prompts
from neg_service.prompts.sources import load_dataset
from neg_service.prompts.store import PromptFile
from neg_service.prompts.tokens import Skips, encode
from neg_service.storage.reader import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """Prompts and a model's files.

    added: the prompts to compute, which are all unless a run is extended; the encoding is theirs. about: what was left
    out of the data set. identity: what more identifies it.
    """

    prompts: Sequence[Prompt]
    added: Sequence[Prompt]
    encoding: Encoding
    local: LocalModel
    info: ModelInfo
    about: dict[str, Any]
    identity: dict[str, Any]


def load(config: ScanConfig, base: Run | None, at_most: int | None) -> Loaded:
    """The data set and the model's files, without weights; encoded where that decides what stays.

    The prompts of `base` are the first ones, and are encoded there alone.
    """
    model = cache(partial(_model_of, config.model))
    tokenizer = cache(lambda: tokenizer_of(*model(), config))
    # Of data sets that have no messages nobody asks for a template.
    chat = cache(lambda: _chat_of(config.dataset, model()[1], tokenizer))
    prompts: Sequence[Prompt] = load_dataset(config.dataset, config.job.limit, chat)
    check_prompts(prompts)
    local, info = model()
    if config.dataset.source == "facts-masked" and not info.is_masked:
        raise ConfigurationError(
            f"its prompts have masks to fill, and {info.name} ({info.architecture}) is a causal model: use "
            "dataset=facts",
            setting="dataset.source",
            value="facts-masked",
        )
    if config.dataset.task is not None and info.is_masked:
        prompts = [as_masked(prompt) for prompt in prompts]
    identity = _identity_of_source(config.dataset, chat if prompts[0].messages is not None else None)
    skips = Skips(config.dataset.not_one_token == "skip", config.dataset.too_long == "skip")
    encode_with = _encoder(tokenizer, info, skips, config.dataset.not_one_token == "sequence")
    ids, about, n_before = Ids(), {}, 0 if base is None else base.n_prompts
    if skips.not_one_token or skips.too_long:
        n_prompts = len(prompts)
        prompts = PromptFile(_kept_prompts(encode_with(prompts), ids, n_before))
        about = _tell_skipped(skips, n_prompts, info)
    if at_most is not None and len(prompts) > at_most:
        prompts = extension.Window(prompts, 0, at_most)
    added = prompts
    if base is not None:
        extension.require_prompts_of(base, prompts, config.dataset.source, encode_with)
        added = extension.Window(prompts, n_before, len(prompts))
    return Loaded(prompts, added, Encoding(added, encode_with, ids), local, info, about, identity)


def _kept_prompts(encoded: Iterable[EncodedPrompt], ids: Ids, n_before: int) -> Iterator[Prompt]:
    """What encoding has not left out; the ids of all but the first `n_before` are kept in `ids`."""
    for place, one in enumerate(encoded):
        if place >= n_before:
            ids.append(one.ids, one.target_ids, one.following, one.at, one.wordings)
        yield one.prompt


def _model_of(asked: ModelConfig) -> tuple[LocalModel, ModelInfo]:
    """The files of a model without its weights, and what they say of it."""
    local = fetch(asked.source, asked.revision, with_weights=False, trust_remote_code=asked.trust_remote_code)
    return local, inspect_model(local, asked.trust_remote_code, check_files=True)


def _chat_of(dataset: DatasetConfig, info: ModelInfo, tokenizer: Callable[[], tuple[Any, int | None]]) -> Chat:
    """How the model's chats are written.

    Raises:
        ConfigurationError: it has no chats, no template, or the settings of the template are wrong.
    """
    if info.is_masked:
        raise no_chats(f"{info.name} ({info.architecture})")
    return chat_of(tokenizer()[0], info.name, dataset.chat_template, dataset.chat_arguments)


def _identity_of_source(dataset: DatasetConfig, chat: MakeChat | None) -> dict[str, Any]:
    """What of a data set goes into a run's identity beside the prompts themselves."""
    found: dict[str, Any] = {}
    if dataset.source not in BUILT_IN and (revision := revision_of(dataset.source)) is not None:
        found["revision"] = revision
    if chat is not None:
        found["chat"] = {"wraps_prompts": dataset.chat, **chat().identity()}
    return found


def _encoder(tokenizer: Callable[[], tuple[Any, int | None]], info: ModelInfo, skips: Skips, sequences: bool) -> Encode:
    """Encodes prompts for a model, whose tokenizer is loaded when the first are asked for."""

    def encode_with(prompts: Iterable[Prompt]) -> Iterator[EncodedPrompt]:
        loaded, mask_token = tokenizer()
        return encode(
            loaded, prompts, info.context_length, mask_token, model=info, skips=skips,
            sequences=sequences,
        )  # fmt: skip

    return encode_with


def tokenizer_of(local: LocalModel, info: ModelInfo, config: ScanConfig) -> tuple[Any, int | None]:
    """A model's tokenizer, and the id of its mask token if it is a masked one.

    Raises:
        ModelError: there is none, or it is another model's.
    """
    tokenizer = load_tokenizer(local, config.model.trust_remote_code)
    return tokenizer, mask_token_of(tokenizer, info.name, info.n_input_ids) if info.is_masked else None


def _tell_skipped(skips: Skips, n_prompts: int, info: ModelInfo) -> dict[str, Any]:
    """Log what was left out of a data set, and give it for run.json.

    Raises:
        ConfigurationError: nothing is left.
    """
    about: dict[str, Any] = {}
    if skips.not_one_token:
        about |= {"skipped_not_one_token": skips.n_not_one_token, "skipped_targets": skips.n_targets}
        if skips.n_not_one_token or skips.n_targets:
            log.info(
                "skipping %d of %d prompts, whose answers are not one token of the model, and %d targets of others",
                skips.n_not_one_token, n_prompts, skips.n_targets,
            )  # fmt: skip
        if skips.n_not_one_token == n_prompts:
            raise ConfigurationError(
                f"none of {n_prompts} prompts has an answer that is one token of the model: check dataset.source",
                change="dataset.source",
            )
    n_prompts -= skips.n_not_one_token
    if skips.too_long:
        about |= {"skipped_too_long": skips.n_too_long}
        if skips.n_too_long:
            log.info(
                "skipping %d of %d prompts, which have more than the %s tokens of the model's context, the first is %r",
                skips.n_too_long, n_prompts, info.context_length, skips.first_too_long,
            )  # fmt: skip
        if skips.n_too_long == n_prompts:
            raise ConfigurationError(
                f"all {n_prompts} prompts have more than the {info.context_length} tokens of the model's context: "
                "shorten them, or choose another model.source",
                change="model.source",
            )
    return about
