"""The reference form of prompt tuning, as it is usually written; for tests only.

The prompt is embedded before every example, examples are padded on the right to the longest of the
batch, attention is full and causal, and logits are computed at all positions. The Llama layers are
written out again, so that nothing is shared with what they check but the tree of weights.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.data.encode import Encoded
from softprompt.models.decoder import DecoderConfig

Tree = Any


def pad_right(encoded: Encoded, examples_B: Any) -> dict[str, np.ndarray]:
    """Examples as tokens_BT, the token that comes next next_BT, and the loss's weight_BT."""
    whole = [np.concatenate([encoded.inputs[n], encoded.targets[n]]) for n in examples_B]
    longest = max(map(len, whole)) - 1
    batch = {name: np.zeros((len(whole), longest), np.int32) for name in ("tokens_BT", "next_BT")}
    weight_BT = np.zeros((len(whole), longest))
    for row, (n, tokens) in enumerate(zip(examples_B, whole, strict=True)):
        batch["tokens_BT"][row, : len(tokens) - 1] = tokens[:-1]
        batch["next_BT"][row, : len(tokens) - 1] = tokens[1:]
        weight_BT[row, len(encoded.inputs[n]) - 1 : len(tokens) - 1] = 1
    return {**batch, "weight_BT": weight_BT / weight_BT.sum()}


def logits(weights: Tree, config: DecoderConfig, x_TD: jax.Array) -> jax.Array:
    """Logits [T, V] of a sequence of vectors."""
    size, dtype = config.head_size, x_TD.dtype
    tokens = x_TD.shape[0]
    frequency_K = config.rope_base ** (-jnp.arange(0, size, 2, dtype=dtype) / size)
    angle_TK = jnp.arange(tokens, dtype=dtype)[:, None] * jnp.tile(frequency_K, 2)
    causal_TS = jnp.tril(jnp.ones((tokens, tokens), bool))

    def norm(x_TD: jax.Array, scale: dict[str, jax.Array]) -> jax.Array:
        mean_T1 = jnp.mean(x_TD**2, axis=-1, keepdims=True)
        return x_TD / jnp.sqrt(mean_T1 + config.norm_eps) * scale["scale"]

    def turn(x_HTK: jax.Array) -> jax.Array:
        a, b = x_HTK[..., : size // 2], x_HTK[..., size // 2 :]
        return x_HTK * jnp.cos(angle_TK) + jnp.concatenate([-b, a], -1) * jnp.sin(angle_TK)

    def layer(x_TD: jax.Array, layer: Tree) -> tuple[jax.Array, None]:
        kernels = {name: part["kernel"] for name, part in (layer["attn"] | layer["mlp"]).items()}
        y_TD = norm(x_TD, layer["attn_norm"])
        q, k, v = (jnp.einsum("td,dhk->htk", y_TD, kernels[name]) for name in "qkv")
        q, k = turn(q), turn(k)
        k, v = (jnp.repeat(part, config.heads // config.kv_heads, axis=0) for part in (k, v))
        score_HTS = jnp.einsum("htk,hsk->hts", q, k) / size**0.5
        share_HTS = jax.nn.softmax(jnp.where(causal_TS, score_HTS, -jnp.inf))
        mixed_HTK = jnp.einsum("hts,hsk->htk", share_HTS, v)
        x_TD = x_TD + jnp.einsum("htk,hkd->td", mixed_HTK, kernels["o"])
        y_TD = norm(x_TD, layer["mlp_norm"])
        y_TF = jax.nn.silu(y_TD @ kernels["gate"]) * (y_TD @ kernels["up"])
        return x_TD + y_TF @ kernels["down"], None

    x_TD, _ = jax.lax.scan(layer, x_TD, weights["layers"])
    embedding_VD = weights["embed"]["embedding"]
    head_DV = embedding_VD.T if config.tied else weights["head"]["kernel"]
    return norm(x_TD, weights["final_norm"]) @ head_DV


def batch_logits(
    prompt_PD: jax.Array, weights: Tree, config: DecoderConfig, tokens_BT: Any
) -> jax.Array:
    """Logits [B, P + T, V] of the prompt before every example."""
    embedding_VD = weights["embed"]["embedding"]

    def one(tokens_T: jax.Array) -> jax.Array:
        return logits(weights, config, jnp.concatenate([prompt_PD, embedding_VD[tokens_T]]))

    return jax.vmap(one)(jnp.asarray(tokens_BT))


def loss(
    prompt_PD: jax.Array, weights: Tree, config: DecoderConfig, batch: dict[str, np.ndarray]
) -> jax.Array:
    """Mean cross-entropy of the target tokens, in nats."""
    logits_BSV = batch_logits(prompt_PD, weights, config, batch["tokens_BT"])
    log_BTV = jax.nn.log_softmax(logits_BSV)[:, len(prompt_PD) :]
    right_BT = jnp.take_along_axis(log_BTV, jnp.asarray(batch["next_BT"])[..., None], axis=-1)
    return -jnp.sum(jnp.asarray(batch["weight_BT"]) * right_BT[..., 0])
