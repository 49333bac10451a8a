"""Whether a model takes what lies in its files: every parameter has a tensor, every tensor that matters a parameter.

transformers fills gaps at random, leaves out what no parameter takes, and only warns; models then run, and their
numbers are another model's. What is left out rightly is known by name and shape, and logged:

| kind                      | such as                                                                |
|---------------------------|------------------------------------------------------------------------|
| tables made anew          | `rotary_emb.inv_freq`, `position_ids`                                  |
| causal masks              | `attn.bias` [1, 1, n, n] with a mask's values, `attn.masked_bias` -1e4 |
| prediction of more tokens | `mtp.*`, layers behind the last one with `eh_proj`, `enorm`, `hnorm`   |
| biases of zeros           | `lm_head.bias`, of whatever layer                                      |
| other heads               | `score`, `classifier`, `v_head`, `cls.seq_relationship`, `pooler`      |
| parts for other input     | `vision_tower.*`, `audio_tower.*`, projectors                          |

Inside the layers that read text only the first four are known. Anything else is refused by name, and so are an
adapter's tensors, wherever they lie, and two different tensors of which one parameter would take either.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from neg_service.errors import ModelError
from neg_service.models.configuration import guarded
from neg_service.models.folder import (
    OTHER_INPUT,
    LocalModel,
    StoredTensor,
    is_of_adapter,
    stored_tensors,
    weight_files,
)
from neg_service.models.layers import find_layers
from neg_service.models.quantized import PLAIN_DTYPES, Quantization, plain_tensors, state_of

log = logging.getLogger(__name__)

_TABLES = re.compile(r"(^|[._])(inv_freq|position_ids|token_type_ids|(cos|sin)_cached)$")
_MORE_TOKENS = re.compile(r"(^|\.)(mtp|nextn|next_n)(_\w+)?\.")
# Modules that only layers for further tokens have.
_OF_MORE_TOKENS = ("eh_proj", "enorm", "hnorm", "shared_head")
_OTHER_HEADS = re.compile(
    r"(^|\.)(pooler|scores?|(\w+_)?classifier|(v|value|reward|contact|classification)_head|qa_outputs|seq_relationship|"
    r"medusa\w*|sequence_summary|(discriminator|generator|lm|mask)_predictions)(\.|$)"
)
# Beside the model, where a part that takes part in its numbers would have another name.
_HEADS_BESIDE = re.compile(r"^(?!lm_head\.)(\w+_)?heads?\.")
_MASK = re.compile(r"(^|\.)(attn|attention|self_attn|self_attention)\.(bias|causal_mask)$")
# What masks add to scores; no bias that was learnt is as far below zero.
_MASKED = -1e3


def rehearse(
    local: LocalModel,
    auto_class: Any,
    model: PreTrainedModel,
    trust_remote_code: bool = False,
    source: str | None = None,
    quantization: Quantization | None = None,
) -> dict[str, StoredTensor]:
    """Go through the loading of a model's files without their data, and refuse what would not be loaded as it is.

    `model` is the same model without weights. Gives what lies in the files as a plain model knows it.

    Raises:
        ModelError: a file that is damaged; a parameter without a tensor or of another shape, a tensor without a
            parameter; quantised weights that are not whole.
    """
    source = source or str(local.directory)
    stored = stored_tensors(source, weight_files(source, local.directory))
    tensors = plain_tensors(source, model, stored, quantization)
    places = _places(model, tensors)
    _require_one_of_each(source, {name: own.name for name, own in places.items() if own.is_taken_whole}, tensors)
    options: dict[str, Any] = {
        "device_map": {"": "meta"},
        "ignore_mismatched_sizes": True,
        "output_loading_info": True,
    }
    state = state_of(tensors, None) if quantization else None
    loaded, report = guarded(
        lambda: with_weights(local, auto_class, model, trust_remote_code, state, **options), source
    )
    require_complete(source, report, head_is_outside=f"{model.base_model_prefix}.")
    known = set(loaded.state_dict())
    _require_numbers(source, loaded, places, tensors)
    unused = {name: own.name for name, own in places.items() if own.name not in known}
    reported = set(map(str, report["unexpected_keys"])).difference(unused.values())
    require_used(source, loaded, {name: name for name in reported} | unused, tensors)
    return tensors


def with_weights(
    local: LocalModel,
    auto_class: Any,
    model: PreTrainedModel,
    trust_remote_code: bool,
    state: Mapping[str, Any] | None,
    **options: Any,
) -> Any:
    """What transformers' `from_pretrained` gives: from a folder, or from `state` where config.json says quantised."""
    if state is None:
        return auto_class.from_pretrained(
            local.directory, use_safetensors=True, trust_remote_code=trust_remote_code, **options
        )
    # The class itself, for the automatic ones look for files; names are converted as those of a plain checkpoint.
    return type(model).from_pretrained(None, config=model.config, state_dict=state, **options)


