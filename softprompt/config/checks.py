"""What a config's values demand of one another: checks of its flat keys.

Whatever is wrong is one line that names the key, the value and what is allowed.
"""

import math
from collections.abc import Mapping
from typing import Any

from softprompt.config.schema import (
    CHOICES,
    INIT_KEYS,
    METHOD_KEYS,
    NEEDS,
    OPTIMIZER_KEYS,
    RANGES,
    TRAINING_KEYS,
    UNTRAINED,
)
from softprompt.errors import UserError

OWN_KEYS = OPTIMIZER_KEYS | METHOD_KEYS


def check_range(key: str, value: float) -> None:
    """Checks a number that has a smallest and a largest value.

    Raises:
        UserError: it is not between them.
    """
    low, high = RANGES[key]
    if not (low <= value <= high and math.isfinite(value)):
        allowed = f"at least {low:g}" if math.isinf(high) else f"{low:g} to {high:.10g}"
        raise UserError(f"config key {key!r} is {value!r}; allowed: {allowed}")


def check_together(values: Mapping[str, Any]) -> None:
    """Checks what one key demands of another.

    Raises:
        UserError: names the first that it does not have.
    """
    _check_method(values)
    if values["train.batch"] % values["train.microbatches"]:
        raise UserError(
            f"config key 'train.microbatches' is {values['train.microbatches']}; "
            f"it must divide train.batch, {values['train.batch']}"
        )
    if values["optimizer.warmup"] > values["train.steps"] > 0:
        raise UserError(
            f"config key 'optimizer.warmup' is {values['optimizer.warmup']}; "
            f"allowed: at most train.steps, {values['train.steps']}"
        )
    if values["mesh.data"] == 0:
        raise UserError(
            "config key 'mesh.data' is 0; allowed: -1 (all devices that are left) or at least 1"
        )
    source = values["task.source"]
    if source and not source.startswith(("jsonl:", "tsv:", "csv:", "tfds:")):
        raise UserError(
            f"config key 'task.source' is {source!r}; "
            "allowed: jsonl:PATH, tsv:PATH, csv:PATH or tfds:NAME"
        )
    if source and not values["task.template"]:
        raise UserError(f"config key 'task.template' is empty; task.source={source} needs it")


def _check_method(values: Mapping[str, Any]) -> None:
    """What a method's keys demand of one another."""
    name, init, reparam = (values[f"method.{key}"] for key in ("name", "init", "reparam"))
    starts = name in ("prompt", "multitask", "prefix")
    if starts and init in ("text", "file") and not values[f"method.init_{init}"]:
        raise UserError(f"config key 'method.init_{init}' is empty; method.init={init} needs it")
    allowed = {"prompt": CHOICES["method.reparam"], "prefix": ("none", "mlp")}.get(name, ("none",))
    if reparam not in allowed:
        raise UserError(
            f"config key 'method.reparam' is {reparam!r}; allowed for method.name={name}: "
            f"{', '.join(allowed)}"
        )
    if values["method.bos"] == "before" and name not in ("prompt", *UNTRAINED):
        raise UserError(
            f"config key 'method.bos' is 'before'; allowed for method.name={name}: after, none"
        )
    if values["eval.text"] and name == "multitask":
        raise UserError(
            f"config key 'eval.text' is {values['eval.text']!r}; allowed: '' for "
            "method.name=multitask, whose prompts are for tasks"
        )


def reads(values: Mapping[str, Any], key: str) -> bool:
    """Whether a key changes a config's trial: its method, optimizer and start read it.

    One that is nobody's own all do, but for training's where nothing is trained.
    """
    if values["method.name"] in UNTRAINED and key.startswith(TRAINING_KEYS):
        return False
    return _started(values, key) and _owned(values, key) and _needed(values, key)


def _started(values: Mapping[str, Any], key: str) -> bool:
    """Whether a config's start has a key; one that is no start's own, all have."""
    return values["method.init"] in INIT_KEYS.get(key, (values["method.init"],))


def _needed(values: Mapping[str, Any], key: str) -> bool:
    """Whether what a key changes is there; one that needs no other always."""
    return key not in NEEDS or any(values[other] for other in NEEDS[key])


def _owned(values: Mapping[str, Any], key: str) -> bool:
    """Whether a config's method or optimizer has a key; one that is nobody's own, all have."""
    names = {values["optimizer.name"], values["method.name"]}
    if values["method.reparam"] != "none":
        names.add("method.reparam")
    owners = OWN_KEYS.get(key)
    return owners is None or not names.isdisjoint(owners)


def check_used(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Checks that a key away from its default changes what is trained.

    Raises:
        UserError: names the first that does not, and what reads it.
    """
    for key, owners in OWN_KEYS.items():
        if values[key] == defaults[key]:
            continue
        if not _owned(values, key):
            choice, readers = f"{key.split('.', 1)[0]}.name", owners
        elif not _started(values, key):
            choice, readers = "method.init", INIT_KEYS[key]
        else:
            continue
        raise UserError(
            f"config key {key!r} is {values[key]!r}; allowed: {defaults[key]!r} with "
            f"{choice}={values[choice]}; {', '.join(readers)} "
            f"{'reads' if len(readers) == 1 else 'read'} it"
        )
    for key, others in NEEDS.items():
        if values[key] != defaults[key] and not _needed(values, key):
            raise UserError(
                f"config key {key!r} is {values[key]!r}; allowed: {defaults[key]!r} without "
                f"{' or '.join(others)}"
            )
    name = values["method.name"]
    for key in ("train.ema", "train.dropout", "optimizer.max_row_norm"):
        if values[key] and name in UNTRAINED:
            raise UserError(
                f"config key {key!r} is {values[key]!r}; allowed: 0 with "
                f"method.name={name}, which trains nothing"
            )
    if name == "lora" and values["method.alpha"] == 0:
        raise UserError(
            "config key 'method.alpha' is 0.0; allowed: above 0 with method.name=lora, whose "
            "update it scales"
        )
