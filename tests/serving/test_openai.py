"""The package `openai` against the server: what it sends is taken, what it reads is there."""

import asyncio

import openai
import pytest

from tests.serving.http import KEY, fake_app, serving


@pytest.fixture(scope="module")
def url():
    with fake_app(key=KEY) as (app, _), serving(app) as port:
        yield f"http://127.0.0.1:{port}/v1"


CHAT = {"model": "short", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
TEXT = {"model": "short", "prompt": ["a", "b"], "temperature": 0, "logprobs": 1}


def test_sync(url):
    """Breaks when a path, a field or a type of an answer is not OpenAI's: rename `choices`."""
    with openai.OpenAI(base_url=url, api_key=KEY) as client:
        assert [one.id for one in client.models.list()] == ["tiny", "long", "short"]
        assert client.models.retrieve("long").owned_by == "softprompt"
        text = client.completions.create(**TEXT)
        assert [len(choice.text) for choice in text.choices] == [16, 16]
        assert len(text.choices[0].logprobs.token_logprobs) == 16
        parts = list(client.completions.create(**TEXT, stream=True))
        streamed = "".join(p.choices[0].text for p in parts if p.choices[0].index == 1)
        assert streamed == text.choices[1].text
        chat = client.chat.completions.create(**CHAT, max_completion_tokens=9)
        assert chat.usage.completion_tokens == len(chat.choices[0].message.content) == 9


def test_async_and_streaming(url):
    """Breaks when the parts of a stream are not those of the answer, or lack the usage."""

    async def talk():
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY) as client:
            whole = await client.chat.completions.create(**CHAT)
            options = {"include_usage": True}
            stream = await client.chat.completions.create(
                **CHAT, stream=True, stream_options=options
            )
            parts = [part async for part in stream]
            return whole, parts

    whole, (*parts, last) = asyncio.run(talk())
    said = "".join(part.choices[0].delta.content or "" for part in parts)
    assert said == whole.choices[0].message.content
    assert parts[-1].choices[0].finish_reason == "length"
    assert last.usage == whole.usage


def test_errors_are_openais_own(url):
    """Breaks when an error's status or body is another one: say 400 for an unknown task."""
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        with pytest.raises(openai.NotFoundError, match="nope"):
            client.completions.create(model="nope", prompt="x")
        with pytest.raises(openai.BadRequestError) as raised:
            client.completions.create(model="short", prompt="x", n=3)
        assert raised.value.param == "n"
    with openai.OpenAI(base_url=url, api_key="another", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
