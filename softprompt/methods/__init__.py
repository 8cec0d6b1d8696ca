"""Parameter-efficient methods by name; `softprompt.methods.base` describes their modules.

A module may define how PEFT stores the method. `PEFT` has the fields of an adapter_config.json that
identify it. `PEFT_VECTORS` maps leaves that are vectors of a projection's outputs to PEFT's tensor
names, such as {"magnitude": "lora_magnitude_vector"}.
"""

from types import ModuleType

from softprompt.methods import (
    adapter,
    bitfit,
    dora,
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
    for module in (prompt, multitask, prefix, lora, dora, adapter, bitfit, ia3, full, none, fewshot)
}
