"""A trial's model with its delta merged into the weights, as a Hugging Face folder."""

from etils import epath

from softprompt.config import ConfigDict, method_settings
from softprompt.errors import UserError
from softprompt.methods import METHODS
from softprompt.methods.base import Setup
from softprompt.methods.delta_file import load_delta
from softprompt.pretrained.loading import find_folder, load_model
from softprompt.pretrained.save import save_folder
from softprompt.trials.delta_shapes import check_fit


def export_merged(config: ConfigDict, delta_file: epath.Path, to: epath.Path) -> list[str]:
    """Writes a model with the delta merged into its weights, in float32, to a new local folder.

    Returns:
        The paths of its files.

    Raises:
        UserError: the method has no `merge`; the delta was trained on other weights, or has other
            shapes; the weights are quantised; the folder is not local. Incomplete output is
            removed.
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
    delta, metadata = load_delta(delta_file)
    loaded = load_model(
        config.model.name,
        dtype="float32",
        quantize=config.model.quantize,
        revision=config.model.revision or None,
        tokenizer_name=config.model.tokenizer,
    )
    if metadata.get("fingerprint") != loaded.fingerprint:
        raise UserError(
            f"{delta_file} was trained on weights {metadata.get('fingerprint')}, "
            f"{config.model.name} has {loaded.fingerprint}"
        )
    check_fit(delta, config, loaded.config, file=str(delta_file))
    cfg = method.resolve(settings, Setup(loaded.config))
    weights = method.merge(delta, loaded.weights, cfg)
    original = find_folder(config.model.name, revision=config.model.revision or None)
    save_folder(to, loaded.config, weights, loaded.tokenizer, original=original)
    return sorted(str(file) for file in to.iterdir())
