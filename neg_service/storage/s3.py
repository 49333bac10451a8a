"""Objects of an S3 bucket below a prefix, through s3fs.

Credentials come from the environment or the usual AWS chain, never from configuration, and are in no message.
"""

from __future__ import annotations

import errno
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pyarrow.fs as pafs
import s3fs
from botocore.exceptions import (
    BotoCoreError,
    HTTPClientError,
    NoCredentialsError,
    NoRegionError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
)
from botocore.parsers import ResponseParserError

from neg_service.errors import DestinationError, StorageError, one_line
from neg_service.places import argument, bucket_and_prefix, refuse_credentials, require_place
from neg_service.refusals import advice_of, said_by_s3
from neg_service.storage.objects import UNFINISHED_SECONDS, Entry
from neg_service.storage.ranges import RangeFiles
from neg_service.storage.requests import Requests, reason_of, traffic_with, within

# Every request is safe to repeat: a put replaces itself. After throttling, server errors, resets and timeouts botocore
# waits longer and longer, with jitter; a server that is gone for longer than that is a RetryingStore's business. When
# nothing moves, `Requests` ends it all much sooner than the time-out of a read.
_CONNECT_SECONDS = 10
_REQUESTS = {
    "connect_timeout": _CONNECT_SECONDS,
    "read_timeout": 120,
    "retries": {"mode": "standard", "total_max_attempts": 6},
}
# At the first look nothing is worth waiting for: an endpoint that takes connections and never replies, say.
_FIRST_LOOK = {**_REQUESTS, "read_timeout": 5}
# What no repetition mends, and what botocore says of it only on its second line.
_WRONG_SETTINGS = (ParamValidationError, ProfileNotFound, NoRegionError, PartialCredentialsError)


