"""Config files: Python files whose `get_config(arg="")` modifies `base_config()`."""

import inspect
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from softprompt.config import (
    RENAMED,
    ConfigDict,
    base_config,
    coerce,
    flatten,
    set_key,
    unknown_key,
    validate,
)
from softprompt.errors import UserError, nearest


def parse_arg(arg: str, **defaults: Any) -> ConfigDict:
    """Parses a config file's argument, "length=5,small", into the types of `defaults`.

    These are all allowed keys. A key without a value is True.

    Returns:
        A locked ConfigDict with all keys.

    Raises:
        UserError: an unknown key or a value of another type.
    """
    parsed = ConfigDict(defaults)
    for item in filter(None, (part.strip() for part in arg.split(","))):
        key, given, value = item.partition("=")
        if key not in defaults:
            known = ", ".join(defaults) or "none"
            raise UserError(
                f"unknown config argument {key!r}{nearest(key, defaults)}; known: {known}"
            )
        parsed[key] = coerce(key, value if given else True, defaults[key])
    return parsed.lock()


def load_config(path: str = "", overrides: Sequence[tuple[str, str]] = ()) -> ConfigDict:
    """Returns the config of a file, with overrides applied, after validation.

    Args:
        path: "configs/x.py" or "configs/x.py:arg", relative to the working directory or, if it is
            not there, to the repository; "" is `base_config()`.
        overrides: pairs such as ("method.length", "5"); the last one for a key applies.

    Raises:
        UserError: the file cannot be read, or a key or value is wrong.
    """
    config = _from_file(path) if path else base_config()
    for key, value in overrides:
        set_key(config, key, value)
    validate(config)
    return config


def _from_file(path: str) -> ConfigDict:
    """Returns the config that a file's `get_config` returns; its errors become UserErrors."""
    name, _, arg = path.partition(".py:")
    file = find_file(name if name.endswith(".py") else f"{name}.py")
    if file is None:
        raise UserError(
            f"no config file {name!r}; known here: {', '.join(list_modules('configs')) or 'none'}"
        )
    try:
        module = load_module(file)
        if arg and not inspect.signature(module.get_config).parameters:
            raise UserError(f"{file}: its get_config takes no argument; {arg!r} was given")
        config = module.get_config(arg) if arg else module.get_config()
    except Exception as error:
        raise with_location(error, file) from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"{file}: get_config() returned {type(config).__name__}; it must return a ConfigDict"
        )
    return config


def with_location(error: Exception, file: Path) -> UserError:
    """Adds file and line to an error in a user's Python file; returns a UserError unchanged."""
    if isinstance(error, UserError):
        return error
    return UserError(f"{file}{_line(error, file)}: {_reason(error)}")


def _line(error: Exception, file: Path) -> str:
    """Returns ", line N" for the innermost line of `file` in the traceback."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == str(file)
    ]
    return f", line {lines[-1]}" if lines else ""


def _reason(error: Exception) -> str:
    """The text of an error; a locked ConfigDict's error about a key becomes `unknown_key`.

    That error has the last part of the key alone.
    """
    text = str(error).splitlines()[0] if str(error) else ""
    if isinstance(error, AttributeError | KeyError) and 'Key "' in text:
        key = text.split('Key "', 1)[1].split('"', 1)[0]
        renamed = (old for old in RENAMED if old.endswith(f".{key}"))
        return unknown_key(next(renamed, key), flatten(base_config()))
    return f"{type(error).__name__}: {text}"


def find_file(path: str) -> Path | None:
    """Finds a file in the working directory or the repository; None if neither has it."""
    for root in _roots():
        if (root / path).is_file():
            return (root / path).resolve()
    return None


def _roots() -> tuple[Path, Path]:
    """Where files are looked for: the working directory and the repository."""
    return Path.cwd(), Path(__file__).parents[2]


def list_modules(folder: str) -> list[str]:
    """Returns the Python files in a folder of the working directory and of the repository."""
    names = {f"{folder}/{file.name}" for root in _roots() for file in (root / folder).glob("*.py")}
    return sorted(name for name in names if not name.endswith("__init__.py"))


def load_module(file: Path) -> ModuleType:
    """Executes a Python file as a new module; exceptions propagate.

    It may import modules of the working directory and of the repository. It is compiled from source
    each time, since a bytecode cache does not notice an edit of the same size within a second.
    """
    module = ModuleType(file.stem)
    module.__file__ = str(file)
    before = sys.path.copy()
    sys.path += map(str, _roots())
    try:
        exec(compile(file.read_bytes(), file, "exec"), module.__dict__)
    finally:
        sys.path[:] = before
    return module
