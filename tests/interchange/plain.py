"""What a delta does, spelt out on plain weights: updates added, scales multiplied, contexts given.

It shares nothing with the methods, so it holds the files' meaning against PEFT's logits.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from softprompt.models.decoder import Context, Decoder
from softprompt.models.rows import Rows
from softprompt.models.t5 import T5, Contexts
from tests.interchange.cases import Case
from tests.interchange.texts import IDS, T5_IDS, T5_TARGETS, TASK


def logits(model: Decoder | T5, weights: Any, delta: Any, case: Case) -> np.ndarray:
    """Logits [T, V] of the text that `live.logits` scores, behind a delta."""
    leaves = dict(flatten_dict(delta, sep="/"))
    plain = {path: np.asarray(leaf) for path, leaf in flatten_dict(weights, sep="/").items()}
    for path in [path for path in leaves if path.endswith("/ia3")]:
        _scale(plain, path.removesuffix("/ia3"), leaves.pop(path))
    for path in [path for path in leaves if path.endswith("/lora_a")]:
        _update(plain, path.removesuffix("/lora_a"), leaves, case.method)
    for path in [path for path in leaves if path.endswith("/magnitude")]:
        _normalise(plain, path.removesuffix("/magnitude"), leaves.pop(path))
    for path in [path for path in leaves if path.endswith("task_cols")]:
        place = path.removesuffix("task_cols")
        product_PD = leaves[path][TASK] @ leaves[f"{place}task_rows"][TASK]
        leaves = {f"{place}prompt": leaves[f"{place}prompt"] * product_PD}
    prompt = {path: leaf for path, leaf in leaves.items() if path.endswith("prompt")}
    variables = {"params": unflatten_dict(plain, sep="/"), "delta": unflatten_dict(prompt, sep="/")}
    kv = [leaves[path] for path in leaves if "prefix/" in path]
    prefix = Context(*map(jnp.asarray, kv)) if kv else None
    return np.asarray(run(model, variables, prefix))


def _scale(plain: dict[str, np.ndarray], path: str, ia3: np.ndarray) -> None:
    """IA3: the outputs of a projection, bias included; the inputs of a feed-forward's last."""
    layers = ia3.shape[0]
    if path.endswith("down"):
        plain[f"{path}/kernel"] = plain[f"{path}/kernel"] * ia3[:, :, None]
        return
    kernel = plain[f"{path}/kernel"]
    between = (1,) * (kernel.ndim - ia3.ndim)
    plain[f"{path}/kernel"] = kernel * ia3.reshape(layers, *between, *ia3.shape[1:])
    if f"{path}/bias" in plain:
        plain[f"{path}/bias"] = plain[f"{path}/bias"] * ia3


def _update(
    plain: dict[str, np.ndarray], path: str, leaves: dict[str, np.ndarray], method: dict[str, Any]
) -> None:
    """LoRA: scale * A B is added to the kernel, or to each that shares the A."""
    rank = method["rank"]
    scale = method["alpha"] / (math.sqrt(rank) if method["rslora"] else rank)
    a_LIZ = leaves[f"{path}/lora_a"]
    shared = path.endswith("qkv")
    for name in "qkv" if shared else ("lora_b",):
        b_LZO = leaves[f"{path}/{name}"]
        kernel = f"{path.removesuffix('qkv')}{name}/kernel" if shared else f"{path}/kernel"
        flat_a = a_LIZ.reshape(a_LIZ.shape[0], -1, rank)
        flat_b = b_LZO.reshape(b_LZO.shape[0], rank, -1)
        product = np.einsum("liz,lzo->lio", flat_a, flat_b).reshape(plain[kernel].shape)
        plain[kernel] = (plain[kernel] + scale * product).astype(np.float32)


def _normalise(plain: dict[str, np.ndarray], path: str, magnitude: np.ndarray) -> None:
    """DoRA: the columns of the updated kernel get these norms."""
    kernel = plain[f"{path}/kernel"]
    inputs = tuple(range(1, 1 + kernel.ndim - magnitude.ndim))
    norm = np.sqrt((kernel**2).sum(axis=inputs, keepdims=True))
    plain[f"{path}/kernel"] = kernel / norm * magnitude.reshape(norm.shape)


@functools.partial(jax.jit, static_argnames="model")
def run(model: Decoder | T5, variables: Any, prefix: Context | None = None) -> jax.Array:
    """Logits [T, V] of the text, behind a prefix where there is one."""
    if isinstance(model, T5):
        return _run_t5(model, variables, prefix)
    tokens_T = jnp.array(IDS)
    if prefix is None:
        return model.apply(variables, tokens_T)
    x_TD = model.apply(variables, prefix, _row(tokens_T), method="hidden")
    return model.apply(variables, x_TD, method="logits")


def _run_t5(model: T5, variables: Any, prefix: Context | None) -> jax.Array:
    tokens_S, tokens_T = jnp.array(T5_IDS), jnp.array(T5_TARGETS)
    if prefix is None:
        return model.apply(variables, tokens_S, tokens_T)
    empty = model.apply(variables, method="prompt_context")
    contexts = Contexts(empty.encoder, empty.states_PD, prefix)
    row = dataclasses.replace(_row(tokens_T), encoder=_row(tokens_S))
    x_TD = model.apply(variables, contexts, row, method="target_states")
    return model.apply(variables, x_TD, method="unembed")


def _row(tokens_T: jax.Array) -> Rows:
    """A row of one text, of which all positions are wanted."""
    index_T = jnp.arange(len(tokens_T))
    return Rows(tokens_T, jnp.ones_like(tokens_T), index_T, index=index_T)
