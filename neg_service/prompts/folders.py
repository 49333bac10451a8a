"""Folders as data sets, here or on the hub: which files are of which split, as the `datasets` library tells by names.

The files themselves are read like single ones (`rows.py`): strictly, and each time, without a cache. In this order:
what `configs` in the front matter of a README.md say; `data/NAME-00000-of-00002.*`; folders, then files, whose names
have train, validation or test in them; all files as `train`. Nothing in the folder's own name is a pattern. Only
formats that have no strict reader here, such as Arrow, are left to the library.
"""

from __future__ import annotations

import logging
import os
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from fsspec.utils import glob_translate

from neg_service.errors import NOT_GIVEN, PromptError, nearest, one_line, shortened
from neg_service.places import absolute

log = logging.getLogger(__name__)

# Endings of which there are strict readers, and those of tables that only the library reads.
STRICT = {".jsonl": "JSON", ".json": "JSON", ".csv": "CSV", ".parquet": "Parquet"}
_OTHERS = (".arrow", ".tsv", ".ndjson", ".geoparquet", ".gpq", ".lance", ".vortex", ".h5", ".hdf5", ".zip", ".tar")
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
# Where a data set says what its splits are.
DESCRIBED_IN = ("README.md", ".huggingface.yaml")
# What libraries and people write beside the data.
_BESIDE = (
    "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "dummy_data.zip",
)  # fmt: skip
_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5}).*\.[^/]*")
_SPLIT = re.compile(r"\w+(\.\w+)*")
_CUT = re.compile(r"\s*(\w+(?:\.\w+)*)\s*(?:\[\s*(?:(-?\d+)(%)?)?\s*:\s*(?:(-?\d+)(%)?)?\s*\])?\s*")
_FRONT_MATTER = re.compile(r"\s*---[\r\n]+(.*?)[\r\n]+---(?:\r?\n|$)", re.DOTALL)
_CONFIG = ("config_name", "data_files", "data_dir", "default", "description", "version")


@dataclass(frozen=True)
class Cut:
    """Files of one split in order, and which of their rows: from `start` up to `end`, each None where nothing is cut.

    Negative ones count from the end; with `is_percent` they are hundredths of all rows.
    """

    files: Sequence[str]
    start: int | None = None
    end: int | None = None
    is_percent: bool = False

    def range(self, count: Callable[[], int]) -> tuple[int, float]:
        """The first row, and the one behind the last; `count` is asked only where it matters."""
        given = [one for one in (self.start, self.end) if one is not None]
        if not self.is_percent and all(one >= 0 for one in given):
            return self.start or 0, float("inf") if self.end is None else self.end
        n = count()
        start, end = (
            default if one is None else round(one * n / 100) if self.is_percent else one
            for one, default in ((self.start, 0), (self.end, n))
        )
        return (max(n + start, 0) if start < 0 else start), (max(n + end, 0) if end < 0 else end)

    @property
    def says(self) -> str:
        """The cut as it is written."""
        return ":".join("" if one is None else f"{one}{'%' * self.is_percent}" for one in (self.start, self.end))

    def is_beyond(self, count: int) -> bool:
        """Whether it names rows that there are not, of so many."""
        return not self.is_percent and any(abs(one) > count for one in (self.start, self.end) if one is not None)


@dataclass(frozen=True)
class Folder:
    """What is read of a folder: its files are named relative to `place`."""

    place: Path
    cuts: Sequence[Cut]


def open_folder(source: str, subset: str | None, split: Any) -> Folder | None:
    """The files of a split of a folder; None where only the `datasets` library has a reader of their format.

    Raises:
        PromptError: subset or split are not among its own, or which files are meant cannot be told from their names.
    """
    place = Path(absolute(source)).resolve()
    heads = (place / name for name in DESCRIBED_IN)
    cuts = chosen_files(source, _files_below(source, place), [head for head in heads if head.is_file()], subset, split)
    return None if cuts is None else Folder(place, cuts)


