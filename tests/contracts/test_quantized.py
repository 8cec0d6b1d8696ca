"""Quantised weights in the step: the same model with rounded weights, and no more memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt.inference.decode import generate
from softprompt.methods.delta_file import load_delta
from softprompt.models.quantize import PARTS, VALUES, dequantize, embedding, input_axes
from softprompt.pretrained.loading import load_model
from softprompt.training.sharding import make_mesh, path_name, put_weight
from softprompt.training.step import loss_fn
from softprompt.trials.run import run_trial
from tests.contracts.examples import (
    logits_and_loss,
    packed,
    prompted,
    random_examples,
    session,
    trial_config,
    write_task,
)
from tests.families import write_family_folder
from tests.matrix import matrix
from tests.models.memory import SMOLLM2
from tests.tiny import write_llama_folder
from tests.tiny_t5 import write_complete_t5

KINDS = ("int8", "int4")
CASES = [  # each kind, and each way to embed, to project and to make logits
    *(("llama", kind) for kind in KINDS),
    *(("gpt2", "int4"), ("gemma3", "int8"), ("untied", "int8"), ("t5", "int4")),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each model."""
    root = tmp_path_factory.mktemp("quantized")
    for name in ("gpt2", "gemma3"):
        write_family_folder(root / name, name)
    write_complete_t5(root / "t5")
    write_llama_folder(root / "llama")
    write_llama_folder(root / "untied", tied=False, layers=2)
    return root


def named_leaves(weights):
    return {path_name(p): x for p, x in jax.tree_util.tree_flatten_with_path(weights)[0]}


def whole(weights):
    """The tree with every matrix dequantised."""
    leaves, tree = named_leaves(weights), {}
    for name, leaf in leaves.items():
        if name.endswith(PARTS[1:]):
            continue
        path = name.removesuffix(VALUES)
        if path != name:
            parts = [leaves[path + part] for part in PARTS if path + part in leaves]
            one = functools.partial(dequantize, axes=input_axes(path), dtype=jnp.float32)
            leaf = (jax.vmap(one) if "layers/" in path else one)(parts)
        node = tree
        *folders, last = path.split("/")
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return tree


@pytest.mark.parametrize(("name", "kind"), matrix(CASES, keep=[("llama", "int4")]))
def test_the_model_is_that_of_the_rounded_weights(folders, name, kind):
    """Mutation: a scale read by the wrong axis; an embedding scaled twice; a head forgotten."""
    loaded = load_model(str(folders / name), quantize=kind)
    plain = load_model(str(folders / name))
    assert loaded.fingerprint == plain.fingerprint
    names = named_leaves(loaded.weights)
    assert not any(name.endswith(("/kernel", "embed/embedding")) for name in names)
    rounded = whole(loaded.weights)
    shapes = jax.tree.map(jnp.shape, plain.weights)
    assert jax.tree.map(jnp.shape, rounded) == shapes
    rng = np.random.default_rng(0)
    tokens = [jnp.array(rng.integers(2, 90, n)) for n in ((9, 5) if name == "t5" else (9,))]
    run = jax.jit(lambda weights: loaded.model.apply({"params": weights}, *tokens))
    ours, wanted = run(loaded.weights), run(rounded)
    np.testing.assert_allclose(ours, wanted, atol=2e-5 * float(jnp.abs(wanted).max()))
    assert np.abs(ours - run(plain.weights)).max() > 1e-3, "rounding shows"


def loss_of(delta, config, weights, batch):
    return loss_fn(delta, weights, batch, None, config=config)[0]


@functools.partial(jax.jit, static_argnames="config")
def value_and_grad(config, delta, weights, batch):
    return jax.value_and_grad(loss_of)(delta, config, weights, batch)


def residuals(config, delta, weights, batch):
    """Shapes and dtypes of what the backward pass keeps."""

    def kept(delta, weights):
        return jax.vjp(lambda d: loss_of(d, config, weights, batch), delta)[1]

    return jax.tree.leaves(jax.eval_shape(kept, delta, weights))


