"""LoRA: a low-rank change of chosen projections, x W + scale (x A) B.

The delta has the paths of the projections: "layers/attn/q/lora_a" [L, in..., Z] and "lora_b"
[L, Z, out...]. The target "qkv" has one A for queries, keys and values, like a fused projection:
"layers/attn/qkv/lora_a", and "q", "k", "v" for the B of each.

Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1; Kalajdzievski 2023 (arXiv 2312.03732) for
the scale alpha / sqrt(rank).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from softprompt.errors import UserError
from softprompt.methods.base import MethodSettings, Setup, unchanged
from softprompt.methods.projections import delta_dtype, keys_by_path, names, targeted
from softprompt.models import Model
from softprompt.models.quantize import VALUES
from softprompt.settings import setting

SHARED = "qkv"  # the target whose A is shared
PEFT = {"peft_type": "LORA", "use_dora": False}

fold = unchanged


@dataclasses.dataclass(frozen=True)
class Settings(MethodSettings):
    """A low-rank change of chosen projections."""

    name = "lora"
    multiplies_tokens = True
    may_leave_out = True
    drops = "lora"

    rank: int = setting(8, "Z, the rank of a projection's change", low=1)
    alpha: float = setting(16.0, "the change is scaled by alpha / rank", low=0)
    dropout: float = setting(
        0.0, "dropout rate of the input of A (PEFT's lora_dropout); 0 is off", low=0, high=0.999999
    )
    rslora: bool = setting(False, "scale the change by alpha / sqrt(rank) instead")
    targets: str = setting(
        "",
        "projections to change, such as q,v or q,k,v,o,gate,up,down; qkv has one A for all three; "
        '"" is q,v',
    )

    def label(self) -> str:
        """The method and its rank."""
        return f"{self.name}-{self.rank}"

    def check(self) -> None:
        """Checks that the scale is not 0."""
        if self.alpha == 0:
            raise UserError(
                f"config key 'method.alpha' is 0.0; allowed: above 0 with method.name={self.name}, "
                "whose update it scales"
            )


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The static configuration.

    Attributes:
        rank: Z.
        alpha: numerator of the scale.
        rslora: the scale is alpha / sqrt(rank) instead of alpha / rank.
        targets: names of projections.
    """

    rank: int
    alpha: float
    rslora: bool = False
    targets: tuple[str, ...] = ("q", "v")

    @property
    def scale(self) -> float:
        """The factor of the low-rank product."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def resolve(settings: Settings, setup: Setup) -> LoraConfig:
    """The static configuration for a trial."""
    s = settings
    return LoraConfig(s.rank, s.alpha, s.rslora, names(s.targets) or LoraConfig.targets)


def init(key: jax.Array, model: Model, weights: Any, cfg: LoraConfig) -> dict[str, Any]:
    """Returns A uniform in +-1 / sqrt(inputs), and B of zeros, float32 (or float64).

    Raises:
        UserError: the model lacks a target, or the targets have "qkv" and one of "q", "k", "v".
    """
    if SHARED in cfg.targets and (twice := {"q", "k", "v"} & set(cfg.targets)):
        raise UserError(
            f"config key 'method.targets' names {SHARED} and {', '.join(sorted(twice))}; allowed: "
            "one of the two"
        )
    sites = {site.path: site for site in targeted(model, cfg.targets, more=[SHARED])}
    groups = {path: [site] for path, site in sites.items()}
    if SHARED in cfg.targets:
        for site in targeted(model, ("q", "k", "v")):
            groups.setdefault(f"{site.path.rsplit('/', 1)[0]}/{SHARED}", []).append(site)
    dtype = delta_dtype(weights)
    leaves: dict[str, jax.Array] = {}
    for path, path_key in keys_by_path(key, groups).items():
        first, bound = groups[path][0], float(np.prod(groups[path][0].inputs)) ** -0.5
        shape = (first.layers, *first.inputs, cfg.rank)
        leaves[f"{path}/lora_a"] = jax.random.uniform(path_key, shape, dtype, -bound, bound)
        for site in groups[path]:
            name = site.name if path.endswith(f"/{SHARED}") else "lora_b"
            leaves[f"{path}/{name}"] = jnp.zeros((site.layers, cfg.rank, *site.outputs), dtype)
    return unflatten_dict(leaves, sep="/")


def variables(
    delta: dict[str, Any], weights: Any, cfg: LoraConfig, task_ids: jax.Array | None
) -> dict[str, Any]:
    """The factors, at the paths where the projections read them; B is multiplied by the scale."""
    leaves: dict[str, jax.Array] = {}
    for path, (a, b) in factors(delta).items():
        leaves |= {f"{path}/lora_a": a, f"{path}/lora_b": b * cfg.scale}
    return unflatten_dict(leaves, sep="/")


def factors(delta: dict[str, Any]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The path of each changed projection -> its A and B."""
    leaves = flatten_dict(delta, sep="/")
    found = {}
    for path, leaf in leaves.items():
        scope, name = path.rsplit("/", 1)
        if name == "lora_b":
            found[scope] = leaves[f"{scope}/lora_a"], leaf
        elif scope.endswith(f"/{SHARED}") and name != "lora_a":
            found[f"{scope.removesuffix(SHARED)}{name}"] = leaves[f"{scope}/lora_a"], leaf
    return found


def merge(delta: dict[str, Any], weights: dict[str, Any], cfg: LoraConfig) -> dict[str, Any]:
    """A copy of the weights with the low-rank changes added, for use without the delta.

    Raises:
        UserError: the weights are quantised, and their format cannot hold the sum.
    """
    merged = flatten_dict(weights, sep="/")
    for path, (a, b) in factors(delta).items():
        if f"{path}/kernel{VALUES}" in merged:
            raise UserError("LoRA does not merge into quantised weights; use model.quantize=none")
        flat = jnp.einsum(
            "liz,lzo->lio", a.reshape(len(a), -1, cfg.rank), b.reshape(*b.shape[:2], -1)
        )
        kernel = merged[f"{path}/kernel"]
        sum_ = kernel.astype(flat.dtype) + cfg.scale * flat.reshape(kernel.shape)
        merged[f"{path}/kernel"] = sum_.astype(kernel.dtype)
    return unflatten_dict(merged, sep="/")
