"""What lies in a model's folder: the files that hold its weights, what else is there, and what only looks like a file.

Names, sizes and headers are read, no weights, so that a folder is judged before anything is loaded from it. Whether the
model takes the tensors that are found here, `weights.py` asks.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from neg_service.errors import ModelError, one_line

log = logging.getLogger(__name__)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG = "config.json"
# What is read beside the weights.
_READ = (
    CONFIG, "generation_config.json", "tokenizer*", "vocab*", "merges*", "*.model", "*.tiktoken", "tekken.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.py",
)  # fmt: skip
# Weights whose name says what they are, in whatever format; words that only have those letters in them are none.
_ADAPTER_FILE = re.compile(
    r"adapter_config\.json|(.*(?<![fp])lora|.*adapter).*\.(safetensors|bin|pt|pth|gguf|ckpt|h5|msgpack|npz)",
    re.IGNORECASE,
)
_ADAPTER_TENSOR = re.compile(
    r"(^|[._])(lora|lokr|loha|ia3|vera|hada|oft|boft|adapters?|soft_prompts?|(prompt|prefix)_(encoder|embeddings?|tuning)|"
    r"control_vectors?)(?=_|\.|$)",
    re.IGNORECASE,
)
# The parts of a model that read images and sound, by the beginnings of their names.
OTHER_INPUT = re.compile(
    r"(^|\.)(vision|visual|image|img_|audio|speech|sound_|multi_?modal|mm_|embed_vision|embed_audio|talker|token2wav|"
    r"code2wav|(vpm|apm|tts|vit|resampler|vqmodel|aligner)\.)"
)
_WEIGHTS_OF_OTHERS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.ckpt", "*.h5", "*.msgpack", "*.npz")
_POINTERS = (
    (b"version https://git-lfs.github.com/spec/v1", "Git LFS"),
    (b"version https://hawser.github.com/spec/v1", "Git LFS"),
    (b"# xet version", "Xet"),
    (b"/annex/objects/", "git-annex"),
)
# What servers send in the place of a file, and downloads keep under its name.
_ANSWERS = (
    (b"<!doctype html", "a page of HTML"),
    (b"<html", "a page of HTML"),
    (b"entry not found", "a server's answer (Entry not found)"),
    (b"access to model", "a server's answer (Access to model …)"),
)
# Git LFS keeps its pointers below this.
_POINTER_BYTES = 1024


@dataclass(frozen=True)
class LocalModel:
    """A model's files on this machine. `name` is short and fit for a file name.

    has_weights: not so where they were left out on purpose, for planning alone.
    """

    directory: Path
    name: str
    identity: str
    has_weights: bool = True


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of its file tells it; `dtype` in the words of safetensors."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> torch.Tensor:
        """Its values."""
        with safe_open(self.file, "pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(self.name)
            return tensor


def require_plain_files(source: str, directory: Path) -> None:
    """Refuse a folder with an adapter, or with pointers in the place of files that are read.

    Raises:
        ModelError: naming the file and what to do.
    """
    adapter = sorted(file for file in directory.iterdir() if _ADAPTER_FILE.fullmatch(file.name))
    if adapter:
        beside = "beside full weights" if any(directory.glob("*.safetensors")) else "without its base model"
        raise ModelError(
            f"{', '.join(file.name for file in adapter[:3])}: an adapter {beside}, which would not be applied: "
            "merge it into its base model and save that, or take its files out of the folder, if the full "
            "weights alone are meant",
            setting="model.source",
            value=source,
        )
    for file in _matching(directory, _READ):
        require_real_file(source, file)
    for file in sorted(directory.glob("*/adapter_config.json")):
        log.warning("model.source=%s: the adapter in %s/ is not applied", source, file.parent.name)


def require_real_file(source: str, file: Path) -> None:
    """Refuse a link that leads nowhere, and the small text that stands for a large file until that is fetched.

    Raises:
        ModelError: naming the file.
    """
    if not file.exists():
        raise ModelError(
            f"{file.name} is a link to {file.readlink()}, where nothing is", setting="model.source", value=source
        )
    if not file.is_file():
        return
    with file.open("rb") as opened:
        text = opened.read(_POINTER_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()
    for start, what in _ANSWERS:
        if text.lower().startswith(start):
            raise ModelError(
                f"{file.name} is {what}, not the file itself: download the file", setting="model.source", value=source
            )
    if file.stat().st_size > _POINTER_BYTES:
        return
    for start, system in _POINTERS:
        if text.startswith(start):
            size = re.search(rb"^size (\d+)", text, re.MULTILINE)
            what = f", which stands for {int(size.group(1))} bytes" if size else ""
            how = {"Git LFS": "run `git lfs pull` there", "git-annex": "run `git annex get` there"}.get(system)
            raise ModelError(
                f"{file.name} is a {system} pointer{what}, not the file itself: {how or 'download the file'}",
                setting="model.source",
                value=source,
            )


def weight_files(source: str, directory: Path) -> list[Path]:
    """The safetensors files that are loaded, in the order in which they are read; the others are logged.

    Raises:
        ModelError: there are none, an index that is damaged or names files that are not there, or an adapter among
            the others.
    """
    used = _used_files(source, directory)
    for file in used:
        require_real_file(source, file)
    others = [file for file in _matching(directory, _WEIGHTS_OF_OTHERS) if file not in used]
    for file in others:
        _require_no_adapter_inside(source, file)
    if others:
        names = ", ".join(file.name for file in others[:3])
        log.info("%s: not used: %s", directory.name, f"{names} and {len(others) - 3} more" if others[3:] else names)
    return used


def _used_files(source: str, directory: Path) -> list[Path]:
    index = directory / INDEX
    chosen = _chosen_by_configuration(directory)
    if chosen is not None:
        index = directory / chosen
        if not chosen.endswith(".index.json"):
            return [index]
    elif (directory / WEIGHTS).is_file() or (directory / WEIGHTS).is_symlink():
        _require_no_second_set(source, directory)
        return [directory / WEIGHTS]
    if not index.is_file():
        found = ", ".join(file.name for file in _matching(directory, ("*.safetensors",))[:3])
        raise ModelError(
            f"cannot be loaded: neither {WEIGHTS} nor {INDEX} is there; of {found} nothing says that they are the "
            "whole model",
            setting="model.source",
            value=source,
        )
    require_real_file(source, index)
    names = _names_in_index(source, index)
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ModelError(
            f"{index.name} names {outside[0]!r}, which is not in the folder", setting="model.source", value=source
        )
    missing = [name for name in names if not (directory / name).exists() and not (directory / name).is_symlink()]
    if missing:
        raise ModelError(
            f"{index.name} names {len(names)} files, of which {len(missing)} are missing: "
            f"{', '.join(missing[:3])}: fetch the whole model",
            setting="model.source",
            value=source,
        )
    return [directory / name for name in names]


def _require_no_second_set(source: str, directory: Path) -> None:
    """Refuse shards that are a whole model too, and another one: which of them is meant nothing says."""
    one, index = directory / WEIGHTS, directory / INDEX
    if not one.is_file() or not index.is_file():
        return
    try:
        shards = [directory / name for name in _names_in_index(source, index)]
        if one in shards or not all(file.is_file() for file in shards):
            return
        own, others = stored_tensors(source, [one]), stored_tensors(source, shards)
    except ModelError:
        # It is no whole model; if it is the first that is damaged, whoever reads it says so.
        return
    different = [name for name in sorted(own.keys() | others.keys()) if not _is_same_stored(name, own, others)]
    if different:
        raise ModelError(
            f"{WEIGHTS} and the {len(shards)} files of {INDEX} are two models, which differ in {len(different)} "
            f"tensors ({', '.join(different[:3])}): take the one that is not meant out of the folder",
            setting="model.source",
            value=source,
        )


def _is_same_stored(name: str, own: Mapping[str, StoredTensor], others: Mapping[str, StoredTensor]) -> bool:
    one, other = own.get(name), others.get(name)
    if one is None or other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return _is_same(name, one.file, other.file)


def _chosen_by_configuration(directory: Path) -> str | None:
    try:
        chosen = json.loads((directory / CONFIG).read_text()).get("transformers_weights")
    except (OSError, ValueError, AttributeError, RecursionError):
        # Whoever reads the configuration for itself says what is wrong with it.
        return None
    return chosen if isinstance(chosen, str) and (directory / chosen).is_file() else None


def _names_in_index(source: str, index: Path) -> list[str]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{index.name} is no JSON: {one_line(error)}", setting="model.source", value=source) from error
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ModelError(
            f"{index.name}: weight_map must name a file for each tensor", setting="model.source", value=source
        )
    if not isinstance(content.get("metadata"), dict):
        raise ModelError(f"{index.name}: metadata must be there, if only as {{}}", setting="model.source", value=source)
    return sorted(set(places.values()))


def _require_no_adapter_inside(source: str, file: Path) -> None:
    """Of a file that is not loaded, whatever its name."""
    if file.suffix != ".safetensors":
        return
    try:
        with safe_open(file, "pt") as opened:
            own = next((name for name in opened.keys() if is_of_adapter(name)), None)  # noqa: SIM118
    except (SafetensorError, OSError):
        # It is not loaded, so it may be anything.
        return
    if own is not None:
        raise ModelError(
            f"{file.name}: an adapter ({own}) beside full weights, which would not be applied: merge it into the "
            "model and save that, or take the file out of the folder",
            setting="model.source",
            value=source,
        )


def is_of_adapter(name: str) -> bool:
    """Whether a tensor is of an adapter, by its name; projectors of images and sound are sometimes called so too."""
    return any(
        not (found.group(2).lower().startswith("adapter") and OTHER_INPUT.search(name[: found.end()]))
        for found in _ADAPTER_TENSOR.finditer(name)
    )


def stored_tensors(source: str, files: Sequence[Path]) -> dict[str, StoredTensor]:
    """Every tensor in the files, by name.

    Raises:
        ModelError: a file that is cut off or no safetensors, or two files with different tensors of one name.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _header(source, file).items():
            if name in found and not _is_same(name, found[name].file, file):
                raise ModelError(
                    f"{found[name].file.name} and {file.name} have different tensors of the name {name}: fetch "
                    "the model anew into an empty folder",
                    setting="model.source",
                    value=source,
                )
            found[name] = tensor
    return found


