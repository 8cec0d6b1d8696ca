"""Kernels against the einsum form: values and gradients run by ordinary operations, programs as
they are lowered for devices that are not here, and the choice."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from softprompt.config import trial_id
from softprompt.data.packing import RowShape
from softprompt.errors import UserError
from softprompt.models import rows as model_rows
from softprompt.models.attention import Part
from softprompt.models.dropout import Dropout
from softprompt.models.kernels import REFERENCE, Case, Device, Kernel, attend, choose, device_of
from softprompt.models.kernels.choice import refusal
from softprompt.training import step
from softprompt.training.sharding import by_device
from softprompt.trials.evaluate import on_this_machine
from softprompt.trials.forward import with_kernel
from softprompt.trials.prepare import prepare
from tests.contracts.examples import (
    equations,
    one_device,
    packed,
    prompted,
    random_examples,
    session,
    trial_config,
    write_task,
)
from tests.matrix import matrix
from tests.models.parts import random_parts
from tests.tiny import tiny_decoder
from tests.tiny_t5 import tiny_t5

SPLASH, CUDNN = (Kernel(name, interpret=True) for name in ("splash", "cudnn"))
P, H, K = 5, 4, 8


@dataclasses.dataclass
class Rows:
    """Rows of a few segments and of padding, and a context; all float32."""

    rows: int = 3
    tokens: int = 136
    groups: int = 2
    context: int = P

    def arrays(self, dtype="float32"):
        """Queries, keys and values of the rows, keys and values of the context, segments."""
        random = np.random.default_rng(self.rows)
        row, own, shared = (
            (self.rows, self.tokens, H, K),
            (self.rows, self.tokens, self.groups, K),
            (self.context, self.groups, K),
        )
        made = [random.normal(size=shape) for shape in (row, own, own, shared, shared)]
        segments_RT = np.sort(random.integers(1, 4, (self.rows, self.tokens)))
        segments_RT[:, -9:] = 0
        return *(jnp.array(x, dtype) for x in made), jnp.array(segments_RT, jnp.int32)


def mixed(kernel, softcap, q, k, v, context_k, context_v, segments_RT):
    """The rows' mixed values, each row by itself under `jax.vmap`."""

    def row(q_THK, k_TGK, v_TGK, segments_T):
        index_T = jnp.arange(len(segments_T))
        mask_TS = (segments_T[:, None] == segments_T) & (index_T[:, None] >= index_T)
        own = Part(k_TGK, v_TGK, mask_TS, None, segments_T)
        parts = [Part(context_k, context_v), own]
        return attend(q_THK, parts, scale=0.4, softcap=softcap, kernel=kernel)

    return jax.vmap(row)(q, k, v, segments_RT)


def loss(kernel, softcap, *arrays):
    """A sum of the mixed values in which no two have the same weight."""
    mixed_RTHK = mixed(kernel, softcap, *arrays).astype(jnp.float32)
    weight_RTHK = jnp.sin(jnp.arange(mixed_RTHK.size)).reshape(mixed_RTHK.shape)
    return jnp.sum(weight_RTHK * mixed_RTHK), mixed_RTHK


def gradients(kernel, softcap=0.0):
    """The loss, mixed values and gradients of the first five arrays."""
    function = functools.partial(loss, kernel, softcap)
    return jax.value_and_grad(function, argnums=(0, 1, 2, 3, 4), has_aux=True)


