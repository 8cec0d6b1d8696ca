"""Our own methods behind the text that PEFT scored: `METHODS`, as a trial uses them."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from softprompt.methods import METHODS
from softprompt.methods.ia3 import Ia3Config
from softprompt.methods.lora import LoraConfig
from softprompt.methods.multitask import MultitaskConfig
from softprompt.methods.prefix import PrefixConfig
from softprompt.methods.prompt import PromptConfig
from softprompt.models.decoder import Decoder
from softprompt.models.layers import collections
from softprompt.models.t5 import T5
from softprompt.pretrained.loading import load_model, make_model
from tests.interchange.cases import Case, is_t5
from tests.interchange.plain import run
from tests.interchange.texts import TASK
from tests.tiny_t5 import load_weights


def stacks(case: Case, *, place: str) -> tuple[str, ...]:
    return (place,) if is_t5(case.model) else ()


def targets(case: Case) -> tuple[str, ...]:
    return tuple(case.method["targets"].split(","))


def lora(case: Case) -> LoraConfig:
    return LoraConfig(*(case.method[key] for key in ("rank", "alpha", "rslora")), targets(case))


# Name of a method -> its configuration for a case. A method that is listed here is held to PEFT.
CONFIGS: dict[str, Callable[[Case], Any]] = {
    "prompt": lambda case: PromptConfig(
        case.method["length"], stacks=stacks(case, place="encoder")
    ),
    "multitask": lambda case: MultitaskConfig(
        case.method["length"], stacks=stacks(case, place="encoder"), rank=case.method["rank"]
    ),
    "prefix": lambda case: PrefixConfig(case.method["length"], stacks(case, place="decoder")),
    "lora": lora,
    "dora": lora,
    "ia3": lambda case: Ia3Config(targets(case)),
}


@functools.cache
def load(folder: Path) -> tuple[Decoder | T5, Any]:
    """The model of a folder, and its weights in float32."""
    if is_t5(folder.name):
        config, weights, _ = load_weights(
            folder, dtype=np.dtype("float32"), put=lambda path, leaf: jnp.asarray(leaf)
        )
        return make_model(config, "float32"), weights
    loaded = load_model(str(folder))
    return loaded.model, loaded.weights


def logits(model: Decoder | T5, weights: Any, delta: Any, case: Case) -> np.ndarray:
    """Logits [T, V] of the text behind a delta, through the method's `variables`."""
    name = case.method["name"]
    variables = METHODS[name].variables(delta, weights, CONFIGS[name](case), jnp.array([TASK]))
    return np.asarray(run(model, collections(weights, variables)))
