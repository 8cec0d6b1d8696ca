"""Greedy and beam search are those of transformers, from a file that it made."""

import json
from pathlib import Path

import pytest

from softprompt.inference.beam import beam_search
from softprompt.inference.decode import generate
from softprompt.pretrained.loading import load_model
from tests.generation_cases import (
    BEAMS,
    ENDING,
    EOS,
    GREEDY,
    NEW,
    PENALTIES,
    check_beams_matter,
    ragged_inputs,
    read_t5,
    write_ending_folder,
    write_greedy_folder,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "generation.json").read_text())


def read(folder, name):
    """Model, weights, the shared part of the plain base model, and the ragged inputs."""
    if "T5" in name:
        model, weights = read_t5(folder)
    else:
        loaded = load_model(str(folder))
        model, weights = loaded.model, loaded.weights
    context = model.apply({"params": weights}, method="prompt_context")
    return model, weights, ({}, context), ragged_inputs(model.config.vocab)


@pytest.mark.parametrize("name", GREEDY)
def test_greedy(tmp_path, name):
    """Mutation: positions by slot, not by row."""
    arguments = read(write_greedy_folder(tmp_path, name), name)
    assert generate(*arguments, max_new=NEW, eos_id=None) == GOLDEN["greedy"][name]


@pytest.mark.matrix
@pytest.mark.parametrize("name", ENDING)
def test_beams(tmp_path, name):
    """Mutation: EOS is not counted in the length; the search goes on until no beam can win; an end
    beyond the first beams competes; the cache does not follow its beam; a closed search moves on.
    """
    wanted = {penalty: GOLDEN["beams"][name][str(penalty)] for penalty in PENALTIES}
    check_beams_matter(wanted)
    arguments = read(write_ending_folder(tmp_path, name), name)
    for penalty in PENALTIES:
        rules = {"beams": BEAMS, "max_new": NEW, "eos_id": EOS, "length_penalty": penalty}
        assert beam_search(*arguments, batch=8, **rules) == wanted[penalty]
