"""Products with matrices that rows share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from softprompt.models.layers import _wide, project


def test_the_gradient_of_a_shared_matrix_is_one_product():
    """In the operands' dtype, and of all rows at once. Mutations: a rule for cotangents, which
    `vmap` turns into a gradient for each row and their sum; a product in the cotangent's dtype."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    x_RTI, matrix_OI, weight_RTO = draw(4, 5, 8).astype("bfloat16"), draw(11, 8), draw(4, 5, 11)

    def loss(matrix_OI, x_RTI):
        narrow = matrix_OI.astype("bfloat16")
        y = jax.vmap(lambda x_TI: _wide("ti,oi->to", jnp.dtype("float32"), x_TI, narrow))(x_RTI)
        assert y.dtype == jnp.float32
        return (y * weight_RTO).sum()

    both = jax.grad(loss, argnums=(0, 1))
    ours = both(matrix_OI, x_RTI)
    g = weight_RTO.astype("bfloat16")
    expected = jnp.einsum("rto,rti->oi", g, x_RTI).astype("float32")
    np.testing.assert_array_equal(ours[0], expected)
    np.testing.assert_array_equal(
        ours[1], jnp.einsum("rto,oi->rti", g, matrix_OI.astype("bfloat16"))
    )
    shapes = {v.aval.shape for e in jax.make_jaxpr(both)(matrix_OI, x_RTI).eqns for v in e.outvars}
    assert (11, 8) in shapes
    assert (4, 11, 8) not in shapes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_matrix_in_training_is_transposed_on_a_cpu(dtype):
    """Its gradient is then a library product. A frozen matrix, which has the computation's dtype,
    is read as it is. Mutations: neither is transposed; both are, which copies frozen weights."""
    kernel = jnp.asarray(np.random.default_rng(0).standard_normal((8, 11)), dtype)

    class Product(nn.Module):
        dtype = jnp.dtype("bfloat16")

        @nn.compact
        def __call__(self, x_TI):
            return project(self, "kernel", x_TI, (8, 11), (0,), None)

    x_TI = jnp.ones((5, 8), "bfloat16")
    run = lambda kernel: Product().apply({"params": {"kernel": kernel}}, x_TI)  # noqa: E731
    in_training = dtype == "float32"
    assert ("optimization_barrier" in str(jax.make_jaxpr(run)(kernel))) == in_training
    np.testing.assert_array_equal(run(kernel), x_TI @ kernel.astype("bfloat16"))