@pytest.mark.parametrize("remat", ("none", "layer"))
@pytest.mark.parametrize("kind", KINDS)
def test_no_residual_has_the_shape_of_a_weight(folders, kind, remat):
    """Mutation: the checkpoint around a dequantisation is left out, or holds it without its
    product. What the backward pass keeps are the integers themselves."""
    loaded = load_model(str(folders / "llama"), quantize=kind)
    config, delta = prompted(loaded.model.clone(remat=remat), loaded.weights, 4)
    batch = packed(random_examples(), [[0, 1, 2], [3, 4, 5]])

    kept = residuals(config, delta, loaded.weights, batch)
    matrices = {x.shape for n, x in named_leaves(whole(loaded.weights)).items() if x.ndim > 1}
    layers = {shape[1:] for shape in matrices if len(shape) > 2}
    floats = [leaf.shape for leaf in kept if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert floats
    norms = {(3, 48)}
    for shape in set(floats) - norms:
        assert shape not in matrices
        assert shape[1:] not in layers, shape


def test_remat_changes_nothing_but_memory(folders):
    """Mutation: a policy that drops the context's cotangents, as one that stops gradients does."""
    loaded = load_model(str(folders / "llama"))
    batch = packed(random_examples(), [[0, 1, 2], [3, 4, 5]])
    found = {}
    for name in ("none", "layer"):
        config, delta = prompted(loaded.model.clone(remat=name), loaded.weights, 4)
        loss, grads = value_and_grad(config, delta, loaded.weights, batch)
        size = sum(leaf.size for leaf in residuals(config, delta, loaded.weights, batch))
        found[name] = float(loss), grads["prompt"], size
    np.testing.assert_allclose(found["layer"][0], found["none"][0], rtol=1e-6)
    scale = float(jnp.abs(found["none"][1]).max())
    np.testing.assert_allclose(found["layer"][1], found["none"][1], atol=1e-5 * scale)
    assert found["layer"][2] < 0.6 * found["none"][2]


@pytest.mark.matrix
def test_a_quantised_model_on_a_mesh(folders):
    """Mutation: no rule covers the integers, scales or minima; an axis of one scale is split."""
    mesh = make_mesh(2, 4)
    put = lambda path, leaf: put_weight(mesh, path, leaf)  # noqa: E731
    ours = load_model(str(folders / "llama"), quantize="int4", put=put)  # scales and minima
    plain = load_model(str(folders / "llama"), quantize="int4")
    split = ours.weights["layers"]["mlp"]["up"]["kernel_q"]
    assert split.addressable_shards[0].data.size == split.size // 4
    batch = packed(random_examples(), [[0, 1, 2], [3, 4, 5]])
    config, delta = prompted(plain.model, plain.weights, 4)
    _, alone = logits_and_loss(config, delta, plain.weights, batch)
    _, together = logits_and_loss(config, delta, ours.weights, batch)
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_a_prompt_is_trained_on_a_quantised_model(folders, tmp_path):
    """Mutation: `init` takes integers for embeddings; the config's key is not passed on."""
    config = trial_config(folders / "llama", write_task(tmp_path), model__quantize="int8")
    config.optimizer.rate_unit = "embedding_rms"
    with session() as shared:
        row = run_trial(config, tmp_path / "w", session=shared)
        weights = shared.model(config).weights
    assert row["status"] == "done"
    assert weights["embed"]["embedding_q"].dtype == jnp.int8
    delta, _ = load_delta(tmp_path / "w" / "delta.safetensors")
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(delta))
    assert largest < 3 * float(jnp.abs(embedding(weights["embed"])).max())


def test_a_quantised_model_decodes_as_its_rounded_weights_do(folders):
    """Mutation: looking up a token's embedding takes the scale of another row."""
    inputs = [random_examples().inputs[n] for n in (0, 2, 5)]
    loaded = load_model(str(folders / "llama"), quantize="int8")
    context = loaded.model.apply({"params": loaded.weights}, method="prompt_context")
    said, wanted = (
        generate(loaded.model, weights, ({}, context), inputs, max_new=12, eos_id=None, batch=4)
        for weights in (loaded.weights, whole(loaded.weights))
    )
    assert said == wanted
    assert len(set(sum(said, []))) > 3


@pytest.mark.matrix
@pytest.mark.real
def test_a_file_in_4_bits_keeps_its_values():
    """Mutation: groups of 24, across the file's blocks; a minimum in bfloat16.

    The layers of SmolLM2's file are Q4_1, blocks of 32 as ours; its embedding is in 8 bits.
    """
    plain, ours = (load_model(SMOLLM2, quantize=kind) for kind in ("none", "int4"))
    rounded = whole(ours.weights)["layers"]
    jax.tree.map(np.testing.assert_array_equal, rounded, plain.weights["layers"])
