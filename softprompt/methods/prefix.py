"""Prefix tuning: trained keys and values of P positions in every layer.

The delta: "prefix/k" and "prefix/v" [L, P, G, K] for a decoder. An encoder-decoder has them under
"encoder" and "decoder" for self-attention, and "decoder/cross_prefix" for cross-attention. Keys are
stored after rotation, at positions 0 to P - 1.

With a `bottleneck`, two layers compute them during training: "rows" [P, D] through "w0" [D, Z] and
"w1" [Z, 2 L G K]. Only the keys and values are stored in the end.

Source: Li and Liang 2021 (arXiv 2101.00190), sections 4.2 and 4.3; section 7.5 for initialisation
with real words.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from softprompt.errors import UserError
from softprompt.methods.base import ContextShape, Setup, TrainedContextSettings
from softprompt.methods.initializers import INITIALIZERS, Initializer
from softprompt.methods.projections import delta_dtype
from softprompt.models import T5, Model
from softprompt.models.quantize import embedding
from softprompt.settings import setting

STDDEV = 0.02  # of "noise"
LEAVES = {  # value of `method.place` -> a prefix's path in the delta
    "encoder": ("encoder", "prefix"),
    "decoder": ("decoder", "prefix"),
    "cross": ("decoder", "cross_prefix"),
}

PEFT = {"peft_type": "PREFIX_TUNING"}


@dataclasses.dataclass(frozen=True)
class Settings(TrainedContextSettings):
    """Trained keys and values before the text, in every layer."""

    name = "prefix"

    init: str = setting(
        "vocabulary",
        "initial values: the model's keys and values of a prompt with this initialiser; noise; or "
        "zeros",
        choices=(*INITIALIZERS, "noise", "zeros"),
    )
    place: str = setting(
        "encoder",
        "encoder-decoders: which attention has a prefix; both is encoder and decoder, cross is "
        "cross-attention",
        choices=("encoder", "decoder", "cross", "both", "all"),
    )
    reparam: str = setting(
        "none",
        "a network that computes the prefix during training: none or mlp",
        choices=("none", "mlp"),
    )
    bottleneck: int = setting(64, "width of reparam's hidden layers", low=1, needs=("reparam",))

    @property
    def from_prompt(self) -> bool:
        """Whether it starts as the keys and values of a prompt."""
        return self.init in INITIALIZERS

    def check(self) -> None:
        """Checks that a network's output starts as noise."""
        if self.reparam == "mlp" and self.init != "noise":
            raise UserError(
                f"config key 'method.init' is {self.init!r}; allowed with method.reparam=mlp: noise"
            )


@dataclasses.dataclass(frozen=True)
class PrefixConfig:
    """The static configuration.

    Attributes:
        length: P.
        stacks: "encoder" and "decoder" (self-attention) and "cross" of an encoder-decoder; () for a
            decoder.
        start: "noise", "zeros", or "rows": the keys and values of the initialiser's rows, run as a
            prompt.
        initializer: for "rows". Only `init` uses it and `start`.
        embed_scale: the model's, as in `PromptConfig`.
        bottleneck: Z of the two layers; 0 if keys and values are trained directly.
    """

    length: int
    stacks: tuple[str, ...] = ()
    start: str = dataclasses.field(default="noise", compare=False)
    initializer: Initializer | None = dataclasses.field(default=None, compare=False)
    embed_scale: float = 1.0
    bottleneck: int = 0


def resolve(settings: Settings, setup: Setup) -> PrefixConfig:
    """The static configuration for a trial.

    Raises:
        UserError: the model has no room for the prefix; `method.place` names what the model lacks,
            or does not allow the initialisation; see `Setup.initializer`.
    """
    settings.check_room(setup)
    stacks, from_prompt = settings.stacks(setup), settings.from_prompt
    if setup.initializer_settings is None and from_prompt:
        return PrefixConfig(settings.length, stacks)  # has the same shape
    if "cross" in stacks and from_prompt:
        raise UserError(
            f"config key 'method.init' is {settings.init!r}; allowed for a prefix of "
            "cross-attention: noise, zeros"
        )
    if stacks and not from_prompt and not settings.prompt_to_input:
        raise UserError(
            "config key 'method.prompt_to_input' is False; allowed for a prefix with "
            f"method.init={settings.init}: True"
        )
    if "encoder" in stacks and settings.prompt_to_input and from_prompt:
        raise UserError(
            f"config key 'method.init' is {settings.init!r}: in an encoder, keys and values of a "
            "prompt depend on the input; allowed: noise, zeros, or method.prompt_to_input=False"
        )
    return PrefixConfig(
        settings.length,
        stacks,
        "rows" if from_prompt else settings.init,
        setup.initializer(settings.place) if from_prompt else None,
        setup.sizes.embed_scale,
        settings.bottleneck if settings.reparam == "mlp" else 0,
    )


