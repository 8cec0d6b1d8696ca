"""Exports a trial's delta to the formats of other programs, and imports such files."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath
from flax.traverse_util import flatten_dict

from softprompt.config import (
    ConfigDict,
    base_config,
    method_settings,
    resolve,
    set_key,
    task_configs,
    to_dict,
    validate,
)
from softprompt.errors import UserError
from softprompt.files import write_bytes, write_text
from softprompt.interchange import peft, prompt_arrays
from softprompt.interchange.adapter_files import CONFIG as ADAPTER_CONFIG
from softprompt.interchange.adapter_files import Adapter, read_adapter, write_adapter
from softprompt.methods import METHODS
from softprompt.methods.base import MethodSettings, Setup
from softprompt.methods.delta_file import load_delta, save_delta
from softprompt.models import ModelConfig
from softprompt.pretrained.catalog import CATALOG
from softprompt.pretrained.loading import find_folder, load_model, read_model_config
from softprompt.pretrained.save import save_folder
from softprompt.results import read_result
from softprompt.source import commit
from softprompt.trials.delta_checks import ANY_WEIGHTS, check_fit, check_weights, read_delta
from softprompt.trials.handover import export_added_tokens, export_vectors
from softprompt.trials.run import CONFIG, DELTA, check_trained, provenance, read_config

PADDING = (
    "PEFT computes the trial's scores with padding on the right, or one text at a time; padding on "
    "the left would separate the prompt from the text"
)


def export_run(
    folders: Sequence[epath.PathLike], *, kind: str, to: epath.PathLike
) -> dict[str, Any]:
    """Writes the selected deltas of trials in another program's format.

    Args:
        folders: of finished trials; several for prompts with "hf" and "vllm".
        kind: "peft" (a folder), "npy" (a file), "hf" (a folder: the model with prompts as added
            tokens, or with another delta in its weights), or "vllm" (a folder: prompts as vectors,
            and a client).
        to: a new path, local or gs://.

    Returns:
        {"format", "method", "wrote", "notes"}: the files, and notes for their users.

    Raises:
        UserError: there is no delta; `to` exists; the delta has other shapes than the model, or
            the format does not support it. Incomplete output is removed.
    """
    to, config = epath.Path(to), read_config(folders[0])
    for folder in folders:
        check_trained(folder)
    if to.exists():
        raise UserError(f"--to {to}: it exists; give a new path")
    if len(folders) > 1 and kind not in ("hf", "vllm"):
        raise UserError(f"--run: {len(folders)} trials; --format {kind} writes one; allowed: 1")
    notes: list[str] = []
    with _removed_on_error(to):
        if kind == "vllm":
            notes = export_vectors(folders, to)
        elif kind == "hf" and (len(folders) > 1 or method_settings(config).is_prompt):
            notes = export_added_tokens(folders, to)
        elif kind == "hf":
            export_merged(config, epath.Path(folders[0]) / DELTA, to)
        else:
            notes = _export_delta(folders[0], config, kind=kind, to=to)
    wrote = sorted(str(file) for file in to.iterdir()) if to.is_dir() else [str(to)]
    return {"format": kind, "method": config.method.name, "wrote": wrote, "notes": notes}


def _export_delta(
    folder: epath.PathLike, config: ConfigDict, *, kind: str, to: epath.Path
) -> list[str]:
    """Writes the delta without the model; returns the notes."""
    file = epath.Path(folder) / DELTA
    delta, metadata = load_delta(file)
    model = read_model_config(config.model.name, revision=config.model.revision)
    check_fit(delta, config, model, file=str(file))
    method, settings = to_dict(config)["method"], method_settings(config)
    notes = conventions(settings, model)
    if kind == "npy":
        write_bytes(to, prompt_arrays.to_npy(delta, model, method))
        return notes
    base, note = base_model(config)
    adapter = peft.to_peft(
        delta,
        model,
        method,
        base=base,
        revision=config.model.revision,
        imported=metadata.get("imported", {}).get("adapter_config"),
    )
    described = export_metadata(config, model, metadata, folder)
    write_adapter(to, Adapter(adapter.config, adapter.tensors, described))
    notes += [note] if note else []
    notes += [PADDING] if settings.is_context else []
    if settings.per_task:
        tasks = [f"{n} {one.task.name}" for n, one in enumerate(task_configs(config))]
        notes.append(f"task ids: {', '.join(tasks)}")
    return notes


def export_merged(config: ConfigDict, delta_file: epath.Path, to: epath.Path) -> None:
    """Writes a model with the delta merged into its weights, in float32, to a new local folder.

    Raises:
        UserError: the method has no `merge`; the delta was trained on other weights, or has other
            shapes; the weights are quantised; the folder is not local.
    """
    settings = method_settings(config)
    method = METHODS[settings.name]
    if not hasattr(method, "merge"):
        allowed = [name for name, method in METHODS.items() if hasattr(method, "merge")]
        raise UserError(
            f"--format hf: a {settings.name} cannot be merged into the model's weights; allowed "
            f"for {', '.join(allowed)}, and for prompts, as added tokens"
        )
    if "://" in str(to):
        raise UserError(f"--to {to}: a whole model is written to a local folder")
    loaded = load_model(
        config.model.name,
        dtype="float32",
        quantize=config.model.quantize,
        revision=config.model.revision,
        tokenizer_name=config.model.tokenizer,
    )
    delta = read_delta(delta_file, config, loaded)
    cfg = method.resolve(settings, Setup(loaded.config))
    weights = method.merge(delta, loaded.weights, cfg)
    original = find_folder(config.model.name, revision=config.model.revision)
    save_folder(to, loaded.config, weights, loaded.tokenizer, original=original)


@contextlib.contextmanager
def _removed_on_error(folder: epath.Path) -> Iterator[None]:
    """Removes a new folder, or file, if the block that writes it raises an exception."""
    try:
        yield
    except BaseException:
        if folder.exists():
            folder.rmtree()
        raise


def base_model(config: ConfigDict) -> tuple[str | None, str]:
    """The base model to name in an adapter's config, and a note about it, or "".

    It is a name that transformers can load: the repository that a model of the catalogue was made
    from, or the folder or repository that the config names. None if there is no such name.
    """
    name, revision = config.model.name, config.model.revision
    if (entry := CATALOG.get(name)) and entry.original:
        return entry.original, (
            f"base_model_name_or_path is {entry.original!r}, which {name!r} was made from; the "
            f"delta was trained on the weights of {name!r}"
        )
    if entry or find_folder(name, revision=revision):
        return name, ""
    return None, f"base_model_name_or_path is null, since transformers cannot load {name!r}"


def export_metadata(
    config: ConfigDict, model: ModelConfig, metadata: Mapping[str, Any], folder: epath.PathLike
) -> dict[str, Any]:
    """The metadata of an exported file, about its origin."""
    row = read_result(folder) or {}
    return {
        **metadata,
        "bos": config.method.bos,
        "embed_scale": model.embed_scale,
        "prompt_enters": "after the embeddings' scaling",
        "commit": row.get("commit") or commit(),
        "config": to_dict(config),
    }


def conventions(settings: MethodSettings, model: ModelConfig) -> list[str]:
    """Notes for users of an exported prompt or prefix."""
    if not settings.is_context:
        return []
    notes = {"none": "the text after the prompt has no BOS"}
    found = [notes.get(settings.bos, "the text after the prompt begins with BOS if it has one")]
    if model.embed_scale != 1.0 and settings.is_prompt:
        found.append(
            f"the prompt's rows enter after the embeddings' scaling by {model.embed_scale:.6g}, as "
            "in PEFT with transformers 5; transformers 4 scales the rows too, so rows from there "
            "have to be multiplied by it"
        )
    return found


def import_run(
    source: str, config: ConfigDict, *, workdir: epath.PathLike, any_weights: bool = False
) -> dict[str, Any]:
    """Makes a trial's folder (config.json, delta.safetensors) from another program's file.

    Args:
        source: an adapter's folder, one of its two files, or a .npy file; local.
        config: names the model and the task.
        workdir: a new or empty folder, local or gs://.
        any_weights: also accept a file whose metadata names other weights.

    Returns:
        {"method", "leaves": shapes by path, "workdir", "notes"}.

    Raises:
        UserError: `workdir` is not empty; the file has another format, is for another model, or
            was trained on other weights; the config contradicts it. Incomplete output is removed.
    """
    workdir, file = epath.Path(workdir), Path(source).expanduser()
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise UserError(f"--workdir {workdir}: not empty; give a new folder")
    adapter = open_source(file)
    metadata = dict(adapter.provenance) if adapter else {}
    model = read_model_config(config.model.name, revision=config.model.revision)
    if adapter is None:
        delta, method = prompt_arrays.from_npy(file, model)
    else:
        delta, method = peft.from_peft(adapter, model)
    config = with_method(config, method, metadata, file=str(file))
    check_tasks(config, delta, file=str(file))
    loaded = load_model(
        config.model.name,
        revision=config.model.revision,
        tokenizer_name=config.model.tokenizer,
        put=lambda path, leaf: None,  # only the fingerprint is needed
    )
    trained = metadata.get("fingerprint", loaded.fingerprint)
    if not any_weights:
        check_weights(file, trained, loaded, remedy=ANY_WEIGHTS)
    origin = {} if adapter is None else {"adapter_config": adapter.config}
    imported = {"imported": {"file": str(file), "trained_on": trained, **origin}}
    with _removed_on_error(workdir):
        save_delta(workdir / DELTA, delta, provenance(config, loaded) | imported)
        write_text(workdir / CONFIG, json.dumps(to_dict(config), indent=2) + "\n")
    return {
        "method": method["name"],
        "leaves": {path: list(leaf.shape) for path, leaf in flatten_dict(delta, sep="/").items()},
        "workdir": str(workdir),
        "notes": notes_on(metadata, adapter) + conventions(method_settings(config), model),
    }


def check_tasks(config: ConfigDict, delta: Mapping[str, Any], *, file: str) -> None:
    """Checks that a multitask prompt has as many tasks as the config.

    Raises:
        UserError: the numbers differ.
    """
    found = [leaf for path, leaf in flatten_dict(delta, sep="/").items() if "task_cols" in path]
    names = [one.task.name for one in task_configs(config)]
    if found and len(found[0]) != len(names):
        raise UserError(
            f"{file} is for {len(found[0])} tasks, by number; the config has {len(names)}, "
            f"{', '.join(names)}; name as many in data.mixture"
        )


def open_source(file: Path) -> Adapter | None:
    """Reads the PEFT adapter at a path; None for a .npy file.

    Raises:
        UserError: the path is neither, or the adapter is not readable.
    """
    if file.is_dir():
        return read_adapter(file)
    if not file.is_file():
        raise UserError(f"{file}: no such file or folder")
    if prompt_arrays.is_array(file):
        return None
    if (file.parent / ADAPTER_CONFIG).exists():
        return read_adapter(file.parent)
    raise UserError(
        f"{file}: neither a .npy file nor part of a PEFT adapter; allowed: an adapter's folder, or "
        "a .npy file"
    )


def with_method(
    config: ConfigDict, method: Mapping[str, Any], metadata: Mapping[str, Any], *, file: str
) -> ConfigDict:
    """Returns a resolved config with the method section of an imported file.

    `method.bos` is that of the file's metadata, or else that of the config. `file` is named in
    errors.

    Raises:
        UserError: the config's `method.bos` contradicts the file or puts BOS before a prompt, or
            a value of the method is not allowed.
    """
    defaults, bos = to_dict(base_config())["method"], config.method.bos
    if "bos" in metadata and bos not in (metadata["bos"], defaults["bos"]):
        raise UserError(f"config key 'method.bos' is {bos!r}; {file} has {metadata['bos']!r}")
    bos = metadata.get("bos", bos)
    if bos == "before" and METHODS[method["name"]].Settings.is_context:
        raise UserError(
            f"config key 'method.bos' is 'before'; in {file} the prompt comes first; allowed: "
            "after, none"
        )
    made = resolve(config)
    for key, value in {**defaults, **method, "bos": bos}.items():
        set_key(made, f"method.{key}", value)
    validate(made)
    return made


def notes_on(metadata: Mapping[str, Any], adapter: Adapter | None) -> list[str]:
    """Notes about the weights that a file was trained on."""
    if "fingerprint" in metadata:
        return []
    base = adapter.config.get("base_model_name_or_path") if adapter else None
    named = f", only their name, {base!r}" if base else ""
    return [f"the file has no fingerprint of the weights that it was trained on{named}"]
