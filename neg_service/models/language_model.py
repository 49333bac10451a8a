"""A language model ready to be measured: weights, tokenizer, and where its neurons live.

Causal models are read at a prompt's last token, masked models at its mask token. How rows are run is the model's
*engine*, which the self-check chooses:

| engine      | a row is                                                                  | for                     |
|-------------|---------------------------------------------------------------------------|-------------------------|
| `branches`  | the last token, over a prefix that all rows share (`branches.py`)         | causal models, fast     |
| `rows`      | the last token, over a cache that each row repeats (`cached.py`)          | causal models, the rest |
| `sequences` | the whole prompt (`rows.py`)                                              | masked models           |

Everything that depends on it is asked here: `rows`, `groups`, `mask_token`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from neg_service.errors import ConfigurationError, ModelError
from neg_service.models import branches
from neg_service.models.batches import Group, group_by_header
from neg_service.models.cached import CachedRows, run_cached_header
from neg_service.models.configuration import (
    auto_class_of,
    guarded,
    is_masked_architecture,
    read_config,
    without_weights,
)
from neg_service.models.feed_forward import FeedForward, find_feed_forward
from neg_service.models.folder import LocalModel, damaged_json
from neg_service.models.library_log import hear_libraries
from neg_service.models.placement import checked_devices, device_map, require_room
from neg_service.models.rows import BranchRows, Rows, SequenceRows
from neg_service.models.self_check import SelfCheck, self_check
from neg_service.models.source import fetch
from neg_service.models.weights import rehearse

log = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "tekken.json")
ENGINES = {"branches": "causal", "rows": "causal", "sequences": "masked"}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelInfo:
    """What can be said of a model without loading its weights."""

    name: str
    identity: str
    architecture: str
    n_layers: int
    n_neurons: int
    context_length: int | None
    n_parameters: int
    is_gated: bool
    is_masked: bool
    # Values that a row of interventions carries: for its one token, or its first of several.
    row_values: int
    # Rows of the embedding and of the vocabulary head, which may be more than the tokenizer has tokens.
    n_input_ids: int | None = None
    n_output_ids: int | None = None


class LanguageModel:
    """A causal or masked language model in evaluation mode, with its tokenizer and its feed-forward neurons."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any = None, *, name: str = "model", identity: str = "unknown"
    ) -> None:
        """Wrap a loaded model; its parameters are frozen.

        Raises:
            ModelError: an architecture whose neurons are not known, or a masked model without a mask token.
        """
        _require_measurable(model)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.identity = identity
        self.feed_forward: FeedForward = find_feed_forward(model)
        self.is_masked = is_masked_architecture(type(model).__name__)
        self.n_input_ids, self.n_output_ids = _vocabulary(model)
        self.mask_token: int | None = mask_token_of(tokenizer, name, self.n_input_ids) if self.is_masked else None
        self._engine: str | None = None
        self._headers: list[branches.Header] = []
        self._checked: SelfCheck | None = None

    @property
    def device(self) -> torch.device:
        """Where inputs go; with several devices, the first layer's."""
        device: torch.device = self.model.device
        return device

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All devices that hold a part of it, the first layer's first."""
        return tuple(dict.fromkeys(weight.device for weight in self.model.parameters()))

    @property
    def dtype(self) -> torch.dtype:
        """The precision of weights and activations."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def engines(self) -> tuple[str, ...]:
        """The engines that may fit the model, the fastest first."""
        kind = "masked" if self.is_masked else "causal"
        return tuple(engine for engine, own in ENGINES.items() if own == kind)

    @property
    def engine(self) -> str:
        """How rows are run; asked for first, it runs the self-check, which chooses.

        Raises:
            ModelError: see `ensure_checked`.
        """
        if self._engine is None:
            self.ensure_checked()
        assert self._engine is not None
        return self._engine

    def use_engine(self, engine: str | None) -> None:
        """Run rows by another engine, or by the one that a new self-check chooses; what was kept is freed."""
        self.forget_headers()
        self._engine = engine

    @property
    def context_length(self) -> int | None:
        """The most tokens a prompt may have; None where the configuration gives no limit."""
        return _context_length(self.model)

    @property
    def row_values(self) -> int:
        """About how many values a row of a batch holds at once: logits and differences, and those of a token."""
        return 3 * int(self.model.config.get_text_config().vocab_size) + self.token_values

    @property
    def token_values(self) -> int:
        """About how many values a token of a row holds at once: a layer's neurons and hidden states, with copies."""
        return _token_values(self.model.config, self.feed_forward.n_neurons)

    def header(self, ids: Sequence[int], keep: int = 4) -> branches.Header:
        """Keys and values of a shared beginning, run once and kept while it is among the last `keep` used.

        An empty one holds nothing, and takes no place among them.
        """
        wanted = tuple(ids)
        if not wanted:
            return branches.Header()
        header = next((known for known in self._headers if known.ids == wanted), None)
        if header is None:
            run_header = branches.run_header if self.engine == "branches" else run_cached_header
            header = run_header(self.model, wanted)
        else:
            self._headers.remove(header)
        self._headers = [header, *self._headers[: keep - 1]]
        return header

    def rows(self, prompts: Sequence[Sequence[int]], header: Sequence[int] = ()) -> Rows:
        """Prompts' tokens, ready to be run in rows; `header` are first ones that all share, for a causal model.

        The engine `rows` takes one prompt, `groups` says so.
        """
        if self.mask_token is not None:
            return SequenceRows(self.model, prompts, self.mask_token)
        if self.engine == "rows":
            return CachedRows(self.model, prompts, self.header(header))
        return BranchRows(self.model, prompts, self.header(header))

    def groups(self, prompts: Sequence[Sequence[int]]) -> list[Group]:
        """Which prompts to run together: those with a common header, or all, where nothing can be shared."""
        if self.is_masked:
            return [Group(tuple(range(len(prompts))), 0)]
        groups = group_by_header(prompts)
        return groups if self.engine == "branches" else [Group((i,), own.header) for own in groups for i in own.members]

    def known_header(self, prompts: Sequence[Sequence[int]]) -> int:
        """Length of the longest header already run with which all `prompts` begin, leaving each its last token."""

        def serves(ids: tuple[int, ...]) -> bool:
            return all(len(prompt) > len(ids) and tuple(prompt[: len(ids)]) == ids for prompt in prompts)

        return max((len(known.ids) for known in self._headers if serves(known.ids)), default=0)

    def forget_headers(self) -> None:
        """Free the kept headers' memory."""
        self._headers = []

    def ensure_checked(self) -> SelfCheck:
        """The self-check, which also chooses the engine; run when first needed and remembered.

        Raises:
            ModelError: see `self_check`.
        """
        if self._checked is None:
            self._checked = self_check(self)
            for engine, reason in self._checked.not_fitting.items():
                log.info("%s: runs as %s, which is slower than %s: %s", self.name, self.engine, engine, reason)
        return self._checked


