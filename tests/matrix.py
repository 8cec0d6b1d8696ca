"""Cases that only `.ci/run` takes: the other methods, families and meshes of a contract."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def matrix(values: Iterable[Any], *, keep: Collection[Any]) -> list[Any]:
    """The cases of `parametrize`; all but those to keep are marked, for `make test` to leave out.

    A case may be the arguments' tuple, and what to keep its first argument.
    """
    return [_case(value, keep) for value in values]


def _case(value: Any, keep: Collection[Any]) -> Any:
    arguments = value if isinstance(value, tuple) else (value,)
    if value in keep or arguments[0] in keep:
        return value
    return pytest.param(*arguments, marks=pytest.mark.matrix)