def chosen_files(
    source: str, names: Sequence[str], heads: Sequence[Path], subset: str | None, split: Any
) -> list[Cut] | None:
    """The files of a split among `names`; None where only the `datasets` library has a reader of their format.

    `heads` are those of DESCRIBED_IN that there are, as files of this machine.

    Raises:
        PromptError: as `open_folder`.
    """
    names = sorted(name for name in names if not _is_hidden(name))
    config = _config_of(source, heads, subset)
    if more := sorted(set(config) - set(_CONFIG)):
        log.warning(
            "%s: its README.md says %s of its files: the datasets library reads them, not strictly", source, more[0]
        )
        return None
    splits = _splits(source, config, names)
    asked = chosen_split(source, split, list(splits))
    cuts: list[Cut] = []
    for part in asked.split("+"):
        found = _CUT.fullmatch(part)
        given = [] if found is None else [int(one) for one in (found[2], found[4]) if one is not None]
        is_percent = found is not None and bool(found[3] or found[5])
        if found is None or (len(given) == 2 and found[3] != found[5]) or (is_percent and max(map(abs, given)) > 100):
            raise PromptError(
                f"{part.strip()!r} cannot be read; a cut is NAME[FROM:TO] in rows, or both in percent",
                setting="dataset.split",
                value=split,
            )
        start, end = (None if one is None else int(one) for one in (found[2], found[4]))
        cuts.append(Cut(splits[found[1]], start, end, is_percent))
    used = list(dict.fromkeys(name for cut in cuts for name in cut.files))
    formats = {_format(name) for name in used}
    if formats == {None}:
        log.warning("%s: files such as %s are read by the datasets library, not strictly", source, used[0])
        return None
    if not used:
        raise _refusal(source, f"split {asked} has no files", names)
    if len(formats) > 1:
        raise _refusal(source, f"split {asked} has files of several formats", used)
    _tell_missing(source, used)
    log.info("reading split %s of %s: %s", asked, source, shortened(", ".join(used)))
    return cuts


def chosen_split(source: str, split: Any, splits: Sequence[str]) -> str:
    """The split that was asked for, or the only one.

    Raises:
        PromptError: there are several, or none of that name.
    """
    if split is None and len(splits) == 1:
        return splits[0]
    if not isinstance(split, str):
        given = NOT_GIVEN if split is None else split
        raise PromptError(
            f"{source} has {', '.join(splits)}", setting="dataset.split", value=given, allowed="one split"
        )
    # As the library writes them, splits may be added and cut: train[:100]+test.
    for part in split.split("+"):
        name = part.partition("[")[0].strip()
        if splits and name not in splits:
            raise PromptError(
                f"{source} has no split {name!r}; {nearest(name, splits)}it has {', '.join(splits)}",
                setting="dataset.split",
                value=split,
            )
    return split


def _format(name: str) -> str | None:
    return STRICT.get(PurePosixPath(name).suffix.lower())


def _is_data(name: str) -> bool:
    """Whether a file may hold rows, by its name alone."""
    path = PurePosixPath(name)
    if path.name in _BESIDE:
        return False
    ending = path.suffix.lower()
    inner = PurePosixPath(path.stem).suffix.lower() if ending in _PACKED else ""
    return ending in STRICT or ending in _OTHERS or inner in STRICT or inner in _OTHERS


def _is_hidden(name: str) -> bool:
    """Whether a file is hidden, or of a folder such as __pycache__."""
    *folders, last = PurePosixPath(name).parts
    return last.startswith(".") or any(one.startswith((".", "__")) or one == "lost+found" for one in folders)


def _files_below(source: str, place: Path) -> list[str]:
    """All files as paths relative to the folder; hidden folders are not gone into."""

    def refuse(error: OSError) -> None:
        raise PromptError(f"cannot be read: {one_line(error)}", setting="dataset.source", value=source) from error

    found = []
    for folder, inner, names in os.walk(place, onerror=refuse):
        inner[:] = [name for name in inner if not name.startswith((".", "__")) and name != "lost+found"]
        at = Path(folder)
        found += [
            (at / name).relative_to(place).as_posix()
            for name in names
            # A link to nothing, as to content that was not fetched, is refused when it is opened.
            if (at / name).is_file() or (at / name).is_symlink()
        ]
    return found


def _splits(source: str, config: Mapping[str, Any], names: Sequence[str]) -> dict[str, list[str]]:
    """The files of each split."""
    below = posixpath.normpath(str(config.get("data_dir") or ".")) + "/"
    below = "" if below == "./" else below
    inner = [name.removeprefix(below) for name in names if name.startswith(below)]
    if config.get("data_files") is not None:
        patterns = _patterns(source, config["data_files"])
        splits = {split: _matching(source, own, inner) for split, own in patterns.items()}
    else:
        data = [name for name in inner if _is_data(name)]
        splits = _sharded(source, data) or _by_keyword(source, data) or ({"train": data} if data else {})
    if not splits:
        raise _refusal(source, f"no file in it ends in {', '.join(STRICT)}", names)
    return {split: [below + name for name in own] for split, own in splits.items()}


def _sharded(source: str, names: Sequence[str]) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {}
    for name in names:
        folder, _, last = name.partition("/")
        if folder == "data" and "/" not in last and (found := _SHARD.fullmatch(last)):
            if not _SPLIT.fullmatch(found[1]):
                raise _refusal(source, f"{found[1]!r} cannot be the name of a split", [name])
            splits.setdefault(found[1], []).append(name)
    return {split: splits[split] for split in [*_KEYWORDS, *sorted(splits)] if split in splits}


