"""The base: every default, for a first look or for `--config.key=value` alone.

Question: none; this is where every other config starts. The keys are explained in
`softprompt/config/schema.py`, and those of methods and optimizers in their modules.

Command:
    softprompt train --config configs/base.py --workdir runs/first

Cost: 100 steps of 32 movie snippets on SmolLM2-135M, at best 2 s each on two shared CPU cores, and
the evaluations.
"""

from ml_collections import ConfigDict

from softprompt.config import base_config


def get_config() -> ConfigDict:
    """Returns the defaults."""
    return base_config()
