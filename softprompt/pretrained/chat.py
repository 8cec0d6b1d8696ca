"""Chat templates: how a model's own makers write a conversation as one text."""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from softprompt.errors import UserError, one_line
from softprompt.pretrained import gguf
from softprompt.pretrained.loading import find, t5x_checkpoint


def read_chat_template(name: str) -> str:
    """The chat template of a model, whose name is as for `load_model`; "" if it has none.

    Raises:
        UserError: no such model, or its files are unreadable.
    """
    if t5x_checkpoint(name):
        return ""
    path = find(name)
    if path.is_file():
        return str(gguf.File(path).get("tokenizer.chat_template", ""))
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    file = path / "tokenizer_config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get("chat_template") or ""
    except (OSError, ValueError):
        return ""
    named = {one["name"]: one["template"] for one in found} if isinstance(found, list) else {}
    return found if isinstance(found, str) else named.get("default", "")


def render_chat(
    template: str, messages: Sequence[Mapping[str, str]], *, bos: str = "", eos: str = ""
) -> str:
    """A conversation as the text that an answer of the assistant follows.

    Args:
        template: of the model, in Jinja. It runs in a sandbox.
        messages: {"role", "content"} each.
        bos: the text of BOS, which some templates write.
        eos: the text of EOS.

    Raises:
        UserError: the template refuses the messages, for instance the order of their roles.

    Source: `apply_chat_template` of transformers, whose environment and names are these.
    """
    try:
        return _compiled(template).render(
            messages=messages, add_generation_prompt=True, bos_token=bos, eos_token=eos
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise UserError(f"messages: the model's chat template says: {one_line(error)}") from error


@functools.cache
def _compiled(template: str) -> jinja2.Template:
    """A template in a sandbox, which changes nothing outside of it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = lambda value, **how: json.dumps(
        value, ensure_ascii=False, **how
    )
    return environment.from_string(template)


def _refuse(message: Any) -> NoReturn:
    raise jinja2.TemplateError(str(message))