def _by_keyword(source: str, names: Sequence[str]) -> dict[str, list[str]]:
    """Splits by names of folders, or else of files; a keyword stands at the beginning or behind a separator."""
    apart = "[-._ 0-9]"
    of_folder = ("**/{0}/**", "**/{0}{1}*/**", "**/*{1}{0}/**", "**/*{1}{0}{1}*/**")
    of_file = ("**/{0}{1}*", "**/*{1}{0}{1}*")
    for forms in (of_folder, of_file):
        splits = {
            split: _matching(source, [form.format(word, apart) for word in words for form in forms], names)
            for split, words in _KEYWORDS.items()
        }
        if found := {split: own for split, own in splits.items() if own}:
            return found
    return {}


def _matching(source: str, patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """The files of each pattern after those of the one before, each once."""
    found: dict[str, None] = {}
    for pattern in patterns:
        own = posixpath.normpath(pattern)
        if own.startswith(("/", "../")) or "://" in pattern or "::" in pattern:
            raise _refusal(source, f"its README.md names {pattern!r}, which is not in the folder", names)
        try:
            expression = re.compile(glob_translate(own))
        except (ValueError, re.error) as error:
            raise _refusal(source, f"its README.md names {pattern!r}: {one_line(error)}", names) from error
        matched = [name for name in names if name == own or (expression.fullmatch(name) and _is_data(name))]
        if not matched and not re.search(r"[*?\[]", own):
            raise _refusal(source, f"its README.md names {pattern!r}, which it does not have", names)
        found |= dict.fromkeys(matched)
    return list(found)


def _patterns(source: str, given: Any) -> dict[str, list[str]]:
    """What `data_files` of a README.md say: a pattern, several, or several for each split."""
    listed = given if isinstance(given, list) else [given]
    if all(isinstance(one, str) for one in listed):
        return {"train": listed}
    found: dict[str, list[str]] = {}
    for one in listed:
        path = one.get("path") if isinstance(one, Mapping) else None
        paths: list[Any] = path if isinstance(path, list) else [path]
        if path is None or set(one) != {"split", "path"} or not all(isinstance(own, str) for own in paths):
            raise _refusal(source, f"data_files in its README.md have {shortened(one)}, not split and path", [])
        if str(one["split"]) in found:
            raise _refusal(source, f"data_files in its README.md have the split {one['split']!r} twice", [])
        found[str(one["split"])] = paths
    return found


def _config_of(source: str, heads: Sequence[Path], subset: str | None) -> Mapping[str, Any]:
    """The configuration that was asked for, or the default one, of those that a README.md has; empty without."""
    configs = _front_matter(source, heads).get("configs") or []
    if not isinstance(configs, list) or not all(isinstance(one, Mapping) and "config_name" in one for one in configs):
        raise _refusal(source, "configs in its README.md are no list of entries with config_name", [])
    by_name = {str(one["config_name"]): one for one in configs}
    if len(by_name) < len(configs):
        raise _refusal(source, "configs in its README.md have a config_name twice", [])
    known = list(by_name) or ["default"]
    if subset is None:
        default = [
            name for name, one in by_name.items() if len(configs) == 1 or name == "default" or one.get("default")
        ]
        if configs and len(default) != 1:
            raise PromptError(
                f"{source} has {', '.join(known)}", setting="dataset.subset", value=subset, allowed="one of them"
            )
        subset = default[0] if default else "default"
    if (subset := str(subset)) not in known:
        raise PromptError(
            f"{source}: {nearest(subset, known)}it has {', '.join(known)}", setting="dataset.subset", value=subset
        )
    config: Mapping[str, Any] = by_name.get(subset, {})
    return config


def _front_matter(source: str, heads: Sequence[Path]) -> Mapping[str, Any]:
    found: dict[str, Any] = {}
    for place in heads:
        is_page = place.suffix == ".md"
        try:
            text = place.read_text(encoding="utf-8-sig")
            head = _FRONT_MATTER.match(text) if is_page else None
            said = yaml.safe_load(head[1] if head else "" if is_page else text)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise _refusal(source, f"{place.name} cannot be read: {one_line(error)}", []) from error
        if isinstance(said, Mapping):
            found |= said
    return found


def _tell_missing(source: str, names: Sequence[str]) -> None:
    """Warn of files that are some of a greater number by their names."""
    there: dict[tuple[str, str], set[str]] = {}
    for found in filter(None, map(_SHARD.fullmatch, names)):
        there.setdefault((found[1], found[3]), set()).add(found[2])
    for (stem, of), numbers in there.items():
        if len(numbers) < int(of):
            log.warning("%s: of the %d files %s-... there are %d", source, int(of), stem, len(numbers))


def _refusal(source: str, reason: str, names: Sequence[str]) -> PromptError:
    has = f"; it has {shortened(', '.join(names))[1:-1]}" if names else ""
    return PromptError(f"{reason}{has}", setting="dataset.source", value=source)
