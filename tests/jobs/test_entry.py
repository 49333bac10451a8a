"""How commands end: the last guard, several jobs in one command, streams that cannot hold what is said."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from jobs.entry import CONF
from tests.e2e.commands import ROOT, environment
from tests.jobs.forks import Forks

# A command of its own, with the configuration of jobs.status and nothing that takes seconds to load. What it does is
# Python, in its environment.
PROGRAM = """
import os
from dataclasses import dataclass, field
from jobs.entry import say, start
from neg_service.config import JobConfig, StorageConfig
from neg_service.errors import ConfigurationError

@dataclass
class Settings:
    run: str = ""
    rows: bool = True
    json: bool = False
    storage: StorageConfig = field(default_factory=StorageConfig)
    job: JobConfig = field(default_factory=JobConfig)

def job(config):
    own = {"config": config, "ConfigurationError": ConfigurationError, "say": say, "code": 0, "os": os}
    exec(os.environ["DOES"], own)
    return own["code"]

start("status", job, Settings)
"""

# A shell starts what is put into the background deaf to Ctrl-C, and its children with it: the tests may be such.
IN_A_TERMINAL = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


_FORKS: list[Forks] = []


@pytest.fixture(scope="module", autouse=True)
def _forks() -> Iterator[None]:
    """Dozens of commands, for one that is loaded."""
    with Forks() as forks:
        _FORKS.append(forks)
        yield
        _FORKS.clear()


def ran(does: str, *arguments: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """What became of a command that does this."""
    return _FORKS[0].run(PROGRAM, arguments, environment(DOES=does, PYTHONPATH=str(ROOT), **env), cwd or ROOT)


def started(does: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The same in a process that is started for it."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, text=True, capture_output=True, check=False,
        encoding="utf-8", env=environment(DOES=does, PYTHONPATH=str(ROOT), **env), timeout=200,
    )  # fmt: skip


UNFORESEEN = {
    "raise RuntimeError('the disk\\n  is gone')": "RuntimeError: the disk is gone",
    "raise ValueError": "ValueError, which says nothing",
    "1/0": "ZeroDivisionError: division by zero",
    "open('/proc/x/y')": r"FileNotFoundError: \[Errno 2\] No such file or directory: '/proc/x/y'",
    "import struct; struct.unpack('i', b'')": "struct.error: unpack requires a buffer of 4 bytes",
    "import zipfile, io; zipfile.ZipFile(io.BytesIO(b'x'))": "zipfile.BadZipFile: File is not a zip file",
    "def f(): f()\nf()": "RecursionError: maximum recursion depth exceeded",
    "raise MemoryError": "MemoryError, which says nothing",
    "'é'.encode('ascii')": "UnicodeEncodeError: 'ascii' codec can't encode",
    "class Mute(Exception):\n def __str__(self): 1/0\nraise Mute": r"Mute: it cannot be printed \(ZeroDivisionError\)",
    "raise ValueError('x' * 5000)": r"ValueError: x{500} \.\.\. x{90}; ",
    "class Panic(BaseException): pass\nraise Panic('rust')": "Panic: rust",
    "import asyncio; raise asyncio.CancelledError": "CancelledError, which says nothing",
    "raise ExceptionGroup('several', [ValueError('a')])": "ExceptionGroup: several",
}


@pytest.mark.parametrize("does", [next(iter(UNFORESEEN)), "class Panic(BaseException): pass\nraise Panic('rust')"])
def test_whatever_comes_up_is_one_line_and_its_traceback_is_in_a_file(does: str, tmp_path: Path) -> None:
    done = started(does, "run=x", TMPDIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    (file,) = tmp_path.glob("neg_service-traceback-*")
    require_line_and_file(line, does, file)


def test_of_whatever_comes_up_in_several_jobs_each_is_one_line_and_a_file(tmp_path: Path) -> None:
    numbers = ",".join(map(str, range(len(UNFORESEEN))))
    done = ran(f"exec({list(UNFORESEEN)!r}[int(config.run)], {{}})", "-m", f"run={numbers}", TMPDIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    files = [Path(line.rpartition(" ")[2]) for line in lines]
    assert set(files) == set(tmp_path.glob("neg_service-traceback-*"))
    assert len(set(files)) == len(UNFORESEEN)
    for does, line, file in zip(UNFORESEEN, lines, files, strict=True):
        require_line_and_file(line, does, file)


def require_line_and_file(line: str, does: str, file: Path) -> None:
    """The line says what came up and where its traceback is, which nobody else may read."""
    assert re.match(rf"error: while running jobs.status.*: .*{UNFORESEEN[does]}", line), line
    assert line.endswith(f"its traceback is in {file}")
    assert file.read_text().startswith(("Traceback (most", "  + Exception Group Traceback"))
    assert file.stat().st_mode & 0o077 == 0


def test_the_line_says_where_in_this_project() -> None:
    done = ran("from neg_service.errors import nearest; nearest(3, [''])", "run=x", "job.traceback=true")
    *trace, line = done.stderr.splitlines()
    assert re.match(
        r"error: while running jobs.status \(nearest in neg_service/errors.py, line \d+\): TypeError: ", line
    )
    assert line.endswith("its traceback stands above")
    assert trace[0].startswith("Traceback (most")


def test_as_json_it_is_one_object() -> None:
    for does, arguments, message in (
        ("1/0", [], "ZeroDivisionError"),
        ("", ["nonsense=1"], "nonsense is no setting"),
        ("raise ConfigurationError('x=1: must be 2')", [], "^x=1: must be 2$"),
    ):
        done = ran(does, "run=x", "+job.log=json", *arguments)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert json.loads(line)["level"] == "ERROR"
        assert re.search(message, json.loads(line)["message"])


def test_a_traceback_that_cannot_be_kept_is_no_second_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    nowhere = {name: str(tmp_path / "file") for name in ("TMPDIR", "HOME", "XDG_CACHE_HOME", "NEG_SERVICE_CACHE")}
    does = "import tempfile; tempfile.tempdir = os.environ['TMPDIR']; 1/0"
    (line,) = ran(does, "run=x", **nowhere).stderr.splitlines()
    assert line.endswith("its traceback cannot be kept (Not a directory): job.traceback=true prints it")


def test_secrets_are_in_neither_the_line_nor_the_file(tmp_path: Path) -> None:
    secrets = {
        "AWS_SECRET_ACCESS_KEY": "wJal/rXUtnFEMIexample",
        "HF_TOKEN": "hf_" + "a" * 34,
        "DB_PASSWORD": "correct-horse",
    }
    does = (
        "raise OSError(f'https://me:hunter22@host/a?sig=abcdef0123 AKIAIOSFODNN7EXAMPLE "
        '{os.environ["AWS_SECRET_ACCESS_KEY"]} {os.environ["HF_TOKEN"]} {os.environ["DB_PASSWORD"]}\')'
    )
    done = ran(does, "run=x", TMPDIR=str(tmp_path), **secrets)
    (file,) = tmp_path.glob("neg_service-traceback-*")
    for text in (done.stderr, file.read_text()):
        for secret in ("hunter22", "abcdef0123", "AKIAIOSFODNN7EXAMPLE", *secrets.values()):
            assert secret not in text
        assert "https://***@host/a?***" in text
    # Also where an error of our own repeats what was typed.
    assert "hunter22" not in ran("", "run=x", "storage.endpoint_url=https://me:hunter22@h,b").stderr


def test_our_own_errors_are_their_message_alone() -> None:
    done = ran("raise ConfigurationError('x=1: must be 2,\\n and not 1')", "run=x")
    assert (done.returncode, done.stderr) == (1, "error: x=1: must be 2, and not 1\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:strict"])
def test_a_terminal_that_cannot_print_a_letter_gets_its_number(encoding: str) -> None:
    done = started("say('日本', 'text'); raise ConfigurationError('日本')", "run=x", PYTHONIOENCODING=encoding)
    assert done.returncode == 1
    assert r"\u65e5\u672c" in done.stdout
    assert done.stderr.startswith(r"error: \u65e5\u672c")


def test_streams_that_are_full_closed_or_not_read_any_more() -> None:
    env = environment(DOES="say('x', 'text')", PYTHONPATH=str(ROOT))

    def shell(after: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", f'set -o pipefail; "$0" -c "$1" run=x {after}', sys.executable, PROGRAM],
            env={**env, **more}, text=True, capture_output=True, check=False, timeout=200,
        )  # fmt: skip

    full = shell(">/dev/full")
    assert full.returncode == 1
    assert re.fullmatch(r"error: while running jobs.status.*: OSError: \[Errno 28\] No space left.*\n", full.stderr)
    for after, code in ((">&-", 0), ("2>&-", 0), (">&- 2>&-", 0)):
        closed = shell(after)
        assert (closed.returncode, closed.stderr) == (code, ""), after
    assert shell("2>/dev/full", DOES="1/0").returncode == 1
    unread = shell("| true", DOES="import time; time.sleep(1); print('x' * 100000)")
    assert (unread.returncode, unread.stderr) == (1, "")


def test_what_comes_up_while_libraries_are_loaded_is_one_line_too(tmp_path: Path) -> None:
    (tmp_path / "omegaconf.py").write_text("raise OSError('libsomething.so.2: cannot open shared object file')")
    done = subprocess.run(
        [sys.executable, "-m", "jobs.status", "run=x"], cwd=ROOT, text=True, capture_output=True, check=False,
        env=environment(PYTHONPATH=f"{tmp_path}:{ROOT}", TMPDIR=str(tmp_path)), timeout=200,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: while starting jobs.status")
    assert "OSError: libsomething.so.2: cannot open shared object file; its traceback is in " in line


SEVERAL = "code = {'a': 0, 'b': 3, 'c': 1}.get(config.run, 0); say(f'did {config.run!r}', 'text')"


@pytest.mark.parametrize(
    ("runs", "code"), [("a,d", 0), ("a,b,d", 3), ("c,a", 1), ("c,b,1e5", 1), ("b,c,a", 1), ("a,e,b,d", 1)]
)
def test_of_several_jobs_each_is_run_and_the_worst_counts(runs: str, code: int, tmp_path: Path) -> None:
    does = f"if config.run == 'e': 1/0\n{SEVERAL}"
    done = ran(does, "--multirun", f"run={runs}", "rows=false", cwd=tmp_path, TMPDIR=str(tmp_path.parent))
    assert done.returncode == code, done.stderr
    assert done.stdout.splitlines() == [f"did {run!r}" for run in runs.split(",") if run != "e"]
    # The last lines say which.
    codes = [{"b": 3, "c": 1, "e": 1}.get(run, 0) for run in runs.split(",")]
    failed = [(index, run) for index, run in enumerate(runs.split(",")) if codes[index]]
    last = done.stderr.splitlines()[-len(failed) - 1 :]
    for line, (index, run) in zip(last, failed, strict=False):
        assert re.search(rf" E job {index} \(run='?{run}'?\) ended with exit code {codes[index]}$", line), last
    assert last[-1].endswith(f"{len(codes) - len(failed)} of {len(codes)} jobs ended well")
    # Nothing is left where the command was started.
    assert list(tmp_path.iterdir()) == []


def test_several_jobs_of_which_one_cannot_be_composed_are_refused_before_any_is_run(tmp_path: Path) -> None:
    done = ran(SEVERAL, "-m", "run=a,b", "nonsense=1,2", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("error: nonsense is no setting")
    assert list(tmp_path.iterdir()) == []


def test_a_person_who_stops_several_jobs_is_obeyed(tmp_path: Path) -> None:
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        does = "import time; print('at work', flush=True); time.sleep(300)"
        process = subprocess.Popen(
            [sys.executable, "-c", IN_A_TERMINAL + PROGRAM, "-m", "run=a,b"], cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(DOES=does, PYTHONPATH=str(ROOT)),
        )  # fmt: skip
        with process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "at work\n"
                process.send_signal(number)
                # What it was told to do, and would do twice, takes longer than this.
                output, errors = process.communicate(timeout=100)
            finally:
                process.kill()
        assert (process.returncode, output) == (code, "")
        assert errors.splitlines()[-1].endswith("interrupted; the same command continues from here")
        assert list(tmp_path.iterdir()) == []


def test_hydras_flags_go_on_to_work(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [status, _self_]\nrun: from-my-file\n")
    (tmp_path / "number.yaml").write_text("defaults: [status, _self_]\nrun: 12e3\n")
    (tmp_path / "broken.yaml").write_text("run: [")
    shown = "say(config.run, 'text')"
    assert ran(shown, "--config-dir", str(tmp_path), "--config-name=mine").stdout == "from-my-file\n"
    assert ran(shown, "-cd", str(tmp_path), "-cn", "mine", "run=1e5").stdout == "1e5\n"
    assert ran(shown, "run=a", "--config-dir", str(tmp_path), "json=true").stdout == "a\n"
    assert "run: '1e5'" in ran(shown, "--cfg", "job", "run=1e5").stdout
    assert "python -m jobs.status run=" in ran(shown, "--help").stdout
    for arguments, message in (
        (["-cn", "number", "-cd", str(tmp_path)], "error: run=12000.0: is a float where a text belongs"),
        (["-cn", "broken", "-cd", str(tmp_path)], "error: while parsing a flow"),
        (["-cn", "nothing"], "error: Cannot find primary config 'nothing'"),
        (["-cd", "/nowhere"], "error: Additional config directory '/nowhere' not found"),
        (["--nonsense"], "error: unrecognized arguments: --nonsense"),
        (["--cfg", "nonsense"], "error: argument --cfg/-c: invalid choice: 'nonsense'"),
        (["--run", "--cfg", "job"], "error: Only one of --run"),
        (["run=a", "run"], "error: run: is not a setting, which is KEY=VALUE"),
    ):
        done = ran(shown, *arguments)
        assert (done.returncode, done.stdout) == (1, ""), arguments
        (line,) = done.stderr.splitlines()
        assert line.startswith(message), line


def test_all_commands_share_how_hydra_is_set() -> None:
    for path in Path(CONF).glob("*.yaml"):
        content = yaml.safe_load(path.read_text())
        if "scan" in content["defaults"]:
            continue
        assert (content["hydra"]["run"], content["hydra"]["output_subdir"]) == ({"dir": "."}, None), path.name
        for kind in ("job", "hydra"):
            assert {f"override hydra/{kind}_logging": "none"} in content["defaults"], path.name
        assert content["job"]["traceback"] is False, path.name


def test_a_read_only_place_to_be_started_in_is_no_error() -> None:
    assert ran("say(os.getcwd(), 'text')", "run=x", cwd=Path("/proc")).stdout == "/proc\n"
    assert ran("", "-m", "run=x,y", cwd=Path("/proc")).returncode == 0


def test_interpolations_are_told_where_they_stand_for_nothing_and_handed_on_where_not(tmp_path: Path) -> None:
    for arguments in (
        ["run=${x}"],
        ["run=a", "+job.log=${x}"],
        ["run=a", "+storage.uri=/tmp/${x}"],
        ["-m", "run=${x}"],
    ):
        done = ran("say(config.run, 'text')", *arguments, TMPDIR=str(tmp_path))
        assert (done.returncode, done.stdout) == (1, ""), arguments
        # Hydra tells of several jobs before they begin.
        line = done.stderr.splitlines()[-1]
        assert len(done.stderr.splitlines()) == (3 if "-m" in arguments else 1)
        assert re.match(r"error: .*=.*\$\{x\}: Interpolation key 'x' not found: ", line), line
    shown = "say(config.run, 'text'); code = 3 * (config.run == 'b')"
    assert ran(shown, "run=${job.log}", "+job.log=text").stdout == "text\n"
    done = ran(shown, "-m", "run=${job.log},b", "+job.log=text", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "text\nb\n")
    assert "job 1 (run=b) ended with exit code 3" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_several_jobs_that_are_none_are_an_error(tmp_path: Path) -> None:
    for given in ("storage=glob(z*)", "job.limit=range(0)"):
        done = ran("say(config.run, 'text')", "-m", "run=a", given, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.splitlines()[-1].startswith("error: --multirun: none of the values given stands for a job")


def test_a_completion_that_no_shell_asks_for_is_an_error() -> None:
    done = ran("", "--shell-completion", "query=bash")
    assert done.returncode == 1
    assert done.stderr.startswith("error: --shell-completion: a shell asks for it")
    assert "traceback" not in done.stderr


def test_bytes_that_are_no_utf8_are_refused_where_they_stand() -> None:
    # As a shell gives a name in Latin-1.
    done = started("", "run=e\udce8.jsonl")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(r"error: run='e\udce8.jsonl': has bytes that are no UTF-8")
