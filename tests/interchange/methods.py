"""Our own methods behind the text that PEFT scored: `METHODS`, as a trial uses them."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from softprompt.methods import METHODS
from softprompt.methods.prompt import PromptConfig
from softprompt.models.decoder import Decoder
from softprompt.models.t5 import T5
from tests.interchange.cases import Case, is_t5
from tests.interchange.plain import run
from tests.interchange.texts import TASK

# Name of a method -> its configuration for a case. A method that is listed here is held to PEFT.
CONFIGS: dict[str, Callable[[Case], Any]] = {
    "prompt": lambda case: PromptConfig(
        case.method["length"], places=("encoder",) if is_t5(case.model) else ()
    ),
}


def logits(model: Decoder | T5, weights: Any, delta: Any, case: Case) -> np.ndarray:
    """Logits [T, V] of the text behind a delta, through the method's `variables`."""
    name = case.method["name"]
    variables = METHODS[name].variables(delta, weights, CONFIGS[name](case), jnp.array([TASK]))
    return np.asarray(run(model, {"params": weights, "delta": variables}))
