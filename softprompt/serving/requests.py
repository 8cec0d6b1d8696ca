"""What callers and the engine exchange: requests, their events, and facts about tasks."""

import dataclasses
from collections.abc import Callable

from softprompt.errors import UserError


class Busy(UserError):
    """The queue of requests is full; the caller may try again later."""


class Stopped(UserError):
    """The engine was closed, or an error ended its thread."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One completion.

    Attributes:
        task: its name; "" is the base model.
        tokens: the input's ids, BOS included where the task's texts begin with it.
        max_new: the most tokens to generate; 0 only with `echo`.
        temperature: 0 chooses the most likely token.
        top_k: only this many of the most likely tokens may be drawn; 0: all.
        top_p: only the most likely tokens that together reach this probability; 1: all.
        seed: of the draws, which depend only on the seed, the logits and the token's index.
        stop: the output ends before the first of these texts.
        logprobs: how many alternatives of each token to report, 0 to 5; None: none.
        echo: the input's tokens are reported first.
    """

    task: str
    tokens: tuple[int, ...]
    max_new: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    echo: bool = False


@dataclasses.dataclass(frozen=True)
class Token:
    """One token of an output, or of an echoed input.

    Attributes:
        id: of the token.
        text: what the token adds to the decoded output; "" while a character is incomplete.
        logprob: log-probability of the model, before temperature, top-k and top-p; NaN for the
            first token of a text, and for echoed tokens if the request's `logprobs` is None.
        top: the most likely tokens (id, log-probability), as many as the request's `logprobs`.
    """

    id: int
    text: str
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Finish:
    """The last event of a request.

    Attributes:
        reason: "stop" (EOS, or a text of `stop`), "length", "cancelled" or "error".
        prompt_tokens: the input's tokens, without the task's context.
        completion_tokens: generated tokens, EOS not included.
        error: one line, if `reason` is "error".
    """

    reason: str
    prompt_tokens: int
    completion_tokens: int
    error: str = ""


OnEvent = Callable[[Token | Finish], None]


@dataclasses.dataclass(frozen=True)
class TaskInfo:
    """Facts about a loaded task.

    Attributes:
        name: of the task.
        method: that trained it.
        model: the frozen model's name.
        length: P, the positions of its context.
        bytes_file: size of the file with its delta.
        bytes_cache: size of its context's keys and values, and of the variables that rows read.
        loaded_at: seconds since 1970.
        digest: of its delta, the weights and the dtype.
    """

    name: str
    method: str
    model: str
    length: int
    bytes_file: int
    bytes_cache: int
    loaded_at: float
    digest: str