def require_complete(source: str, report: Mapping[str, Any], head_is_outside: str | None = None) -> None:
    """Refuse weights that are not all there: transformers would fill the gaps at random and only warn.

    Tensors that do not begin with `head_is_outside` belong to the head, which many checkpoints were saved without.

    Raises:
        ModelError: naming tensors.
    """
    mismatched = sorted(report.get("mismatched_keys") or (), key=str)
    if mismatched:
        name, stored, wanted = mismatched[0]
        raise ModelError(
            f"cannot be loaded: {len(mismatched)} tensors are mismatched: {name} is {list(stored)} in the files, "
            f"{list(wanted)} by config.json: the two are of different models, or config.json was changed",
            setting="model.source",
            value=source,
        )
    missing = sorted(map(str, report.get("missing_keys") or ()))
    if not missing:
        return
    if head_is_outside and not any(name.startswith(head_is_outside) for name in missing):
        raise ModelError(
            f"has no language-model head ({', '.join(missing[:3])} are missing): choose a checkpoint that was "
            "saved with one",
            setting="model.source",
            value=source,
        )
    raise ModelError(
        f"{len(missing)} tensors are missing: {', '.join(missing[:3])}: the files are not complete, or "
        "config.json asks for more than they have",
        setting="model.source",
        value=source,
    )


def require_used(
    source: str, model: PreTrainedModel, unused: Mapping[str, str], tensors: Mapping[str, StoredTensor]
) -> None:
    """Refuse tensors that no parameter takes although they would change numbers; log the others.

    unused: the names in the files, each with the name by which the model knows such tensors today.

    Raises:
        ModelError: naming tensors and their files.
    """
    about = _About.of(model, unused.values())
    kinds = {name: about.kind_of(place, tensors.get(name)) for name, place in sorted(unused.items())}
    wrong = [name for name, kind in kinds.items() if kind is None]
    if wrong:
        stored = tensors.get(wrong[0])
        where = f" ({stored.file.name})" if stored else ""
        hint = "config.json switches off what they are for, or is another model's: mend it, or change model.source"
        if any(map(is_of_adapter, wrong)):
            hint = "they are an adapter's: merge it into the model, and save that"
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ModelError(
            f"{len(wrong)} tensors would not be used: {', '.join(wrong[:3])}{more}{where}: no parameter of "
            f"{type(model).__name__} takes them: {hint}",
            setting="model.source",
            value=source,
        )
    for kind in sorted({kind for kind in kinds.values() if kind}):
        names = [name for name, own in kinds.items() if own == kind]
        log.info("%s: not used: %d tensors, %s: %s", source, len(names), kind, ", ".join(names[:3]))


@dataclass(frozen=True)
class _Place:
    """The name under which the model looks for a stored tensor; whole, or as a part of what is put together."""

    name: str
    is_taken_whole: bool


def _places(model: PreTrainedModel, names: Iterable[str]) -> dict[str, _Place]:
    """Where transformers puts each stored tensor: it knows older names, and names with and without the prefix."""
    transforms, known = get_model_conversion_mapping(model), model.state_dict()
    renamings = [own for own in transforms if isinstance(own, WeightRenaming)]
    converters = [own for own in transforms if isinstance(own, WeightConverter)]
    prefix = model.base_model_prefix
    found = {}
    for name in names:
        place, part = rename_source_key(name, renamings, converters, prefix, known)
        if place not in known and name in known:
            place, part = rename_source_key(name, [], [], prefix, known)
        found[name] = _Place(place, part is None)
    return found


