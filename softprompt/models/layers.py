"""Layers for one row: arrays have no batch axis, which callers add with `jax.vmap`.

Frozen weights are in Flax's collection "params", trained variables in the collection "delta". A
module reads a delta variable from its own scope, so that both trees have the modules' structure.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.custom_derivatives import SymbolicZero

from softprompt.models.attention import accumulate
from softprompt.models.dropout import RowDropout, lora_dropped
from softprompt.models.quantize import PARTS, dequantize

HEAD = ("embed", "project_out", "head")  # the modules of a model that its unembedding may read

_normal = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=0, out_axis=-1)


def read_delta(module: nn.Module, name: str) -> jax.Array | None:
    """The trained variable `name` in the module's own scope; None if the delta lacks it.

    Every read is recorded in the collection "read", so that a trial can reject a delta with a leaf
    that no module reads (Linen would silently ignore it).
    """
    if not module.has_variable("delta", name):
        return None
    module.sow("read", name, True)
    return module.get_variable("delta", name)


def collections(weights: Any, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Flax's collections for `model.apply`, from frozen weights and a method's variables.

    A method that trains the weights themselves has them under "params" in its variables.
    """
    delta = {name: tree for name, tree in variables.items() if name != "params"}
    return {"params": {**weights, **variables.get("params", {})}, "delta": delta}


def head_weights(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The collections without the weights that no unembedding reads."""
    weights = {name: variables["params"][name] for name in HEAD if name in variables["params"]}
    return {**variables, "params": weights}


class Linear(nn.Module):
    """A projection `einsum(spec, x, kernel)` in `dtype`; its bias, if any, is added in float32.

    The delta may have these variables in its scope: "bias", added to the frozen bias; "lora_a" and
    "lora_b" (arXiv 2106.09685), whose product is added to the kernel; "output_scale", which
    multiplies the columns of that sum (arXiv 2402.09353); "ia3" (arXiv 2205.05638), which
    multiplies the result, bias included, or the input if `rescales_input`.

    `wide`: the result has at least float32, as logits do.
    """

    spec: str
    shape: tuple[int, ...]
    dtype: jnp.dtype
    use_bias: bool = False
    wide: bool = False
    rescales_input: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, drop: RowDropout | None = None) -> jax.Array:
        """Projects `x` [T, ...]; `drop` has the dropout of the input of "lora_a"."""
        axes, out = self.spec.split(",")[1].split("->")
        inputs = tuple(n for n, axis in enumerate(axes) if axis not in out)
        acc = accumulate(self.dtype)
        factor = read_delta(self, "ia3")
        if factor is not None and self.rescales_input:
            x = (x.astype(acc) * factor).astype(self.dtype)
        y = project(self, "kernel", x, self.shape, inputs, acc if self.wide else None)
        if (low_rank := self._low_rank(x, drop)) is not None:
            y = y + low_rank.astype(y.dtype)
        if (scale := read_delta(self, "output_scale")) is not None:
            y = (y.astype(acc) * scale).astype(y.dtype)
        biases = [read_delta(self, "bias")]
        if self.use_bias:
            shape = tuple(size for axis, size in zip(axes, self.shape, strict=True) if axis in out)
            biases.insert(0, self.param("bias", nn.initializers.zeros, shape))
        y = add_biases(y, biases, self.dtype)
        if factor is not None and not self.rescales_input:
            y = (y.astype(acc) * factor).astype(self.dtype)
        return y

    def _low_rank(self, x: jax.Array, drop: RowDropout | None) -> jax.Array | None:
        """The product of `x` with LoRA's factors; None if the delta has none."""
        a, b = read_delta(self, "lora_a"), read_delta(self, "lora_b")
        if a is None or b is None:
            return None
        x = lora_dropped(self, x, drop)
        tokens, rest = self.spec.split(",")
        axes, out = rest.split("->")
        summed = "".join(axis for axis in axes if axis not in out)
        low = jnp.einsum(f"{tokens},{summed}z->tz", x, a.astype(self.dtype))
        outputs = "".join(axis for axis in axes if axis in out)
        return jnp.einsum(f"tz,z{outputs}->{out}", low, b.astype(self.dtype))


def add_biases(y: jax.Array, biases: Sequence[jax.Array | None], dtype: jnp.dtype) -> jax.Array:
    """Adds the biases that are not None, in at least float32, and casts the sum to `dtype`."""
    present = [bias for bias in biases if bias is not None]
    if not present:
        return y
    acc = accumulate(dtype)
    total = functools.reduce(jnp.add, (bias.astype(acc) for bias in present))
    return (y.astype(acc) + total).astype(dtype)


class Adapter(nn.Module):
    """A bottleneck network on a sublayer's output; the identity if the delta has none.

    y + up(gelu(down(y) + down_bias)) + up_bias, in `dtype`. Source: arXiv 1902.00751, section 2.1.
    """

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, y_TD: jax.Array) -> jax.Array:
        """Returns [T, D]."""
        down_DZ = read_delta(self, "down")
        if down_DZ is None:
            return y_TD
        parts = [read_delta(self, name) for name in ("down_bias", "up", "up_bias")]
        assert not any(part is None for part in parts), "an adapter lacks a part"
        bias_Z, up_ZD, bias_D = (part.astype(self.dtype) for part in parts)  # type: ignore[union-attr]
        low_TZ = jax.nn.gelu(y_TD @ down_DZ.astype(self.dtype) + bias_Z)
        return y_TD + low_TZ @ up_ZD + bias_D


