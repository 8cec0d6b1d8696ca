"""`/v1/completions` and `/v1/chat/completions`.

Source: OpenAI's API reference, "Completions" and "Chat".
"""

import secrets
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from softprompt.inference.pool_programs import ALTERNATIVES
from softprompt.pretrained.chat import render_chat
from softprompt.serving.http.answers import ChatAnswer, TextAnswer
from softprompt.serving.http.errors import Json, Refusal
from softprompt.serving.http.fields import Fields, is_text, parse_body, refusal
from softprompt.serving.http.request_rows import Rows, Stream
from softprompt.serving.http.service import Service
from softprompt.serving.requests import Request

DEFAULT_TOKENS = 16  # OpenAI's default for a text completion
DEFAULT_CHAT_TOKENS = 128
MOST_STOPS = 16
ROLES = ("system", "developer", "user", "assistant")

# Unsupported fields, with the values that have no effect.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "metadata": ({},),
    "n": (1,),
    "presence_penalty": (0, 0.0),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
}
NEUTRAL_CHAT = NEUTRAL | {
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (False, True),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}


async def completions(http: HttpRequest) -> Response:
    """Continues texts or token ids."""
    service: Service = http.app.state.service
    fields = parse_body(await http.body())
    task = take_task(fields, service)
    prompts = take_prompts(fields, service)
    echo = fields.flag("echo")
    count = fields.integer("logprobs", None, 0, ALTERNATIVES)
    least, most = 0 if echo else 1, service.settings.max_tokens
    max_new = fields.integer("max_tokens", min(DEFAULT_TOKENS, most), least, most)
    settings = {**take_sampling(fields), "max_new": max_new, "echo": echo, "logprobs": count}
    stream = take_stream(fields)
    fields.finish(NEUTRAL)
    ids = await _ids(task, prompts, service)
    requests = [Request(task=task, tokens=tuple(one), **settings) for one in ids]
    return await _answer(TextAnswer, requests, stream, service)


async def chat_completions(http: HttpRequest) -> Response:
    """Continues a conversation, written with the model's chat template."""
    service: Service = http.app.state.service
    fields = parse_body(await http.body())
    task = take_task(fields, service)
    messages = take_messages(fields)
    most = service.settings.max_tokens
    old = fields.integer("max_tokens", min(DEFAULT_CHAT_TOKENS, most), 1, most)
    max_new = fields.integer("max_completion_tokens", old, 1, most)
    logprobs = fields.flag("logprobs")
    count = fields.integer("top_logprobs", 0, 0, ALTERNATIVES)
    if count and not logprobs:
        raise refusal("top_logprobs", count, "only with logprobs")
    settings = {**take_sampling(fields), "max_new": max_new}
    settings["logprobs"] = count if logprobs else None
    stream = take_stream(fields)
    fields.finish(NEUTRAL_CHAT)
    ids = await _chat_ids(task, messages, service)
    request = Request(task=task, tokens=tuple(ids), **settings)
    return await _answer(ChatAnswer, [request], stream, service)


def take_task(fields: Fields, service: Service) -> str:
    """The task of `model`, which may be an alias, for `user`."""
    user = fields.text("user", "")
    return service.resolve(fields.text("model"), user, "model")


def take_sampling(fields: Fields) -> dict[str, Any]:
    """How tokens are drawn and where they end, as keywords of a `Request`."""
    seed = fields.integer("seed", None, 0, 2**31 - 1)
    return {
        "temperature": fields.number("temperature", 1.0, 0.0, 2.0),
        "top_p": fields.number("top_p", 1.0, 1e-6, 1.0),
        "top_k": fields.integer("top_k", 0, 0, 2**31 - 1),
        "seed": secrets.randbelow(2**31) if seed is None else seed,
        "stop": tuple(fields.texts("stop", MOST_STOPS)),
    }


