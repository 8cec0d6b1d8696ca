"""Chat templates beside transformers, and what a hostile one may do."""

import json

import pytest
from transformers import AutoTokenizer

from softprompt.errors import UserError
from softprompt.pretrained.chat import read_chat_template, render_chat
from tests.tiny import BOS, EOS, write_llama_folder

CHATML = (
    "{%- for message in messages %}\n"
    "    {%- if loop.first and message.role != 'system' %}\n"
    "        {{- '<|im_start|>system\\nBe helpful.<|im_end|>\\n' }}\n"
    "    {%- endif %}\n"
    "    {% if message.role == 'tool' %}{% continue %}{% endif %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' }}\n"
    "    {{- message.content | trim + '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}\n"
)
ALTERNATING = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '[' + message.role + '] ' + (message.content | tojson) + eos_token }}{% endfor %}"
)
TALK = [
    {"role": "user", "content": " Bonjour, «été» \n"},
    {"role": "assistant", "content": "{{ 7 * 7 }}"},
    {"role": "user", "content": "x"},
]


@pytest.fixture
def folder(tmp_path):
    return write_llama_folder(tmp_path / "model", width=16, layers=1, heads=2, kv_heads=1)


@pytest.mark.parametrize("template", [CHATML, ALTERNATING])
@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_template_gives_the_text_that_transformers_gives(folder, template, place):
    """Breaks without `trim_blocks` or `lstrip_blocks`, or when one of the places is not read."""
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if place == "tokenizer_config.json":
        config = json.loads((folder / place).read_text())
        (folder / place).write_text(json.dumps(config | {"chat_template": template}))
    else:
        (folder / place).write_text(template)
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = render_chat(read_chat_template(str(folder)), TALK, bos=BOS, eos=EOS)
    assert ours == theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)


def test_a_refusal_of_the_template_is_one_line():
    """Breaks when the template's own error is a traceback: do not catch `TemplateError`."""
    with pytest.raises(UserError, match="roles must alternate"):
        render_chat(ALTERNATING, TALK[1:])
    with pytest.raises(UserError, match="template"):
        render_chat("{% for", TALK)


@pytest.mark.parametrize(
    "attack", ["{{ messages.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}"]
)
def test_a_template_cannot_leave_its_sandbox(attack):
    """Breaks when the environment is jinja2's plain one: a model's file would run code."""
    with pytest.raises(UserError, match=r"unsafe|undefined"):
        render_chat(attack, list(TALK))


def test_a_model_without_a_template_has_none(folder):
    """Breaks when a missing template is made up."""
    assert read_chat_template(str(folder)) == ""


@pytest.mark.real
def test_the_template_of_a_gguf_file_is_read():
    """Breaks when the metadata's key is another one."""
    template = read_chat_template("smollm2-135m-instruct-q4")
    text = render_chat(template, [{"role": "user", "content": "Hi"}])
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
