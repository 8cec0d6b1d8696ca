"""Reads a trial's delta, and checks that it has the leaves and shapes of its method and model."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from softprompt.config import ConfigDict, method_settings, task_configs
from softprompt.errors import UserError
from softprompt.methods import METHODS
from softprompt.methods.base import Setup
from softprompt.methods.delta_file import load_delta
from softprompt.models import ModelConfig
from softprompt.models.shapes import leaf_shapes
from softprompt.pretrained.loading import Loaded, make_model

ANY_WEIGHTS = "; --any-weights accepts it"  # the end of an error


def read_delta(
    file: epath.PathLike,
    config: ConfigDict,
    loaded: Loaded,
    *,
    any_weights: bool = False,
    remedy: str = "",
) -> dict[str, Any]:
    """Reads a trial's delta for a model.

    Raises:
        UserError: see `load_delta`, `check_weights` (not with `any_weights`) and `check_fit`.
    """
    delta, provenance = load_delta(file)
    if not any_weights:
        check_weights(file, provenance.get("fingerprint"), loaded, remedy=remedy)
    check_fit(delta, config, loaded.config, file=str(file))
    return delta


def check_weights(
    file: epath.PathLike, trained: str | None, loaded: Loaded, *, remedy: str = ""
) -> None:
    """Checks that weights with the fingerprint `trained` are the model's.

    Raises:
        UserError: they are not; the message ends with `remedy`.
    """
    if trained != loaded.fingerprint:
        raise UserError(
            f"{file} was trained on weights {trained}, {loaded.name} has "
            f"{loaded.fingerprint}{remedy}"
        )


def check_fit(delta: dict[str, Any], config: ConfigDict, sizes: ModelConfig, *, file: str) -> None:
    """Checks that a folded delta has exactly the leaves of its method for this model.

    If the method may leave out modules, the delta must have all leaves of each module that it has.

    Raises:
        UserError: names the file, and the first leaf that is unknown, misshapen or missing.
    """
    shapes, found = folded_shapes(config, sizes), flatten_dict(delta, sep="/")
    for path, leaf in found.items():
        if leaf.shape != shapes.get(path):
            known = f"the leaves {', '.join(shapes)}" if shapes else "no leaf"
            allowed = list(shapes[path]) if path in shapes else known
            raise UserError(
                f"{file}: {path} {list(leaf.shape)} does not fit this model; allowed: {allowed}"
            )
    some = found and method_settings(config).may_leave_out
    modules = _modules(shapes)
    needed = {modules[path] for path in (found if some else shapes)}
    for path in shapes:
        if modules[path] in needed and path not in found:
            together = [one for one in shapes if modules[one] == modules[path]]
            raise UserError(f"{file}: {path} is missing; allowed: {', '.join(together)}, together")


def trained_count(config: ConfigDict, sizes: ModelConfig) -> int:
    """The number of values in a config's folded delta, for a model of these sizes."""
    return sum(math.prod(shape) for shape in folded_shapes(config, sizes).values())


def folded_shapes(config: ConfigDict, sizes: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The path and shape of each leaf of a config's folded delta, for a model of these sizes."""
    settings, model = method_settings(config), make_model(sizes, "float32")
    abstract = {
        path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in leaf_shapes(sizes).items()
    }
    method = METHODS[settings.name]
    cfg = method.resolve(settings, Setup(sizes, tasks=len(task_configs(config))))

    def make(weights: Any) -> Any:
        return method.fold(method.init(jax.random.key(0), model, weights, cfg), cfg)

    delta = jax.eval_shape(make, unflatten_dict(abstract, sep="/"))
    return {path: leaf.shape for path, leaf in flatten_dict(delta, sep="/").items()}


def _modules(paths: Iterable[str]) -> dict[str, str]:
    """The module of each leaf.

    A leaf may be named after another module: attn/qkv/q is the part of attn/q in factors that
    queries, keys and values share. Then the leaves of attn/q belong to attn/qkv too.
    """
    modules = {path: path.rpartition("/")[0] for path in paths}
    shared = {
        f"{module.rpartition('/')[0]}/{path.rpartition('/')[2]}": module
        for path, module in modules.items()
    }
    return {path: shared.get(module, module) for path, module in modules.items()}
