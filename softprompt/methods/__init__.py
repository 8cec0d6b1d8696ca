"""Ways to train a delta. Each module has `init`, `variables` and `fold` (DESIGN: methods)."""

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
