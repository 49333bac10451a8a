"""Data sets of the Hugging Face hub: `OWNER/NAME` or `OWNER/NAME@REVISION`, with a subset and a split.

Their files are those of a folder (`folders.py`), which the hub lists and its client downloads once. What has no strict
reader here, such as Arrow, in folders too, is left to the `datasets` library: an extra, because the rest needs none. A
single file, `hf://datasets/OWNER/NAME@REVISION/FILE`, is a place like others.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from huggingface_hub import HfApi, cached_assets_path, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from neg_service.errors import PromptError, one_line
from neg_service.places import absolute, is_here
from neg_service.prompts.folders import DESCRIBED_IN, Folder, chosen_files, chosen_split
from neg_service.redaction import without_secrets
from neg_service.refusals import is_silence

log = logging.getLogger(__name__)

_NAMED = re.compile(r"([\w-][\w.-]*/[\w.-]+?)(?:@([\w./-]+))?")
# A revision may be a reference with slashes, as of pull requests.
_OF_FILE = re.compile(r"hf://datasets/[^/@]+/[^/@]+@(refs/[^/]+/[^/]+|[^/]+)/", re.IGNORECASE)
# The hub answers in less than a second, or not at all.
_HUB_SECONDS = 10.0
_ROWS = 1000


def is_data_set(source: str) -> bool:
    """Whether a source is a data set of the hub by its form, or a folder."""
    if is_here(source):
        return Path(absolute(source)).is_dir()
    return _NAMED.fullmatch(source) is not None


def revision_of(source: str) -> str | None:
    """The branch, tag or commit of the hub that a source names, if it does."""
    if found := _OF_FILE.match(source):
        return found[1]
    named = None if is_here(source) else _NAMED.fullmatch(source)
    return named[2] if named else None


@dataclass(frozen=True)
class HubTable:
    """The rows of one split; `columns` are all that they have."""

    dataset: Any
    columns: Sequence[str]

    def rows(self, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Some columns of all rows, as they are stored: nothing is decoded."""
        for part in self.dataset.select_columns(list(wanted)).with_format("arrow").iter(_ROWS):
            yield from part.to_pylist()


class _Listed(NamedTuple):
    """The files of a data set at one commit."""

    commit: str | None
    names: list[str]


def open_listed(source: str, subset: str | None, split: Any) -> Folder | None:
    """The files of a split of a data set of the hub, downloaded where they are not here yet.

    None where only the `datasets` library has a reader of their format.

    Raises:
        PromptError: the hub does not answer or does not have it, or subset or split are not among its own.
    """
    # Each retry would be announced over two lines; what came of it is told below.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    listed = _listed(source)
    heads = [_fetched(source, listed, name) for name in DESCRIBED_IN if name in listed.names]
    cuts = chosen_files(source, listed.names, heads, subset, split)
    if cuts is None:
        return None
    place = Path()
    for name in dict.fromkeys(name for cut in cuts for name in cut.files):
        place = _fetched(source, listed, name).parents[len(PurePosixPath(name).parts) - 1]
    return Folder(place, cuts)


