"""A trial's model with what was trained in it, as a Hugging Face folder."""

from typing import Any

from etils import epath

from softprompt.config import ConfigDict, method_settings
from softprompt.errors import UserError
from softprompt.methods import METHODS
from softprompt.methods.base import Setup
from softprompt.methods.delta_file import load_delta
from softprompt.pretrained.loading import Loaded, find_folder, load_model
from softprompt.pretrained.save import save_folder
from softprompt.trials.delta_shapes import check_fit

# Methods that change the model's matrices, and nothing else.
CHANGES = [name for name, method in METHODS.items() if hasattr(method, "merge")]


def export_model(config: ConfigDict, delta_file: epath.Path, to: epath.Path) -> list[str]:
    """Writes the model in float32 with a LoRA added to its weights, or with all that was trained.

    Args:
        config: the trial's.
        delta_file: what was trained.
        to: a local folder, new.

    Returns:
        The files.

    Raises:
        UserError: another method, other weights than it was trained on, quantised ones, a delta
            that does not fit them, or a folder that is not local.
    """
    method = config.method.name
    if method not in CHANGES:
        raise UserError(
            f"--format hf: a {method} is no change of the model's weights; allowed for "
            f"{', '.join(CHANGES)}"
        )
    if "://" in str(to):
        raise UserError(f"--to {to}: a whole model is written to a local folder")
    delta, known = load_delta(delta_file)
    loaded = load_model(
        config.model.name,
        dtype="float32",
        quantize=config.model.quantize,
        revision=config.model.revision or None,
        tokenizer_name=config.model.tokenizer,
    )
    if known.get("fingerprint") != loaded.fingerprint:
        raise UserError(
            f"{delta_file} was trained on weights {known.get('fingerprint')}, "
            f"{config.model.name} has {loaded.fingerprint}"
        )
    check_fit(delta, config, loaded.config, file=str(delta_file))
    weights = changed(config, delta, loaded)
    original = find_folder(config.model.name, revision=config.model.revision or None)
    save_folder(to, loaded.config, weights, loaded.tokenizer, original=original)
    return sorted(str(file) for file in to.iterdir())


def changed(config: ConfigDict, delta: dict[str, Any], loaded: Loaded) -> dict[str, Any]:
    """The weights that compute what base model and delta do together."""
    settings = method_settings(config)
    method = METHODS[settings.name]
    cfg = method.resolve(settings, Setup(loaded.config))
    merged: dict[str, Any] = method.merge(delta, loaded.weights, cfg)
    return merged
