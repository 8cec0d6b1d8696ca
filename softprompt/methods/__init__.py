"""Ways to train a delta. Each module has `init`, `variables` and `fold` (DESIGN: methods).

A module may say how PEFT stores the method: `PEFT` has the fields by which an adapter_config.json
names it, and `PEFT_VECTORS` the vectors of a projection's outputs beside a LoRA's A and B (leaf ->
tensor, such as {"magnitude": "lora_magnitude_vector"}).
"""

from types import ModuleType

from softprompt.methods import adapter, bitfit, full, ia3, lora, multitask, none, prefix, prompt

METHODS: dict[str, ModuleType] = {
    "none": none,
    "prompt": prompt,
    "multitask": multitask,
    "prefix": prefix,
    "lora": lora,
    "adapter": adapter,
    "bitfit": bitfit,
    "ia3": ia3,
    "full": full,
}
TRAINED = tuple(name for name in METHODS if name != "none")
