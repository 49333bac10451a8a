"""Retries of a store that fails in a way that may pass: waiting in the place of computing again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import pyarrow.fs as pafs
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

from neg_service.errors import StorageError
from neg_service.storage.objects import UNFINISHED_SECONDS, Entry, ObjectStore
from neg_service.storage.waiting import Waiting, waiting

log = logging.getLogger(__name__)

T = TypeVar("T")

# Between an operation that failed and its repetition: drawn from below a bound that doubles each time. Many replicas
# lose the same server at the same moment; they should not all come back at once.
_PAUSE = wait_random_exponential(multiplier=1, min=0.5, max=30)


class RetryingStore:
    """Another store, each of whose operations is repeated for a while when it fails in a way that may pass.

    A server that is restarted, or a network that is down for minutes, then costs waiting and nothing else.
    """

    def __init__(self, store: ObjectStore, seconds: float) -> None:
        """`seconds`: how long an operation may get nowhere, with all its repetitions."""
        self._store = store
        self._seconds = seconds
        self.uri, self.settings = store.uri, store.settings

    def put(self, key: str, data: bytes) -> None:
        """See ObjectStore."""
        self._retried(lambda: self._store.put(key, data))

    def get(self, key: str) -> bytes | None:
        """See ObjectStore."""
        return self._retried(lambda: self._store.get(key))

    def replace(self, key: str, old: bytes, new: bytes) -> bool:
        """See ObjectStore; after a reply that was lost it may say False of what it wrote itself."""
        return self._retried(lambda: self._store.replace(key, old, new))

    def list(self, prefix: str) -> list[Entry]:
        """See ObjectStore."""
        return self._retried(lambda: self._store.list(prefix))

    def delete(self, key: str) -> None:
        """See ObjectStore."""
        self._retried(lambda: self._store.delete(key))

    def check(self) -> None:
        """See ObjectStore."""
        self._retried(self._store.check)

    def clear_unfinished(self, older_than_seconds: float = UNFINISHED_SECONDS) -> int:
        """See ObjectStore."""
        return self._retried(lambda: self._store.clear_unfinished(older_than_seconds))

    def arrow(self) -> tuple[pafs.FileSystem, str]:
        """See ObjectStore."""
        return self._store.arrow()

    def _retried(self, operation: Callable[[], T]) -> T:
        wait = Waiting(self._seconds, is_repeated=True)

        def attempt() -> T:
            wait.begin_attempt()
            with waiting(wait):
                return operation()

        def tell(state: RetryCallState) -> None:
            log.warning("%s; trying again for %.0f s", state.outcome and state.outcome.exception(), wait.left)
            wait.has_spoken = True

        attempts = Retrying(
            retry=retry_if_exception_type(StorageError),
            stop=lambda _: wait.fail() <= 0,
            wait=lambda state: min(_PAUSE(state), wait.fail()),
            before_sleep=tell,
            reraise=True,
        )
        try:
            result = attempts(attempt)
        except StorageError as error:
            took = f"given up after {time.monotonic() - wait.began:.0f} s"
            error.reason = f"{error.reason}; {took} (storage.retry_timeout_seconds={self._seconds:g})"
            raise
        if wait.has_spoken:
            log.info("%s answers again, after %.0f s", self.uri, time.monotonic() - wait.began)
        return result