def _listed(source: str) -> _Listed:
    """What the hub lists, or listed when it was asked last; or what a person downloaded whole."""
    name, revision = _named(source)
    place = cached_assets_path("neg_service", name, "listed") / f"{(revision or 'main').replace('/', '--')}.json"
    if not constants.HF_HUB_OFFLINE:
        info = _asked_of_hub(source)
        listed = _Listed(info.sha, [one.rfilename for one in info.siblings or ()])
        place.write_text(json.dumps(listed), encoding="utf-8")
        return listed
    if place.is_file():
        return _Listed(*json.loads(place.read_text(encoding="utf-8")))
    try:
        folder = Path(snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise _not_given(source, "HF_HUB_OFFLINE is set, and it was not downloaded before") from error
    names = [one.relative_to(folder).as_posix() for one in folder.rglob("*") if not one.is_dir()]
    return _Listed(revision, names)


def _fetched(source: str, listed: _Listed, file: str) -> Path:
    """Where a file lies on this machine."""
    name, _ = _named(source)
    try:
        return Path(hf_hub_download(name, file, repo_type="dataset", revision=listed.commit))
    # Whatever its client is built on has errors of its own.
    except Exception as error:
        reason = "it does not answer" if is_silence(error) else without_secrets(one_line(error))
        if isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set, and it was not downloaded before"
        raise PromptError(
            f"the hub did not give its file {file!r}: {reason}", setting="dataset.source", value=source
        ) from error


def open_by_library(source: str, subset: str | None, split: Any) -> HubTable:
    """One split of a folder or a data set of the hub as the `datasets` library reads it.

    Raises:
        PromptError: the library is not installed, the hub does not answer or does not have it, or subset or split are
            not among its own.
    """
    library = _library(source)
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    library.disable_progress_bars()
    # The library's cache knows a file by its time, which a changed one may keep.
    mode = "force_redownload" if is_here(source) else None
    if is_here(source):
        place, revision = absolute(source), None
        if odd := re.search(r"[*?\[\]]|::", place):
            raise PromptError(
                f"has {odd[0]!r} in its path, which the datasets library takes for a pattern: rename the folder, or "
                "store its rows as Parquet",
                setting="dataset.source",
                value=source,
            )
    else:
        place, revision = _named(source)
        if not constants.HF_HUB_OFFLINE:
            revision = _asked_of_hub(source).sha
    try:
        builder = library.load_dataset_builder(place, subset, revision=revision)
        splits = [str(one) for one in (builder.config.data_files or builder.info.splits or ())]
        chosen = chosen_split(source, split, splits)
        log.info("reading split %s of %s", chosen, source)
        builder.download_and_prepare(download_mode=mode)
        dataset = builder.as_dataset(split=chosen)
    except PromptError:
        raise
    # The library reads files of a dozen kinds, and each of their readers raises errors of its own.
    except Exception as error:
        raise _refusal(source, subset, error) from error
    return HubTable(dataset, list(dataset.column_names))


def _library(source: str) -> Any:
    try:
        library = importlib.import_module("datasets")
    except ImportError:
        library = None
    # A folder of this name beside the program can be imported, too.
    if not hasattr(library, "load_dataset_builder"):
        raise PromptError(
            "data sets of the hub, and formats such as Arrow, are read by the datasets library, which is not "
            "installed: pip install 'neg-service[datasets]'; single files need none, such as "
            "hf://datasets/OWNER/NAME@REVISION/FILE.parquet",
            setting="dataset.source",
            value=source,
        )
    return library


def _named(source: str) -> tuple[str, str | None]:
    """The name and the revision."""
    found = _NAMED.fullmatch(source)
    assert found is not None
    return found[1], found[2]


def _asked_of_hub(source: str) -> Any:
    """What the hub says of a data set: one question, because the library would repeat its own for minutes."""
    name, revision = _named(source)
    try:
        return HfApi().dataset_info(name, revision=revision, timeout=_HUB_SECONDS)
    except GatedRepoError as error:
        raise _not_given(source, "it asks for an agreement on its page, and for HF_TOKEN of who agreed") from error
    except RevisionNotFoundError as error:
        raise _not_given(source, f"it has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise _not_given(source, "it has none of this name, or one that needs HF_TOKEN in the environment") from error
    # Whatever its client is built on has errors of its own.
    except Exception as error:
        reason = "it does not answer" if is_silence(error) else without_secrets(one_line(error))
        raise _not_given(source, f"{reason}; with HF_HUB_OFFLINE=1 what was downloaded before is read") from error


def _not_given(source: str, reason: str) -> PromptError:
    return PromptError(
        f"no such folder or file here, and the hub gave no data set: {reason}", setting="dataset.source", value=source
    )


def _refusal(source: str, subset: str | None, error: Exception) -> PromptError:
    # Of an error while it reads a file the library says that there was one.
    words = without_secrets(one_line(error.__cause__ or error)).rstrip(".")
    if isinstance(error, ValueError) and ("BuilderConfig" in str(error) or "onfig name" in str(error)):
        names = re.search(r"\[.*\]", " ".join(str(error).split()))
        known = f"it has {names[0]}" if names else words
        return PromptError(f"{source}: {known}", setting="dataset.subset", value=subset)
    return PromptError(f"cannot be read by the datasets library: {words}", setting="dataset.source", value=source)
