"""`/v1/completions` and `/v1/chat/completions` in OpenAI's forms."""

import math

import pytest

from softprompt.pretrained.tokenizer import Tokenizer, byte_backend
from softprompt.serving.http.answers import LEAST, TextAnswer
from softprompt.serving.requests import Token
from tests.serving.fake import FakeEngine
from tests.serving.http import call, events, fake_app, post


@pytest.fixture(scope="module")
def app():
    with fake_app() as (app, _):
        yield app


def complete(app, **body):
    response = post(app, "/v1/completions", {"model": "short", "temperature": 0} | body)
    assert response.status_code == 200, response.text
    return response.json()


def texts(answer):
    return [choice["text"] for choice in answer["choices"]]


def test_a_list_a_text_and_token_ids_give_the_same(app):
    """Breaks when rows are mixed up, or ids are taken for texts: reverse `rows` in `whole`."""
    both = complete(app, prompt=["one", "two"])
    assert texts(both) == texts(complete(app, prompt="one")) + texts(complete(app, prompt="two"))
    ids = [[3 + byte for byte in b"one"], [3 + byte for byte in b"two"]]
    assert texts(complete(app, prompt=ids)) == texts(both)
    assert texts(complete(app, prompt=ids[1])) == texts(both)[1:]
    assert [choice["index"] for choice in both["choices"]] == [0, 1]
    assert both["usage"] == {"prompt_tokens": 6, "completion_tokens": 32, "total_tokens": 38}


def test_the_model_is_the_task(app):
    """Breaks when every row runs the base model: drop `task` from `_requests`."""
    answers = [complete(app, model=name, prompt="x") for name in ("tiny", "short", "long")]
    assert [answer["model"] for answer in answers] == ["tiny", "short", "long"]
    assert len({texts(answer)[0] for answer in answers}) == 3


def test_echo_and_logprobs_as_evaluation_harnesses_read_them(app):
    """Breaks when the lists differ in length, or NaN is sent: return `logprob` from `finite`."""
    prompt = "é!"
    (choice,) = complete(app, prompt=prompt, echo=True, logprobs=2, max_tokens=1)["choices"]
    found = choice["logprobs"]
    assert {len(values) for values in found.values()} == {4}
    assert "".join(found["tokens"]) == choice["text"]
    assert found["token_logprobs"] == [None, -2.0, -2.0, -1.0]
    assert found["top_logprobs"][0] is None
    assert len(found["top_logprobs"][-1]) == 3  # two alternatives and the token itself
    ends = [len("".join(found["tokens"][:n])) for n in range(4)]
    assert found["text_offset"] == ends
    echoed = complete(app, prompt="x!", echo=True, max_tokens=0)
    assert texts(echoed) == ["x!"]


def test_impossible_tokens_have_a_finite_logprob(app):
    """Breaks when -inf reaches the JSON encoder: drop `max` in `_alternatives`."""
    answer = TextAnswer("m", Tokenizer(byte_backend(), None, 1, False), logprobs=True)
    token = Token(100, "a", -math.inf, ((100, -math.inf), (101, -1.0)))
    found = answer.part(0, [token], None)["choices"][0]["logprobs"]
    assert found["token_logprobs"] == [LEAST]
    assert found["top_logprobs"] == [{"a": LEAST, "b": -1.0}]