def _require_one_of_each(source: str, places: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse two tensors for one parameter: which of them it takes is a matter of the order of their names."""
    first: dict[str, str] = {}
    for name, place in places.items():
        other = first.setdefault(place, name)
        if other != name and not _are_equal(other, name, tensors):
            files = ", ".join(sorted({tensors[own].file.name for own in (other, name)}))
            raise ModelError(
                f"{other} and {name} ({files}) are different tensors for one parameter, {place}: take out the one "
                "that is not meant",
                setting="model.source",
                value=source,
            )


def _are_equal(one: str, other: str, tensors: Mapping[str, StoredTensor]) -> bool:
    if tensors[one].shape != tensors[other].shape:
        return False
    return torch.equal(tensors[one].read().double(), tensors[other].read().double())


@dataclass(frozen=True)
class _About:
    """What has to be known of a model to tell why a tensor may be left out."""

    prefix: str
    body: frozenset[str]
    head: tuple[str, ...]
    layer: re.Pattern[str]
    further: frozenset[int]
    ignored: re.Pattern[str] | None

    @classmethod
    def of(cls, model: PreTrainedModel, names: Collection[str]) -> _About:
        prefix = f"{model.base_model_prefix}."
        path, layers = find_layers(model)
        layer = re.compile(rf"(^|\.){re.escape(path.rsplit('.', 1)[-1])}\.(\d+)\.")
        found = [(_text_layer(layer, name), name) for name in names]
        with_evidence = {
            int(own.group(2)) for own, name in found if own and name[own.end() :].split(".", 1)[0] in _OF_MORE_TOKENS
        }
        return cls(
            prefix=prefix,
            body=frozenset(name for name, _ in model.base_model.named_children()),
            head=tuple(
                f"{name}."
                for name, own in model.named_modules()
                if name and not f"{name}.".startswith(prefix) and any(True for _ in own.parameters(recurse=False))
            ),
            layer=layer,
            further=frozenset(own for own in with_evidence if own >= len(layers)),
            ignored=_patterns_that_are_ignored(model),
        )

    def kind_of(self, name: str, stored: StoredTensor | None) -> str | None:
        """Why a tensor may be left out, or None if it may not."""
        layer = _text_layer(self.layer, name)
        if is_of_adapter(name):
            return None
        if _TABLES.search(name):
            return "tables that are made anew"
        if stored and _is_mask(name, stored):
            return "causal masks"
        if (layer and int(layer.group(2)) in self.further) or (not layer and _MORE_TOKENS.search(name)):
            return "layers that predict further tokens"
        # To some of these patterns a bias of attention looks like a mask.
        if self.ignored and self.ignored.search(name) and not name.endswith("bias"):
            return "known to transformers as of no use"
        if not layer and OTHER_INPUT.search(name):
            return "parts for other input than text"
        if stored and name.endswith("bias") and not bool(stored.read().any()):
            return "biases of zeros"
        if layer or name.startswith(self.head):
            return None
        is_beside = not name.startswith(self.prefix) and name.split(".", 1)[0] not in self.body
        return "other heads" if _OTHER_HEADS.search(name) or (is_beside and _HEADS_BESIDE.search(name)) else None


def _text_layer(layer: re.Pattern[str], name: str) -> re.Match[str] | None:
    """The layer that a name is of, unless it is one of a part for other input, for further tokens, or of a head."""
    found = layer.search(name)
    if found is None:
        return None
    before = f"{name[: found.start()]}."
    return None if any(own.search(before) for own in (OTHER_INPUT, _MORE_TOKENS, _OTHER_HEADS)) else found


def _is_mask(name: str, stored: StoredTensor) -> bool:
    """GPT-2 and others kept their causal masks beside the weights, one of them under the name of a bias."""
    if name.endswith(".masked_bias"):
        return sum(stored.shape) <= 1 and float(stored.read()) <= _MASKED
    if not _MASK.search(name) or len(stored.shape) not in (2, 4) or set(stored.shape[:-2]) - {1}:
        return False
    if stored.shape[-1] != stored.shape[-2] or stored.shape[-1] < 2:
        return False
    return _is_causal(stored.read().reshape(stored.shape[-2:]))


def _is_causal(mask: torch.Tensor) -> bool:
    """Whether one of two values stands where a position is seen: itself, and all before it or the last of these."""
    seen, unseen = mask[0, 0], mask[0, 1]
    before = mask[:, 0] == seen
    window = int(before.sum())
    return bool(
        seen != unseen
        and (mask[0, 1:] == unseen).all()
        and before[:window].all()
        and (mask[window:, 0] == unseen).all()
        # The same along every diagonal.
        and torch.equal(mask[1:, 1:], mask[:-1, :-1])
    )


def _patterns_that_are_ignored(model: PreTrainedModel) -> re.Pattern[str] | None:
    patterns = sorted(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    return re.compile("|".join(f"({pattern})" for pattern in patterns)) if patterns else None


def _require_numbers(
    source: str, model: PreTrainedModel, places: Mapping[str, _Place], tensors: Mapping[str, StoredTensor]
) -> None:
    """Refuse parameters that are stored as integers or in eight bits: without their scales they are no weights."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, stored in tensors.items():
        if stored.dtype not in PLAIN_DTYPES and places[name].name in parameters:
            raise ModelError(
                f"{name} ({stored.file.name}) is stored as {stored.dtype}, which are quantised weights that "
                f"config.json does not tell of: choose the full weights ({', '.join(PLAIN_DTYPES)})",
                setting="model.source",
                value=source,
            )
