"""What a config's values may be, and which of them its trial reads: checks of its flat keys.

Whatever is wrong is one line that names the key, the value and what is allowed.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from softprompt.config.schema import CHOOSERS, KEYS, LET_BE, METHOD_SETTINGS, SECTIONS
from softprompt.errors import UserError
from softprompt.settings import Setting, Settings, check_value, keys


def parts(values: Mapping[str, Any]) -> Iterator[tuple[str, type[Settings]]]:
    """The settings classes that make up a config, with what chose them ("method.name=lora", or "").

    A choice that its own owner does not have brings none: a LoRA starts from no initialiser.
    """
    there: set[str] = set()
    for cls in SECTIONS:
        there |= keys(cls).keys()
        yield "", cls
    for chooser, options in CHOOSERS.items():
        if chooser in there and values[chooser] in options:
            cls = options[values[chooser]]
            there |= keys(cls).keys()
            yield f"{chooser}={values[chooser]}", cls


def own_settings(values: Mapping[str, Any]) -> dict[str, Setting]:
    """The keys that a config's trial has, with what they may be there."""
    return {name: one for _, cls in parts(values) for name, one in keys(cls).items()}


def check_values(values: Mapping[str, Any]) -> None:
    """Checks every value, and what one demands of another.

    Raises:
        UserError: names the first that is not allowed.
    """
    for name, value in values.items():
        check_value(name, value, KEYS[name])
    for where, cls in parts(values):
        for name, one in keys(cls).items():
            check_value(name, values[name], one, where=where and f"for {where}")
        cls.of(values).check()
    method = METHOD_SETTINGS[values["method.name"]]
    if values["optimizer.warmup"] > values["train.steps"] > 0:
        raise UserError(
            f"config key 'optimizer.warmup' is {values['optimizer.warmup']}; "
            f"allowed: at most train.steps, {values['train.steps']}"
        )
    if values["eval.text"] and method.per_task:
        raise UserError(
            f"config key 'eval.text' is {values['eval.text']!r}; allowed: '' for "
            f"method.name={method.name}, whose prompts are for tasks"
        )
    if values["data.mixture"] and method.shows_examples:
        raise UserError(
            f"config key 'data.mixture' is {values['data.mixture']!r}; allowed: '' with "
            f"method.name={method.name}"
        )


def chooses(key: str) -> bool:
    """Whether what other keys change goes by this one."""
    return key in CHOOSERS or any(key in other.needs for other in KEYS.values())


def reads(values: Mapping[str, Any], key: str) -> bool:
    """Whether a key changes a config's trial."""
    found = own_settings(values).get(key)
    if found is None or not _needs_met(values, found):
        return False
    return METHOD_SETTINGS[values["method.name"]].trains or not found.for_training


def _needs_met(values: Mapping[str, Any], setting: Setting) -> bool:
    """Whether one of the keys is set that a key needs; one that needs none always is."""
    return not setting.needs or any(values[key] not in (0, "", "none") for key in setting.needs)


def check_used(values: Mapping[str, Any]) -> None:
    """Checks that a key away from its default is one that the config's trial has.

    Raises:
        UserError: names the first that is not: what has it, and what there is instead.
    """
    own = own_settings(values)
    for name, key in KEYS.items():
        if values[name] == key.default or name in LET_BE:
            continue
        if name not in own:
            raise UserError(_foreign(name, values, own))
        if not _needs_met(values, own[name]):
            raise UserError(
                f"config key {name!r} is {values[name]!r}; allowed: {key.default!r} without "
                f"{' or '.join(own[name].needs)}"
            )


def _foreign(name: str, values: Mapping[str, Any], own: Mapping[str, Setting]) -> str:
    """One line on a key that the config's method, optimizer or initialiser does not have."""
    ((chooser, owners),) = KEYS[name].owners.items()
    while chooser not in own:  # that choice is not there itself
        ((chooser, owners),) = KEYS[chooser].owners.items()
    choice = f"{chooser}={values[chooser]}"
    (cls,) = [cls for where, cls in parts(values) if where == choice] or [Settings]
    return (
        f"config key {name!r} is {values[name]!r}; {choice} has no such key "
        f"({', '.join(owners)} {'has' if len(owners) == 1 else 'have'} it); "
        f"its keys: {', '.join(keys(cls)) or 'none'}"
    )
