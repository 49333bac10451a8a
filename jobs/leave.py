"""python -m jobs.leave: the former name of `jobs.drain`, for clusters whose pods still call it before they end."""

from __future__ import annotations

from jobs.drain import main
from jobs.entry import command
from neg_service.former_names import tell


def told(arguments: list[str]) -> int:
    """Say the present name, and do the same."""
    tell("jobs.leave", "jobs.drain")
    return main(arguments)


if __name__ == "__main__":
    command("drain", told)
