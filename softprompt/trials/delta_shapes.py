"""Whether a stored delta is what its method makes of a model."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from softprompt.config import ConfigDict
from softprompt.errors import UserError
from softprompt.methods import METHODS
from softprompt.methods.setup import folded_config
from softprompt.models.decoder import DecoderConfig
from softprompt.models.shapes import leaf_shapes
from softprompt.models.t5_layers import T5Config
from softprompt.pretrained.loading import make_model

SPARSE = ("lora", "ia3")  # an adapter of PEFT's may leave projections out


def check_fit(
    delta: dict[str, Any], config: ConfigDict, sizes: DecoderConfig | T5Config, *, file: str
) -> None:
    """Checks that a folded delta has the leaves of its method for this model, and no others.

    A LoRA or IA3 may leave projections out, as imported ones do: not all of them, and each whole.

    Args:
        delta: as a file has it.
        config: the trial's.
        sizes: of the model.
        file: named in errors.

    Raises:
        UserError: names the first leaf that nothing reads, that has another shape, or that is
            missing.
    """
    shapes, found = folded_shapes(config, sizes), flatten_dict(delta, sep="/")
    for path, leaf in found.items():
        if leaf.shape != shapes.get(path):
            known = f"the leaves {', '.join(shapes)}" if shapes else "no leaf"
            allowed = list(shapes[path]) if path in shapes else known
            raise UserError(
                f"{file}: {path} {list(leaf.shape)} does not fit this model; allowed: {allowed}"
            )
    some = found and config.method.name in SPARSE
    needed = {_module(path) for path in (found if some else shapes)}
    for path in shapes:
        if _module(path) in needed and path not in found:
            together = [one for one in shapes if _module(one) == _module(path)]
            raise UserError(f"{file}: {path} is missing; allowed: {', '.join(together)}, together")


def folded_shapes(
    config: ConfigDict, sizes: DecoderConfig | T5Config
) -> dict[str, tuple[int, ...]]:
    """Path -> shape of a config's folded delta, for a model of these sizes."""
    name, model = config.method.name, make_model(sizes, "float32")
    abstract = {
        path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in leaf_shapes(sizes).items()
    }
    cfg = folded_config(config, encoder_decoder=isinstance(sizes, T5Config))
    method = METHODS["none" if name == "fewshot" else name]
    make = functools.partial(method.init, model=model, cfg=cfg)
    key = jax.eval_shape(lambda: jax.random.key(0))
    delta = jax.eval_shape(
        lambda key, weights: make(key, weights=weights), key, unflatten_dict(abstract, sep="/")
    )
    return {path: leaf.shape for path, leaf in flatten_dict(delta, sep="/").items()}


def _module(path: str) -> str:
    """The module that reads a leaf."""
    return path.rpartition("/")[0]
