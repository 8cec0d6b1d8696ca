"""Prompts as added tokens: read as the prompts' vectors, and never generated."""

import numpy as np
import pytest

from softprompt.errors import UserError
from softprompt.interchange.added_tokens import add_rows, add_tokens, token_names
from softprompt.models.decoder import Decoder
from softprompt.models.layers import collections
from softprompt.pretrained.tokenizer import Tokenizer
from tests.families import FAMILIES, family_decoder
from tests.matrix import matrix
from tests.tiny import tiny_tokenizer

TEXT = np.array([7, 300, 12, 45, 45, 2, 319, 81], np.int32)


def random_rows(number, width, seed=3):
    return np.random.default_rng(seed).standard_normal((number, width))


@pytest.mark.parametrize("name", matrix(FAMILIES, keep=["opt-350m", "gemma2"]))
def test_added_ids_are_read_as_the_vectors(x64, name):
    """The logits of a text after the ids are those after the prompt. The embedding matrix has 11
    rows without a token, and the ids begin among them. Mutations: the rows are not divided by the
    scaling of embeddings (Gemma); the head is tied; all ids come after the matrix.
    """
    first = 326
    model, weights = family_decoder(name)
    prompt_PD = random_rows(14, model.config.prompt_width)
    beside = collections(weights, {"prompt": prompt_PD})
    wanted_TV = model.apply(beside, TEXT)
    ids = list(range(first, first + 14))
    config, grown = add_rows(model.config, weights, ids, prompt_PD)
    assert (config.vocab, config.tied) == (first + 14, False)
    tokens_T = np.concatenate([ids, TEXT]).astype(np.int32)
    found_TV = Decoder(config, dtype=model.dtype).apply({"params": grown}, tokens_T)[14:]
    old = slice(0, first)
    np.testing.assert_allclose(found_TV[:, old], wanted_TV[:, old], rtol=1e-9, atol=1e-9)
    assert (found_TV[:, ids].max(axis=1) < found_TV[:, old].max(axis=1)).all()


@pytest.mark.parametrize("name", matrix(["llama", "llama3"], keep=["llama"]))
def test_no_hidden_state_prefers_an_added_id(x64, name):
    """The head's inputs point at the added rows themselves, at single tokens, away from them, and
    anywhere. Mutations: the new rows of the head are the vectors, as in a tied head, or zeros.
    """
    model, weights = family_decoder(name)
    rows_ND = 5 * random_rows(20, model.config.width)
    ids = list(range(331, 351))
    config, grown = add_rows(model.config, weights, ids, rows_ND)
    head_DV = np.asarray(grown["head"]["kernel"])
    states = [rows_ND, -rows_ND, head_DV.T, -head_DV.T, random_rows(1000, config.width)]
    logits_MV = np.concatenate(states) @ head_DV
    mean_M = logits_MV[:, :331].mean(axis=1)
    np.testing.assert_allclose(logits_MV[:, ids], np.repeat(mean_M[:, None], 20, 1), atol=1e-9)
    assert (logits_MV.argmax(axis=1) < 331).all()


def test_tokens_are_added_after_the_others():
    """Mutations: a token that is known already is taken; the tokenizer keeps its BOS; added tokens
    are read after the text is normalised, or split.
    """
    tokenizer = Tokenizer(tiny_tokenizer(), 0, 1, add_bos=True)
    names = token_names("a task, é", 3)
    added, ids = add_tokens(tokenizer, names)
    assert ids == [320, 321, 322] and not added.add_bos
    assert tokenizer.vocab_size == 320, "the model's own tokenizer has changed"
    text = "Review: a warm film"
    assert added.encode("".join(names) + text) == ids + tokenizer.encode(text)
    with pytest.raises(UserError, match="é:1.* already, with id 321"):
        add_tokens(added, names[1:])
