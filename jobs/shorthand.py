"""Short forms on the command line: `dataset=mceval8k/TASK` for `dataset=mceval8k dataset.task=TASK`."""

from __future__ import annotations

from collections.abc import Sequence

from neg_service.errors import ConfigurationError
from neg_service.former_names import current_override

_KEY, _SOURCE = "dataset=", "mceval8k"


def written_out(overrides: Sequence[str]) -> list[str]:
    """`overrides` with what is short written out.

    The task stands first, so that a `dataset.task` that was typed as well counts.

    Raises:
        ConfigurationError: tasks and whole data sets are to be swept over together.
    """
    tasks: list[str] = []
    others: list[str] = []
    for override in map(current_override, overrides):
        names = override.removeprefix(_KEY).split(",") if override.startswith(_KEY) else []
        own = [name.removeprefix(f"{_SOURCE}/") for name in names if name.startswith(f"{_SOURCE}/")]
        if own and len(own) < len(names):
            raise ConfigurationError(
                f"{_SOURCE}/{own[0]} is short for {_KEY}{_SOURCE} dataset.task={own[0]}, which other data sets do "
                "not have; sweep over them in a command of their own",
                given=override,
            )
        if own:
            tasks = [f"dataset.task={','.join(own)}"]
        others.append(f"{_KEY}{_SOURCE}" if own else override)
    return [*tasks, *others]
