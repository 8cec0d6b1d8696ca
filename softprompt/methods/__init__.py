"""Ways to train a delta. Each module has `init`, `variables` and `fold` (DESIGN: methods)."""

from types import ModuleType

from softprompt.methods import none, prompt

METHODS: dict[str, ModuleType] = {"none": none, "prompt": prompt}
