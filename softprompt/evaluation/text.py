"""Perplexity of plain text: what a prompt or a rounding does to the model at large."""

import numpy as np
from etils import epath

from softprompt.data.encode import Encoded
from softprompt.errors import UserError
from softprompt.models.tokenizer import Tokenizer

PIECE = 512  # tokens that are predicted from one another


def read_text(file: str) -> str:
    """The text of `config.eval.text`.

    Raises:
        UserError: no such file, or not UTF-8.
    """
    try:
        return epath.Path(file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"config key 'eval.text' is {file!r}: {error}; allowed: a text file"
        ) from error


def text_pieces(tokenizer: Tokenizer, text: str, *, tokens: int, piece: int = PIECE) -> Encoded:
    """The text's first tokens in pieces that are scored apart, each token but the first predicted.

    A piece begins with BOS where the model was trained so.

    Args:
        tokenizer: of the model.
        text: any length.
        tokens: how many of its tokens are used, at most.
        piece: tokens of a piece; what is left at the end is dropped.

    Raises:
        UserError: the text has less than one piece.
    """
    ids = np.array(tokenizer.encode(text)[:tokens], np.int32)
    start = [tokenizer.bos_id] if tokenizer.add_bos else []
    pieces = ids[: len(ids) // piece * piece].reshape(-1, piece)
    if not len(pieces):
        raise UserError(f"config key 'eval.text' has {len(ids)} tokens; allowed: {piece} or more")
    whole = [np.array([*start, *one], np.int32) for one in pieces]
    return Encoded(
        ids=[f"piece {n}" for n in range(len(whole))],
        inputs=[one[:1] for one in whole],
        targets=[one[1:] for one in whole],
        labels=np.full(len(whole), -1, np.int32),
        candidates=(),
        truncated=0,
    )
