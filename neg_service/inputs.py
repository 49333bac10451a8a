"""Files that a user names, at any path or fsspec URI: fetched whole, with every failure told in one line.

What their content says: `contents.py`.
"""

from __future__ import annotations

import gzip
import io
import lzma
import posixpath
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import aiohttp
import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.tar import TarFileSystem
from fsspec.implementations.zip import ZipFileSystem

from neg_service.errors import ConfigurationError, NegServiceError, one_line
from neg_service.places import (
    file_name_of,
    is_chain,
    is_here,
    local_path,
    refuse_credentials,
    split_scheme,
    without_credentials,
)
from neg_service.refusals import advice_of, is_silence

_DAMAGED = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, EOFError, struct.error,
    aiohttp.ClientPayloadError,
)  # fmt: skip
_PIECE = 2**20


def read_input(key: str, source: str, error: type[ConfigurationError] = ConfigurationError) -> bytes:
    """The content of the file `source`, which the configuration key `key` names.

    Raises:
        ConfigurationError: it cannot be read; of the class `error`.
    """
    with _told(key, source, error):
        return _content(*_opened(key, source, error))


@contextmanager
def opened_input(key: str, source: str, error: type[ConfigurationError] = ConfigurationError) -> Iterator[BinaryIO]:
    """The file `source`, to be read in pieces: on this machine where it lies, from elsewhere fetched whole before.

    Raises:
        ConfigurationError: it cannot be read; of the class `error`.
    """
    with ExitStack() as until_read:
        with _told(key, source, error):
            files, place = _opened(key, source, error)
            file: BinaryIO
            if isinstance(files, LocalFileSystem):
                file = until_read.enter_context(Path(place).open("rb"))
            else:
                file = io.BytesIO(_content(files, place))
        yield file


def read_if_there(key: str, source: str, error: type[ConfigurationError] = ConfigurationError) -> bytes | None:
    """The content of the file `source`, or None where there is no such file.

    Raises:
        ConfigurationError: its place cannot be asked, or refuses to say; of the class `error`.
    """
    with _told(key, source, error):
        try:
            return _content(*_opened(key, source, error))
        except FileNotFoundError as problem:
            if is_silence(_cause(problem)):
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
            names = sorted(entry["name"] for entry in found if entry["type"] == "file" and _is_part(entry["name"]))
    for name in names:
        with _told(key, source, ConfigurationError):
            content = _content(files, name)
        yield name, content


def _is_part(name: str) -> bool:
    """Whether a file of a table's folder is of the table; hidden ones are what systems and tools leave beside files."""
    return suffix_of(name) == ".parquet" and not file_name_of(name).startswith(".")


def _content(files: AbstractFileSystem, place: str) -> bytes:
    # In one request, whose reply says why a server refuses, and ends where its header says. s3fs would ask with HEAD,
    # to which nothing is said, and for ranges, which it does not count.
    whole = {"max_concurrency": 1} if "s3" in files.protocol else {}
    content: bytes = files.cat_file(place, **whole)
    # A copy that is kept stands before what it is of.
    archive = getattr(files, "fs", files)
    names: list[str] = []
    if isinstance(archive, ZipFileSystem):
        names = archive.zip.namelist()
    elif isinstance(archive, TarFileSystem):
        names = archive.tar.getnames()
    if [_in_archive(name) for name in names].count(_in_archive(place)) > 1:
        raise ValueError(f"the archive has two files {place!r}; names must differ")
    if isinstance(files, TarFileSystem):
        # The checksum of a compressed archive stands at its end.
        while files.fo.read(_PIECE):
            pass
    return content


def _in_archive(name: str) -> str:
    """One name for what programs write as `a`, `/a` and `./a`."""
    return posixpath.normpath(name.lstrip("/"))


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
            raise error("names no bucket; give s3://bucket/key", setting=key, value=source)
        if scheme == "s3" and "?versionId=" not in rest:
            return fsspec.filesystem("s3"), rest
        if scheme in ("http", "https"):
            # fsspec would take the address of a host in brackets, [::1], for a chain.
            return fsspec.filesystem(scheme), source
    # An archive that was changed since it was opened is another one.
    files, place = fsspec.url_to_fs(source, skip_instance_cache=is_chain(source))
    return files, place


@contextmanager
def _told(key: str, source: str, error: type[ConfigurationError]) -> Iterator[None]:
    refuse_credentials(key, source, error)
    shown = without_credentials(source)
    try:
        yield
    except NegServiceError:
        raise
    # Any library may stand behind a file system of fsspec, and raises its own errors, of an address of a form that it
    # does not expect, too.
    except Exception as problem:
        # What a library says of an address may hold what the address hides.
        reason = _reason(_better_told(source, _cause(problem)), shown == source)
        # The storage of results and the place of inputs need not be the same server.
        hint = "; the server, where it is not Amazon's, is named by AWS_ENDPOINT_URL" if _is_s3(_last(shown)) else ""
        raise error(f"cannot be read: {reason}{hint}", setting=key, value=shown) from problem


def _last(source: str) -> str:
    """The last link of a chain, from which all bytes come; any other place itself."""
    return source.rpartition("::")[2] if is_chain(source) else source


def _is_s3(source: str) -> bool:
    return split_scheme(source)[0] in ("s3", "s3a")


def _better_told(source: str, problem: BaseException) -> BaseException:
    """What a server of S3 says of the end of a chain: archives and copies ask with HEAD, to which nothing is said."""
    if not is_chain(source) or not _is_s3(_last(source)) or isinstance(problem, _DAMAGED):
        return problem
    try:
        files, place = fsspec.url_to_fs(_last(source))
        files.cat_file(place, start=0, end=1)
    except Exception as told:  # noqa: BLE001 (as above)
        return told
    return problem


def _cause(problem: BaseException) -> BaseException:
    """The problem itself, or what fsspec took for a file that is not there."""
    behind = problem.__cause__ or problem.__context__
    return behind if isinstance(problem, FileNotFoundError) and isinstance(behind, aiohttp.ClientError) else problem


def _reason(problem: BaseException, may_be_quoted: bool) -> str:
    """Why a file cannot be read, and what to do about it where that is known."""
    text = one_line(problem) if may_be_quoted else type(problem).__name__
    if isinstance(problem, aiohttp.ClientResponseError):
        if problem.status == 404:
            return "no such file"
        advice = ": it needs credentials, or those in the address are wrong or have expired"
        return f"the server says {problem.status} {problem.message}{advice * (problem.status in (401, 403))}"
    if (advised := advice_of(problem)) is not None:
        return advised
    if isinstance(problem, _DAMAGED):
        return f"damaged or cut short: {text}"
    if is_silence(problem):
        return "nothing answers there"
    if isinstance(problem, FileNotFoundError):
        return "no such file"
    # Where a library did not expect what it was given, its words say nothing to who gave it.
    is_puzzled = isinstance(problem, TypeError | AttributeError | KeyError | IndexError | AssertionError)
    return f"fsspec cannot open it ({type(problem).__name__}: {text})" if is_puzzled and may_be_quoted else text