def _header(source: str, file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: StoredTensor(name, file, str(own.get_dtype()), tuple(own.get_shape()))
                for name, own in slices.items()
            }
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"cannot be loaded: {file.name}: {_what_is_wrong(file) or one_line(error)}: fetch the file again",
            setting="model.source",
            value=source,
        ) from error


def _what_is_wrong(file: Path) -> str | None:
    """In numbers, where a safetensors file is not as long as it says: 8 bytes for the header's length, header, data."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or 8 + length > size:
            said = f"a header of {length} bytes" if size >= 8 else "the length of a header"
            return f"is no safetensors, or is cut off: {said} does not fit into its {size} bytes"
        try:
            header = json.loads(opened.read(length))
            end = 8 + length + max((own["data_offsets"][1] for own in _tensors_in(header)), default=0)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return "is no safetensors: its header is damaged"
    return None if end == size else f"has {size} bytes, but its header tells of {end}"


def damaged_json(directory: Path) -> str | None:
    """The first of a tokenizer's files that cannot be one by its JSON, with the reason."""
    for file in _matching(
        directory, ("tokenizer*.json", "vocab*.json", "special_tokens_map.json", "added_tokens.json")
    ):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError, OSError) as error:
            return f"{file.name} is no JSON: {one_line(error)}"
        if not isinstance(content, dict):
            return f"{file.name} is no JSON object"
        if file.name == "tokenizer.json" and "model" not in content:
            return f"{file.name} has no model"
    return None


def _tensors_in(header: Mapping[str, Any]) -> Iterable[Any]:
    return (own for name, own in header.items() if name != "__metadata__")


def _is_same(name: str, first: Path, second: Path) -> bool:
    with safe_open(first, "pt") as one, safe_open(second, "pt") as other:
        return torch.equal(one.get_tensor(name), other.get_tensor(name))


def _matching(directory: Path, patterns: Sequence[str]) -> list[Path]:
    # Links that lead nowhere are found too, which is what a glob leaves out for names without a star.
    return sorted(file for file in directory.iterdir() if any(fnmatch(file.name, pattern) for pattern in patterns))
