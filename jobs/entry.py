"""How every job starts: configuration composed by Hydra, logs to stderr, errors as one line, exit codes.

Hydra runs the jobs, so that all of its flags (--help, --cfg, --multirun) work as its users know them. Its own messages
run over several lines, and it knows no text, only what its grammar makes of it: the command line is put into its words
ahead (`command_line.py`), what it then has to say is told in one line here, and what nobody foresaw is for the last
guard (`guard.py`). Of several jobs, one that fails does not keep the others from running.

Help, a mistake on the command line and the status of a run should come at once, and torch, transformers and Ray take
seconds to load. So the modules of commands import at their top only what settings and texts need; the function that
does a command's work imports what it works with.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import re
import signal
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from jobs.advice import in_quotes
from jobs.command_line import as_typed, require_text
from jobs.conf_folder import CONF as CONF
from jobs.guard import EXIT_ERROR, EXIT_INTERRUPTED, flush_or_silence, prepare_streams, speak, tell, tell_unforeseen
from jobs.kinds import names_in, type_at
from neg_service.cluster.logs import log_to_stderr, tell_interrupted
from neg_service.errors import NOT_GIVEN, ConfigurationError, NegServiceError, nearest
from neg_service.former_names import SETTINGS, current_measure
from neg_service.former_names import tell as tell_former_name
from neg_service.places import refuse_credentials, require_utf8, texts_of

EXIT_INCOMPLETE, EXIT_STOPPED = 3, 143

log = logging.getLogger(__name__)


def say(text: str, style: str) -> None:
    """What a job has found, for a person on stdout, or where `job.log=json` as one more object in the log."""
    if style == "json":
        log.info("%s", text.strip())
    else:
        print(text)


def start(config_name: str, job: Callable[[DictConfig], int], settings: type) -> None:
    """Compose `conf/<config_name>.yaml` with the command line, run `job`, and exit with what it returns.

    `settings` is the dataclass of all that can be set, which says what is text. Of several jobs (--multirun) each is
    run; the exit code is then the worst: an error, else an incomplete run.
    """
    _begin()
    # Libraries speak up only when something is wrong.
    for noisy in ("httpx", "botocore", "aiobotocore", "urllib3", "filelock", "fsspec", "accelerate", "pyiceberg"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # Of a server that is away our own warning tells, once.
    for told in ("urllib3.connectionpool", "openlineage"):
        logging.getLogger(told).setLevel(logging.ERROR)
    ended: list[tuple[list[str], int]] = []

    def guarded(config: DictConfig) -> None:
        with ending(f"running jobs.{config_name}") as end:
            resolved = _resolved(config)
            _speak(OmegaConf.select(config, "job.log"), OmegaConf.select(config, "job.traceback"))
            for key, text in (*texts_of(OmegaConf.to_container(config)), *texts_of(resolved)):
                refuse_credentials(key, text)
                require_utf8(key, text)
            _use_present_names(config)
            require_text(config, settings)
            end.code = job(config)
        # As they were typed: what they refer to is not known there.
        overrides: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
        ended.append((list(overrides), end.code))

    with ending("composing the configuration") as composing, _in_our_words(config_name, settings) as asked:
        hydra.main(version_base="1.3", config_path=CONF, config_name=config_name)(guarded)()
        if asked.runs_several and not ended:
            raise ConfigurationError(
                "none of the values given stands for a job, so that nothing was run", setting="--multirun"
            )
    if len(ended) > 1:
        _tell_of_several(ended)
    sys.exit(max([composing.code, *(code for _, code in ended)], key=_badness))


def command(name: str, main: Callable[[list[str]], int]) -> NoReturn:
    """Run the `main` of a command that is no Hydra job with what was typed, and exit with what it returns."""
    _begin()
    with ending(f"running jobs.{name}") as end:
        end.code = main(sys.argv[1:])
    sys.exit(end.code)


@dataclass
class _Asked:
    """What a command line asks Hydra for."""

    arguments: list[str]
    runs_several: bool


@dataclass
class End:
    """How something ended: its exit code."""

    code: int = 0


@contextmanager
def ending(doing: str) -> Iterator[End]:
    """Tell what comes up inside, in one line; the exit code is then that of an error. A person who stops is obeyed."""
    end = End()
    try:
        yield end
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has seen enough.
        end.code = EXIT_ERROR
    except NegServiceError as error:
        tell(str(error))
        end.code = EXIT_ERROR
    except KeyboardInterrupt as stopped:
        tell_interrupted(stopped)
        sys.exit(EXIT_INTERRUPTED)
    except SystemExit as stopped:
        # Ray turns the signal to stop, which `ray job stop` and Kubernetes send, into an exit with its number.
        if stopped.code != signal.SIGTERM:
            flush_or_silence()
            raise
        tell_interrupted(stopped)
        sys.exit(EXIT_STOPPED)
    except BaseException as error:  # noqa: BLE001 - the one last guard
        tell_unforeseen(error, doing)
        end.code = EXIT_ERROR
    flush_or_silence()


def composed(config_name: str, overrides: list[str], settings: type) -> DictConfig:
    """`conf/<config_name>.yaml` with what is set on the command line.

    Raises:
        ConfigurationError: a mistake in it, in one line.
    """
    with _hydra_told(config_name, settings), initialize_config_dir(CONF, version_base="1.3"):
        config = compose(config_name, overrides=as_typed(overrides, settings, is_sweep=False))
    _resolved(config)
    _use_present_names(config)
    require_text(config, settings)
    return config


def _use_present_names(config: DictConfig) -> None:
    """Put what a YAML file gives under a former name under the present one."""
    with open_dict(config):
        for before, now in SETTINGS.items():
            group, _, key = before.partition(".")
            own = config.get(group)
            if isinstance(own, DictConfig) and key in own:
                tell_former_name(before, now)
                OmegaConf.update(config, now, own.pop(key))
        if isinstance(name := OmegaConf.select(config, "measure.name"), str):
            config.measure.name = current_measure(name)


def _resolved(config: DictConfig) -> Any:
    """All values, with what `${...}` stands for.

    Raises:
        ConfigurationError: it stands for nothing.
    """
    try:
        return OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        typed = dict(texts_of(OmegaConf.to_container(config))).get(re.sub(r"\[\d+\]", "", error.full_key or ""))
        reason = str(error).splitlines()[0]
        raise ConfigurationError(
            f"{reason}: ${{...}} stands for another setting, or as ${{oc.env:NAME}} for a variable of the environment; "
            f"where it is meant as it is, \\${{ is written",
            setting=error.full_key,
            value=NOT_GIVEN if typed is None else typed,
        ) from error


def value_of(config: DictConfig, key: str) -> str:
    """A value that must be given.

    Raises:
        ConfigurationError: it was not.
    """
    if OmegaConf.is_missing(config, key) or config[key] is None:
        raise ConfigurationError(f"has no value; give one, such as {key}=results/RUN", setting=key)
    return str(config[key])


def flag_of(config: DictConfig, key: str) -> bool:
    """A value that is true or false.

    Raises:
        ConfigurationError: it is something else, such as `no`.
    """
    if not isinstance(config[key], bool):
        raise ConfigurationError(setting=key, value=config[key], allowed="true or false")
    return bool(config[key])


def refuse_credentials_in(overrides: list[str]) -> None:
    """Refuse credentials as they are typed, before any message about a mistake could show them.

    Raises:
        ConfigurationError: naming the setting.
    """
    for override in overrides:
        key, _, value = override.partition("=")
        refuse_credentials(key.lstrip("+~") if value else "an argument", override)


def _begin() -> None:
    prepare_streams()
    log_to_stderr("text")
    # Hardly anything that is loaded is garbage. Looking for it as often as Python does takes a second of eight, and at
    # the end, when it takes its modules apart, 1.5 s.
    gc.set_threshold(50_000, 20, 20)
    atexit.register(gc.freeze)
    # As Ray does once it is there, so that a stop is the same before.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
    # Before the configuration is composed, this is all that can be known of it.
    given = dict(argument.lstrip("+").split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    _speak(given.get("job.log"), given.get("job.traceback", "").lower() == "true")


def _speak(style: Any, shows_traceback: Any) -> None:
    if style == "json":
        log_to_stderr("json")
    speak(style == "json", shows_traceback is True)


@contextmanager
def _in_our_words(config_name: str, settings: type) -> Iterator[_Asked]:
    """Hydra with the command line in its words; it raises what it has to say, and leaves nothing behind."""
    before, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    # Hydra then hands on what it raises, in the place of printing it.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    with ExitStack() as scratch, _hydra_told(config_name, settings):
        try:
            refuse_credentials_in(before[1:])
            asked = _asked(before[1:], settings, scratch)
            sys.argv = [before[0], *asked.arguments]
            yield asked
        finally:
            sys.argv = before
            os.environ.pop("HYDRA_FULL_ERROR")
            if full is not None:
                os.environ["HYDRA_FULL_ERROR"] = full


def _asked(typed: list[str], settings: type, scratch: ExitStack) -> _Asked:
    """What was typed, with text as Hydra's grammar writes it, and a place of its own for Hydra's notes on a sweep."""
    asked = vars(in_one_line(get_args_parser()).parse_intermixed_args(typed))
    overrides = asked.pop("overrides")
    if asked["shell_completion"]:
        if any("query=" in one for one in overrides) and "COMP_LINE" not in os.environ:
            raise ConfigurationError("a shell asks for it, with the line in COMP_LINE", setting="--shell-completion")
        return _Asked(typed, runs_several=False)
    is_sweep = asked["multirun"] or any(one.lstrip("+").lower() == "hydra.mode=multirun" for one in overrides)
    told = as_typed(overrides, settings, is_sweep)
    if is_sweep and not any(one.lstrip("+").startswith("hydra.sweep.dir=") for one in overrides):
        told.append(f"hydra.sweep.dir={in_quotes(scratch.enter_context(TemporaryDirectory(prefix='neg_service-')))}")
    flags = [
        f"--{name.replace('_', '-')}" + (f"={value}" if isinstance(value, str) else "")
        for name, value in asked.items()
        if value
    ]
    only_shows = any(asked.get(name) for name in ("help", "hydra_help", "cfg", "info"))
    return _Asked([*flags, *told], runs_several=is_sweep and not only_shows)


def in_one_line(parser: ArgumentParser) -> ArgumentParser:
    """The same parser; what it refuses is told as everything else is."""

    def refuse(message: str) -> NoReturn:
        raise ConfigurationError(f"{message} (see --help)")

    parser.error = refuse  # type: ignore[method-assign]
    return parser


@contextmanager
def _hydra_told(config_name: str, settings: type) -> Iterator[None]:
    try:
        yield
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        reason = _reason(error)
        raise ConfigurationError(
            f"{_unknown(reason, settings) or reason} (see `python -m jobs.{config_name} --help` for what can be set)"
        ) from error


def _unknown(reason: str, settings: type) -> str | None:
    """What is to be said of a setting that there is not, if that is the reason."""
    found = re.search(r"Could not override '([\w.]+)'; Key '\w+' is not in struct", reason)
    if found is None:
        return None
    above, _, name = found[1].rpartition(".")
    known = names_in(type_at(settings, above) if above else settings)
    if name in known:
        # Others of the group have it.
        return f"{found[1]} is no setting of this {above}"
    question = nearest(name, known).rstrip()
    return f"{found[1]} is no setting" + (f"; {question}" if question else "")


def _tell_of_several(ended: list[tuple[list[str], int]]) -> None:
    shared = set.intersection(*(set(settings) for settings, _ in ended))
    failed = [(index, settings, code) for index, (settings, code) in enumerate(ended) if code]
    for index, settings, code in failed:
        own = " ".join(one for one in settings if one not in shared)
        log.error("job %d (%s) ended with exit code %d", index, own, code)
    log.info("%d of %d jobs ended well", len(ended) - len(failed), len(ended))


def _badness(code: int) -> int:
    return {0: 0, EXIT_INCOMPLETE: 1}.get(code, 2)


def _reason(error: BaseException) -> str:
    # Hydra wraps: its own line names the override, the cause says what is wrong with it.
    lines: list[str] = []
    current: BaseException | None = error
    while current is not None:
        lines += [line.strip() for line in str(current).splitlines() if line.strip()]
        current = current.__cause__
    wanted = [line.rstrip(".") for line in dict.fromkeys(lines) if not line.startswith(("full_key", "object_type"))]
    # Hydra's advice to add an unknown key with a plus leads to a refusal of the same key further on.
    useless = ("use +", "Config search path", "provider=")
    wanted = [line for line in wanted if not any(part in line for part in useless)]
    return "; ".join(wanted[:20]).replace(":;", ":")
