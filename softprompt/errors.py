"""Errors that a user can cause, each in one line."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user in one line: the field or file, its value, and what is allowed.

    The command line prints it without a traceback and exits with 2.
    """


def one_line(error: Exception) -> str:
    """The message of an error in one line, at most 200 characters; its type if it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns " (did you mean 'x'?)" for the closest known name, or "" where none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """An error for a name of a `kind`, such as "task", that is not among the known ones."""
    names = sorted(known)
    return UserError(f"unknown {kind} {name!r}{nearest(name, names)}; known: {', '.join(names)}")