def take_stream(fields: Fields) -> tuple[bool, bool]:
    """Whether to stream, and whether the stream ends with the usage."""
    stream = fields.flag("stream")
    options = fields.take("stream_options", {})
    if not isinstance(options, dict):
        raise refusal("stream_options", options, "an object")
    inner = Fields(options)
    with_usage = inner.flag("include_usage")
    inner.finish({"include_obfuscation": (False,)})
    if options and not stream:
        raise Refusal("stream_options is given; allowed: only with stream", field="stream_options")
    return stream, with_usage


def take_prompts(fields: Fields, service: Service) -> list[str] | list[list[int]]:
    """The prompts: all texts, or all token ids."""
    value = fields.take("prompt")
    prompts = [value] if is_text(value) or _is_ids(value, service) else value
    most = service.settings.rows
    if isinstance(prompts, list) and 0 < len(prompts) <= most:
        if all(map(is_text, prompts)) or all(_is_ids(one, service) for one in prompts):
            return prompts
    size = service.engine.tokenizer.vocab_size
    allowed = f"a text, a list of token ids below {size}, or a list of at most {most} of either"
    raise refusal("prompt", value, allowed)


def _is_ids(value: Any, service: Service) -> bool:
    """Whether a value is a list of token ids, at least one."""
    size = service.engine.tokenizer.vocab_size
    known = isinstance(value, list) and bool(value)
    return known and all(type(one) is int and 0 <= one < size for one in value)


def take_messages(fields: Fields) -> list[dict[str, str]]:
    """The messages: roles and texts."""
    value = fields.take("messages")
    if not isinstance(value, list) or not value or not all(isinstance(x, dict) for x in value):
        raise refusal("messages", value, "a list of objects with role and content")
    return [_message(Fields(one)) for one in value]


def _message(fields: Fields) -> dict[str, str]:
    """One message; a list of its texts is joined."""
    role, content = fields.text("role"), fields.take("content", "")
    if role not in ROLES:
        raise refusal("role", role, ", ".join(ROLES))
    if isinstance(content, list) and all(map(_is_part, content)):
        content = "".join(part["text"] for part in content)
    if not is_text(content):
        raise refusal("content", content, "a text, or a list of {type: text, text}")
    fields.text("name", "")
    fields.finish({"tool_calls": ([],)})
    return {"role": role, "content": content}


def _is_part(value: Any) -> bool:
    """Whether a part of a message is a text."""
    return isinstance(value, dict) and value.get("type") == "text" and is_text(value.get("text"))


async def _ids(task: str, prompts: list[Any], service: Service) -> list[list[int]]:
    """The token ids of prompts; those given as ids stay as they are."""
    return await service.encode(task, prompts) if is_text(prompts[0]) else prompts


async def _chat_ids(task: str, messages: list[dict[str, str]], service: Service) -> list[int]:
    """The token ids of a conversation. If the template writes BOS, no other is added."""
    if not service.chat_template:
        raise Refusal(
            f"{service.settings.base} has no chat template; /v1/completions needs none", 400
        )
    tokenizer = service.engine.tokenizer
    bos, eos = (
        tokenizer.token(one) if one is not None else ""
        for one in (tokenizer.bos_id, tokenizer.eos_id)
    )
    text = render_chat(service.chat_template, messages, bos=bos, eos=eos)
    (ids,) = await service.encode(task, [text])
    doubled = ids[:2] == [tokenizer.bos_id] * 2
    return ids[1:] if doubled else ids


async def _answer(
    form: type[TextAnswer], requests: list[Request], stream: tuple[bool, bool], service: Service
) -> Response:
    """Answers when all rows are done, or streams; `stream` is the result of `take_stream`."""
    first, (streamed, usage) = requests[0], stream
    name, logprobs = first.task or service.settings.base, first.logprobs is not None
    answer = form(name, service.engine.tokenizer, logprobs=logprobs)
    rows = Rows(service.engine, requests, service.metrics)
    if streamed:
        return Stream(rows, answer, usage=usage)
    return Json(answer.whole(await rows.collect()))
