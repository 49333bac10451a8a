"""Files that a user names, at any path or fsspec URI: fetched whole, with every failure told in one line.

What their content says: `contents.py`.
"""

from __future__ import annotations

import gzip
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
from fsspec import AbstractFileSystem
from fsspec.implementations.tar import TarFileSystem

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

_DAMAGED = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, EOFError, struct.error,
    aiohttp.ClientPayloadError,
)  # fmt: skip
# fsspec's file systems raise whatever comes up in them, of an address of a form that they do not expect, too.
_UNREADABLE = (
    OSError, ValueError, ImportError, LookupError, RuntimeError, TypeError, AttributeError, BotoCoreError,
    aiohttp.ClientError, *_DAMAGED,
)  # fmt: skip
_RENEW = "the credentials in the environment are of a session that is over or another's: renew them"
_CREDENTIALS = {
    "ExpiredToken": _RENEW,
    "ExpiredTokenException": _RENEW,
    "TokenRefreshRequired": _RENEW,
    "RequestExpired": _RENEW,
    "InvalidToken": "AWS_SESSION_TOKEN does not belong to the keys in the environment",
    "InvalidAccessKeyId": "AWS_ACCESS_KEY_ID is unknown there",
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY, perhaps",
    "RequestTimeTooSkewed": "set this machine's clock",
    "AccessDenied": "the key in the environment may not read it",
    "403": "the key in the environment may not read it",
}
_PIECE = 2**20


def read_input(key: str, source: str, error: type[ConfigurationError] = ConfigurationError) -> bytes:
    """The content of the file `source`, which the configuration key `key` names.

    Raises:
        ConfigurationError: it cannot be read; of the class `error`.
    """
    with _told(key, source, error):
        return _content(*_opened(key, source, error))


def read_if_there(key: str, source: str, error: type[ConfigurationError] = ConfigurationError) -> bytes | None:
    """The content of the file `source`, or None where there is no such file.

    Raises:
        ConfigurationError: its place cannot be asked, or refuses to say; of the class `error`.
    """
    with _told(key, source, error):
        try:
            return _content(*_opened(key, source, error))
        except FileNotFoundError as problem:
            if _is_silent(_cause(problem)):
                raise
            return None


def parts_of_input(key: str, source: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents, one after the other, of a file, or of all *.parquet files of a folder: a table of results.

    Raises:
        ConfigurationError: it cannot be read.
    """
    with _told(key, source, ConfigurationError):
        files, place = _opened(key, source, ConfigurationError)
        names = [place]
        if files.isdir(place):
            # Listed, not matched: a pattern's characters in a folder's name are the name's own.
            found = files.ls(place, detail=True)
            names = sorted(
                entry["name"] for entry in found if entry["type"] == "file" and suffix_of(entry["name"]) == ".parquet"
            )
    for name in names:
        with _told(key, source, ConfigurationError):
            content = _content(files, name)
        yield name, content


def _content(files: AbstractFileSystem, place: str) -> bytes:
    # In one request, whose reply says why a server refuses, and ends where its header says. s3fs would ask with HEAD,
    # to which nothing is said, and for ranges, which it does not count.
    whole = {"max_concurrency": 1} if "s3" in files.protocol else {}
    content: bytes = files.cat_file(place, **whole)
    if isinstance(files, TarFileSystem):
        # The checksum of a compressed archive stands at its end.
        while files.fo.read(_PIECE):
            pass
    return content


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
        reason = _reason(_cause(problem), shown == source)
        # The storage of results and the place of inputs need not be the same server.
        hint = "; the server, where it is not Amazon's, is named by AWS_ENDPOINT_URL" if shown.startswith("s3") else ""
        raise error(f"{key}={shown}: cannot be read: {reason}{hint}") from problem


def _cause(problem: BaseException) -> BaseException:
    """The problem itself, or what fsspec took for a file that is not there."""
    behind = problem.__cause__ or problem.__context__
    return behind if isinstance(problem, FileNotFoundError) and isinstance(behind, aiohttp.ClientError) else problem


def _is_silent(problem: BaseException) -> bool:
    is_unsafe = isinstance(problem, aiohttp.ClientSSLError)
    return isinstance(problem, aiohttp.ClientConnectionError) and not is_unsafe


def _reason(problem: BaseException, may_be_quoted: bool) -> str:
    """Why a file cannot be read, and what to do about it where that is known."""
    text = one_line(problem) if may_be_quoted else type(problem).__name__
    if _is_silent(problem):
        return "nothing answers there"
    if isinstance(problem, aiohttp.ClientResponseError):
        if problem.status == 404:
            return "no such file"
        advice = ": it needs credentials, or those in the address are wrong or have expired"
        return f"the server says {problem.status} {problem.message}{advice * (problem.status in (401, 403))}"
    reply = getattr(problem.__cause__, "response", None)
    said = reply.get("Error", {}) if isinstance(reply, dict) else {}
    if (code := str(said.get("Code", ""))) in _CREDENTIALS:
        return f"{code}: {' '.join(str(said.get('Message', '')).split()).rstrip('.')}: {_CREDENTIALS[code]}"
    if isinstance(problem, FileNotFoundError):
        return "no such file"
    damaged = "damaged or cut short: " if isinstance(problem, _DAMAGED) else ""
    return f"{damaged}{text}"
