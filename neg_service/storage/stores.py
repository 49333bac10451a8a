"""Which store a URI names."""

from __future__ import annotations

import os

from neg_service.errors import DestinationError
from neg_service.places import local_path, require_place, split_scheme, without_credentials
from neg_service.storage.objects import LocalStore, ObjectStore
from neg_service.storage.retries import RetryingStore


def open_store(
    uri: str | os.PathLike[str],
    endpoint_url: str | None = None,
    retry_timeout_seconds: float = 0,
    *,
    key: str = "storage.uri",
) -> ObjectStore:
    """The object store at a URI: a local path, file://, or s3://bucket/prefix; see RetryingStore for the timeout.

    `key` is the setting that names it, for messages.

    Raises:
        DestinationError: no text, an unknown scheme, no bucket, credentials, or a place that would not be found again.
    """
    if not isinstance(uri, str | os.PathLike):
        raise DestinationError(setting=key, value=repr(uri), allowed="a path or a URI, as text")
    text = os.fspath(uri)
    require_place(text, key, DestinationError)
    path = local_path(uri, key, DestinationError)
    store: ObjectStore
    if path is not None:
        # Already without ~, unless it was a Path; a name may begin so.
        store = LocalStore(path.absolute() if isinstance(uri, str) else path, key=key)
    elif (scheme := split_scheme(text)[0]) == "s3":
        # s3fs takes a second to load, for which readers of a disk need not wait.
        from neg_service.storage.s3 import S3Store

        store = S3Store(text, endpoint_url, key=key)
    else:
        shown = without_credentials(text)
        raise DestinationError(f"scheme {scheme!r} is unknown; use a path, file:// or s3://", setting=key, value=shown)
    return RetryingStore(store, retry_timeout_seconds) if retry_timeout_seconds else store
