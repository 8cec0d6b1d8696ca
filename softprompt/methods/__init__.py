"""Ways to train a delta: modules that `softprompt.methods.base` describes, by name.

A module may say how PEFT stores the method: `PEFT` has the fields by which an adapter_config.json
names it, and `PEFT_VECTORS` the vectors of a projection's outputs beside a LoRA's A and B (leaf ->
tensor, such as {"magnitude": "lora_magnitude_vector"}).
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
    for module in (
        prompt,
        multitask,
        prefix,
        lora,
        dora,
        adapter,
        bitfit,
        ia3,
        full,
        none,
        fewshot,
    )
}
