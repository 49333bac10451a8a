"""A .gguf file, unpacked by transformers to a folder with safetensors, a configuration and a tokenizer.

What transformers leaves out without a word is refused here: tensors that its table of names does not have (biases of
attention in a Llama), and rotary embeddings that are scaled, which its configurations of most architectures lose. What
it leaves out of the metadata, `gguf_metadata` puts back or refuses.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel
from transformers.integrations.gguf.reader import read_gguf_metadata
from transformers.integrations.gguf.utils import is_gguf_arch_supported
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from neg_service.errors import ModelError, NegServiceError, one_line
from neg_service.models.folder import require_real_file
from neg_service.models.gguf_metadata import apply_metadata, is_rotary_scaled
from neg_service.models.library_log import hear_libraries
from neg_service.models.text_config import text_config
from neg_service.models.weights import require_complete, require_used

log = logging.getLogger(__name__)

# Rotary angles that are made anew; layers that predict further tokens; parts for other input than text; other heads.
_OF_NO_USE = re.compile(r"rot_embd\.|\.nextn\.|^(v|a|mm)\.|^cls(\.|_)")
_ROTARY_FACTORS = re.compile(r"^rope_(freqs|factors_long|factors_short)\.")


def unpack(file: Path, target: Path) -> None:
    """Write what a .gguf file holds as a folder that `model.source` can name, in float32.

    Raises:
        ModelError: it cannot be read, or would not be read as it is.
    """
    log.info("unpacking %s to safetensors, once", file.name)
    hear_libraries()
    require_real_file(str(file), file)
    try:
        metadata, names = read_gguf_metadata(str(file))
        _require_a_whole_model(file, metadata)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        apply_metadata(file, config, metadata)
        model, report = AutoModelForCausalLM.from_pretrained(
            file.parent,
            config=config,
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
    except NegServiceError:
        raise
    except Exception as error:  # Three readers, whose own exceptions are of all kinds where a file is damaged.
        raise ModelError(f"cannot be read as GGUF: {one_line(error)}", setting="model.source", value=file) from error
    require_complete(str(file), report)
    require_used(str(file), model, {name: name for name in report["unexpected_keys"]}, {})
    _require_all_taken(file, model, metadata, names)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _require_a_whole_model(file: Path, metadata: dict[str, Any]) -> None:
    if metadata.get("general.type", "model") != "model":
        raise ModelError(
            f"holds no model but {metadata['general.type']} (general.type): merge it into its base model, and "
            "give that",
            setting="model.source",
            value=file,
        )
    if int(metadata.get("split.count", 1)) > 1:
        raise ModelError(
            f"is one of {metadata['split.count']} files of a model (split.count): merge them, as with "
            "llama-gguf-split --merge",
            setting="model.source",
            value=file,
        )


def _require_all_taken(file: Path, model: PreTrainedModel, metadata: dict[str, Any], names: tuple[str, ...]) -> None:
    architecture = metadata["general.architecture"]
    if is_gguf_arch_supported(architecture):
        # What is not taken is in transformers' own report.
        return
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config={})
    taken = {*get_gguf_hf_weights_map(model, processor), "output.weight"}
    left = sorted(set(names) - taken)
    factors = [name for name in left if _ROTARY_FACTORS.search(name)]
    wrong = [name for name in left if name not in factors and not _OF_NO_USE.search(name)]
    if wrong:
        raise ModelError(
            f"{len(wrong)} tensors would not be used: {', '.join(wrong[:3])}: no parameter of "
            f"{type(model).__name__} takes them: give the model's directory with safetensors",
            setting="model.source",
            value=file,
        )
    if factors and not is_rotary_scaled(text_config(model.config)) and not _are_ones(file, factors):
        raise ModelError(
            f"has scaled rotary embeddings ({', '.join(factors)}), which are lost where GGUF is unpacked: give "
            "the model's directory with safetensors",
            setting="model.source",
            value=file,
        )
    if left:
        log.info("%s: not used: %d tensors: %s", file.name, len(left), ", ".join(left[:3]))


def _are_ones(file: Path, names: list[str]) -> bool:
    tensors = [tensor for tensor in GGUFReader(file).tensors if tensor.name in names]
    return all((dequantize(tensor.data, tensor.tensor_type) == 1).all() for tensor in tensors)
