"""How every job starts: configuration composed by Hydra, logs to stderr, errors as one line, exit codes.

Hydra's own messages for a mistyped key run over several lines, so the configuration is composed once ahead, where a
mistake can be told in one; all of Hydra's flags (--help, --cfg, --multirun) work as its users know them.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import hydra
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from neg_service.cluster.logs import log_to_stderr
from neg_service.errors import ConfigurationError, NegServiceError
from neg_service.places import refuse_credentials, texts_of

CONF = str(Path(__file__).resolve().parent.parent / "conf")
EXIT_ERROR, EXIT_INCOMPLETE, EXIT_INTERRUPTED, EXIT_STOPPED = 1, 3, 130, 143

log = logging.getLogger(__name__)


def say(text: str, style: str) -> None:
    """What a job has found, for a person on stdout, or where `job.log=json` as one more object in the log."""
    if style == "json":
        log.info("%s", text.strip())
    else:
        print(text)


def start(config_name: str, job: Callable[[DictConfig], int]) -> None:
    """Compose `conf/<config_name>.yaml` with the command line, run `job`, and exit with what it returns."""
    log_to_stderr("text")
    # As Ray does once it is there, so that a stop is the same before.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
    # Libraries speak up only when something is wrong.
    for noisy in ("httpx", "botocore", "aiobotocore", "urllib3", "filelock", "fsspec", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        refuse_credentials_in(sys.argv[1:])
    except ConfigurationError as error:
        fail(str(error))
    _check_overrides(config_name)

    def guarded(config: DictConfig) -> None:
        if OmegaConf.select(config, "job.log") == "json":
            log_to_stderr("json")
        try:
            for key, text in texts_of(OmegaConf.to_container(config)):
                refuse_credentials(key, text)
            code = job(config)
            sys.stdout.flush()
        except BrokenPipeError:
            # Whoever read our output has seen enough; Python would complain once more when it closes it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(EXIT_ERROR)
        except NegServiceError as error:
            if OmegaConf.select(config, "job.log") != "json":
                fail(str(error))
            log.error("%s", error)
            sys.exit(EXIT_ERROR)
        except (KeyboardInterrupt, SystemExit) as end:
            # Ray turns the signal to stop, which `ray job stop` and Kubernetes send, into an exit with its number.
            if isinstance(end, SystemExit) and end.code != signal.SIGTERM:
                raise
            log.warning("interrupted; the same command continues from here")
            sys.exit(EXIT_INTERRUPTED if isinstance(end, KeyboardInterrupt) else EXIT_STOPPED)
        if code:
            sys.exit(code)

    hydra.main(version_base="1.3", config_path=CONF, config_name=config_name)(guarded)()


def value_of(config: DictConfig, key: str) -> str:
    """A value that must be given.

    Raises:
        ConfigurationError: it was not.
    """
    if OmegaConf.is_missing(config, key):
        raise ConfigurationError(f"{key}: has no value; give one, such as {key}=results/RUN")
    return str(config[key])


def flag_of(config: DictConfig, key: str) -> bool:
    """A value that is true or false.

    Raises:
        ConfigurationError: it is something else, such as `no`.
    """
    if not isinstance(config[key], bool):
        raise ConfigurationError(f"{key}={config[key]}: must be true or false")
    return bool(config[key])


def refuse_credentials_in(overrides: list[str]) -> None:
    """Refuse credentials as they are typed, before any message about a mistake could show them.

    Raises:
        ConfigurationError: naming the setting.
    """
    for override in overrides:
        key, _, value = override.partition("=")
        refuse_credentials(key.lstrip("+~") if value else "an argument", override)


def _check_overrides(config_name: str) -> None:
    """Compose the same configuration ahead, to tell a mistake in one line."""
    if not any(argument.startswith("-") for argument in sys.argv[1:]):
        composed(config_name, sys.argv[1:])


def composed(config_name: str, overrides: list[str]) -> DictConfig:
    """`conf/<config_name>.yaml` with what is set on the command line; a mistake is told in one line, and ends."""
    try:
        with initialize_config_dir(CONF, version_base="1.3"):
            return compose(config_name, overrides=overrides)
    except (HydraException, OmegaConfBaseException) as error:
        return fail(f"{_reason(error)} (see `python -m jobs.{config_name} --help` for what can be set)")


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


def fail(message: str) -> NoReturn:
    """Say what is wrong in one line, and end."""
    # Of blanks and tabs each may be part of a path.
    print(f"error: {' '.join(line.strip() for line in message.splitlines())}", file=sys.stderr)
    sys.exit(EXIT_ERROR)