def context(cfg: PrefixConfig) -> ContextShape:
    """The shape of the prefix."""
    return ContextShape(cfg.length, cfg.stacks)


def init(key: jax.Array, model: Model, weights: Any, cfg: PrefixConfig) -> dict[str, Any]:
    """Returns the prefix of each of `cfg.stacks`, float32 (float64 where the weights are)."""
    dtype = delta_dtype(weights)
    if not cfg.stacks:
        return {"prefix": _initial(key, model, weights, cfg, dtype)}
    delta: dict[str, Any] = {}
    for n, attention in enumerate(cfg.stacks):
        stack, name = LEAVES[attention]
        prefix = _initial(jax.random.fold_in(key, n), model, weights, cfg, dtype, stack)
        delta.setdefault(stack, {})[name] = prefix
    return delta


def _initial(
    key: jax.Array, model: Model, weights: Any, cfg: PrefixConfig, dtype: jnp.dtype, stack: str = ""
) -> dict[str, jax.Array]:
    shape = _shape(model, cfg.length, stack)
    if cfg.start == "rows":
        k, v = _run(key, model, weights, cfg, stack)
        return {"k": k.astype(dtype), "v": v.astype(dtype)}
    if cfg.bottleneck:
        return _network(key, shape, model.config.width, cfg, dtype)
    stddev = STDDEV if cfg.start == "noise" else 0.0
    noise = (stddev * jax.random.normal(k, shape, dtype) for k in jax.random.split(key))
    return dict(zip(("k", "v"), noise, strict=True))


def _shape(model: Model, length: int, stack: str) -> tuple[int, int, int, int]:
    """[L, P, G, K] of a stack."""
    c: Any = model.config
    if isinstance(model, T5):
        return getattr(c, f"{stack}_layers"), length, c.heads, c.head_size
    return c.layers, length, c.kv_heads, c.head_size


def _run(
    key: jax.Array, model: Model, weights: Any, cfg: PrefixConfig, stack: str
) -> tuple[jax.Array, jax.Array]:
    """Keys and values of the initialiser's rows, run as a prompt by itself."""
    assert cfg.initializer is not None, "start=rows needs an initialiser"
    embedding_VD = embedding(weights["embed"])
    if cfg.embed_scale != 1.0:
        embedding_VD = embedding_VD * jnp.asarray(cfg.embed_scale, embedding_VD.dtype)
    prompt = {"prompt": cfg.initializer(key, embedding_VD, cfg.length)}
    alone = model.clone(prompt_to_input=False) if isinstance(model, T5) else model
    delta = {stack: prompt} if stack else prompt
    context: Any = alone.apply({"params": weights, "delta": delta}, method="prompt_context")
    context = getattr(context, stack) if stack else context
    return context.k_LPGK, context.v_LPGK


def _network(
    key: jax.Array, shape: tuple[int, ...], width: int, cfg: PrefixConfig, dtype: jnp.dtype
) -> dict[str, jax.Array]:
    """The rows and the two layers that compute keys and values."""
    layers, length, groups, size = shape
    out = 2 * layers * groups * size
    keys = jax.random.split(key, 3)
    return {
        "rows": jax.random.normal(keys[0], (length, width), dtype),
        "w0": jax.random.normal(keys[1], (width, cfg.bottleneck), dtype) * width**-0.5,
        "b0": jnp.zeros(cfg.bottleneck, dtype),
        "w1": jax.random.normal(keys[2], (cfg.bottleneck, out), dtype) * STDDEV,
        "b1": jnp.zeros((layers, 2, groups, size), dtype),
    }


def variables(
    delta: dict[str, Any], weights: Any, cfg: PrefixConfig, task_ids: jax.Array | None
) -> dict[str, Any]:
    """The keys and values of each prefix."""
    return _map_prefixes(delta, _computed)


def _map_prefixes(tree: Mapping[str, Any], function: Callable[[Any], Any]) -> dict[str, Any]:
    """The tree with each prefix replaced by `function(prefix)`."""
    return {
        name: function(node) if name.endswith("prefix") else _map_prefixes(node, function)
        for name, node in tree.items()
    }


def _computed(prefix: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Keys and values, computed by the network if there is one."""
    if "rows" not in prefix:
        return prefix
    low_PZ = jnp.tanh(prefix["rows"] @ prefix["w0"] + prefix["b0"])
    x_PLNGK = (low_PZ @ prefix["w1"]).reshape(-1, *prefix["b1"].shape) + prefix["b1"]
    k_PLGK, v_PLGK = x_PLNGK[:, :, 0], x_PLNGK[:, :, 1]
    return {"k": k_PLGK.swapaxes(0, 1), "v": v_PLGK.swapaxes(0, 1)}


def fold(delta: dict[str, Any], cfg: PrefixConfig) -> dict[str, Any]:
    """Returns keys and values without the network."""
    return _map_prefixes(delta, _computed)
