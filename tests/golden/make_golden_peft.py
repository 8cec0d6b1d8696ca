"""Writes peft/: adapters that PEFT saved, and logits of the tiny models with them.

Run in the environment of `make parity`, from the repository root:

    python -m tests.golden.make_golden_peft
"""

import json
import shutil
import tempfile
from pathlib import Path

import peft
import torch
import transformers

from tests.interchange.cases import CASES, GOLDEN, MODELS, write_model
from tests.interchange.live import beside, logits, trained

FILES = ("adapter_config.json", "adapter_model.safetensors")


def main() -> None:
    """Writes a folder for each case, and logits.json."""
    versions = {
        "peft": peft.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    golden: dict[str, object] = {"made_with": versions}
    with tempfile.TemporaryDirectory() as folder, beside(Path(folder)):
        for model in MODELS:
            write_model(Path(model), model)
        for name, case in CASES.items():
            model = trained(case)
            model.save_pretrained(name)
            last_V = logits(model, case)[-1]
            golden[name] = [round(float(v), 6) for v in last_V[:16]]
            (GOLDEN / name).mkdir(parents=True, exist_ok=True)
            for file in FILES:
                shutil.copyfile(Path(name) / file, GOLDEN / name / file)
    (GOLDEN / "logits.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
