"""Greedy and beam search against transformers on PyTorch, token for token, in float32."""

from pathlib import Path
from typing import Any

import pytest

from softprompt.errors import UserError
from softprompt.inference.beam import beam_search
from softprompt.inference.decode import generate
from softprompt.pretrained.catalog import CATALOG
from softprompt.pretrained.loading import find, load_model
from tests.contracts.examples import snippets
from tests.families import VARIANTS, write_small_tokenizer
from tests.generation_cases import (
    BEAMS,
    EMBEDDING,
    ENDING,
    EOS,
    NEW,
    PENALTIES,
    check_beams_matter,
    check_variety,
    ragged_inputs,
    read_t5,
    write_ending_folder,
)
from tests.tiny_t5 import FAMILIES

pytestmark = pytest.mark.parity

REAL = ("smollm2-135m-instruct-q4", "gemma3-270m-q4")

torch = pytest.importorskip("torch")

from tests.parity.reference import alone, random_model, read_back, saved_by_transformers, theirs  # noqa: E402


def save_with_small_embeddings(model: Any, folder: Path) -> None:
    """Saves a model whose texts then vary more."""
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(EMBEDDING)
    model.save_pretrained(folder)


def empty(model: Any, weights: Any) -> tuple[dict, Any]:
    """The shared part of the plain base model."""
    return {}, model.apply({"params": weights}, method="prompt_context")


def greedy(model: Any, weights: Any, inputs: list[Any]) -> list[Any]:
    shared = empty(model, weights)
    return generate(model, weights, shared, inputs, max_new=NEW, eos_id=None)


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_by_every_decoder(name, tmp_path):
    """Mutation: positions by slot, not by row; a window that what is cached never leaves."""
    save_with_small_embeddings(random_model(name), tmp_path)
    write_small_tokenizer(tmp_path)
    model, ours = read_back(tmp_path), load_model(str(tmp_path))
    inputs = ragged_inputs(model.config.vocab_size)
    wanted = theirs(model, inputs)
    check_variety(wanted)
    assert greedy(ours.model, ours.weights, inputs) == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_by_every_t5(family, tmp_path):
    """Mutation: biases by slot; padding of the input is seen."""
    model = saved_by_transformers(tmp_path, family)
    save_with_small_embeddings(model, tmp_path)
    inputs = ragged_inputs(model.config.vocab_size)
    wanted = theirs(model, inputs)
    check_variety(wanted)
    assert greedy(*read_t5(tmp_path), inputs) == wanted


@pytest.mark.real
@pytest.mark.parametrize("name", REAL)
def test_greedy_by_a_real_model(name, shared_data):
    """Mutation: positions by slot, not by row.

    Both read the same GGUF file. transformers runs the inputs as one batch, padded on the left, for
    Gemma too: its positions and windows count from each input's own first token.
    """
    from transformers import AutoModelForCausalLM

    try:
        path = find(name)
    except UserError as e:
        if getattr(CATALOG[name].source, "terms", None) is None:
            raise
        pytest.skip(str(e))
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    ours = load_model(name)
    start = [ours.tokenizer.bos_id] if ours.tokenizer.add_bos else []
    inputs = [[*start, *ids] for ids in snippets(shared_data, ours.tokenizer, 8).inputs]
    assert len({len(tokens) for tokens in inputs}) > 4
    wanted = theirs(model, inputs)
    check_variety(wanted)
    assert greedy(ours.model, ours.weights, inputs) == wanted


@pytest.mark.parametrize("name", ENDING)
def test_beam_search(name, tmp_path):
    """Mutation: EOS is not counted in the length; the search goes on until no beam can win; an end
    beyond the first beams competes; the cache does not follow its beam.
    """
    from transformers import AutoModelForCausalLM, T5ForConditionalGeneration

    kind = AutoModelForCausalLM if name == "llama" else T5ForConditionalGeneration
    folder = write_ending_folder(tmp_path / "model", name)
    reference = kind.from_pretrained(folder, dtype=torch.float32).eval()
    if name == "llama":
        loaded = load_model(str(folder))
        model, weights = loaded.model, loaded.weights
    else:
        model, weights = read_t5(folder)
    inputs, found = ragged_inputs(reference.config.vocab_size), {}
    for penalty in PENALTIES:
        found[penalty] = alone(reference, inputs, penalty)
        ours = beam_search(
            model,
            weights,
            empty(model, weights),
            inputs,
            beams=BEAMS,
            max_new=NEW,
            eos_id=EOS,
            length_penalty=penalty,
            batch=1,
        )
        assert ours == found[penalty]
    check_beams_matter(found)
