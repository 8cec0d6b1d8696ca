"""Products with matrices that rows share."""

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.models.layers import _wide


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
