"""The rule table covers every frozen leaf; rows and deltas lie where they should."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from softprompt.errors import UserError
from softprompt.models.decoder import Decoder
from softprompt.training.sharding import (
    WEIGHT_RULES,
    Gather,
    by_row,
    make_mesh,
    nearest_sizes,
    path_name,
    put_batch,
    put_weight,
    replicated,
    weight_shardings,
    weight_spec,
)
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(2, 4)


def weight_shapes(**sizes):
    model = Decoder(tiny_config(**sizes))
    return jax.eval_shape(model.init, jax.random.key(0), np.zeros(1, np.int32))["params"]


@pytest.mark.parametrize("tied", [True, False])
def test_every_leaf_has_exactly_one_rule(mesh, tied):
    """Mutation: delete or duplicate a rule."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(weight_shapes(tied=tied))
    names = [path_name(path) for path, _ in leaves]
    assert ("head/kernel" in names) == (not tied)
    for name in names:
        assert sum(bool(re.fullmatch(pattern, name)) for pattern, _ in WEIGHT_RULES) == 1, name


def test_dividing_axes_are_split(mesh):
    """Mutation: split the width, which every product sums over; split over "data"."""
    shardings = weight_shardings(weight_shapes(tied=False, heads=4, kv_heads=4), mesh)
    found = {
        path_name(path): sharding.spec
        for path, sharding in jax.tree_util.tree_flatten_with_path(shardings)[0]
    }
    heads, norm = P(None, None, "model", None), P()
    wanted = {
        "embed/embedding": P("model", None),
        "head/kernel": P(None, "model"),
        "final_norm/scale": P(None),
        "layers/attn/q/kernel": heads,
        "layers/attn/k/kernel": heads,
        "layers/attn/v/kernel": heads,
        "layers/attn/o/kernel": P(None, "model", None, None),
        "layers/attn_norm/scale": norm,
        "layers/mlp_norm/scale": norm,
        "layers/mlp/gate/kernel": P(None, None, "model"),
        "layers/mlp/up/kernel": P(None, None, "model"),
        "layers/mlp/down/kernel": P(None, "model", None),
    }
    assert found.keys() == wanted.keys()
    for name, spec in found.items():
        assert [a for a in spec if a] == [a for a in wanted[name] if a], name
        assert spec.index("model") == wanted[name].index("model") if "model" in spec else True


def test_an_axis_that_does_not_divide_is_replicated(mesh):
    """Mutation: let jax refuse the array."""
    shapes = weight_shapes(heads=9, kv_heads=3, width=54, vocab=322, head_size=6)
    for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        name = path_name(path)
        array = put_weight(mesh, name, np.ones(leaf.shape, np.float32))
        whole = not name.startswith("layers/mlp/")  # ffn, 64, divides by 4; the others do not
        assert array.sharding.is_fully_replicated == whole, name
        np.testing.assert_array_equal(array, np.ones(leaf.shape))