def load_model(
    source: str | os.PathLike[str] = "smollm2",
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str | Sequence[str] = "auto",
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a causal or masked language model for measuring.

    Args:
        source: `smollm2` (the default model), a hub id, a directory with safetensors, or a .gguf file; a text or path.
        revision: branch, tag or commit, for a hub id.
        dtype: float64, float32, bfloat16 or float16; float32 computes without TF32.
        device: a torch device, or `auto`: a GPU if there is one. Several, `["cuda:0", "cuda:1"]`, share the layers of
            a model that is too large for one.
        trust_remote_code: run Python code that comes with the model; off unless asked for.

    Raises:
        ModelError: nothing usable at `source`, files that the model would not take as they are, or an architecture
            whose neurons are not known.
        ConfigurationError: an unknown dtype or a device that is not there.
    """
    chosen_dtype = checked_dtype(dtype)
    devices = checked_devices(device)
    local = fetch(source, revision, trust_remote_code=trust_remote_code)
    source = os.fsdecode(source)
    if chosen_dtype == torch.float32:
        torch.set_float32_matmul_precision("highest")
    config = read_config(local, trust_remote_code)
    auto_class = auto_class_of(config, local.name)
    empty = without_weights(auto_class, config, local, trust_remote_code)
    _require_measurable(empty)
    find_feed_forward(empty)
    rehearse(local, auto_class, empty, trust_remote_code, source)
    places: dict[str, Any] = {}
    if devices[0].type == "cuda":
        placed = device_map(empty, devices) if len(devices) > 1 else {"": devices[0]}
        require_room(empty, chosen_dtype, placed, source)
    if len(devices) > 1:
        # Read straight to where they belong: all of the weights may not fit this machine's memory.
        places["device_map"] = device_map(empty, devices)
    model: PreTrainedModel = guarded(
        lambda: auto_class.from_pretrained(
            local.directory,
            dtype=chosen_dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            **places,
        ),
        source,
    )
    if not places:
        model = model.to(devices[0])
    return LanguageModel(model, load_tokenizer(local, trust_remote_code), name=local.name, identity=local.identity)


def load_tokenizer(local: LocalModel, trust_remote_code: bool = False) -> Any:
    """The tokenizer beside a model's weights.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    hear_libraries()
    if not any(list(local.directory.glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise ModelError(f"model.source={local.directory}: has no tokenizer ({', '.join(_TOKENIZER_FILES)})")
    damaged = damaged_json(local.directory)
    return guarded(
        lambda: AutoTokenizer.from_pretrained(local.directory, trust_remote_code=trust_remote_code),
        local.directory,
        f"the tokenizer{f' ({damaged})' if damaged else ''} ",
    )


def inspect_model(local: LocalModel, trust_remote_code: bool = False, *, check_files: bool = False) -> ModelInfo:
    """Describe a model from its configuration alone: built without memory for weights.

    check_files: also see whether the model would take what lies in its files, as far as they are here.

    Raises:
        ModelError: an architecture whose neurons are not known, or neither a causal nor a masked language model; files
            that the model would not take as they are.
    """
    hear_libraries()
    config = read_config(local, trust_remote_code)
    auto_class = auto_class_of(config, local.name)
    model = without_weights(auto_class, config, local, trust_remote_code)
    _require_measurable(model)
    found = find_feed_forward(model)
    if check_files and local.has_weights:
        rehearse(local, auto_class, model, trust_remote_code)
    n_input_ids, n_output_ids = _vocabulary(model)
    return ModelInfo(
        name=local.name,
        identity=local.identity,
        architecture=type(model).__name__,
        n_layers=found.n_layers,
        n_neurons=found.n_neurons,
        context_length=_context_length(model),
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
        is_gated=found.layout.is_gated,
        is_masked=is_masked_architecture(type(model).__name__),
        row_values=3 * model.config.get_text_config().vocab_size + _token_values(model.config, found.n_neurons),
        n_input_ids=n_input_ids,
        n_output_ids=n_output_ids,
    )


def checked_dtype(dtype: str) -> torch.dtype:
    """The torch dtype of a name in the configuration."""
    if dtype not in DTYPES:
        raise ConfigurationError(f"model.dtype={dtype} is unknown; known are {', '.join(DTYPES)}")
    return DTYPES[dtype]


def mask_token_of(tokenizer: Any, name: str, n_input_ids: int | None = None) -> int:
    """The id of a masked model's mask token.

    Raises:
        ModelError: the tokenizer has none, or one that the embedding of `n_input_ids` rows does not have.
    """
    token: int | None = getattr(tokenizer, "mask_token_id", None)
    if token is None:
        raise ModelError(f"{name} is a masked model, but its tokenizer has no mask token: choose another model.source")
    if n_input_ids is not None and token >= n_input_ids:
        raise ModelError(
            f"{name}: the mask token {tokenizer.mask_token!r} has the id {token}, but it embeds only the ids below "
            f"{n_input_ids}: the tokenizer beside the weights is another model's (model.source)"
        )
    return token


def _require_measurable(model: PreTrainedModel) -> None:
    """Refuse what the engine would get wrong without the self-check's seeing it."""
    name, config = type(model).__name__, model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise ModelError(f"{name} is an encoder-decoder; a causal or masked model is needed (model.source)")
    _require_dense_attention(name, config)
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if model._is_stateful or kinds:
        what = f"layers of the kinds {', '.join(sorted(kinds))}" if kinds else "a recurrent state"
        raise ModelError(
            f"{name} has {what}, which keep no keys and values that rows could share: choose a model with attention "
            f"alone as model.source"
        )


def _require_dense_attention(name: str, config: Any) -> None:
    """Refuse attention that looks at other tokens when a prompt is longer, which a short self-check cannot see."""
    sparse = ("keep_window_size", "index_topk", "attention_window")
    own = next((key for key in sparse if getattr(config, key, None)), None)
    if own is None and getattr(config, "attention_type", None) == "block_sparse":
        own = "attention_type"
    if own is not None:
        raise ModelError(
            f"{name} has sparse attention ({own}={getattr(config, own)}), which depends on a prompt's length: choose a "
            f"model with dense or sliding attention as model.source"
        )


def _vocabulary(model: PreTrainedModel) -> tuple[int | None, int | None]:
    """How many ids can be read and predicted: rows of the embedding and of the vocabulary head."""
    config = model.config.get_text_config()
    # Gemma 3n reads a second, shorter table of embeddings in each layer.
    read = [model.get_input_embeddings().weight.shape[0], getattr(config, "vocab_size_per_layer_input", None)]
    head = model.get_output_embeddings()
    predicted = getattr(head, "weight", None)
    return (
        min(int(rows) for rows in read if rows),
        int(config.vocab_size) if predicted is None else int(predicted.shape[0]),
    )


def _token_values(config: Any, n_neurons: int) -> int:
    return 6 * n_neurons + 12 * int(config.get_text_config().hidden_size)


def _context_length(model: PreTrainedModel) -> int | None:
    """The most tokens of a prompt: positions that there are, and for which rotary angles are the same in every pass."""
    config = model.config.get_text_config()
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    # Beyond its original context `longrope` takes other angles for a whole pass, so that one prompt changes another's.
    # `dynamic` does so beyond max_position_embeddings.
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *rope.values()):
        if isinstance(part, dict) and part.get("rope_type") == "longrope":
            limits.append(part.get("original_max_position_embeddings"))
    for module_name, module in model.named_modules():
        # RoBERTa numbers positions from behind the one that stands for padding.
        if module_name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min((int(limit) for limit in limits if limit), default=None)


def set_threads(threads: int) -> None:
    """How many CPU threads torch uses in this process."""
    torch.set_num_threads(max(1, threads))
