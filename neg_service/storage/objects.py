"""Object storage: whole objects under keys, in a local directory or in S3.

An object is visible when it is complete and not before: on S3 a put is one request (or a multipart upload, which
shows nothing until it is completed); on a local disk the bytes are written beside their place, synced, and renamed.
Putting the same key twice replaces it. There is nothing else to know, and no lock.

S3 credentials come from the environment or the usual AWS chain, never from configuration.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import pyarrow.fs as pafs
import s3fs
from botocore.exceptions import BotoCoreError, NoCredentialsError

from neg_service.errors import DestinationError, StorageError, one_line

# What no retry mends: no space, no permission, a read-only disk, a file where a folder is needed.
_FINAL = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}


# Every request is safe to repeat: a put replaces itself. After throttling, server errors, resets and timeouts botocore
# waits longer and longer, with jitter; a server that is gone for longer than that is the driver's business.
_PATIENCE = {
    "connect_timeout": 10,
    "read_timeout": 60,
    "retries": {"mode": "standard", "total_max_attempts": 6},
}


class ObjectStore(Protocol):
    """Objects under one URI. Keys are relative, with forward slashes."""

    uri: str

    def put(self, key: str, data: bytes) -> None:
        """Write a whole object, replacing what is there."""
        ...

    def get(self, key: str) -> bytes | None:
        """A whole object, or None if there is none."""
        ...

    def list(self, prefix: str) -> list[str]:
        """Keys below the folder `prefix`, sorted; unfinished objects are not among them."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; none there is fine."""
        ...

    def arrow(self) -> tuple[pafs.FileSystem, str]:
        """The same place for pyarrow: a file system and the path of the URI in it."""
        ...


def open_store(uri: str, endpoint_url: str | None = None) -> ObjectStore:
    """The object store at a URI: a local path, file://, or s3://bucket/prefix.

    Raises:
        DestinationError: an unknown scheme.
    """
    parts = urlsplit(uri)
    if parts.scheme in ("", "file"):
        return LocalStore(Path(parts.path if parts.scheme else uri))
    if parts.scheme == "s3":
        return S3Store(uri, endpoint_url)
    raise DestinationError(f"storage.uri={uri}: scheme {parts.scheme!r} is unknown; use a path, file:// or s3://")


class LocalStore:
    """Objects as files of a local directory."""

    def __init__(self, root: Path) -> None:
        """`root` need not exist yet."""
        self.root = root.expanduser().absolute()
        self.uri = str(self.root)

    def put(self, key: str, data: bytes) -> None:
        """Write beside, sync, rename: a reader or a crash at any moment sees the old object or the new one."""
        target = self.root / key
        # The leading dot keeps an unfinished file out of every Parquet reader's sight, and out of `list`.
        scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
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

    def list(self, prefix: str) -> list[str]:
        """Files below a folder."""
        with self._translated():
            files = (path for path in (self.root / prefix).rglob("*") if path.is_file())
            return sorted(path.relative_to(self.root).as_posix() for path in files if not path.name.startswith("."))

    def delete(self, key: str) -> None:
        """Remove a file."""
        with self._translated():
            (self.root / key).unlink(missing_ok=True)
            # As in an object store, a folder that holds nothing does not exist.
            for folder in (self.root / key).parents:
                if not folder.is_relative_to(self.root) or not folder.is_dir() or any(folder.iterdir()):
                    break
                folder.rmdir()

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
            endpoint_url=endpoint_url, use_listings_cache=False, config_kwargs=_PATIENCE
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

    def list(self, prefix: str) -> list[str]:
        """Keys below a folder, as the server has them now."""
        with self._translated():
            try:
                found = self._files.find(f"{self.root}/{prefix}")
            except FileNotFoundError:
                return []
            return sorted(path.removeprefix(f"{self.root}/") for path in found)

    def delete(self, key: str) -> None:
        """Remove an object."""
        with self._translated():
            try:
                self._files.rm_file(f"{self.root}/{key}")
            except FileNotFoundError:
                return

    def arrow(self) -> tuple[pafs.FileSystem, str]:
        """s3fs behind pyarrow's interface, so that both see the same credentials and endpoint."""
        return pafs.PyFileSystem(pafs.FSSpecHandler(self._files)), self.root

    @contextmanager
    def _translated(self) -> Iterator[None]:
        at = f" (storage.endpoint_url={self.endpoint_url})" if self.endpoint_url else ""
        try:
            yield
        except (PermissionError, FileNotFoundError, NoCredentialsError) as error:
            raise DestinationError(f"storage.uri={self.uri}{at}: {one_line(error)}") from error
        # botocore's own errors, such as a refused connection, are not OSErrors.
        except (OSError, BotoCoreError) as error:
            raise StorageError(f"storage.uri={self.uri}{at}: {one_line(error)}") from error
