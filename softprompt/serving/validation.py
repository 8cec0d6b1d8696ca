"""What a request may ask for."""

from typing import Any

from softprompt.errors import UserError
from softprompt.inference.pool_programs import ALTERNATIVES
from softprompt.models.decoder_layers import DecoderConfig
from softprompt.serving.placement import Sizes
from softprompt.serving.requests import Request


def check_request(request: Request, model: DecoderConfig, sizes: Sizes, *, context: int) -> None:
    """Checks a request's values.

    Args:
        request: to check.
        model: the decoder's config.
        sizes: of the pools.
        context: P, the positions of the task's context.

    Raises:
        UserError: names the first field whose value is not allowed.
    """
    length, most = len(request.tokens), sizes.input
    if not request.max_new:
        most += sizes.new  # the input is only scored
    if not 1 <= length <= most:
        raise UserError(f"the input has {length} tokens; allowed: 1 to {most}")
    for token in request.tokens:
        if not _is_int(token, 0, model.vocab - 1):
            raise UserError(f"token id {token!r}; allowed: 0 to {model.vocab - 1}")
    positions = context + length + max(request.max_new - 1, 0)
    if positions > model.context_length:
        raise UserError(
            f"{length} tokens and {request.max_new} new ones need {positions} positions with the "
            f"{context} of the task; allowed: {model.context_length}, the model's context"
        )
    _check(
        request,
        "max_new",
        _is_int(request.max_new, 0 if request.echo else 1, sizes.new),
        f"{0 if request.echo else 1} to {sizes.new}",
    )
    _check(request, "temperature", 0 <= request.temperature < float("inf"), "0 (greedy) or more")
    _check(request, "top_k", _is_int(request.top_k, 0, 2**31 - 1), "0 (all) or more")
    _check(request, "top_p", 0 < request.top_p <= 1, "above 0, up to 1")
    _check(request, "seed", _is_int(request.seed, 0, 2**32 - 1), "0 to 4294967295")
    texts = all(isinstance(text, str) and text for text in request.stop)
    _check(request, "stop", texts, "texts that are not empty")
    known = request.logprobs is None or _is_int(request.logprobs, 0, ALTERNATIVES)
    _check(request, "logprobs", known, f"0 to {ALTERNATIVES}, or none")


def _is_int(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _check(request: Request, field: str, allowed: bool, words: str) -> None:
    if not allowed:
        raise UserError(f"{field} is {getattr(request, field)!r}; allowed: {words}")
