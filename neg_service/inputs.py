"""Files that a user names, at any path or fsspec URI: read whole, with every failure told in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit, urlunsplit

import aiohttp
import fsspec
from botocore.exceptions import BotoCoreError

from neg_service.errors import ConfigurationError, one_line


def read_input(key: str, source: str, error: type[ConfigurationError] = ConfigurationError) -> bytes:
    """The content of the file `source`, which the configuration key `key` names.

    Raises:
        ConfigurationError: it cannot be read; of the class `error`.
    """
    with _told(key, source, error), fsspec.open(source, "rb") as file:
        content: bytes = file.read()
        return content


def exists(key: str, source: str, error: type[ConfigurationError] = ConfigurationError) -> bool:
    """Whether there is a file at `source`.

    Raises:
        ConfigurationError: its place cannot be asked; of the class `error`.
    """
    with _told(key, source, error):
        files, place = fsspec.url_to_fs(source)
        return bool(files.isfile(place))


def is_there(path: str) -> bool:
    """Whether a path of this machine exists; one that cannot be, being too long for one, does not."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def parts_of_input(key: str, source: str) -> list[tuple[str, bytes]]:
    """Names and contents of a file, or of all *.parquet files of a folder, which is a table of results.

    Raises:
        ConfigurationError: it cannot be read.
    """
    with _told(key, source, ConfigurationError):
        files, place = fsspec.url_to_fs(source)
        names = sorted(files.glob(f"{place}/*.parquet")) if files.isdir(place) else [place]
        return [(name, files.cat_file(name)) for name in names]


def suffix_of(source: str) -> str:
    """The ending of a path or URI, in small letters, with its dot."""
    return PurePosixPath(without_credentials(source)).suffix.lower()


def without_credentials(source: str) -> str:
    """A path or URI without the user, password and query that it may carry: fit to be printed and stored."""
    parts = urlsplit(source)
    if not parts.scheme or "://" not in source:
        return source
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


@contextmanager
def _told(key: str, source: str, error: type[ConfigurationError]) -> Iterator[None]:
    shown = without_credentials(source)
    try:
        yield
    except (OSError, ValueError, ImportError, BotoCoreError, aiohttp.ClientError) as problem:
        # What a library says of an address may hold what the address hides.
        reason = one_line(problem) if shown == source else type(problem).__name__
        if isinstance(problem, FileNotFoundError):
            # fsspec says the same of a server that does not answer.
            silent = isinstance(problem.__cause__ or problem.__context__, aiohttp.ClientConnectionError)
            reason = "nothing answers there" if silent else "no such file"
        # The storage of results and the place of inputs need not be the same server.
        hint = "; the server, where it is not Amazon's, is named by AWS_ENDPOINT_URL" if shown.startswith("s3") else ""
        raise error(f"{key}={shown}: cannot be read: {reason}{hint}") from problem
