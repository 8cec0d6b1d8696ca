"""Checks of a config's flat keys: which values are allowed, and which keys affect the trial.

Every error is one line that names the key, the value and what is allowed.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from softprompt.config.schema import ALWAYS_ALLOWED, CHOOSERS, KEYS, METHOD_SETTINGS, SECTIONS
from softprompt.errors import UserError
from softprompt.settings import Setting, Settings, check_value, keys

# Keys that change what training computes, and must be off for a method that trains nothing. Others
# of training, such as the number of steps, may be set, since config files set them for all methods.
OFF_UNTRAINED = ("train.ema", "train.dropout", "optimizer.max_row_norm")


def settings_classes(values: Mapping[str, Any]) -> Iterator[tuple[str, type[Settings]]]:
    """The settings classes of a config, each with the choice that adds it.

    The choice is as in "method.name=lora", or "" for a section. A chooser that the config does not
    have adds no class: LoRA has no "method.init", and so no initialiser.
    """
    present: set[str] = set()
    for cls in SECTIONS:
        present |= keys(cls).keys()
        yield "", cls
    for chooser, options in CHOOSERS.items():
        if chooser in present and values[chooser] in options:
            cls = options[values[chooser]]
            present |= keys(cls).keys()
            yield f"{chooser}={values[chooser]}", cls


def own_settings(values: Mapping[str, Any]) -> dict[str, Setting]:
    """The keys that a config's method, initialiser and optimizer have, with their settings."""
    return {name: one for _, cls in settings_classes(values) for name, one in keys(cls).items()}


def check_values(values: Mapping[str, Any]) -> None:
    """Checks every value, and conditions between values.

    Raises:
        UserError: names the first key whose value is not allowed.
    """
    for name, value in values.items():
        check_value(name, value, KEYS[name])
    for where, cls in settings_classes(values):
        for name, one in keys(cls).items():
            check_value(name, values[name], one, where=where and f"for {where}")
        cls.of(values).check()
    method = METHOD_SETTINGS[values["method.name"]]
    if values["optimizer.warmup"] > values["train.steps"] > 0:
        raise UserError(
            f"config key 'optimizer.warmup' is {values['optimizer.warmup']}; "
            f"allowed: at most train.steps, {values['train.steps']}"
        )
    for name in ("eval.text", "eval.transfer"):
        if values[name] and method.per_task:
            raise UserError(
                f"config key {name!r} is {values[name]!r}; allowed: '' for "
                f"method.name={method.name}, whose prompts are for tasks"
            )
    if values["data.mixture"] and method.shows_examples:
        raise UserError(
            f"config key 'data.mixture' is {values['data.mixture']!r}; allowed: '' with "
            f"method.name={method.name}"
        )


def is_chooser(key: str) -> bool:
    """Whether the effect of other keys depends on this one."""
    return key in CHOOSERS or any(key in other.needs for other in KEYS.values())


def has_effect(values: Mapping[str, Any], key: str) -> bool:
    """Whether a key has an effect on a config's trial."""
    found = own_settings(values).get(key)
    if found is None or not _needs_met(values, found):
        return False
    return METHOD_SETTINGS[values["method.name"]].trains or not found.for_training


def _needs_met(values: Mapping[str, Any], setting: Setting) -> bool:
    """Whether one of the keys that a key needs is set; True if it needs none."""
    return not setting.needs or any(values[key] not in (0, "", "none") for key in setting.needs)


def check_used(values: Mapping[str, Any]) -> None:
    """Checks that every key that differs from its default has an effect on the trial.

    Raises:
        UserError: names the first key that has none, the choices that have it, and the keys that
            the config has instead.
    """
    own = own_settings(values)
    for name, key in KEYS.items():
        if values[name] == key.default or name in ALWAYS_ALLOWED:
            continue
        if name not in own:
            raise UserError(_not_a_key_of(name, values, own))
        if not _needs_met(values, own[name]):
            raise UserError(
                f"config key {name!r} is {values[name]!r}; allowed: {key.default!r} without "
                f"{' or '.join(own[name].needs)}"
            )
        if name in OFF_UNTRAINED and not METHOD_SETTINGS[values["method.name"]].trains:
            raise UserError(
                f"config key {name!r} is {values[name]!r}; allowed: {key.default!r} with "
                f"method.name={values['method.name']}, which trains nothing"
            )


def _not_a_key_of(name: str, values: Mapping[str, Any], own: Mapping[str, Setting]) -> str:
    """The error for a key that the config's method, optimizer or initialiser does not have."""
    ((chooser, owners),) = KEYS[name].owners.items()
    while chooser not in own:  # the config does not have the chooser either
        ((chooser, owners),) = KEYS[chooser].owners.items()
    choice = f"{chooser}={values[chooser]}"
    (cls,) = [cls for where, cls in settings_classes(values) if where == choice] or [Settings]
    return (
        f"config key {name!r} is {values[name]!r}; {choice} has no such key "
        f"({', '.join(owners)} {'has' if len(owners) == 1 else 'have'} it); "
        f"its keys: {', '.join(keys(cls)) or 'none'}"
    )
