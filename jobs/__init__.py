"""Entry points. Each is thin: it composes a configuration, calls the library, and speaks to a person."""

import sys

# Python says `-m` here while it looks for `python -m jobs.NAME`: what comes up while a command's libraries are loaded,
# which takes seconds, is then told in one line too.
if sys.argv[:1] == ["-m"]:
    from jobs.guard import guard_imports

    guard_imports(next((argument for argument in sys.orig_argv if argument.startswith("jobs.")), "a command"))