class S3Store:
    """Objects of a bucket below a prefix, through s3fs."""

    def __init__(self, uri: str, endpoint_url: str | None = None, *, key: str = "storage.uri") -> None:
        """Connects lazily: nothing is asked of the server yet.

        Raises:
            DestinationError: no bucket, credentials, or a prefix under which nothing would be found again.
        """
        self._key = key
        require_place(uri, key, DestinationError)
        bucket, prefix = bucket_and_prefix(uri, key, DestinationError)
        self.root = f"{bucket}/{prefix}" if prefix else bucket
        self.uri = f"s3://{self.root}"
        if endpoint_url is not None:
            refuse_credentials("storage.endpoint_url", endpoint_url, DestinationError)
        self.endpoint_url = endpoint_url
        self.settings = argument("run", self.uri)
        if endpoint_url:
            self.settings += f" {argument('storage.endpoint_url', endpoint_url)}"
        # s3fs repeats what botocore has given up on; once more is for bodies that break off, which botocore never sees.
        self._files = self._requests(_REQUESTS, retries=2)

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
                    # Where nothing is listed s3fs asks once more, and names the folder if something came in between.
                    # An object whose name ends in a slash is a folder that some tools make.
                    if known["type"] != "directory" and not known["name"].endswith("/")
                ),
                key=lambda entry: entry.key,
            )

    def replace(self, key: str, old: bytes, new: bytes) -> bool:
        """By a put on the condition that the object is the one that was looked at."""
        with self._translated():
            bucket, folder = self._bucket_and_folder()
            place = {"Bucket": bucket, "Key": f"{folder}{key}"}
            try:
                reply = self._files.call_s3("head_object", **place)
                if self.get(key) != old:
                    return False
                self._files.call_s3("put_object", **place, Body=new, IfMatch=reply["ETag"])
            except FileNotFoundError:
                return False
            except OSError as error:
                code, _ = said_by_s3(error)
                if code in ("PreconditionFailed", "ConditionalRequestConflict", "412", "409"):
                    return False
                if code not in ("NotImplemented", "501"):
                    raise
                # A server without conditions: between our look and this put somebody else's may be lost.
                self.put(key, new)
            return True

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
            "something answers there, but not as an S3 server does; check storage.endpoint_url", given=self._where()
        )
        with self._translated():
            try:
                bucket, prefix = self._bucket_and_folder()
                # Below the prefix, because a key may be good for that alone.
                first = self._requests(_FIRST_LOOK, retries=1)
                reply = first.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)
            except (ValueError, RecursionError):
                # What is no URL, and pages that lead on to other pages, where a client of S3 goes round and round.
                raise strange from None
            except HTTPClientError as error:
                if isinstance(error.kwargs.get("error"), aiohttp.TooManyRedirects):
                    raise strange from error
                raise
            except OSError as error:
                # An error without a code of S3's own is no error of S3's.
                reply = getattr(error.__cause__, "response", {})
                if isinstance(reply, dict) and reply.get("Error", {}).get("Code", "none") in ("", "404", "403"):
                    raise strange from error
                raise
        # Of a page in HTML the parser understands nothing, and finds nothing wrong.
        if "IsTruncated" not in reply:
            raise strange

    def clear_unfinished(self, older_than_seconds: float = UNFINISHED_SECONDS) -> int:
        """Multipart uploads that were never completed; their bytes are kept, and billed, until they are aborted."""
        bucket, prefix = self._bucket_and_folder()
        cleared, place = 0, {"Bucket": bucket, "Prefix": prefix}
        until = datetime.now(UTC).timestamp() - older_than_seconds
        with self._translated():
            while True:
                reply = self._files.call_s3("list_multipart_uploads", **place)
                for upload in reply.get("Uploads", []):
                    if upload["Initiated"].timestamp() <= until:
                        key, upload_id = upload["Key"], upload["UploadId"]
                        self._files.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload_id)
                        cleared += 1
                if not reply.get("IsTruncated"):
                    return cleared
                place |= {"KeyMarker": reply["NextKeyMarker"], "UploadIdMarker": reply["NextUploadIdMarker"]}

    def arrow(self) -> tuple[pafs.FileSystem, str]:
        """s3fs behind pyarrow's interface, so that both see the same credentials and endpoint."""
        return pafs.PyFileSystem(RangeFiles(self._files)), self.root

    def _requests(self, config: dict[str, Any], retries: int) -> Requests:
        traffic = traffic_with(self.endpoint_url)
        # Listings are never cached: another process may be writing.
        files: Any = s3fs.S3FileSystem(
            endpoint_url=self.endpoint_url,
            use_listings_cache=False,
            config_kwargs={**config, "connector_args": {"socket_factory": traffic}},
        )
        files.retries = retries
        return Requests(files, traffic, self._where())

    def _bucket_and_folder(self) -> tuple[str, str]:
        """The bucket, and what all keys in it begin with."""
        bucket, _, prefix = self.root.partition("/")
        return bucket, f"{prefix}/" if prefix else ""

    def _require_listener(self) -> None:
        """A name that nobody has and a port where nobody listens are told at once, not after many tries."""
        if self.endpoint_url is None or urllib.request.getproxies():
            return
        try:
            parts = urlsplit(self.endpoint_url)
        except ValueError as error:
            raise DestinationError(f"is no URL of a server: {error}", given=self._where()) from error
        if parts.scheme not in ("http", "https"):
            raise DestinationError("is no URL of a server; give http://HOST:PORT or https://HOST", given=self._where())
        try:
            place = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
            within(_CONNECT_SECONDS, lambda: socket.create_connection(place, timeout=_CONNECT_SECONDS)).close()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DestinationError(f"no server answers there: {reason}", given=self._where()) from error

    def _where(self) -> str:
        at = f" (storage.endpoint_url={self.endpoint_url})" if self.endpoint_url else ""
        return f"{self._key}={self.uri}{at}"

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (PermissionError, FileNotFoundError, NoCredentialsError, *_WRONG_SETTINGS) as error:
            # The reply to a completed upload was lost, and the upload is not there any more: put it again.
            if "upload" in str(error) and "does not exist" in str(error):
                raise StorageError(one_line(error), given=self._where()) from error
            raise DestinationError(_explained(error), given=self._where()) from error
        # Refused connections are botocore's own errors, bodies that break off aiohttp's; both are no OSErrors.
        except (OSError, BotoCoreError, ResponseParserError, aiohttp.ClientError) as error:
            if getattr(error, "errno", None) == errno.ENAMETOOLONG:
                raise DestinationError(f"{one_line(error)}: give a shorter prefix", given=self._where()) from error
            if (advised := advice_of(error)) is not None:
                raise DestinationError(advised, given=self._where()) from error
            raise StorageError(reason_of(error), given=self._where()) from error


def _explained(error: Exception) -> str:
    """What the server said, and what to do about it where that is not plain."""
    text = one_line(error)
    if isinstance(error, _WRONG_SETTINGS):
        return " ".join(str(error).split())
    if isinstance(error, NoCredentialsError):
        return f"{text}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or another source of the AWS chain"
    code, _ = said_by_s3(error)
    # What is forbidden may be any of reading, writing and listing.
    if code not in ("AccessDenied", "403") and (advised := advice_of(error)) is not None:
        return advised
    if "signature" in text:
        return f"{text}: AWS_SECRET_ACCESS_KEY, perhaps"
    if "request time" in text:
        return f"{text.rstrip('.')}: set this machine's clock"
    return text
