"""PEFT itself on the tiny models; needs PyTorch."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tests.interchange.cases import Case, is_t5
from tests.interchange.texts import IDS, T5_IDS, T5_TARGETS, TASK


@contextlib.contextmanager
def beside(folder: Path) -> Iterator[None]:
    """In a folder, so that models and tokenizers have short names; PEFT's advice is not shown."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.chdir(before)


def base_model(model: str) -> Any:
    """The base model in the folder of this name."""
    kind = AutoModelForSeq2SeqLM if is_t5(model) else AutoModelForCausalLM
    return kind.from_pretrained(model, dtype=torch.float32).eval()


def trained(case: Case, *, base: Any = None, spread: float = 1.0) -> Any:
    """A PEFT model whose adapter is random throughout, as after training.

    `base`: the base model, if not the one in the folder of the case's name. `spread`: of the noise.
    """
    task = "SEQ_2_SEQ_LM" if is_t5(case.model) else "CAUSAL_LM"
    config = getattr(peft, case.kind)(task_type=task, **case.options)
    torch.manual_seed(0)
    model = peft.get_peft_model(base or base_model(case.model), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = spread * torch.randn_like(parameter)
            parameter.data = 1 + 0.5 * noise if case.kind == "IA3Config" else noise
    return model


def logits(model: Any, case: Case) -> np.ndarray:
    """Logits [T, V] of one text behind the adapter."""
    inputs: dict[str, Any] = {"input_ids": torch.tensor([T5_IDS if is_t5(case.model) else IDS])}
    if is_t5(case.model):
        inputs["decoder_input_ids"] = torch.tensor([T5_TARGETS])
    if case.method["name"] == "multitask":
        inputs["task_ids"] = torch.tensor([TASK])
        if inputs.pop("decoder_input_ids", None) is not None:  # PEFT does not hand them on
            inputs["labels"] = torch.tensor([T5_TARGETS[1:] + [1]])  # the decoder's, shifted
    ones = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        found = model(**inputs, attention_mask=ones).logits[0].numpy()
    return found[-len(T5_TARGETS if is_t5(case.model) else IDS) :]
