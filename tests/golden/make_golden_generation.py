"""Writes generation.json: what transformers on PyTorch generates, for the tests without PyTorch.

Run in the environment of `make parity`, from the repository root:

    python -m tests.golden.make_golden_generation
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, T5ForConditionalGeneration

from tests.generation_cases import (
    ENDING,
    GREEDY,
    PENALTIES,
    check_beams_matter,
    check_variety,
    ragged_inputs,
    write_ending_folder,
    write_greedy_folder,
)
from tests.parity.reference import alone, theirs


def read(folder: Path, name: str) -> Any:
    """transformers' model of a folder."""
    kind = T5ForConditionalGeneration if "T5" in name else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def greedy(folder: Path, name: str) -> list[list[int]]:
    """Greedy answers of a tiny variant to the ragged inputs."""
    model = read(write_greedy_folder(folder, name), name)
    answers = theirs(model, ragged_inputs(model.config.vocab_size))
    check_variety(answers)
    return answers


def beams(folder: Path, name: str) -> dict[str, list[list[int]]]:
    """Best sequences of a beam search by length penalty."""
    model = read(write_ending_folder(folder, name), name)
    inputs = ragged_inputs(model.config.vocab_size)
    found = {penalty: alone(model, inputs, penalty) for penalty in PENALTIES}
    check_beams_matter(found)
    return {str(penalty): answers for penalty, answers in found.items()}


def in_folder(make: Any, name: str) -> Any:
    """What `make` returns for a model written into a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return make(Path(folder) / "model", name)


def main() -> None:
    """Writes generation.json beside this file."""
    golden = {
        "made_with": {"transformers": transformers.__version__, "torch": torch.__version__},
        "greedy": {name: in_folder(greedy, name) for name in GREEDY},
        "beams": {name: in_folder(beams, name) for name in ENDING},
    }
    Path(__file__).with_name("generation.json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
