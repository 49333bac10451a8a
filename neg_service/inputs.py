"""Files that a user names, at any path or fsspec URI: read whole, with every failure told in one line."""

from __future__ import annotations

import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

import aiohttp
import fsspec
from botocore.exceptions import BotoCoreError

from neg_service.errors import ConfigurationError, one_line
from neg_service.places import (
    file_name_of,
    is_chain,
    is_here,
    local_path,
    refuse_credentials,
    split_scheme,
    without_credentials,
)

# Of disks, servers and archives; file systems of fsspec raise whatever the library behind them does.
_UNREADABLE = (
    OSError, ValueError, ImportError, EOFError, LookupError, RuntimeError, TypeError, BotoCoreError,
    aiohttp.ClientError, zipfile.BadZipFile, zlib.error, tarfile.TarError, lzma.LZMAError, struct.error,
)  # fmt: skip


def read_input(key: str, source: str, error: type[ConfigurationError] = ConfigurationError) -> bytes:
    """The content of the file `source`, which the configuration key `key` names.

    Raises:
        ConfigurationError: it cannot be read; of the class `error`.
    """
    with _told(key, source, error):
        files, place = _opened(key, source, error)
        with files.open(place, "rb") as file:
            content: bytes = file.read()
            return content


def exists(key: str, source: str, error: type[ConfigurationError] = ConfigurationError) -> bool:
    """Whether there is a file at `source`.

    Raises:
        ConfigurationError: its place cannot be asked; of the class `error`.
    """
    with _told(key, source, error):
        files, place = _opened(key, source, error)
        return bool(files.isfile(place))


def parts_of_input(key: str, source: str) -> list[tuple[str, bytes]]:
    """Names and contents of a file, or of all *.parquet files of a folder, which is a table of results.

    Raises:
        ConfigurationError: it cannot be read.
    """
    with _told(key, source, ConfigurationError):
        files, place = _opened(key, source, ConfigurationError)
        # Listed and not globbed, because in a folder's own name a bracket is a bracket.
        listed = files.ls(place, detail=False) if files.isdir(place) else None
        names = [place] if listed is None else sorted(name for name in listed if suffix_of(name) == ".parquet")
        return [(name, files.cat_file(name)) for name in names]


def suffix_of(source: str) -> str:
    """The ending of a path or URI, in small letters, with its dot."""
    return PurePosixPath(file_name_of(source)).suffix.lower()


def _opened(key: str, source: str, error: type[ConfigurationError]) -> tuple[Any, str]:
    """A file system of fsspec and the place in it, with no character of a path or key taken for anything else.

    fsspec itself takes `::` for a chain everywhere, and expands patterns here and there.
    """
    if is_here(source) or not is_chain(source):
        path = local_path(source, key, error)
        if path is not None:
            return fsspec.filesystem("file"), str(path.absolute())
        scheme, rest = split_scheme(source)
        if scheme == "s3" and not rest.partition("/")[0]:
            raise error(f"{key}={source}: names no bucket; give s3://bucket/key")
        if scheme == "s3" and "?versionId=" not in rest:
            return fsspec.filesystem("s3"), rest
    # An archive that was changed since it was opened is another one.
    files, place = fsspec.url_to_fs(source, skip_instance_cache=is_chain(source))
    return files, place


@contextmanager
def _told(key: str, source: str, error: type[ConfigurationError]) -> Iterator[None]:
    refuse_credentials(key, source, error)
    shown = without_credentials(source)
    try:
        yield
    except _UNREADABLE as problem:
        # What a library says of an address may hold what the address hides.
        reason = one_line(problem) if shown == source else type(problem).__name__
        if isinstance(problem, FileNotFoundError):
            # fsspec says the same of a server that does not answer.
            silent = isinstance(problem.__cause__ or problem.__context__, aiohttp.ClientConnectionError)
            reason = "nothing answers there" if silent else "no such file"
        # The storage of results and the place of inputs need not be the same server.
        hint = "; the server, where it is not Amazon's, is named by AWS_ENDPOINT_URL" if shown.startswith("s3") else ""
        raise error(f"{key}={shown}: cannot be read: {reason}{hint}") from problem
