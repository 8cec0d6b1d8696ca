"""Prompts as added tokens: one more row of the vocabulary for each vector of a prompt.

A model with these rows reads the ids of a prompt's tokens as the prompt's vectors. A program that
loads a Hugging Face folder needs no other support for prompts: it mixes tasks in a batch, and
shares the keys and values of equal beginnings.

An added token is only ever read. A tied head would give it a logit, its vector times the last
hidden state, and this may be the largest. So the head becomes a matrix of its own, and the added
tokens' rows in it are the mean of all rows:

* The logit of an added token is the mean of all logits (before a soft cap, which keeps their
  order). The mean is never above the largest: greedy decoding never chooses such a token.
* Without a soft cap its probability is at most the geometric mean of all V probabilities, at any
  temperature, so at most 1 / V. It is not zero. No row of a head without a bias does better for
  every hidden state: by the separating hyperplane theorem, only convex combinations of the other
  rows never exceed the largest logit. A sampler has to exclude the added ids by name.

Source: for the mean, Hewitt 2021, "Initializing new word embeddings for pretrained language
models".
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from softprompt.errors import UserError
from softprompt.models.decoder import DecoderConfig
from softprompt.pretrained.tokenizer import Tokenizer


def token_names(task: str, length: int) -> list[str]:
    """The tokens that stand for a task's vectors, in order."""
    return [f"<|{task}:{n}|>" for n in range(length)]


def add_tokens(tokenizer: Tokenizer, tokens: Sequence[str]) -> tuple[Tokenizer, list[int]]:
    """A tokenizer with special tokens added, and their ids; it puts no BOS before a text.

    Raises:
        UserError: the tokenizer has one of the tokens already.
    """
    backend = Backend.from_str(tokenizer.backend.to_str())
    for token in tokens:
        if (known := backend.token_to_id(token)) is not None:
            raise UserError(f"the tokenizer has a token {token!r} already, with id {known}")
    backend.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in tokens])
    vocabulary = backend.get_vocab(with_added_tokens=True)
    added = dataclasses.replace(tokenizer, backend=backend, add_bos=False)
    return added, [vocabulary[token] for token in tokens]


def add_rows(
    config: DecoderConfig, weights: Mapping[str, Any], ids: Sequence[int], rows_ND: np.ndarray
) -> tuple[DecoderConfig, dict[str, Any]]:
    """A model whose embeddings of `ids` are `rows_ND`, and that does not generate these ids.

    Args:
        config: of the model.
        weights: a tree like that of `load_model`, not quantised.
        ids: N new ids. They may be those of rows that no token of the tokenizer has.
        rows_ND: vectors as they enter the first layer, after the scaling of embeddings.

    Returns:
        The config and the weights, which share the leaves that have not changed.
    """
    embed_VD = np.asarray(weights["embed"]["embedding"])
    head_DV = embed_VD.T if config.tied else np.asarray(weights["head"]["kernel"])
    mean_D = head_DV.mean(axis=1, dtype=np.float64)
    vocab = max(config.vocab, max(ids) + 1)
    grown = ((0, vocab - config.vocab), (0, 0))
    embed_VD, head_VD = np.pad(embed_VD, grown), np.pad(head_DV.T, grown)
    embed_VD[ids] = rows_ND / config.embed_scale
    head_VD[ids] = mean_D
    config = dataclasses.replace(config, vocab=vocab, tied=False)
    return config, {**weights, "embed": {"embedding": embed_VD}, "head": {"kernel": head_VD.T}}
