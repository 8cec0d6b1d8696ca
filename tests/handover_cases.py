"""Trials with given prompts, not trained ones, for the tests of hand-overs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, processors

from softprompt.config import to_dict
from softprompt.methods.delta_file import save_delta
from softprompt.pretrained.loading import load_model
from softprompt.trials.run import CONFIG, DELTA, provenance
from tests.own_task import make_config
from tests.tiny import BOS

TEXTS = ("Review: a warm film\nSentiment:", "Review: the plot of the city", "a river")


def write_trial(folder: Path, root: Path, model: Path, delta: dict[str, Any], **more: Any) -> Path:
    """Writes config.json and delta.safetensors; `root` has the task's data (`write_task`)."""
    config, loaded = make_config(root, model, **more), load_model(str(model))
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(to_dict(config)))
    save_delta(folder / DELTA, delta, provenance(config, loaded))
    return folder


def random_prompt(length: int, width: int, *, seed: int) -> dict[str, np.ndarray]:
    """A prompt of vectors some times larger than embeddings, as trained ones are."""
    vectors = np.random.default_rng(seed).standard_normal((length, width))
    return {"prompt": (3 * vectors).astype(np.float32)}


def begin_with_bos(model: Path) -> None:
    """Makes a tokenizer of `write_llama_folder` put BOS before every text."""
    file = str(model / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 0)]
    )
    tokenizer.save(file)