def test_a_stream_is_the_answer_in_parts(app):
    """Breaks when a part goes to another row: send `index` 0 with every part."""
    body = {"model": "long", "prompt": ["a", "b"], "temperature": 0, "logprobs": 0, "stop": ["q"]}
    whole = post(app, "/v1/completions", body).json()
    streamed = post(app, "/v1/completions", body | {"stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    parts = [part["choices"][0] for part in events(streamed)]
    for choice in whole["choices"]:
        own = [part for part in parts if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert [part["finish_reason"] for part in own][-1] == choice["finish_reason"]
        offsets = [at for part in own if part["logprobs"] for at in part["logprobs"]["text_offset"]]
        assert offsets == choice["logprobs"]["text_offset"]


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ],
)
def test_the_last_part_has_the_usage_only_if_asked(app, path, asked):
    """Breaks when usage is always or never sent, or the other parts lack its null, which OpenAI
    sends: negate `self._usage` in `Stream`, or drop `| usage`.
    """
    body = {"model": "short", "stream": True, "max_tokens": 3, **asked}
    plain = events(post(app, path, body))
    assert all("usage" not in part for part in plain)
    options = {"stream_options": {"include_usage": True}}
    *parts, last = events(post(app, path, body | options))
    assert [part["usage"] for part in parts] == [None] * len(plain)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3


def test_a_chat_is_written_with_the_models_template(app):
    """Breaks when only the last message is read: render `messages[-1:]`."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]},
    ]
    asked = {"model": "short", "temperature": 0, "max_tokens": 4}
    chat = {**asked, "messages": messages, "logprobs": True, "top_logprobs": 2}
    (choice,) = post(app, "/v1/chat/completions", chat).json()["choices"]
    plain = complete(app, **asked, prompt="system: Be brief.\nuser: xy\nassistant:")
    assert choice["message"] == {"role": "assistant", "content": texts(plain)[0]}
    content = choice["logprobs"]["content"]
    assert [entry["token"] for entry in content] == list(texts(plain)[0])
    assert [len(entry["top_logprobs"]) for entry in content] == [2] * 4
    parts = events(post(app, "/v1/chat/completions", chat | {"stream": True}))
    deltas = [part["choices"][0]["delta"] for part in parts]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == texts(plain)[0]


def test_a_seed_repeats_a_draw_and_no_seed_does_not(app):
    """Breaks when the seed is dropped, or is 0 where none is given: `seed or 0`."""
    drawn = [complete(app, prompt="x", temperature=1, seed=n)["choices"][0]["text"] for n in (5, 5)]
    assert drawn[0] == drawn[1]
    assert len({texts(complete(app, prompt="x", temperature=1))[0] for _ in range(3)}) == 3


def test_unsupported_fields_pass_at_neutral_values(app):
    """Breaks when a client that spells out defaults is refused: empty `NEUTRAL`."""
    neutral = {"n": 1, "best_of": 1, "frequency_penalty": 0, "presence_penalty": 0.0}
    complete(app, prompt="x", **neutral, logit_bias=None, suffix=None, unheard_of=None)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("n", 2, "1 or null"),
        ("n", True, "1 or null"),
        ("logit_bias", {"50256": -100}, "{}"),
        ("temperatur", 1, "temperature"),
        ("temperature", -1, "0 to 2"),
        ("temperature", "warm", "0 to 2"),
        ("top_p", 0, "to 1"),
        ("max_tokens", 0, "1 to 512"),
        ("max_tokens", 513, "1 to 512"),
        ("max_tokens", 1.5, "1 to 512"),
        ("logprobs", 6, "0 to 5"),
        ("seed", 2**31, "0 to"),
        ("stop", "", "1 to 256"),
        ("stop", ["a" * 257], "1 to 256"),
        ("stop", ["a"] * 17, "at most 16"),
        ("echo", 1, "true or false"),
        ("stream_options", {"include_usage": True}, "only with stream"),
        ("prompt", None, "missing"),
        ("prompt", [], "a list of 0"),
        ("prompt", ["x", 1], "a list of 2"),
        ("prompt", [-1], "below 259"),
        ("prompt", [True], "below 259"),
        ("prompt", [259], "below 259"),
        ("prompt", ["x"] * 65, "at most 64"),
        ("model", 3, "a string"),
        ("model", None, "missing"),
        ("user", "u" * 257, "at most 256"),
    ],
)
def test_a_refusal_names_the_field_and_what_is_allowed(app, field, value, said):
    """Breaks when a check is dropped, for instance the bounds in `integer`."""
    body = {"model": "short", "prompt": "x"} | {field: value}
    response = post(app, "/v1/completions", body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert field in error["message"]
    assert said in error["message"]
    assert error["param"] == field


def test_chats_refuse_what_has_no_meaning(app):
    """Breaks when tools are dropped in silence: add `"tools"` to what is taken."""
    ask = {"model": "short", "messages": [{"role": "user", "content": "x"}]}
    wrong = {"tools": [{"type": "function"}], "response_format": {"type": "json"}}
    for name, value in (wrong | {"top_logprobs": 2}).items():  # without logprobs
        response = post(app, "/v1/chat/completions", ask | {name: value})
        assert (response.status_code, response.json()["error"]["param"]) == (400, name)
    for message in ({"role": "tool", "content": "x"}, {"role": "user", "content": [{"type": "a"}]}):
        response = post(app, "/v1/chat/completions", ask | {"messages": [message]})
        assert response.status_code == 400
    assert post(app, "/v1/chat/completions", ask | {"tools": [], "n": 1}).status_code == 200


def test_an_unknown_task_is_not_found(app):
    """Breaks when an unknown name falls back to the base model: return "" from `resolve`."""
    response = post(app, "/v1/completions", {"model": "nope", "prompt": "x"})
    assert (response.status_code, response.json()["error"]["param"]) == (404, "model")
    assert call(app, "GET", "/v1/models/nope").status_code == 404
    assert call(app, "GET", "/v1/models/short").json()["length"] == 20
    names = [one["id"] for one in call(app, "GET", "/v1/models").json()["data"]]
    assert names == ["tiny", "long", "short"]


def test_a_full_queue_says_when_to_come_back():
    """Breaks when `Busy` is a plain error, or rows before it stay: drop `free` in `Rows`."""
    engine = FakeEngine(["short"], most=2)
    with fake_app(engine=engine) as (app, _):
        response = post(app, "/v1/completions", {"model": "short", "prompt": ["a", "b", "c"]})
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        assert engine.running == {}
