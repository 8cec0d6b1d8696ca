"""What generation is compared with transformers on: inputs, and models that end their sequences."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from softprompt.models.t5 import T5
from tests.families import write_family_folder
from tests.tiny import write_llama_folder
from tests.tiny_t5 import FAMILIES as T5_FAMILIES
from tests.tiny_t5 import load_weights, write_t5_folder

NEW = 32
LENGTHS = (40, 9, 1, 23, 5, 31, 14, 2)
BEAMS = 4
EOS = 1
PENALTIES = (0.0, 1.0, 2.0)
ENDING = ("llama", "T5 1.1")  # models for beam search
EMBEDDING = 0.05  # how far embeddings are scaled down, lest models repeat the last token
GREEDY = ("opt-350m", "gemma3", "T5 1.0")  # those of the golden file

Answers = Sequence[Sequence[int]]


def ragged_inputs(vocab: int) -> list[list[int]]:
    """Eight inputs of unlike lengths, without the first two tokens."""
    random = np.random.default_rng(11)
    return [random.integers(2, vocab, length).tolist() for length in LENGTHS]


def write_greedy_folder(path: Path, name: str) -> Path:
    """A model of `GREEDY` whose texts vary."""
    if name in T5_FAMILIES:
        write_t5_folder(path, seed=1, **T5_FAMILIES[name])
    else:
        write_family_folder(path, name)
    embeddings = ("shared.weight", "embed_tokens.weight")
    scale(path, {name: EMBEDDING for name in tensors_in(path) if name.endswith(embeddings)})
    return path


def write_ending_folder(path: Path, name: str) -> Path:
    """A model whose choices are close, whose texts vary, and whose sequences end now and then."""
    llama = name == "llama"
    if llama:
        write_llama_folder(path, seed=3, tied=False)
    else:
        write_t5_folder(path, seed=3)
    embedding = "model.embed_tokens.weight" if llama else "shared.weight"
    scale(path, {embedding: 0.3, "lm_head.weight": 0.3})
    tensors = tensors_in(path)
    tensors["lm_head.weight"][EOS] *= 2.0
    save(path, tensors)
    return path


def tensors_in(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a folder."""
    return load_file(path / "model.safetensors")


def save(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes them back."""
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def scale(path: Path, factors: Mapping[str, float]) -> None:
    """Multiplies some tensors of a folder."""
    tensors = tensors_in(path)
    save(path, {name: x * np.float32(factors.get(name, 1)) for name, x in tensors.items()})


def check_variety(answers: Answers) -> None:
    """Whether what a random model says is not one token over and over, nor the same for all."""
    assert np.mean([len(set(ids)) for ids in answers]) > 2.5
    assert len(set(map(tuple, answers))) > 6


def check_beams_matter(found: Mapping[float, Answers]) -> None:
    """Whether sequences end before the limit, and the penalty decides which is best."""
    ended = np.array([[len(ids) < NEW for ids in found[p]] for p in PENALTIES])
    assert ended.any(axis=1).all() and not ended.all(axis=1).any()
    assert (ended[0] & ~ended[-1]).sum() >= 2
    differ = [len({tuple(found[p][n]) for p in PENALTIES}) > 1 for n in range(len(LENGTHS))]
    assert np.mean(differ) > 0.5


def read_t5(folder: Path) -> tuple[T5, dict]:
    """A T5 and its weights in float32."""
    config, weights, _ = load_weights(
        folder, dtype=np.dtype(np.float32), put=lambda path, leaf: jnp.asarray(leaf)
    )
    return T5(config), weights