def check(ours, theirs, *, within=1e-5):
    """Both agree; each array relative to its largest entry."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    for a, b in pairs:
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        scale = np.abs(b).max(initial=0)
        assert scale > 1e-3 or not b.size
        np.testing.assert_allclose(a, b, rtol=0, atol=within * scale)


# Mutations: the part's own log-sum-exp or mixed values, instead of the whole's, in splash's
# `_backward`; `lse_HT` read as [ratio, groups, T]; segments left out (`_segment_ids` of zeros);
# `softcap` not handed to the kernel; the kernel's share left out of the total in `forward`.
@pytest.mark.parametrize(
    ("kernel", "rows", "softcap"),
    [
        (SPLASH, Rows(tokens=264), 0.0),  # three blocks of 128, the last of them filled up
        (SPLASH, Rows(rows=2, groups=1, context=0), 0.7),
        (CUDNN, Rows(), 0.0),
    ],
    ids=["blocks", "no context, softcap", "cudnn"],
)
def test_values_and_gradients_are_the_reference_s(kernel, rows, softcap):
    arrays = rows.arrays()
    ours, theirs = (jax.jit(gradients(k, softcap))(*arrays) for k in (kernel, REFERENCE))
    check(ours, theirs)


# Mutations: hidden keys up to an aligned number that are seen; masks in another order than keys; no
# mask in the backward pass.
def test_cudnn_takes_any_mask():
    random = np.random.default_rng(3)
    parts = random_parts(random, bias=False)
    parts[0] = parts[0]._replace(mask_TS=jnp.array(random.integers(0, 2, (6, P)), bool))
    q_THK = jnp.array(random.normal(size=(6, H, K)))

    def function(kernel, q_THK, kvs):
        seen = [Part(*kv, p.mask_TS) for kv, p in zip(kvs, parts, strict=True)]
        return jnp.sum(jnp.cos(attend(q_THK, seen, kernel=kernel)))

    def found(kernel):
        step = jax.value_and_grad(functools.partial(function, kernel), (0, 1))
        return jax.jit(step)(q_THK, [(part.k_SGK, part.v_SGK) for part in parts])

    check(found(CUDNN), found(REFERENCE))


# Mutation: contexts joined with every row's keys, as for cuDNN.
def test_splash_does_not_repeat_the_context():
    arrays = Rows(rows=3).arrays()
    program = jax.make_jaxpr(functools.partial(mixed, SPLASH, 0.0))(*arrays)
    shapes = [out.aval.shape for equation in equations(program) for out in equation.outvars]
    assert (3, 136, H, K) in shapes
    assert not [shape for shape in shapes if P in shape and K in shape and 3 in shape]


# Mutation: `over_rows` joins axes in another order than it parts them.
@pytest.mark.parametrize("kernel", [SPLASH, CUDNN], ids=["splash", "cudnn"])
def test_rows_of_several_trials(kernel):
    q, k, v, context_k, context_v, segments_RT = Rows(rows=2, tokens=128).arrays()
    contexts = [jnp.stack([x, x[::-1], -x]) for x in (context_k, context_v)]
    axes = (0, 1, None, 0, 0, None)  # of trials; the second's is not the first of its array
    arrays = jnp.stack([q, 2 * q, -q]), jnp.stack([k, -k, k], 1), v, *contexts, segments_RT
    many = jax.jit(jax.vmap(gradients(kernel), axes))(*arrays)
    reference = jax.jit(gradients(REFERENCE))
    for n in range(3):
        pairs = zip(arrays, axes, strict=True)
        one = [x if axis is None else jnp.take(x, n, axis) for x, axis in pairs]
        check(jax.tree.map(lambda x, n=n: x[n], many), reference(*one))


def mesh_of_four():
    """Two devices for rows, two for heads."""
    axes = (AxisType.Auto,) * 2
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=axes, devices=jax.devices()[:4])


def everywhere(mesh, arrays):
    """The arrays, whole on every device of a mesh."""
    return [jax.device_put(array, NamedSharding(mesh, PartitionSpec())) for array in arrays]


# Mutations: heads split where groups are not; segments or masks not split over rows.
@pytest.mark.parametrize(
    ("kernel", "rows"),
    [
        (SPLASH, Rows(rows=4, tokens=128)),
        (SPLASH, Rows(rows=3, tokens=128, groups=1)),
        (CUDNN, Rows(rows=2, tokens=16, groups=1)),
    ],
    ids=["split", "whole", "cudnn"],
)
def test_each_device_has_its_own_rows_and_heads(kernel, rows):
    mesh, arrays = mesh_of_four(), rows.arrays()
    spread = jax.jit(gradients(dataclasses.replace(kernel, mesh=mesh)))
    check(spread(*everywhere(mesh, arrays)), jax.jit(gradients(REFERENCE))(*arrays))


def lowered(kernel, platform, arrays):
    """The text of the program for a device that need not be there."""
    traced = jax.jit(gradients(kernel)).trace(*arrays)
    return traced.lower(lowering_platforms=(platform,)).as_text()


# Mutation: no `shard_map`: the compiler cannot split a Pallas kernel.
def test_what_a_tpu_is_given():
    mesh = mesh_of_four()
    arrays = everywhere(mesh, Rows(rows=4, tokens=256).arrays("bfloat16"))
    text = lowered(Kernel("splash", mesh), "tpu", arrays)
    assert text.count("tpu_custom_call") == 3
    for name in ("fwd_segmented_residuals", "dq_segmented", "dkv_segmented"):
        assert f"splash_mha_{name}" in text
    assert "tensor<2x2x256x128xbf16>" in text  # R, H, T and K of a device


# Mutation: `implementation` not given.
def test_what_a_gpu_is_given(monkeypatch):
    cudnn = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
    monkeypatch.setattr(cudnn, lambda: 91000)
    mesh = mesh_of_four()
    arrays = everywhere(mesh, Rows(rows=4).arrays("bfloat16"))
    text = lowered(Kernel("cudnn", mesh), "cuda", arrays)
    calls = re.findall(r"@__cudnn\$fmhaScaleBiasSoftmax(\w*)", text)
    assert sorted(calls) == ["", "", "Backward"]
    assert "tensor<2x1x136x144xbf16>" in text  # R, one for all heads, T, S of a device


def step_gradients(model, weights, batch, delta, config):
    """Loss and gradient of a step with dropout; and the names of what its program is made of."""
    config = config._replace(model=model)
    function = functools.partial(step.loss_fn, config=config)
    both = jax.value_and_grad(function, has_aux=True)
    arguments = delta, weights, batch, Dropout(jax.random.key(0), np.float32(0.8))
    names = {equation.primitive.name for equation in equations(jax.make_jaxpr(both)(*arguments))}
    (value, _), grads = jax.jit(both)(*arguments)
    return (value, grads), names


# Mutation: in `on_shards` "data" is split once more, or the mesh is taken as if it were whole.
@pytest.mark.matrix
def test_in_a_step_of_each_device():
    mesh = mesh_of_four()
    model, weights = tiny_decoder(dtype="float32", layers=2)
    batch = packed(random_examples(), [[3, 0], [1, 4, 2, 5]], RowShape(2, 136, 12))
    config, delta = prompted(model, weights, P)
    arguments = delta, weights, batch, None
    theirs, of_theirs = jax.jit(functools.partial(step.gradients, config=config))(*arguments)
    config = config._replace(model=model.clone(attention=dataclasses.replace(SPLASH, mesh=mesh)))
    spread = by_device(mesh)(functools.partial(step.gradients, config=config))
    ours, of_ours = jax.jit(spread)(*arguments)
    check((ours["loss"], of_ours), (theirs["loss"], of_theirs), within=1e-4)


# Mutations: `segments_T` not handed on; the kernel used by the run of the context as well (it has
# no segments); dropped keys dropped after the kernel.
@pytest.mark.parametrize(
    ("kernel", "dtype", "within"),
    matrix([(SPLASH, "float32", 1e-4), (CUDNN, "bfloat16", 0.05)], keep=(SPLASH,)),
    ids=["splash", "cudnn"],
)
def test_a_training_step(kernel, dtype, within):
    model, weights = tiny_decoder(dtype=dtype, layers=2)
    batch = packed(random_examples(), [[3, 0], [1, 4, 2, 5]], RowShape(2, 136, 12))
    rows = dataclasses.replace(batch.rows, examples=np.arange(8, dtype=np.int32).reshape(2, 4))
    batch = dataclasses.replace(batch, rows=rows)
    config, delta = prompted(model, weights, P)
    theirs, _ = step_gradients(model, weights, batch, delta, config)
    ours, names = step_gradients(model.clone(attention=kernel), weights, batch, delta, config)
    assert ("pallas_call" in names) == (kernel is SPLASH)
    check(ours, theirs, within=within)


# Mutations: `branches` or `window` left out of `attention_case`; `serving` that returns itself.
@pytest.mark.parametrize(
    ("windows", "tokens", "branches", "served"),
    [
        ((), 128, False, True),
        ((134, 0), 128, False, True),
        ((132, 0), 128, False, False),
        ((), 120, False, False),
        ((), 128, True, False),
    ],
)
def test_what_splash_cannot_serve_is_left_to_the_reference(windows, tokens, branches, served):
    model, weights = tiny_decoder(dtype="float32", layers=2)
    config = dataclasses.replace(model.config, windows=windows)
    model = model.clone(attention=SPLASH, config=config)
    row_T = jnp.zeros(tokens, int)

    def hidden(prompt_PD):
        variables = {"params": weights, "delta": {"prompt": prompt_PD}}
        context = model.apply(variables, method="prompt_context")
        row = model_rows.Rows(*[row_T] * 3, branches=row_T if branches else None)
        return model.apply(variables, context, row, method="hidden")

    program = jax.make_jaxpr(hidden)(jnp.ones((P, config.width)))
    names = {equation.primitive.name for equation in equations(program)}
    assert ("pallas_call" in names) == served


CASE = Case("bfloat16", 64, tokens=256)
TPU, A100, H100 = Device("tpu"), Device("gpu", (8, 0)), Device("gpu", (9, 0))


# Mutation: each of the checks left out, or turned round.
@pytest.mark.parametrize(
    ("name", "device", "changes", "words"),
    [
        ("splash", TPU, {}, ""),
        ("splash", TPU, {"softcap": True, "dtype": "float32", "tokens": 131}, ""),
        ("splash", TPU, {"tokens": 127}, "blocks are of 128 tokens, and rows have 127"),
        ("splash", TPU, {"window": True}, "window is shorter"),
        ("splash", TPU, {"branches": True}, "branches"),
        ("splash", TPU, {"bias": True}, "relative bias"),
        ("splash", TPU, {"dtype": "float64"}, "the model in float64"),
        ("splash", H100, {}, "runs on TPUs, and this is a gpu"),
        ("splash", None, {}, ""),
        ("cudnn", A100, {}, ""),
        ("cudnn", A100, {"window": True, "branches": True, "tokens": None}, ""),
        ("cudnn", A100, {"head_size": 256}, "up to 128, the model's 256"),
        ("cudnn", H100, {"head_size": 256}, ""),
        ("cudnn", H100, {"head_size": 12}, "multiple of 8"),
        ("cudnn", H100, {"softcap": True}, "caps its scores"),
        ("cudnn", H100, {"bias": True}, "relative bias"),
        ("cudnn", H100, {"dtype": "float32"}, "the model in float32"),
        ("cudnn", H100, {"tokens": 129}, "even number of tokens, these 129"),
        ("cudnn", Device("gpu", (7, 5)), {}, "an older one"),
        ("cudnn", TPU, {}, "this is none"),
        ("reference", Device("cpu"), {"bias": True}, ""),
    ],
)
def test_a_refusal_says_why(name, device, changes, words):
    reason = refusal(name, dataclasses.replace(CASE, **changes), device)
    assert words in reason and bool(words) == bool(reason)


# Mutation: the order of KERNELS; a refusal that "auto" raises.
def test_auto_takes_what_serves():
    assert choose("auto", CASE, TPU) == "splash"
    assert choose("auto", CASE, H100) == "cudnn"
    assert choose("auto", dataclasses.replace(CASE, bias=True), TPU) == "reference"
    assert choose("auto", CASE, device_of(one_device())) == "reference"
    assert choose("reference", CASE, TPU) == "reference"


# Mutations: `with_kernel` that does not ask for the rows' length; a mesh of one device handed on;
# `compute.attention` in a scientific section.
def test_a_trial_s_kernel(tiny_folder, tmp_path, monkeypatch):
    source = write_task(tmp_path)
    with session() as shared:

        def attention(**changes):
            prepared = prepare(trial_config(tiny_folder, source, **changes), shared)
            return prepared.step.model.attention

        assert attention() == attention(compute__attention="reference") == REFERENCE
        with pytest.raises(
            UserError, match="'compute.attention' is 'splash'.*this is a cpu; allowed"
        ):
            attention(compute__attention="splash")
        monkeypatch.setattr("softprompt.trials.forward.device_of", lambda mesh: TPU)
        assert attention() == Kernel("splash")
        with pytest.raises(UserError, match="blocks are of 128 tokens, and rows have"):
            attention(compute__attention="splash")
    configs = [trial_config(tiny_folder, source, compute__attention=a) for a in ("auto", "splash")]
    assert len(set(map(trial_id, configs))) == 1


# Mutation: `on_this_machine` returns the config as it was trained.
@pytest.mark.parametrize(("trained", "used"), [("splash", "auto"), ("reference", "reference")])
def test_a_run_is_opened_where_its_kernel_is_not(tmp_path, trained, used):
    config = trial_config(tmp_path, "jsonl:none", compute__attention=trained)
    assert on_this_machine(config).compute.attention == used
    assert config.compute.attention == trained


# Mutation: `with_kernel` returns an encoder-decoder before it looks at what is asked for.
def test_an_encoder_decoder_has_the_reference(tiny_folder, monkeypatch):
    monkeypatch.setattr("softprompt.trials.forward.device_of", lambda mesh: TPU)
    model, _ = tiny_t5(dtype="float32")
    rows = {"context": 0, "tokens": 256}
    config = trial_config(tiny_folder, "jsonl:none")
    assert with_kernel(config, model, one_device(), **rows) is model
    config.compute.attention = "splash"
    with pytest.raises(UserError, match="relative bias"):
        with_kernel(config, model, one_device(), **rows)