@pytest.mark.parametrize(
    ("path", "shape", "wanted"),
    [
        # The longest axis that the rule leaves and 2 divides; 4 devices along "model".
        ("layers/attn/q/kernel", (3, 48, 4, 12), P(None, "data", "model", None)),
        ("layers/attn/k/kernel", (3, 48, 3, 50), P(None, None, None, "data")),
        ("layers/attn/o/kernel", (4, 4, 12, 48), P(None, "model", None, "data")),
        ("layers/mlp/down/kernel", (3, 64, 48), P(None, "model", "data")),
        ("encoder/layers/mlp/up/kernel", (2, 48, 64), P(None, "data", "model")),
        ("layers/mlp/up/kernel_q", (3, 24, 64), P(None, "data", "model")),
        ("layers/mlp/up/kernel_scale", (3, 2, 64), P(None, None, "model")),
        ("layers/mlp/up/kernel_min", (3, 2, 64), P(None, None, "model")),
        ("embed/embedding_q", (320, 24), P("model", None)),
        ("layers/attn/o/kernel_scale", (3, 1, 1, 48), P()),
        # Nothing divides; too small; outside the stacks; and never along the layers.
        ("layers/mlp/up/kernel", (2, 27, 33), P()),
        ("layers/mlp_norm/scale", (2, 64), P()),
        ("layers/attn/q/bias", (2, 4, 12), P(None, "model", None)),
        ("decoder/relative_bias/embedding", (32, 6), P()),
        ("embed/embedding", (320, 48), P("model", None)),
        ("positions/embedding", (64, 48), P()),
        ("layers/attn/v/kernel", (64, 27, 3, 5), P()),
    ],
)
def test_sharded_weights_are_split_over_data_too(mesh, path, shape, wanted):
    """Mutation: the first axis instead of the longest; the layers' axis; norms, biases or the
    vocabulary as well; an axis that "model" has.
    """
    spec = weight_spec(path, shape, mesh, weights="sharded")
    assert [*spec, *[None] * 4][:4] == [*wanted, *[None] * 4][:4]
    array = put_weight(mesh, path, np.ones(shape, np.float32), weights="sharded")
    parts = [mesh.shape[axis] for axis in wanted if axis]
    assert {s.data.size for s in array.addressable_shards} == {array.size // np.prod([1, *parts])}


def test_a_layer_is_gathered_to_what_its_rule_leaves(mesh):
    """Mutation: gather over "model" too; leave the layer on its shards."""
    stack = np.arange(3 * 48 * 64, dtype=np.float32).reshape(3, 48, 64)
    held = put_weight(mesh, "layers/mlp/up/kernel", stack, weights="sharded")
    layer = jax.jit(lambda x: Gather(mesh)("layers/mlp/up/kernel", x[1]))(held)
    np.testing.assert_array_equal(layer, stack[1])
    assert layer.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "model")), 2)


def test_an_unknown_leaf_is_refused(mesh):
    """Mutation: replicate what no rule covers; match a pattern anywhere in a path."""
    for name in ("layers/attn/r/kernel", "layers/attn/q/scale", "x/head/kernel", "head/kernel/x"):
        with pytest.raises(UserError, match=rf"{name}.*\[4, 6\]"):
            weight_spec(name, (4, 6), mesh)


def test_rows_are_split_over_data_and_deltas_are_whole():
    """Mutation: rows over "model"; a mesh of (model, data)."""
    mesh = make_mesh(-1, 2)
    assert dict(mesh.shape) == {"data": 4, "model": 2}
    batch = {"ids": np.arange(40).reshape(8, 5), "weights": np.ones((8, 2), np.float32)}
    placed = put_batch(mesh, batch)
    for name, array in placed.items():
        np.testing.assert_array_equal(array, batch[name])
        assert array.sharding == by_row(mesh)
        assert {shard.data.shape[0] for shard in array.addressable_shards} == {2}
    assert replicated(mesh).is_fully_replicated


@pytest.mark.parametrize("data, model", [(3, 2), (4, 4), (-1, 3), (-1, 0), (8, -1)])
def test_a_mesh_that_is_not_all_devices_is_refused(data, model):
    """Mutation: use fewer devices."""
    with pytest.raises(UserError, match="config key 'mesh.*; allowed: .*8"):
        make_mesh(data, model)


@pytest.mark.parametrize(
    ("asked", "count", "found"),
    [
        ((-1, 4), 8, (-1, 4)),
        ((2, 4), 8, (2, 4)),
        ((4, 4), 8, (-1, 4)),
        ((1, 4), 1, (-1, 1)),
        ((-1, 4), 6, (-1, 2)),
    ],
)
def test_the_nearest_mesh(asked, count, found):
    """Mutation: "data" stays where it does not suit; heads are split over all that there is."""
    assert nearest_sizes(*asked, count=count) == found