class Prefix(nn.Module):
    """The trained keys and values "k" and "v" [L, P, G, K] of a stack, if the delta has them.

    The keys are already rotated. Source: arXiv 2101.00190, section 4.
    """

    dtype: jnp.dtype

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array] | None:
        """Returns the keys and values; None if the delta has none."""
        k_LPGK, v_LPGK = read_delta(self, "k"), read_delta(self, "v")
        if k_LPGK is None or v_LPGK is None:
            return None
        return k_LPGK.astype(self.dtype), v_LPGK.astype(self.dtype)


def project(
    module: Any,
    name: str,
    x: jax.Array,
    shape: tuple[int, ...],
    inputs: tuple[int, ...],
    acc: jnp.dtype | None,
) -> jax.Array:
    """The product of `x` with a frozen matrix of the module, plain or quantised.

    A quantised matrix is dequantised here, inside the scan over layers, and again in the backward
    pass. `jax.checkpoint` covers the product as well; otherwise the dequantised matrices of all
    layers would be stored for the backward pass.

    Args:
        module: has the matrix `name` in its scope; its `dtype` is that of the product.
        name: of the matrix, such as "kernel".
        x: the input, [T, ...].
        shape: of the matrix.
        inputs: the axes of the matrix that are summed over, its first or its last.
        acc: dtype of the result; None for the module's.
    """
    dtype = module.dtype
    product = functools.partial(_product, inputs, acc or dtype)
    if module.has_variable("params", name):
        matrix = module.get_variable("params", name)
        if matrix.dtype != dtype and jax.default_backend() == "cpu":
            # A weight in training. Else XLA's CPU compiler leaves its gradient to a slow loop.
            product = functools.partial(product, flip=True)
        return recomputed(lambda x, matrix: product(x, matrix.astype(dtype)))(x, matrix)
    parts = quantized_parts(module, name)
    if not parts:
        return product(x, module.param(name, _normal, shape).astype(dtype))
    return jax.checkpoint(lambda x, parts: product(x, dequantize(parts, inputs, dtype)))(x, parts)


def _product(
    inputs: tuple[int, ...], acc: jnp.dtype, x: jax.Array, kernel: jax.Array, *, flip: bool = False
) -> jax.Array:
    """The product in `acc` of vectors [T, ...] with an array, summed over its axes `inputs`.

    It is a product of matrices: XLA would transpose an array of heads for the backward pass. With
    `flip` the matrix is [outputs, inputs] in memory.
    """
    summed = [kernel.shape[axis] for axis in inputs]
    outputs = [size for axis, size in enumerate(kernel.shape) if axis not in inputs]
    x_TI = x.reshape(x.shape[0], math.prod(summed))
    if inputs[0] == 0:
        spec, w_2D = "ti,io->to", kernel.reshape(math.prod(summed), math.prod(outputs))
    else:
        spec, w_2D = "ti,oi->to", kernel.reshape(math.prod(outputs), math.prod(summed))
    if flip and spec == "ti,io->to":
        spec, w_2D = "ti,oi->to", jax.lax.optimization_barrier(w_2D.T)
    y_TO = jnp.einsum(spec, x_TI, w_2D) if acc == x.dtype else _wide(spec, acc, x_TI, w_2D)
    return y_TO.reshape(x.shape[0], *outputs)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _wide(spec: str, acc: jnp.dtype, x: jax.Array, matrix: jax.Array) -> jax.Array:
    """The einsum in `acc`, whose gradients are products in the dtype of its operands.

    JAX's own gradient would cast the embedding matrix to the dtype of the cotangent. With a rule
    for tangents, not for cotangents, the gradient of a matrix that rows share under `vmap` is one
    product; otherwise it would be one for each row, and their sum.
    """
    return jnp.einsum(spec, x, matrix, preferred_element_type=acc)


