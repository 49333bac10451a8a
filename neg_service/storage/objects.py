"""Object storage: whole objects under keys; what a store is, and the one on a local disk.

An object is visible when it is complete and not before: on S3 a put is one request (or a multipart upload, which
shows nothing until it is completed); on a local disk the bytes are written beside their place, synced, and renamed.
Putting the same key twice replaces it. There is nothing else to know, and no lock.

Every operation can be repeated, and is: a request for some seconds by the S3 client (`s3.py`), an operation for as long
as a `RetryingStore` is told to (`retries.py`), unless it gets on (`waiting.py`). `stores.py` opens the store that a URI
names.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow.fs as pafs

from neg_service.errors import DestinationError, StorageError
from neg_service.places import argument

# What no retry mends: no space, no permission, a read-only disk, a file where a folder is needed, an impossible name.
_FINAL = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR,
    errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL,
}  # fmt: skip
# Of file systems that know no locks, as some of clusters.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


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
    # How a command names it, for messages that tell what to run next.
    settings: str

    def put(self, key: str, data: bytes) -> None:
        """Write a whole object, replacing what is there."""
        ...

    def get(self, key: str) -> bytes | None:
        """A whole object, or None if there is none."""
        ...

    def replace(self, key: str, old: bytes, new: bytes) -> bool:
        """Write a whole object in the place of one that has the bytes `old`; False if it has others, or is gone."""
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


# The leading dot keeps an unfinished file out of every Parquet reader's sight, and out of `list`.
_SCRATCH = ".unfinished."


class LocalStore:
    """Objects as files of a local directory."""

    def __init__(self, root: Path, *, key: str = "storage.uri") -> None:
        """`root` need not exist yet; `key` is the setting that names it, for messages."""
        self._key = key
        self.root = root.expanduser().absolute()
        self.uri = str(self.root)
        self.settings = argument("run", self.uri)

    def put(self, key: str, data: bytes) -> None:
        """Write beside, sync, rename: a reader or a crash at any moment sees the old object or the new one."""
        with self._translated():
            self._write(self.root / key, data)

    def get(self, key: str) -> bytes | None:
        """Read a whole file."""
        with self._translated():
            try:
                return (self.root / key).read_bytes()
            except FileNotFoundError:
                return None

    def replace(self, key: str, old: bytes, new: bytes) -> bool:
        """Under a lock of the directory, which all who replace take."""
        target = self.root / key
        with self._translated():
            try:
                with _locked(target.parent):
                    if target.read_bytes() != old:
                        return False
                    self._write(target, new)
                    return True
            except FileNotFoundError:
                return False

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

    def _write(self, target: Path, data: bytes) -> None:
        scratch = target.with_name(f"{_SCRATCH}{target.name}.{uuid.uuid4().hex}")
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
            kind = DestinationError if error.errno in _FINAL else StorageError
            raise kind(str(error.strerror or error), setting=self._key, value=self.uri) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone among those who lock this folder, on whatever machine; on file systems without locks not alone."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(descriptor)
