"""A trial's delta written for other programs, and theirs made a trial's folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath
from flax.traverse_util import flatten_dict

from softprompt.config import (
    ConfigDict,
    base_config,
    members,
    method_settings,
    resolve,
    set_key,
    to_dict,
    validate,
)
from softprompt.errors import UserError
from softprompt.files import write_bytes, write_text
from softprompt.interchange import peft
from softprompt.interchange import prompt_arrays as arrays
from softprompt.interchange.adapter_files import CONFIG as ADAPTER
from softprompt.interchange.adapter_files import Adapter, read_adapter, write_adapter
from softprompt.interchange.module_names import ModelConfig
from softprompt.methods import METHODS
from softprompt.methods.base import MethodSettings
from softprompt.methods.delta_file import load_delta, save_delta
from softprompt.pretrained.loading import Loaded, load_model, read_model_config
from softprompt.results import commit, read_result
from softprompt.trials.delta_shapes import check_fit
from softprompt.trials.merged_model import export_model
from softprompt.trials.run import CONFIG, DELTA, provenance, read_config

PADDING = (
    "PEFT scores it right with padding on the right, or one text at a time; on the left, padding "
    "comes between the prompt and the text"
)


def export_run(folder: epath.PathLike, *, kind: str, to: epath.PathLike) -> dict[str, Any]:
    """Writes a trial's selected delta in another program's format; only "hf" reads the weights.

    Args:
        folder: of a trial that has its delta.
        kind: "peft", a folder, "npy", a file, or "hf", the model with the delta in its weights.
        to: where, new; local or gs://.

    Returns:
        {"format", "method", "wrote", "notes"}: the files, and what their reader has to know.

    Raises:
        UserError: no delta, something at `to`, or a delta that does not fit the model or that the
            format cannot say.
    """
    config, file = read_config(folder), epath.Path(folder) / DELTA
    if not file.exists():
        raise UserError(f"{folder}: the trial has no {DELTA} yet; finish it with softprompt train")
    to = epath.Path(to)
    if to.exists():
        raise UserError(f"--to {to}: it exists; give a new path")
    if kind == "hf":
        wrote = export_model(config, file, to)
        return {"format": kind, "method": config.method.name, "wrote": wrote, "notes": []}
    delta, known = load_delta(file)
    model = read_model_config(config.model.name, revision=config.model.revision or None)
    check_fit(delta, config, model, file=str(file))
    method, settings = to_dict(config)["method"], method_settings(config)
    notes = conventions(settings, model)
    if kind == "npy":
        write_bytes(to, arrays.to_npy(delta, model, method))
        wrote = [str(to)]
    else:
        made = peft.to_peft(
            delta,
            model,
            method,
            base=config.model.name,
            revision=config.model.revision,
            imported=known.get("imported", {}).get("adapter_config"),
        )
        said = describe(config, model, known, folder)
        write_adapter(to, Adapter(made.config, made.tensors, said))
        wrote = sorted(str(file) for file in to.iterdir())
        notes += [PADDING] if settings.is_context else []
    if settings.per_task:
        tasks = [f"{n} {one.task.name}" for n, one in enumerate(members(config))]
        notes.append(f"task ids: {', '.join(tasks)}")
    return {"format": kind, "method": method["name"], "wrote": wrote, "notes": notes}


def describe(
    config: ConfigDict, model: ModelConfig, known: Mapping[str, Any], folder: epath.PathLike
) -> dict[str, Any]:
    """What an exported file says of where it came from."""
    row = read_result(folder) or {}
    return {
        **known,
        "bos": config.method.bos,
        "embed_scale": model.embed_scale,
        "prompt_enters": "after the embeddings' scaling",
        "commit": row.get("commit") or commit(),
        "config": to_dict(config),
    }


def conventions(settings: MethodSettings, model: ModelConfig) -> list[str]:
    """What a prompt's reader has to know, in sentences."""
    if not settings.is_context:
        return []
    notes = {"none": "the text behind the prompt has no BOS"}
    said = [notes.get(settings.bos, "the text behind the prompt begins with BOS where it has one")]
    if model.embed_scale != 1.0 and settings.is_prompt:
        said.append(
            f"its rows enter after the embeddings' scaling by {model.embed_scale:.6g}, as in PEFT "
            "with transformers 5; rows from transformers 4, which scales them too, are to be "
            "multiplied by it"
        )
    return said


