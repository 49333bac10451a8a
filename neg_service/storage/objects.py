"""Object storage: whole objects under keys, in a local directory or in S3.

An object is visible when it is complete and not before: on S3 a put is one request (or a multipart upload, which
shows nothing until it is completed); on a local disk the bytes are written beside their place, synced, and renamed.
Putting the same key twice replaces it. There is nothing else to know, and no lock.

Every operation can be repeated, and is: a request for some seconds by the S3 client, an operation for as long as a
`PatientStore` is told to. S3 credentials come from the environment or the usual AWS chain, never from configuration.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import aiohttp
import pyarrow.fs as pafs
import s3fs
from botocore.exceptions import BotoCoreError, HTTPClientError, NoCredentialsError

from neg_service.errors import DestinationError, StorageError, one_line

log = logging.getLogger(__name__)

T = TypeVar("T")

# What no retry mends: no space, no permission, a read-only disk, a file where a folder is needed.
_FINAL = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}


# Every request is safe to repeat: a put replaces itself. After throttling, server errors, resets and timeouts botocore
# waits longer and longer, with jitter; a server that is gone for longer than that is a PatientStore's business.
_CONNECT_SECONDS = 10
_REQUESTS = {
    "connect_timeout": _CONNECT_SECONDS,
    "read_timeout": 60,
    "retries": {"mode": "standard", "total_max_attempts": 6},
}
# Between an operation that failed and its repetition: doubled each time, up to this, and jittered.
_LONGEST_PAUSE_SECONDS = 30.0
# What a writer leaves behind when it is killed in the middle of a put is its own for so long.
UNFINISHED_SECONDS = 3600.0


@dataclass(frozen=True)
class Entry:
    """An object in a listing; `modified` in seconds since 1970, by the clock of the server or the disk."""

    key: str
    size: int
    modified: float


class ObjectStore(Protocol):
    """Objects under one URI. Keys are relative, with forward slashes."""

    uri: str

    def put(self, key: str, data: bytes) -> None:
        """Write a whole object, replacing what is there."""
        ...

    def get(self, key: str) -> bytes | None:
        """A whole object, or None if there is none."""
        ...

    def list(self, prefix: str) -> list[Entry]:
        """What is below the folder `prefix`, sorted by key; unfinished objects are not among it."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; none there is fine."""
        ...

    def check(self) -> None:
        """Refuse a place that is none, or that does not let us in (DestinationError); writes nothing."""
        ...

    def clear_unfinished(self, older_than_seconds: float = UNFINISHED_SECONDS) -> int:
        """Remove what killed writers left of objects that never became visible; how many there were."""
        ...

    def arrow(self) -> tuple[pafs.FileSystem, str]:
        """The same place for pyarrow: a file system and the path of the URI in it."""
        ...


def open_store(uri: str, endpoint_url: str | None = None, patience_seconds: float = 0) -> ObjectStore:
    """The object store at a URI: a local path, file://, or s3://bucket/prefix; see PatientStore for the patience.

    Raises:
        DestinationError: an unknown scheme, or no bucket.
    """
    parts = urlsplit(uri)
    store: ObjectStore
    if parts.scheme in ("", "file"):
        store = LocalStore(Path(parts.path if parts.scheme else uri))
    elif parts.scheme == "s3":
        if not parts.netloc:
            raise DestinationError(f"storage.uri={uri}: names no bucket; give s3://bucket/prefix")
        store = S3Store(uri, endpoint_url)
    else:
        raise DestinationError(f"storage.uri={uri}: scheme {parts.scheme!r} is unknown; use a path, file:// or s3://")
    return PatientStore(store, patience_seconds) if patience_seconds else store


# The leading dot keeps an unfinished file out of every Parquet reader's sight, and out of `list`.
_SCRATCH = ".unfinished."


