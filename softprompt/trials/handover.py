"""Hands trials' prompts to other engines: as added tokens of a model, or as vectors for vLLM."""

import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors.numpy import save

from softprompt.config import ConfigDict, method_settings, task_configs
from softprompt.data.builtin_tasks import get_task
from softprompt.errors import UserError
from softprompt.files import write_bytes, write_text
from softprompt.interchange import vllm_client
from softprompt.interchange.added_tokens import add_rows, add_tokens, token_names
from softprompt.methods import METHODS
from softprompt.methods.base import Setup
from softprompt.models.decoder import DecoderConfig
from softprompt.pretrained.loading import Loaded, load_model
from softprompt.pretrained.save import save_folder
from softprompt.pretrained.tokenizer import Tokenizer
from softprompt.trials.delta_checks import read_delta
from softprompt.trials.forward import text_bos
from softprompt.trials.run import DELTA, read_config

SAME = ("name", "revision", "tokenizer", "quantize")  # keys of config.model

ADDED = """# {model}, with prompts as added tokens

The tokens of a task, put before a text, act as the task's trained prompt. tasks.json says for each
task the string `begins`, its token ids `ids`, and the templates of the texts.

* Send `begins` and the text as one string, or `ids` and the text's ids. Nothing goes before them:
  the tokenizer adds no BOS, since `begins` has it where the prompt was trained with it. A text
  without a prompt begins with `base`.
* The added tokens have the ids {first} to {last}. They are for reading. Greedy decoding never
  chooses one: their logits are the mean of all logits. Sampling and beams could, though their
  probability is small. transformers excludes them (`suppress_tokens` in generation_config.json).
  With vLLM, send `logit_bias`, -100 for each of these ids.

```python
import json
from pathlib import Path

from vllm import LLM, SamplingParams

model = LLM("FOLDER")
begins = json.loads(Path("FOLDER/tasks.json").read_text())["tasks"]["{task}"]["begins"]
model.generate(begins + "TEXT", SamplingParams(temperature=0))
```
"""

VECTORS = """# Prompts for {model} in vLLM

prompts.safetensors has a tensor [P, D] for each task: the vectors that stand before the text.
tasks.json says for each task the token ids that its text begins with (`text_begins`: BOS or
nothing), and the templates of the texts. client.py sends them to vLLM:

```sh
echo '{{"task": "{task}", "input": "TEXT"}}' | python client.py --model FOLDER
```

FOLDER is a Hugging Face folder with the weights of the training.
"""


@dataclasses.dataclass(frozen=True)
class TaskPrompt:
    """A task's trained prompt.

    Attributes:
        vectors_PD: what stands before a text, a BOS before the prompt included, float32.
        text_begins: the ids that a text itself begins with: of BOS, or none.
        templates: of the texts, by the name of the task they were trained on.
    """

    vectors_PD: np.ndarray
    text_begins: list[int]
    templates: dict[str, str]


def export_added_tokens(folders: Sequence[epath.PathLike], to: epath.Path) -> list[str]:
    """Writes a trials' model as a Hugging Face folder that has their prompts as added tokens.

    Args:
        folders: of trials on one decoder, whose names become the tasks' names. A prompt for several
            tasks gets a name for each of them, FOLDER.TASK.
        to: a new local folder.

    Returns:
        Notes for its users.

    Raises:
        UserError: a trial has no prompt, or another model than the first; two have the same name;
            `to` is not local.
    """
    if "://" in str(to):
        raise UserError(f"--to {to}: a whole model is written to a local folder")
    loaded, prompts = read_prompts(folders, whole=True)
    assert isinstance(loaded.config, DecoderConfig)
    names = {task: token_names(task, len(one.vectors_PD)) for task, one in prompts.items()}
    tokenizer, ids = add_tokens(loaded.tokenizer, [one for some in names.values() for one in some])
    rows_ND = np.concatenate([one.vectors_PD for one in prompts.values()])
    config, weights = add_rows(loaded.config, loaded.weights, ids, rows_ND)
    save_folder(to, config, weights, tokenizer)
    new, tasks = iter(ids), {}
    for task, one in prompts.items():
        bos = [tokenizer.token(token) for token in one.text_begins]
        tasks[task] = {
            "begins": "".join(names[task] + bos),
            "ids": [next(new) for _ in names[task]] + one.text_begins,
            "templates": one.templates,
        }
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    _write_json(to / "generation_config.json", special | {"suppress_tokens": ids})
    _write_json(
        to / "tasks.json", {"model": loaded.name, "base": _base(loaded.tokenizer), "tasks": tasks}
    )
    facts = {"model": loaded.name, "first": ids[0], "last": ids[-1]}
    write_text(to / "README.md", ADDED.format(**facts, task=next(iter(tasks))))
    notes = [f"the added tokens have the ids {ids[0]} to {ids[-1]}; README.md says how to sample"]
    return notes + _tokenization_note(tokenizer, tasks)


def _base(tokenizer: Tokenizer) -> str:
    """The token that a text without a prompt begins with, or ""."""
    bos_id = tokenizer.bos_id if tokenizer.add_bos else None
    return "" if bos_id is None else tokenizer.token(bos_id)


