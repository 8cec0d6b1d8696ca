"""Writes t5.json: logits of tiny T5s by transformers on PyTorch, for the tests without PyTorch.

Run in the environment of `make parity`, from the repository root:

    python -m tests.golden.make_golden_t5
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForSeq2SeqLM

from tests.tiny_t5 import VARIANTS, write_t5_folder

TARGET = [0, 17, 4, 4, 60]


def rounded(values: Any) -> list[float]:
    """Five decimals: below every tolerance that reads them."""
    return [round(float(v), 5) for v in values]


def reference(family: dict[str, Any]) -> list[dict[str, Any]]:
    """Logits at the last target position: a long input, and one behind a prompt."""
    with tempfile.TemporaryDirectory() as folder:
        write_t5_folder(folder, seed=1, **family)
        model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    cases = []
    for length, prompt_length in ((150, 0), (9, 3)):
        rng = np.random.default_rng([length, prompt_length])
        ids = rng.integers(2, 99, length).tolist()
        prompt = np.round(rng.standard_normal((prompt_length, 20)), 3)
        x = torch.cat([torch.tensor(prompt, dtype=torch.float32), model.shared.weight[ids]])
        logits = model(inputs_embeds=x[None], decoder_input_ids=torch.tensor([TARGET])).logits
        cases.append(
            {
                "input": ids,
                "target": TARGET,
                "prompt": prompt.reshape(-1).tolist(),
                "first_logits": rounded(logits[0, -1, :8]),
            }
        )
    return cases


def main() -> None:
    """Writes t5.json beside this file."""
    with torch.no_grad():
        golden = {
            "made_with": {"transformers": transformers.__version__, "torch": torch.__version__},
            "models": {name: reference(family) for name, family in VARIANTS.items()},
        }
    Path(__file__).with_name("t5.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