class LocalStore:
    """Objects as files of a local directory."""

    def __init__(self, root: Path) -> None:
        """`root` need not exist yet."""
        self.root = root.expanduser().absolute()
        self.uri = str(self.root)

    def put(self, key: str, data: bytes) -> None:
        """Write beside, sync, rename: a reader or a crash at any moment sees the old object or the new one."""
        target = self.root / key
        scratch = target.with_name(f"{_SCRATCH}{target.name}.{uuid.uuid4().hex}")
        with self._translated():
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with scratch.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                scratch.replace(target)
            except BaseException:
                scratch.unlink(missing_ok=True)
                raise
            self._sync_folder(target.parent)

    def get(self, key: str) -> bytes | None:
        """Read a whole file."""
        with self._translated():
            try:
                return (self.root / key).read_bytes()
            except FileNotFoundError:
                return None

    def list(self, prefix: str) -> list[Entry]:
        """Files below a folder."""
        found = []
        with self._translated():
            for path in (self.root / prefix).rglob("*"):
                try:
                    known = path.stat()
                except FileNotFoundError:
                    # Renamed or deleted by another process since it was listed.
                    continue
                if path.is_file() and not path.name.startswith("."):
                    found.append(Entry(path.relative_to(self.root).as_posix(), known.st_size, known.st_mtime))
        return sorted(found, key=lambda entry: entry.key)

    def delete(self, key: str) -> None:
        """Remove a file."""
        with self._translated():
            (self.root / key).unlink(missing_ok=True)
            # As in an object store, a folder that holds nothing does not exist.
            for folder in (self.root / key).parents:
                if not folder.is_relative_to(self.root) or not folder.is_dir() or any(folder.iterdir()):
                    break
                folder.rmdir()

    def check(self) -> None:
        """Anything on the way that is no folder is found here."""
        with self._translated():
            for folder in (self.root, *self.root.parents):
                if folder.exists():
                    if not folder.is_dir():
                        raise NotADirectoryError(errno.ENOTDIR, f"{folder} is a file, not a folder")
                    return

    def clear_unfinished(self, older_than_seconds: float = UNFINISHED_SECONDS) -> int:
        """Files beside their place that were never renamed."""
        cleared = 0
        with self._translated():
            for path in self.root.rglob(f"{_SCRATCH}*"):
                if path.stat().st_mtime <= time.time() - older_than_seconds:
                    path.unlink(missing_ok=True)
                    cleared += 1
        return cleared

    def arrow(self) -> tuple[pafs.FileSystem, str]:
        """pyarrow's own local file system."""
        return pafs.LocalFileSystem(), str(self.root)

    def _sync_folder(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            text = f"storage.uri={self.uri}: {error.strerror or error}"
            raise DestinationError(text) if error.errno in _FINAL else StorageError(text) from error


class S3Store:
    """Objects of a bucket below a prefix, through s3fs."""

    def __init__(self, uri: str, endpoint_url: str | None = None) -> None:
        """Connects lazily: nothing is asked of the server yet."""
        self.uri = uri.rstrip("/")
        self.root = self.uri.removeprefix("s3://")
        self.endpoint_url = endpoint_url
        # Listings are never cached: another process may be writing.
        self._files: Any = s3fs.S3FileSystem(
            endpoint_url=endpoint_url, use_listings_cache=False, config_kwargs=_REQUESTS
        )
        # s3fs repeats what botocore has given up on; once more is for bodies that break off, which botocore never sees.
        self._files.retries = 2

    def put(self, key: str, data: bytes) -> None:
        """One request, or a multipart upload that shows nothing until complete."""
        with self._translated():
            self._files.pipe_file(f"{self.root}/{key}", data)

    def get(self, key: str) -> bytes | None:
        """Fetch a whole object."""
        with self._translated():
            try:
                data: bytes = self._files.cat_file(f"{self.root}/{key}")
                return data
            except FileNotFoundError:
                return None

    def list(self, prefix: str) -> list[Entry]:
        """What is below a folder, as the server has it now."""
        with self._translated():
            try:
                found = self._files.find(f"{self.root}/{prefix}", detail=True)
            except FileNotFoundError:
                return []
            return sorted(
                (
                    Entry(path.removeprefix(f"{self.root}/"), int(known["size"]), known["LastModified"].timestamp())
                    for path, known in found.items()
                ),
                key=lambda entry: entry.key,
            )

    def delete(self, key: str) -> None:
        """Remove an object."""
        with self._translated():
            try:
                self._files.rm_file(f"{self.root}/{key}")
            except FileNotFoundError:
                return

    def check(self) -> None:
        """The server answers as S3 does, the bucket exists, and the key may list it."""
        self._require_listener()
        strange = DestinationError(
            f"{self._where()}: something answers there, but not as an S3 server does; check storage.endpoint_url"
        )
        with self._translated():
            try:
                reply = self._files.call_s3("list_objects_v2", Bucket=self.root.partition("/")[0], MaxKeys=1)
            except (ValueError, RecursionError):
                # What is no URL, and pages that lead on to other pages, where a client of S3 goes round and round.
                raise strange from None
            except HTTPClientError as error:
                if isinstance(error.kwargs.get("error"), aiohttp.TooManyRedirects):
                    raise strange from error
                raise
            except OSError as error:
                # An error without a code is no error of S3's.
                if "An error occurred ()" in str(error):
                    raise strange from error
                raise
        # Of a page in HTML the parser understands nothing, and finds nothing wrong.
        if "IsTruncated" not in reply:
            raise strange

    def clear_unfinished(self, older_than_seconds: float = UNFINISHED_SECONDS) -> int:
        """Multipart uploads that were never completed; their bytes are kept, and billed, until they are aborted."""
        bucket, _, prefix = self.root.partition("/")
        cleared, place = 0, {"Bucket": bucket, "Prefix": f"{prefix}/"}
        until = datetime.now(UTC).timestamp() - older_than_seconds
        with self._translated():
            while True:
                reply = self._files.call_s3("list_multipart_uploads", **place)
                for upload in reply.get("Uploads", []):
                    if upload["Initiated"].timestamp() <= until:
                        key, number = upload["Key"], upload["UploadId"]
                        self._files.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=number)
                        cleared += 1
                if not reply.get("IsTruncated"):
                    return cleared
                place |= {"KeyMarker": reply["NextKeyMarker"], "UploadIdMarker": reply["NextUploadIdMarker"]}

    def arrow(self) -> tuple[pafs.FileSystem, str]:
        """s3fs behind pyarrow's interface, so that both see the same credentials and endpoint."""
        # Parquet readers know which bytes they want; s3fs would read ahead by tens of megabytes.
        exact = s3fs.S3FileSystem(
            endpoint_url=self.endpoint_url, use_listings_cache=False, config_kwargs=_REQUESTS, default_cache_type="none"
        )
        return pafs.PyFileSystem(pafs.FSSpecHandler(exact)), self.root

    def _require_listener(self) -> None:
        """A name that nobody has and a port where nobody listens are told at once, not after many tries."""
        if self.endpoint_url is None:
            return
        parts = urlsplit(self.endpoint_url)
        try:
            place = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
            socket.create_connection(place, timeout=_CONNECT_SECONDS).close()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DestinationError(f"{self._where()}: no server answers there: {reason}") from error

    def _where(self) -> str:
        at = f" (storage.endpoint_url={self.endpoint_url})" if self.endpoint_url else ""
        return f"storage.uri={self.uri}{at}"

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (PermissionError, FileNotFoundError, NoCredentialsError) as error:
            # The reply to a completed upload was lost, and the upload is not there any more: put it again.
            if "upload" in str(error) and "does not exist" in str(error):
                raise StorageError(f"{self._where()}: {one_line(error)}") from error
            raise DestinationError(f"{self._where()}: {_explained(error)}") from error
        # Refused connections are botocore's own errors, bodies that break off aiohttp's; both are no OSErrors.
        except (OSError, BotoCoreError, aiohttp.ClientError) as error:
            raise StorageError(f"{self._where()}: {one_line(error)}") from error


