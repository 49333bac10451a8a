"""The S3 server of the tests: who may do what, and how a test becomes somebody."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import s3fs

from infra.s3.server import Keys


def credentials(keys: Keys) -> dict[str, str]:
    """The environment variables that a user of these keys sets."""
    return {"AWS_ACCESS_KEY_ID": keys.access_key, "AWS_SECRET_ACCESS_KEY": keys.secret_key, "AWS_REGION": "us-east-1"}


@contextmanager
def acting_as(keys: Keys | None) -> Iterator[None]:
    """This process with these keys, or with none, in its environment."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ.update(credentials(keys) if keys is not None else {})
    # s3fs remembers its instances, and with them the keys that they were made with.
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)
        s3fs.S3FileSystem.clear_instance_cache()
