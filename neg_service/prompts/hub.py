"""Data sets of the Hugging Face hub, as the `datasets` library reads them.

`OWNER/NAME` or `OWNER/NAME@REVISION`, with a subset and a split where there are several; and folders whose files have
no strict reader (`folders.py`). The library downloads what it does not have yet, keeps it in its own cache, and is
asked for rows as they are stored. It is an extra, because single files need none, nor do folders of them:
`hf://datasets/OWNER/NAME@REVISION/FILE` is a place like others.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from neg_service.errors import NOT_GIVEN, PromptError, nearest, one_line
from neg_service.places import absolute, is_here
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


def open_data_set(source: str, subset: str | None, split: Any) -> HubTable:
    """One split of a data set, downloaded where it is not here yet.

    Raises:
        PromptError: the library is not installed, the hub does not answer or does not have it, or subset or split are
            not among its own.
    """
    library = _library(source)
    # Each retry would be announced over two lines; what came of it is told below.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
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
        place, revision = _asked_of_hub(source)
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


def _asked_of_hub(source: str) -> tuple[str, str | None]:
    """The name and the commit of a data set: one question, because the library would repeat its own for minutes."""
    named = _NAMED.fullmatch(source)
    assert named is not None
    name, revision = named.groups()
    if constants.HF_HUB_OFFLINE:
        # The library takes what it downloaded before.
        return name, revision
    try:
        return name, HfApi().dataset_info(name, revision=revision, timeout=_HUB_SECONDS).sha
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


def _refusal(source: str, subset: str | None, error: Exception) -> PromptError:
    # Of an error while it reads a file the library says that there was one.
    words = without_secrets(one_line(error.__cause__ or error)).rstrip(".")
    if isinstance(error, ValueError) and ("BuilderConfig" in str(error) or "onfig name" in str(error)):
        names = re.search(r"\[.*\]", " ".join(str(error).split()))
        known = f"it has {names[0]}" if names else words
        return PromptError(f"{source}: {known}", setting="dataset.subset", value=subset)
    return PromptError(f"cannot be read by the datasets library: {words}", setting="dataset.source", value=source)
