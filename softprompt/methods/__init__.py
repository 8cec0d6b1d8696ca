"""Ways to train a delta: modules that `softprompt.methods.base` describes, by name."""

from types import ModuleType

from softprompt.methods import (
    adapter,
    bitfit,
    fewshot,
    full,
    ia3,
    lora,
    multitask,
    none,
    prefix,
    prompt,
)

METHODS: dict[str, ModuleType] = {
    module.Settings.name: module
    for module in (
        prompt,
        multitask,
        prefix,
        lora,
        adapter,
        bitfit,
        ia3,
        full,
        none,
        fewshot,
    )
}
