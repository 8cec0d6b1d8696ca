"""The fields of a request's JSON body, with checks; unknown fields are refused by name."""

import json
import math
from collections.abc import Mapping
from typing import Any

from softprompt.errors import nearest
from softprompt.serving.http.errors import Refusal

MOST_SHOWN = 60  # characters of a refused value in a message
MOST_NAME = 256  # characters of a name or a user


def parse_body(body: bytes) -> "Fields":
    """The fields of a body.

    Raises:
        Refusal: it is not a JSON object, or has NaN, infinite numbers or lone surrogates.
    """
    try:
        text = body.decode()
        value = json.loads(text, parse_constant=_no_constant)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # fails on a lone surrogate
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the body is not readable as JSON ({shown(str(error))})") from error
    if not isinstance(value, dict):
        raise Refusal(f"the body is {shown(value)}; allowed: a JSON object")
    return Fields(value)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def shown(value: object) -> str:
    """A value for a message, shortened; of a list or an object, which may be deep, the kind."""
    if isinstance(value, list | dict):
        return f"a list of {len(value)}" if isinstance(value, list) else "an object"
    text = repr(value[: MOST_SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


class Fields:
    """Takes checked values out of a JSON object. `finish` refuses the rest. Null counts as absent.

    Args:
        values: the object.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._left = {name: value for name, value in values.items() if value is not None}
        self._taken: set[str] = set()

    def take(self, name: str, default: Any = None) -> Any:
        """A value that the caller checks."""
        self._taken.add(name)
        return self._left.pop(name, default)

    def integer(self, name: str, default: Any, low: int, high: int) -> Any:
        """An integer from `low` to `high`, or the default if it is absent."""
        value = self.take(name, default)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not default and not (whole and low <= value <= high):
            raise refusal(name, value, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, default: float | None, low: float, high: float) -> float:
        """A finite number from `low` to `high`."""
        value = self.take(name, default)
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if not (known and low <= value <= high and math.isfinite(value)):
            raise refusal(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str) -> bool:
        """True or false, which is the default."""
        value = self.take(name, False)
        if not isinstance(value, bool):
            raise refusal(name, value, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string of at most `MOST_NAME` characters; without a default it must be there."""
        value = self.take(name, default)
        if value is None:
            raise Refusal(f"{name} is missing; allowed: a string", field=name)
        if not isinstance(value, str) or len(value) > MOST_NAME:
            raise refusal(name, value, f"a string of at most {MOST_NAME} characters")
        return value

    def texts(self, name: str, most: int) -> list[str]:
        """A string or a list of at most `most` short strings, none of them empty; [] by default."""
        value = self.take(name, [])
        found = [value] if isinstance(value, str) else value
        known = isinstance(found, list) and len(found) <= most
        if not known or not all(is_text(one) and 0 < len(one) <= MOST_NAME for one in found):
            allowed = f"a string of 1 to {MOST_NAME} characters, or a list of at most {most}"
            raise refusal(name, value, allowed)
        return found

    def finish(self, neutral: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuses fields that were not taken, except unsupported ones whose value has no effect.

        Args:
            neutral: unsupported fields, with the values that are allowed.

        Raises:
            Refusal: another field, or another value of an unsupported one.
        """
        for name, value in self._left.items():
            if name not in neutral:
                close = nearest(name[:MOST_NAME], {*self._taken, *neutral})
                raise Refusal(f"unknown field {shown(name)}{close}", field=name[:MOST_NAME])
            if not any(type(value) is type(one) and value == one for one in neutral[name]):
                only = " or ".join(json.dumps(one) for one in (*neutral[name], None))
                raise Refusal(f"{name} is not supported; allowed: {only}", field=name)


def is_text(value: object) -> bool:
    """Whether a value is a string."""
    return isinstance(value, str)


def refusal(name: str, value: object, allowed: str) -> Refusal:
    """An error for a field's value."""
    said = "missing" if value is None else shown(value)
    return Refusal(f"{name} is {said}; allowed: {allowed}", field=name)