def _explained(error: Exception) -> str:
    """What the server said, and what to do about it where that is not plain."""
    text = one_line(error)
    if isinstance(error, NoCredentialsError):
        return f"{text}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or another source of the AWS chain"
    if "request time" in text:
        return f"{text.rstrip('.')}: set this machine's clock"
    return text


class PatientStore:
    """Another store, each of whose operations is repeated for a while when it fails in a way that may pass.

    A server that is restarted, or a network that is down for minutes, then costs waiting and nothing else.
    """

    def __init__(self, store: ObjectStore, seconds: float) -> None:
        """`seconds`: how long an operation is repeated, from its first failure on."""
        self._store = store
        self._seconds = seconds
        self.uri = store.uri

    def put(self, key: str, data: bytes) -> None:
        """See ObjectStore."""
        self._patiently(lambda: self._store.put(key, data))

    def get(self, key: str) -> bytes | None:
        """See ObjectStore."""
        return self._patiently(lambda: self._store.get(key))

    def list(self, prefix: str) -> list[Entry]:
        """See ObjectStore."""
        return self._patiently(lambda: self._store.list(prefix))

    def delete(self, key: str) -> None:
        """See ObjectStore."""
        self._patiently(lambda: self._store.delete(key))

    def check(self) -> None:
        """See ObjectStore."""
        self._patiently(self._store.check)

    def clear_unfinished(self, older_than_seconds: float = UNFINISHED_SECONDS) -> int:
        """See ObjectStore."""
        return self._patiently(lambda: self._store.clear_unfinished(older_than_seconds))

    def arrow(self) -> tuple[pafs.FileSystem, str]:
        """See ObjectStore."""
        return self._store.arrow()

    def _patiently(self, operation: Callable[[], T]) -> T:
        pause, until = 1.0, None
        while True:
            try:
                return operation()
            except StorageError as error:
                now = time.monotonic()
                until = now + self._seconds if until is None else until
                if now >= until:
                    raise
                log.warning("%s; trying again for %.0f s", error, until - now)
                # Many replicas lose the same server at the same moment; they should not all come back at once.
                time.sleep(min(pause * random.uniform(0.5, 1.5), until - now))
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
