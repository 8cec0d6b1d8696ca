"""Errors that a user can cause, each one clear line."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What a user can mend: one line that names the field or file, the value and what is allowed.

    The command line prints it without a traceback and exits with 2.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns " (did you mean 'x'?)" for the closest known name, or "" where none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """An error for a name that is not in a closed set, listing the set.

    Args:
        kind: what the name stands for, such as "task" or "config.method.init".
        name: what the user said.
        known: every allowed name.
    """
    names = sorted(known)
    return UserError(f"unknown {kind} {name!r}{nearest(name, names)}; known: {', '.join(names)}")
