"""Data sets of the Hugging Face hub: `OWNER/NAME` or `OWNER/NAME@REVISION`, with a subset and a split.

Their files are those of a folder (`folders.py`), which the hub lists and its client downloads once. What has no strict
reader here, such as Arrow, in folders too, is left to the `datasets` library: an extra, because the rest needs none. A
single file, `hf://datasets/OWNER/NAME@REVISION/FILE`, is a place like others.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
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
_DEFAULT = "main"
# Files that are fetched beside each other.
_AT_ONCE = 8


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
    with _quiet("huggingface_hub"):
        listed = _listed(source)
        heads = [_fetched(source, listed, name) for name in DESCRIBED_IN if name in listed.names]
        script = f"{_named(source)[0].partition('/')[2]}.py"
        if script in listed.names:
            raise PromptError(
                f"which rows it has says a program of its own ({script}), which is not run: name one of its files, as "
                "hf://datasets/OWNER/NAME@REVISION/FILE",
                setting="dataset.source",
                value=source,
            )
        cuts = chosen_files(source, listed.names, heads, subset, split)
        if cuts is None:
            return None
        names = list(dict.fromkeys(name for cut in cuts for name in cut.files))
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            places = list(pool.map(partial(_fetched, source, listed), names))
    return Folder(places[0].parents[len(PurePosixPath(names[0]).parts) - 1], cuts)


@contextmanager
def _quiet(library: str) -> Iterator[None]:
    """Each retry would be announced over two lines; what came of it is told by us."""
    logger = logging.getLogger(library)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _listed(source: str) -> _Listed:
    """What the hub lists, or listed when it was asked last; or what a person downloaded."""
    if constants.HF_HUB_OFFLINE:
        return _listed_before(source)
    name, revision = _named(source)
    commit = _commit_of(source)
    try:
        names = HfApi().list_repo_files(name, repo_type="dataset", revision=commit)
    # Whatever its client is built on has errors of its own.
    except Exception as error:
        raise _not_given(source, _reason(error)) from error
    listed = _Listed(commit, sorted(names))
    for kept in (revision or _DEFAULT, commit):
        _keep(listed, _place(name, kept))
    return listed


def _place(name: str, revision: str) -> Path:
    """Where what the hub listed is kept."""
    return Path(constants.HF_ASSETS_CACHE) / "neg_service" / name / f"{revision.replace('/', '--')}.json"


def _keep(listed: _Listed, place: Path) -> None:
    """Keep a list for times without the hub, where the cache can be written; others may write and read it meanwhile."""
    own = place.with_suffix(f".{os.getpid()}")
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        own.write_text(json.dumps(listed), encoding="utf-8")
        own.replace(place)


def _kept(place: Path) -> _Listed | None:
    with suppress(OSError, ValueError, TypeError):
        return _Listed(*json.loads(place.read_text(encoding="utf-8")))
    return None


def _listed_before(source: str) -> _Listed:
    """The list that was kept; after a later download by a person, of that."""
    name, revision = _named(source)
    place = _place(name, revision or _DEFAULT)
    listed = _kept(place)
    try:
        folder = Path(snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True))
    # Names that the hub's client does not take, and a cache that cannot be read, too.
    except Exception as error:
        if listed is None:
            raise _not_given(source, _reason(error)) from error
        return listed
    if listed is not None and (listed.commit == folder.name or not _is_later(folder, revision, place)):
        return listed
    if (listed := _kept(_place(name, folder.name))) is None:
        log.warning("%s: what was downloaded of it is taken for all of it: %s", source, folder)
        names = [one.relative_to(folder).as_posix() for one in folder.rglob("*") if not one.is_dir()]
        listed = _Listed(folder.name, sorted(names))
    return listed


def _is_later(folder: Path, revision: str | None, place: Path) -> bool:
    """Whether a branch or tag came to what it is here after a list was kept: this program moves none."""
    reference = folder.parents[1] / "refs" / (revision or _DEFAULT)
    return reference.is_file() and reference.stat().st_mtime > place.stat().st_mtime


def _fetched(source: str, listed: _Listed, file: str) -> Path:
    """Where a file lies on this machine."""
    name, _ = _named(source)
    try:
        return Path(hf_hub_download(name, file, repo_type="dataset", revision=listed.commit))
    # As above.
    except Exception as error:
        raise PromptError(
            f"the hub did not give its file {file!r}: {_reason(error)}", setting="dataset.source", value=source
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, and it was not downloaded before"
    return "it does not answer" if is_silence(error) else without_secrets(one_line(error))


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
            revision = _commit_of(source)
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


def _commit_of(source: str) -> str:
    """The commit of a revision: one question with a limit, because later ones would be repeated for minutes."""
    name, revision = _named(source)
    try:
        return str(HfApi().dataset_info(name, revision=revision, timeout=_HUB_SECONDS).sha)
    except GatedRepoError as error:
        raise _not_given(source, "it asks for an agreement on its page, and for HF_TOKEN of who agreed") from error
    except RevisionNotFoundError as error:
        raise _not_given(source, f"it has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise _not_given(source, "it has none of this name, or one that needs HF_TOKEN in the environment") from error
    # As above.
    except Exception as error:
        reason = f"{_reason(error)}; with HF_HUB_OFFLINE=1 what was downloaded before is read"
        raise _not_given(source, reason) from error


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
