"""One of the quickstart's prompts: 20 vectors that start as label tokens, on movie snippets.

Question: how far does a soft prompt lift a frozen SmolLM2-135M-Instruct over zero-shot?
The argument sets length and initialisation, as in `configs/quickstart.py:length=5,init=vocabulary`.

Command:
    softprompt train --config configs/quickstart.py --workdir runs/one_prompt

Cost: 50 steps of 8 movie snippets, two minutes of processor time (AVX-512 BF16), test included.

Expected: test accuracy about 0.86 (seed 0), by the roundings of the version; zero-shot 0.80.
"""

from ml_collections import ConfigDict

from softprompt.config import base_config
from softprompt.config.files import parse_arg


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config of one prompt.

    Args:
        arg: "length=20,init=labels,seed=0", any part of it.
    """
    given = parse_arg(arg, length=20, init="labels", seed=0)
    config = base_config()
    config.seed = given.seed
    config.method.length = given.length
    config.method.init = given.init
    config.data.validation_examples = 100
    config.data.test_examples = 1000
    config.train.steps, config.train.batch = 50, 8
    config.optimizer.warmup = 5
    config.eval.every = 25
    return config
