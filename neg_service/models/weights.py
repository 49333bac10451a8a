"""Whether a model takes what lies in its files: every parameter has a tensor, every tensor that matters a parameter.

transformers fills gaps at random, leaves out what no parameter takes, and only warns; models then run, and their
numbers are another model's. What is left out rightly is known by name and shape, and logged:

| kind                      | such as                                                              |
|---------------------------|----------------------------------------------------------------------|
| tables made anew          | `rotary_emb.inv_freq`, `position_ids`                                |
| causal masks              | `attn.bias` [1, 1, n, n], `attn.masked_bias`                         |
| prediction of more tokens | `mtp.*`, layers behind the last one with `eh_proj`, `enorm`, `hnorm` |
| biases of zeros           | `lm_head.bias`, of whatever layer                                    |
| other heads               | `score`, `classifier`, `v_head`, `cls.seq_relationship`, `pooler`    |
| parts for other input     | `vision_tower.*`, `audio_tower.*`, projectors                        |

Anything else is refused by name.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from neg_service.errors import ModelError
from neg_service.models.configuration import guarded
from neg_service.models.folder import LocalModel, StoredTensor, stored_tensors, weight_files

log = logging.getLogger(__name__)

_TABLES = re.compile(r"(^|[._])(inv_freq|position_ids|token_type_ids|(cos|sin)_cached)$")
_MORE_TOKENS = re.compile(r"(^|\.)(mtp|nextn|next_n)(_\w+)?\.")
# Modules that only layers for further tokens have.
_OF_MORE_TOKENS = ("eh_proj", "enorm", "hnorm", "shared_head")
_OTHER_INPUT = re.compile(r"(^|\.)(vision|visual|image|audio|speech|multi_modal|mm_|embed_vision|embed_audio|talker)")
_OTHER_HEADS = re.compile(r"(^|\.)(pooler|score|classifier|\w*head\w*|qa_outputs|seq_relationship|medusa\w*)(\.|$)")
_FLOATS = ("F64", "F32", "F16", "BF16")


def rehearse(
    local: LocalModel,
    auto_class: Any,
    model: PreTrainedModel,
    trust_remote_code: bool = False,
    source: str | None = None,
) -> None:
    """Go through the loading of a model's files without their data, and refuse what would not be loaded as it is.

    `model` is the same model without weights.

    Raises:
        ModelError: a file that is damaged; a parameter without a tensor or of another shape, a tensor without a
            parameter.
    """
    source = source or str(local.directory)
    tensors = stored_tensors(source, weight_files(source, local.directory))
    loaded, report = guarded(
        lambda: auto_class.from_pretrained(
            local.directory,
            device_map={"": "meta"},
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        ),
        source,
    )
    require_complete(source, report, head_is_outside=f"{model.base_model_prefix}.")
    _require_numbers(source, loaded, tensors)
    hidden = _left_out_without_a_word(loaded, tensors)
    require_used(source, loaded, {*report["unexpected_keys"], *hidden}, tensors)


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
            f"model.source={source}: cannot be loaded: {len(mismatched)} tensors are mismatched: {name} is "
            f"{list(stored)} in the files, {list(wanted)} by config.json: the two are of different models, or "
            f"config.json was changed"
        )
    missing = sorted(map(str, report.get("missing_keys") or ()))
    if not missing:
        return
    if head_is_outside and not any(name.startswith(head_is_outside) for name in missing):
        raise ModelError(
            f"model.source={source}: has no language-model head ({', '.join(missing[:3])} are missing): choose "
            f"a checkpoint that was saved with one"
        )
    raise ModelError(
        f"model.source={source}: {len(missing)} tensors are missing: {', '.join(missing[:3])}: the files are not "
        f"complete, or config.json asks for more than they have"
    )


def require_used(
    source: str, model: PreTrainedModel, unused: Collection[str], tensors: Mapping[str, StoredTensor]
) -> None:
    """Refuse tensors that no parameter takes although they would change numbers; log the others.

    Raises:
        ModelError: naming tensors and their files.
    """
    about = _About.of(model, {*unused, *tensors})
    kinds = {name: about.kind_of(name, tensors.get(name)) for name in sorted(unused)}
    wrong = [name for name, kind in kinds.items() if kind is None]
    if wrong:
        stored = tensors.get(wrong[0])
        where = f" ({stored.file.name})" if stored else ""
        hint = "config.json switches off what they are for, or is another model's: mend it, or change model.source"
        if any("lora_" in name.lower() for name in wrong):
            hint = "they are an adapter's: merge it into the model, and save that"
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ModelError(
            f"model.source={source}: {len(wrong)} tensors would not be used: {', '.join(wrong[:3])}{more}{where}: no "
            f"parameter of {type(model).__name__} takes them: {hint}"
        )
    for kind in sorted({kind for kind in kinds.values() if kind}):
        names = [name for name, own in kinds.items() if own == kind]
        log.info("%s: not used: %d tensors, %s: %s", source, len(names), kind, ", ".join(names[:3]))


@dataclass(frozen=True)
class _About:
    """What has to be known of a model to tell why a tensor may be left out."""

    prefix: str
    body: frozenset[str]
    head: tuple[str, ...]
    layer: re.Pattern[str]
    n_layers: int
    further: frozenset[int]
    ignored: re.Pattern[str] | None

    @classmethod
    def of(cls, model: PreTrainedModel, names: Collection[str]) -> _About:
        config = model.config.get_text_config()
        prefix, n_layers = f"{model.base_model_prefix}.", config.num_hidden_layers
        layer = re.compile(rf"(^|\.){re.escape(_path_of_layers(model).rsplit('.', 1)[-1])}\.(\d+)\.")
        found = [(layer.search(name), name.split(".")) for name in names]
        named = {int(own.group(2)) for own, parts in found if own and not set(_OF_MORE_TOKENS).isdisjoint(parts)}
        announced = range(n_layers, n_layers + _layers_of_more_tokens(config))
        return cls(
            prefix=prefix,
            body=frozenset(name for name, _ in model.base_model.named_children()),
            head=tuple(
                f"{name}."
                for name, own in model.named_modules()
                if name and not f"{name}.".startswith(prefix) and any(True for _ in own.parameters(recurse=False))
            ),
            layer=layer,
            n_layers=n_layers,
            further=frozenset(own for own in {*named, *announced} if own >= n_layers),
            ignored=_patterns_that_are_ignored(model),
        )

    def kind_of(self, name: str, stored: StoredTensor | None) -> str | None:
        """Why a tensor may be left out, or None if it may not."""
        layer = self.layer.search(name)
        if _TABLES.search(name):
            return "tables that are made anew"
        if _is_mask(name, stored):
            return "causal masks"
        if _MORE_TOKENS.search(name) or (layer and int(layer.group(2)) in self.further):
            return "layers that predict further tokens"
        # To some of these patterns a bias of attention looks like a mask.
        if self.ignored and self.ignored.search(name) and not name.endswith("bias"):
            return "known to transformers as of no use"
        if _OTHER_INPUT.search(name):
            return "parts for other input than text"
        if stored and name.endswith("bias") and _is_zero(name, stored):
            return "biases of zeros"
        if layer and not _OTHER_HEADS.search(name[: layer.start()]):
            return None
        is_of_body = name.startswith(self.prefix) or name.split(".", 1)[0] in self.body
        if name.startswith(self.head) or (is_of_body and not _OTHER_HEADS.search(name)):
            return None
        return "other heads"


def _is_zero(name: str, stored: StoredTensor) -> bool:
    with safe_open(stored.file, "pt") as opened:
        return not bool(opened.get_tensor(name).any())


def _is_mask(name: str, stored: StoredTensor | None) -> bool:
    """GPT-2 and others kept their causal masks beside the weights, one of them under the name of a bias."""
    if name.endswith(".masked_bias"):
        return stored is None or sum(stored.shape) <= 1
    if not name.endswith(("attn.bias", "attention.bias")) or stored is None:
        return False
    return len(stored.shape) in (2, 4) and stored.shape[-1] == stored.shape[-2] and set(stored.shape[:-2]) <= {1}


def _layers_of_more_tokens(config: Any) -> int:
    """How many layers for further tokens a configuration announces."""
    names = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "n_mtp_layers", "num_mtp_modules")
    found = [getattr(config, name, None) for name in names]
    return max((own for own in found if isinstance(own, int)), default=0)


def _path_of_layers(model: PreTrainedModel) -> str:
    n_layers = model.config.get_text_config().num_hidden_layers
    decoder = model.base_model.get_decoder()
    layers = next(own for own in decoder.modules() if isinstance(own, nn.ModuleList) and len(own) == n_layers)
    path: str = next(name for name, own in model.named_modules() if own is layers)
    return path


def _patterns_that_are_ignored(model: PreTrainedModel) -> re.Pattern[str] | None:
    patterns = sorted(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    return re.compile("|".join(f"({pattern})" for pattern in patterns)) if patterns else None


def _left_out_without_a_word(model: PreTrainedModel, tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Tensors that transformers leaves out by patterns of their names, and does not report."""
    patterns = _patterns_that_are_ignored(model) or _TABLES
    prefix, known = f"{model.base_model_prefix}.", set(model.state_dict())
    return [
        name
        for name in tensors
        if (patterns.search(name) or _TABLES.search(name))
        and known.isdisjoint((name, prefix + name, name.removeprefix(prefix)))
    ]


def _require_numbers(source: str, model: PreTrainedModel, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse parameters that are stored as integers or in eight bits: without their scales they are no weights."""
    prefix = f"{model.base_model_prefix}."
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, stored in tensors.items():
        if stored.dtype not in _FLOATS and not parameters.isdisjoint((name, prefix + name, name.removeprefix(prefix))):
            raise ModelError(
                f"model.source={source}: {name} ({stored.file.name}) is stored as {stored.dtype}, which are quantised "
                f"weights that config.json does not tell of: choose the full weights ({', '.join(_FLOATS)})"
            )