def _wide_tangent(
    spec: str, acc: Any, primals: tuple[jax.Array, jax.Array], tangents: tuple[Any, Any]
) -> tuple[jax.Array, Any]:
    (x, matrix), (dx, d_matrix) = primals, tangents
    pairs = (dx, matrix), (x, d_matrix)
    narrow = sum(jnp.einsum(spec, *pair) for pair in pairs if SymbolicZero not in map(type, pair))
    return _wide(spec, acc, x, matrix), jnp.asarray(narrow).astype(acc)


_wide.defjvp(_wide_tangent, symbolic_zeros=True)


def quantized_parts(module: nn.Module, name: str) -> list[Any]:
    """The stored arrays of the module's quantised matrix `name`; [] if it is not quantised."""
    names = [name + part for part in PARTS]
    return [module.get_variable("params", n) for n in names if module.has_variable("params", n)]


def recomputed(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`jax.checkpoint` of a cheap function: the backward pass stores only its arguments.

    In a scan over layers, every stored array is written to memory and read back in each layer.
    """
    return jax.checkpoint(function, prevent_cse=False)


def scaled(
    x: jax.Array, scale: jax.Array, *, epsilon: float, acc: jnp.dtype, centre: bool = False
) -> jax.Array:
    """Vectors over their root mean square, times `scale`, in `acc`; `centre` subtracts the mean."""

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        x = x.astype(acc)
        if centre:
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        size = jnp.mean(x * x, axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(size + epsilon) * scale.astype(acc)

    return recomputed(norm)(x, scale)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32. Source: arXiv 1910.07467."""

    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises each vector and multiplies it by the learned scale."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        x = scaled(x, scale, epsilon=self.epsilon, acc=accumulate(self.dtype))
        return add_biases(x, [read_delta(self, "bias")], self.dtype).astype(self.dtype)


class LayerNorm(nn.Module):
    """Layer norm with scale and bias over the last axis, in float32. Source: arXiv 1607.06450."""

    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises each vector, multiplies it by the scale and adds the bias."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        acc = accumulate(self.dtype)
        x = scaled(x, scale, epsilon=self.epsilon, acc=acc, centre=True)
        return add_biases(x, [bias, read_delta(self, "bias")], self.dtype)


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rms": RMSNorm, "layer": LayerNorm}

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def activate(name: str, x_TF: jax.Array, up_TF: jax.Array | None = None) -> jax.Array:
    """The activation `name`, times `up_TF` if it is given, computed in at least float32."""

    def product(x: jax.Array, *up: jax.Array) -> jax.Array:
        acc = accumulate(x.dtype)
        y = ACTIVATIONS[name](x.astype(acc))
        return (y * up[0].astype(acc) if up else y).astype(x.dtype)

    inputs = x_TF, *(() if up_TF is None else (up_TF,))
    if jax.default_backend() == "cpu":
        # Else XLA's CPU compiler recomputes the gradient inside a transposing copy, very slowly.
        inputs = jax.lax.optimization_barrier(inputs)
    return recomputed(product)(*inputs)


class Embed(nn.Module):
    """An embedding matrix of tokens, which a tied head reads too, or of positions.

    Embeddings are multiplied by `scale`; a tied head's products are not.
    """

    rows: int
    width: int
    dtype: jnp.dtype
    scale: float = 1.0

    @nn.compact
    def __call__(self, index_T: jax.Array) -> jax.Array:
        """Rows of the matrix, [T, D]."""
        if parts := quantized_parts(self, "embedding"):
            x_TD = dequantize([part[index_T] for part in parts], (1,), self.dtype)
        else:
            shape = (self.rows, self.width)
            matrix_VD = self.param("embedding", nn.initializers.normal(0.02), shape)
            x_TD = matrix_VD[index_T].astype(self.dtype)
        return x_TD if self.scale == 1.0 else x_TD * jnp.asarray(self.scale, self.dtype)

    def attend(self, x_MD: jax.Array) -> jax.Array:
        """Products with every row of the matrix, [M, V]."""
        shape, acc = (self.rows, self.width), accumulate(self.dtype)
        return project(self, "embedding", x_MD, shape, (1,), acc)
