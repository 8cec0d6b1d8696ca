"""Settings classes: frozen dataclasses whose fields are the keys of a config.

A field is made with `setting`, which says its default, its meaning and what it may be. Its key is
the class's section and its name, as in "method.length".
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

from softprompt.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Setting:
    """A key's default, its meaning and what it may be.

    Attributes:
        default: its value where nothing is said; its type is the key's.
        help: what it means, in a line or two.
        choices: the allowed strings; () where any is.
        low: the smallest allowed number.
        high: the largest.
        needs: names of other fields; unless one of them is set (is none of 0, "", False and "none")
            the key changes nothing, and must keep its default.
        scientific: the key is part of a trial's id.
        for_training: it changes nothing where nothing is trained.
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
        section: of the config, that the keys belong to; "" for those outside of all sections.
        scientific: the keys are part of a trial's id.
        for_training: the keys change nothing where nothing is trained.
    """

    section: ClassVar[str] = ""
    scientific: ClassVar[bool] = True
    for_training: ClassVar[bool] = False

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The settings with their values among a config's, as in {"method.length": 20, ...}."""
        return cls(**{name.rpartition(".")[2]: values[name] for name in keys(cls)})

    def check(self) -> None:
        """Checks what one key demands of another.

        Raises:
            UserError: names the first that does not have it.
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

    Args:
        key: as in "method.length".
        value: of the key.
        setting: of the key.
        where: of which config that is so, as in "for method.name=lora"; "" for any.

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
    """Returns what a key may be, in words: its choices, its range or its type."""
    if setting.choices:
        return ", ".join(setting.choices)
    if setting.low == -math.inf:
        return KINDS[type(setting.default)]
    if math.isinf(setting.high):
        return f"at least {setting.low:g}"
    return f"{setting.low:g} to {setting.high:.10g}"


def coerce(key: str, value: Any, old: Any) -> Any:
    """The value as the type of `old`; a string is read as that type.

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


# What a key takes, by the type of its default.
KINDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    dict: 'a mapping of strings, as in {"pos": " positive"}',
}


def _parse(text: str, old: Any) -> Any:
    """The command line's text read as the type of `old`; the text itself where it cannot be."""
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
