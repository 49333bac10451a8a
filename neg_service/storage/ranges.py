"""Objects of a server as files that pyarrow reads: each read is one request, for the bytes that are wanted."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.fs as pafs

from neg_service.storage.requests import Requests


class RangeFile(io.RawIOBase):
    """An object that is read in ranges; nothing is read ahead or kept, since Parquet readers know what they want."""

    def __init__(self, requests: Requests, path: str, size: int) -> None:
        """`size` in bytes, as the server says."""
        super().__init__()
        self._requests, self._path, self._size, self._at = requests, path, size, 0

    def readable(self) -> bool:
        """It is for reading."""
        return True

    def seekable(self) -> bool:
        """Any place can be read."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Read on from another place."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """So many bytes, or all that are left."""
        end = self._size if size is None or size < 0 else min(self._at + size, self._size)
        if end <= self._at:
            return b""
        data = self._requests.cat_file(self._path, self._at, end)
        self._at += len(data)
        return data


class RangeFiles(pafs.FSSpecHandler):  # type: ignore[misc]  # pyarrow has no types
    """s3fs behind pyarrow's interface, for reading."""

    def open_input_file(self, path: str) -> pa.PythonFile:
        """An object.

        Raises:
            FileNotFoundError: there is none.
        """
        return pa.PythonFile(RangeFile(self.fs, path, int(self.fs.info(path)["size"])), mode="r")

    open_input_stream = open_input_file
