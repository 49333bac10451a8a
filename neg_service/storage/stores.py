"""Which store a URI names."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from neg_service.errors import DestinationError
from neg_service.storage.objects import LocalStore, ObjectStore
from neg_service.storage.patience import PatientStore
from neg_service.storage.s3 import S3Store


def open_store(uri: str, endpoint_url: str | None = None, patience_seconds: float = 0) -> ObjectStore:
    """The object store at a URI: a local path, file://, or s3://bucket/prefix; see PatientStore for the patience.

    Raises:
        DestinationError: an unknown scheme, or no bucket.
    """
    parts = urlsplit(uri)
    store: ObjectStore
    if parts.scheme == "file" and parts.netloc not in ("", "localhost"):
        raise DestinationError(f"storage.uri={uri}: names a host; an absolute path begins with file:///")
    if parts.scheme in ("", "file"):
        store = LocalStore(Path(parts.path if parts.scheme else uri))
    elif parts.scheme == "s3":
        if not parts.netloc:
            raise DestinationError(f"storage.uri={uri}: names no bucket; give s3://bucket/prefix")
        store = S3Store(uri, endpoint_url)
    else:
        raise DestinationError(f"storage.uri={uri}: scheme {parts.scheme!r} is unknown; use a path, file:// or s3://")
    return PatientStore(store, patience_seconds) if patience_seconds else store