def import_run(
    source: str, config: ConfigDict, *, workdir: epath.PathLike, any_weights: bool = False
) -> dict[str, Any]:
    """Makes a trial's folder (config.json, delta.safetensors) of another program's file.

    Args:
        source: an adapter's folder, one of its two files, or an array of numpy's; local.
        config: names the model, and the task that it is for.
        workdir: a new folder, local or gs://.
        any_weights: also where the file says that it was trained on other weights.

    Returns:
        {"method", "leaves": shapes by path, "workdir", "notes"}.

    Raises:
        UserError: something at `workdir`; a file that is none of these, or not of this model; one
            that was trained on other weights; a config that contradicts the file.
    """
    workdir, file = epath.Path(workdir), Path(source).expanduser()
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise UserError(f"--workdir {workdir}: not empty; give a new folder")
    adapter = open_source(file)
    said = dict(adapter.provenance) if adapter else {}
    model = read_model_config(config.model.name, revision=config.model.revision or None)
    if adapter is None:
        delta, method = arrays.from_npy(file, model)
    else:
        delta, method = peft.from_peft(adapter, model)
    config = with_method(config, method, said, file=str(file))
    check_tasks(config, delta, file=str(file))
    loaded = load_unkept(config)
    trained = said.get("fingerprint", loaded.fingerprint)
    if trained != loaded.fingerprint and not any_weights:
        raise UserError(
            f"{file} was trained on weights {trained}, {config.model.name} has "
            f"{loaded.fingerprint}; --any-weights uses it nevertheless"
        )
    origin = {} if adapter is None else {"adapter_config": adapter.config}
    facts = {"imported": {"file": str(file), "trained_on": trained, **origin}}
    save_delta(workdir / DELTA, delta, provenance(config, loaded) | facts)
    write_text(workdir / CONFIG, json.dumps(to_dict(config), indent=2) + "\n")
    return {
        "method": method["name"],
        "leaves": {path: list(leaf.shape) for path, leaf in flatten_dict(delta, sep="/").items()},
        "workdir": str(workdir),
        "notes": notes_on(said, adapter) + conventions(method_settings(config), model),
    }


def check_tasks(config: ConfigDict, delta: Mapping[str, Any], *, file: str) -> None:
    """Raises a UserError where a multitask prompt has other numbers of tasks than the config."""
    found = [leaf for path, leaf in flatten_dict(delta, sep="/").items() if "task_cols" in path]
    names = [one.task.name for one in members(config)]
    if found and len(found[0]) != len(names):
        raise UserError(
            f"{file} is for {len(found[0])} tasks, by number; the config has {len(names)}, "
            f"{', '.join(names)}; name as many in data.mixture"
        )


def load_unkept(config: ConfigDict) -> Loaded:
    """A config's model for its fingerprint alone: no leaf of its weights is kept."""
    return load_model(
        config.model.name,
        revision=config.model.revision or None,
        tokenizer_name=config.model.tokenizer,
        put=lambda path, leaf: None,
    )


def open_source(file: Path) -> Adapter | None:
    """The PEFT adapter that a path names; None where it is an array.

    Raises:
        UserError: neither, or an adapter that cannot be read.
    """
    if file.is_dir():
        return read_adapter(file)
    if not file.is_file():
        raise UserError(f"{file}: no such file or folder")
    if arrays.is_array(file):
        return None
    if (file.parent / ADAPTER).exists():
        return read_adapter(file.parent)
    raise UserError(
        f"{file}: neither a .npy file nor part of a PEFT adapter; allowed: an adapter's folder, or "
        "an array of numpy's"
    )


def with_method(
    config: ConfigDict, method: Mapping[str, Any], said: Mapping[str, Any], *, file: str
) -> ConfigDict:
    """A resolved config whose method is the file's, whatever it was before.

    BOS stands where the file says, else where the config does, which must not be before a prompt.

    Raises:
        UserError: BOS is to stand elsewhere than the file says, or before a prompt; or there is no
            such method here.
    """
    usual, bos = to_dict(base_config())["method"], config.method.bos
    if "bos" in said and bos not in (said["bos"], usual["bos"]):
        raise UserError(f"config key 'method.bos' is {bos!r}; {file} has {said['bos']!r}")
    bos = said.get("bos", bos)
    if bos == "before" and METHODS[method["name"]].Settings.is_context:
        raise UserError(
            f"config key 'method.bos' is 'before'; in {file} the prompt comes first; allowed: "
            "after, none"
        )
    made = resolve(config)
    for key, value in {**usual, **method, "bos": bos}.items():
        set_key(made, f"method.{key}", value)
    validate(made)
    return made


def notes_on(said: Mapping[str, Any], adapter: Adapter | None) -> list[str]:
    """What is to be known of the weights that a file was trained on."""
    if "fingerprint" in said:
        return []
    base = adapter.config.get("base_model_name_or_path") if adapter else None
    named = f", only their name, {base!r}" if base else ""
    return [f"the file has no fingerprint of the weights that it was trained on{named}"]
