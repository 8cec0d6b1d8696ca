"""Settings classes: frozen dataclasses whose fields are the keys of a config.

`setting` makes a field, with its default, its meaning and its allowed values. The field's key is
the section of its class and its name, as in "method.length".
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

from softprompt.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Setting:
    """A key's default, its meaning and its allowed values.

    Attributes:
        default: its default value, which also defines its type.
        help: its meaning, in a line or two.
        choices: the allowed strings; () allows any.
        low: the smallest allowed number.
        high: the largest allowed number.
        needs: names of other fields. Unless one of them is set (is none of 0, "", False, "none"),
            the key has no effect and must keep its default.
        scientific: the key is part of a trial's id.
        for_training: the key has no effect if nothing is trained.
    """

    default: Any
    help: str
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    needs: tuple[str, ...] = ()
    scientific: bool = True
    for_training: bool = False


def setting(default: Any, help: str, *, choices: Iterable[str] = (), **more: Any) -> Any:
    """A field of a settings class; see `Setting` for the arguments."""
    metadata = {"setting": Setting(default, help, tuple(choices), **more)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base of the settings classes.

    Attributes:
        section: the config section of the keys; "" for keys at the top level.
        scientific: the keys are part of a trial's id.
        for_training: the keys have no effect if nothing is trained.
    """

    section: ClassVar[str] = ""
    scientific: ClassVar[bool] = True
    for_training: ClassVar[bool] = False

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Makes the settings from a config's flat values, as in {"method.length": 20, ...}."""
        return cls(**{name.rpartition(".")[2]: values[name] for name in keys(cls)})

    def check(self) -> None:
        """Checks conditions between keys.

        Raises:
            UserError: names the first key that violates one.
        """


def keys(cls: type[Settings]) -> dict[str, Setting]:
    """The keys of a class, as in {"method.length": ...}, in the order of its fields."""
    prefix = f"{cls.section}." if cls.section else ""
    return {
        f"{prefix}{field.name}": dataclasses.replace(
            (one := field.metadata["setting"]),
            needs=tuple(f"{prefix}{name}" for name in one.needs),
            scientific=cls.scientific and one.scientific,
            for_training=cls.for_training or one.for_training,
        )
        for field in dataclasses.fields(cls)
    }


def summaries(options: Mapping[str, type[Settings]]) -> str:
    """Each name with the first line of its class's docstring, as "name (line), ..."."""
    lines = {name: (cls.__doc__ or "").splitlines()[0] for name, cls in options.items()}
    return ", ".join(f"{name} ({line.rstrip('.')})" for name, line in lines.items())


def check_value(key: str, value: Any, setting: Setting, *, where: str = "") -> None:
    """Checks a value of the key's type against its choices and its range.

    `where` are the configs that the check applies to, as in "for method.name=lora"; "" for all.

    Raises:
        UserError: names the key, the value and what is allowed.
    """
    if setting.choices and value not in setting.choices:
        hint, where = nearest(value, setting.choices), f" {where}" if where else ""
        raise UserError(
            f"config key {key!r} is {value!r}{hint}; allowed{where}: {allowed(setting)}"
        )
    if setting.low == -math.inf:
        return
    if not (setting.low <= value <= setting.high and math.isfinite(value)):
        raise UserError(f"config key {key!r} is {value!r}; allowed: {allowed(setting)}")


def allowed(setting: Setting) -> str:
    """Describes the allowed values of a key: its choices, its range or its type."""
    if setting.choices:
        return ", ".join(setting.choices)
    if setting.low == -math.inf:
        return KINDS[type(setting.default)]
    if math.isinf(setting.high):
        return f"at least {setting.low:g}"
    return f"{setting.low:g} to {setting.high:.10g}"


def coerce(key: str, value: Any, old: Any) -> Any:
    """Converts a value to the type of `old`; a string is parsed as that type.

    Raises:
        UserError: names the key, the value and the type.
    """
    parsed = _parse(value, old) if isinstance(value, str) and not isinstance(old, str) else value
    if isinstance(old, float) and isinstance(parsed, int) and not isinstance(parsed, bool):
        parsed = float(parsed)
    if isinstance(old, dict):
        fine = isinstance(parsed, Mapping) and all(
            isinstance(text, str) for pair in parsed.items() for text in pair
        )
    else:
        fine = type(parsed) is type(old)
    if not fine:
        raise UserError(f"config key {key!r} is {value!r}; it takes {KINDS[type(old)]}")
    return dict(parsed) if isinstance(old, dict) else parsed


# Descriptions of a key's values, by the type of its default.
KINDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    dict: 'a mapping of strings, as in {"pos": " positive"}',
}


def _parse(text: str, old: Any) -> Any:
    """Parses text of the command line as the type of `old`; returns the text if that fails."""
    try:
        if isinstance(old, bool):
            return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
        if isinstance(old, int):
            return int(text)
        if isinstance(old, float):
            return float(text)
        return json.loads(text)
    except ValueError:
        return text