def _tokenization_note(tokenizer: Tokenizer, tasks: Mapping[str, Any]) -> list[str]:
    """A note if a text has other ids after added tokens than alone."""
    for task in tasks.values():
        for text in task["templates"].values():
            if tokenizer.encode(task["begins"] + text) != task["ids"] + tokenizer.encode(text):
                return [
                    "after added tokens the tokenizer gives a text other ids than in training, "
                    "where it was encoded alone; send `ids` and the ids of the text, not one string"
                ]
    return []


def export_vectors(folders: Sequence[epath.PathLike], to: epath.Path) -> list[str]:
    """Writes trials' prompts as vectors, with a client that gives them to vLLM.

    Args:
        folders: as for `export_added_tokens`.
        to: a new folder, local or gs://.

    Returns:
        Notes for its users.

    Raises:
        UserError: as for `export_added_tokens`.
    """
    loaded, prompts = read_prompts(folders, whole=False)
    vectors = {task: np.ascontiguousarray(one.vectors_PD) for task, one in prompts.items()}
    provenance = {"model": loaded.name, "fingerprint": loaded.fingerprint}
    write_bytes(to / vllm_client.PROMPTS, save(vectors, provenance))
    tasks = {
        task: {"text_begins": one.text_begins, "templates": one.templates}
        for task, one in prompts.items()
    }
    _write_json(to / vllm_client.TASKS, {**provenance, "tasks": tasks})
    write_text(to / "client.py", inspect.getsource(vllm_client))
    write_text(to / "README.md", VECTORS.format(model=loaded.name, task=next(iter(tasks))))
    return [f"client.py needs a Hugging Face folder with the weights of {loaded.name!r}"]


def read_prompts(
    folders: Sequence[epath.PathLike], *, whole: bool
) -> tuple[Loaded, dict[str, TaskPrompt]]:
    """The model of some trials, float32, and their prompts by the names of the tasks.

    With `whole` unset the model has only the weights of its embeddings.

    Raises:
        UserError: see `export_added_tokens`.
    """
    first = read_config(folders[0])

    def put(path: str, leaf: np.ndarray) -> jax.Array | None:
        return jnp.asarray(leaf) if whole or path.startswith("embed/") else None

    if first.model.quantize != "none":
        raise UserError(
            f"config key 'model.quantize' is {first.model.quantize!r}; allowed for a hand-over: "
            "none"
        )
    loaded = load_model(
        first.model.name,
        dtype="float32",
        revision=first.model.revision,
        tokenizer_name=first.model.tokenizer,
        put=put,
    )
    prompts: dict[str, TaskPrompt] = {}
    for folder in folders:
        config = read_config(folder)
        for key in SAME:
            if config.model[key] != first.model[key]:
                raise UserError(
                    f"--run {folder}: config key 'model.{key}' is {config.model[key]!r}; allowed: "
                    f"{first.model[key]!r}, that of {folders[0]}"
                )
        for task, prompt in _prompts_of(folder, config, loaded).items():
            if task in prompts:
                raise UserError(f"--run {folder}: there is a prompt named {task!r} already")
            prompts[task] = prompt
    return loaded, prompts


def _prompts_of(
    folder: epath.PathLike, config: ConfigDict, loaded: Loaded
) -> dict[str, TaskPrompt]:
    """The prompts of one trial, by name."""
    settings, name = method_settings(config), epath.Path(folder).resolve().name
    if not (settings.is_prompt and settings.trains):
        allowed = [
            known
            for known, method in METHODS.items()
            if method.Settings.is_prompt and method.Settings.trains
        ]
        raise UserError(
            f"--run {folder}: method {settings.name!r} has no vectors to hand over; allowed: "
            f"{', '.join(allowed)}"
        )
    if loaded.encoder_decoder:
        raise UserError(f"--run {folder}: {loaded.name} is an encoder-decoder; allowed: decoders")
    file = epath.Path(folder) / DELTA
    delta = read_delta(file, config, loaded)
    method, tasks = METHODS[settings.name], [get_task(one.task) for one in task_configs(config)]
    cfg = method.resolve(settings, Setup(loaded.config, tasks=len(tasks), loaded=loaded))
    prompt = np.asarray(method.variables(delta, loaded.weights, cfg, None)["prompt"], np.float32)
    if not prompt.size:
        raise UserError(f"{file}: the prompt has no vectors (length 0)")
    bos_id = loaded.tokenizer.bos_id
    begins = [bos_id] if bos_id is not None and text_bos(config, loaded) else []
    templates = {task.name: task.template for task in tasks}
    if not settings.per_task:
        return {name: TaskPrompt(prompt, begins, templates)}
    return {
        f"{name}.{task}": TaskPrompt(prompt_PD, begins, {task: template})
        for (task, template), prompt_PD in zip(templates.items(), prompt, strict=True)
    }


def _write_json(file: epath.Path, value: dict[str, Any]) -> None:
    write_text(file, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
