"""What a scan tells a lineage server, or a file: that it started, and that it completed, failed or was aborted.

Events are OpenLineage's, by its own transports: what its client would take from files of the working folder and from
the environment decides nothing here. They leave from a thread of their own: a server that is away or slow costs a scan
a warning, and at its end no more than `_LAST_SECONDS`; a store that is away then costs as many again. A driver that is
killed sends nothing more, so that its run is one that started and never ended; the next start of the same scan is
another run of the same job.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from neg_service.cluster.lineage_place import KEY, address_of, path_of, require_place_of_events
from neg_service.errors import ConfigurationError, NegServiceError, one_line
from neg_service.redaction import without_secrets
from neg_service.storage.run import Snapshot

if TYPE_CHECKING:
    from openlineage.client.event_v2 import RunEvent
    from openlineage.client.transport import Transport

    from neg_service.cluster.prepare import Prepared

log = logging.getLogger(__name__)

# For a server to answer, and for all events to leave when a scan ends.
_TIMEOUT_SECONDS, _LAST_SECONDS = 2.0, 5.0


class RunEvents:
    """The events of one start of a scan; within it, the scan runs. Without a place for them, nothing is sent."""

    def __init__(self, prepared: Prepared) -> None:
        """Nothing is sent yet.

        Raises:
            ConfigurationError: job.lineage is no URL and no file that can be written, or the client is not installed.
        """
        place = prepared.config.job.lineage
        self._prepared, self._began = prepared, datetime.now(UTC)
        self._counts: dict[str, int] = {}
        self._incomplete = ""
        self._snapshot: Snapshot | None = None
        self._sender = None if place is None else _Sender(_transport(place), place)

    def __enter__(self) -> Self:
        """Say that it starts."""
        self._send("START")
        return self

    def done(
        self, *, shards: int, prompts: int, n_bytes: int, failed: dict[int, str], at: Callable[[], Snapshot]
    ) -> None:
        """The scan has come to its end: shards done in all, prompts and bytes of this start, and what is stored."""
        if self._sender is None:
            return
        self._counts = {"shards_done": shards, "prompts_now": prompts, "bytes_now": n_bytes}
        if failed:
            shard, error = next(iter(failed.items()))
            self._incomplete = f"{len(failed)} shards failed, shard {shard} with: {error}"
        # A store that is away is asked for minutes, for which the end of a scan does not wait.
        looking = threading.Thread(target=self._look, args=(at,), name="lineage-store", daemon=True)
        looking.start()
        looking.join(_LAST_SECONDS)

    def _look(self, at: Callable[[], Snapshot]) -> None:
        try:
            self._snapshot = at()
        except NegServiceError as error:
            log.info("how much is stored is not known to the lineage: %s", error)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Say how it ended."""
        if isinstance(error, KeyboardInterrupt | SystemExit):
            self._send("ABORT", "interrupted or stopped")
        elif error is not None:
            self._send(
                "FAIL",
                str(error) if isinstance(error, NegServiceError) else f"{type(error).__name__}: {one_line(error)}",
            )
        elif self._incomplete:
            self._send("FAIL", self._incomplete)
        else:
            self._send("COMPLETE")
        if self._sender is not None:
            self._sender.close()

    def _send(self, state: str, problem: str | None = None) -> None:
        if self._sender is not None:
            from neg_service.cluster.lineage_events import event_of

            said = None if problem is None else without_secrets(" ".join(problem.split()))
            self._sender.put(event_of(self._prepared, state, self._began, said, self._counts, self._snapshot))


class _Sender:
    """Sends events one after the other, in a thread that nobody waits for; of what fails the first is told."""

    def __init__(self, transport: Transport, place: str) -> None:
        self._transport, self._place = transport, place
        self._events: queue.SimpleQueue[RunEvent | None] = queue.SimpleQueue()
        self._is_told = False
        # A daemon: a server that replies a byte a second keeps no process alive.
        self._thread = threading.Thread(target=self._work, name="lineage", daemon=True)
        self._thread.start()

    def put(self, event: RunEvent) -> None:
        self._events.put(event)

    def close(self) -> None:
        """All have left, or it has taken too long."""
        self._events.put(None)
        self._thread.join(_LAST_SECONDS)
        if self._thread.is_alive():
            self._tell(f"no answer for {_LAST_SECONDS:g} s")

    def _work(self) -> None:
        while (event := self._events.get()) is not None:
            try:
                self._transport.emit(event)
            # What requests raises is an OSError; the transport has RuntimeError for a file that it cannot write.
            except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
                self._tell(one_line(error))

    def _tell(self, problem: str) -> None:
        if not self._is_told:
            self._is_told = True
            log.warning("%s=%s: lineage is not told, the scan goes on: %s", KEY, self._place, without_secrets(problem))


def _transport(place: str) -> Transport:
    """What sends to a URL or adds to a file.

    Raises:
        ConfigurationError: the place is neither, or the file cannot be written, or the client is not installed.
    """
    require_place_of_events(place)
    path = path_of(place)
    if path is None:
        return _to_server(place)
    from openlineage.client.transport.file import FileConfig, FileTransport

    _require_writable(path)
    return FileTransport(FileConfig(log_file_path=str(path), append=True))


def _to_server(url: str) -> Transport:
    from openlineage.client.transport.http import ApiKeyTokenProvider, HttpConfig, HttpTransport

    address, path = address_of(url)
    config = HttpConfig(
        url=address,
        endpoint=path or os.environ.get("OPENLINEAGE_ENDPOINT") or "api/v1/lineage",
        timeout=_TIMEOUT_SECONDS,
        # The client would try six times, and a scan ends meanwhile.
        retry={"total": 1, "backoff_factor": 0.1, "allowed_methods": ["POST"], "status_forcelist": [502, 503, 504]},
    )
    # A file of secrets ends with a newline, which no header may have.
    if key := os.environ.get("OPENLINEAGE_API_KEY", "").strip():
        config.auth = ApiKeyTokenProvider({"api_key": key})
    return HttpTransport(config)


def _require_writable(path: Path) -> None:
    try:
        path.open("a").close()
    except OSError as error:
        raise ConfigurationError(
            f"no events can be written there: {error.strerror or error}", setting=KEY, value=path
        ) from error
