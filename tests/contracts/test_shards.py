"""What a compiled step moves between devices: rows stay, a layer's weights come and go."""

import functools
import re

import jax
import numpy as np
import pytest

from softprompt.training.optimizers import OptimizerConfig, make_optimizer, set_rate
from softprompt.training.sharding import make_mesh, put_batch, replicated
from softprompt.training.step import train_step
from softprompt.trials import shape_check
from softprompt.trials.programs import Member, compile_population
from tests.contracts.examples import packed, prompted, random_examples
from tests.matrix import matrix
from tests.tiny import tiny_config, tiny_decoder
from tests.tiny_t5 import tiny_t5_config

LAYERS, WIDTH, FFN = 8, 64, 96
DECODER = tiny_config(layers=LAYERS, width=WIDTH, ffn=FFN, heads=8, kv_heads=4)
T5 = tiny_t5_config(
    encoder_layers=LAYERS, decoder_layers=LAYERS, width=WIDTH, ffn=FFN, heads=4, vocab=96
)


@pytest.fixture
def small(monkeypatch):
    """Steps of 16 short rows, in float32: a CPU widens what is narrower before it gathers it."""
    changes = {"ROWS": 16, "TOKENS": 24, "TARGETS": 3, "PROMPT": 5}
    for name, value in {**changes, "DTYPE": jax.numpy.dtype("float32")}.items():
        monkeypatch.setattr(shape_check, name, value)


def shapes(text, operation):
    """Shapes of the results of an operation, wherever it stands in the program."""
    found = re.findall(rf" = \w+\[([\d,]*)\]\S* {operation}(?:-start)?\(", text)
    return [tuple(map(int, shape.split(","))) if shape else () for shape in found]


def test_a_microbatch_takes_rows_of_every_device(small):
    """Mutation: the first microbatch is the first rows: every device then computes all of them.

    Of weights that are split over "data": else `by_device` gives each its own rows in any case.
    """
    text = shape_check.compiled(DECODER, make_mesh(8, 1), "sharded").as_text()
    batch = shape_check.abstract_step(DECODER).arguments[3]
    rows = {leaf.shape[1:] for leaf in jax.tree.leaves(batch)}
    gathered = shapes(text, "all-gather")
    assert (WIDTH, FFN) in gathered
    assert not [shape for shape in gathered if shape[-1:] in rows]


@pytest.mark.parametrize(("data", "model"), [(8, 1), (4, 2)])
def test_over_data_the_deltas_gradient_alone_is_summed(small, data, model):
    """Mutation: `by_device` is left out: keys and values of the context are summed in every layer.

    Over "model" the parts of products are summed, of tokens by width.
    """
    text = shape_check.compiled(DECODER, make_mesh(data, model), "replicated").as_text()
    results = re.findall(r" = (.*?) all-reduce(?:-start)?\(", text)
    found = {shape for result in results for shape in re.findall(r"\[([\d,]*)\]", result)}
    delta = f"{shape_check.PROMPT},{WIDTH}"
    assert delta in found
    heads = (f"{DECODER.kv_heads // model},{DECODER.head_size}",)
    assert not [shape for shape in found if shape.endswith(heads)], found
    if model == 1:
        assert found <= {delta, ""}


@pytest.mark.matrix
def test_a_device_takes_whole_trials(small, monkeypatch):
    """Mutation: the axis of members is left whole, so that every device takes rows of all trials,
    and computes the contexts of all.
    """
    monkeypatch.setattr(shape_check, "PROMPT", 24)
    mesh, step = make_mesh(8, 1), shape_check.abstract_step(DECODER)
    flops = {}
    for members in (1, 8, 12):
        told = step.static, shape_check.OPTIMIZER, mesh, step.arguments
        flops[members] = compile_population(*told, members).cost_analysis()["flops"]
    assert flops[8] < 0.85 * 8 * flops[1]
    assert flops[12] > 0.95 * 12 * flops[1]


@pytest.mark.parametrize("members", matrix((2, 3), keep=(3,)))
def test_members_over_devices_step_as_alone(members):
    """Two lie whole on a device each, three by their rows. Mutation: the mean over devices is taken
    for the sum, in steps that are vmapped.
    """
    model, weights = tiny_decoder(dtype="float32", layers=2)
    config, delta = prompted(model, weights, 5)
    optimizer, batch = OptimizerConfig(), packed(random_examples(), [[3, 0], [1, 4, 2, 5]])
    opt_state = set_rate(make_optimizer(optimizer).init(delta), np.float32(0.1))
    deltas = [jax.tree.map(lambda x, n=n: (n + 1) * x, delta) for n in range(members)]
    found = []
    for devices in (1, 2):
        mesh = make_mesh(devices, 1, devices=jax.devices()[:devices])
        whole = functools.partial(jax.device_put, device=replicated(mesh))
        own = whole((opt_state, weights)), put_batch(mesh, batch)
        (state, frozen), rows = own
        told = config, optimizer, mesh, (whole(delta), state, frozen, rows, None)
        trials = [Member(whole(one), state, rows, None) for one in deltas]
        found.append(compile_population(*told, members)(trials, frozen))
        if devices == 1:
            tx = make_optimizer(optimizer)
            step = jax.jit(functools.partial(train_step, config=config, tx=tx))
            found.append([step(one.delta, state, frozen, rows, None) for one in trials])
    for trial in zip(*found, strict=True):
        one, *others = [(delta, metrics) for delta, _, metrics in trial]
        for other in others:
            for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
                np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("config", "remat"), [(DECODER, "none"), (T5, "layer")], ids=["decoder", "T5"]
)
def test_a_layer_is_gathered_where_it_is_computed(small, config, remat):
    """Mutation: no `gather` in the model (XLA gathers the rows instead); the backward pass finds
    gathered weights ready made (`_keep` keeps all); shards along the layers.
    """
    compiled = shape_check.compiled(config, make_mesh(4, 2), "sharded", remat=remat)
    text = compiled.as_text()
    layer = (WIDTH, FFN // 2)  # of gate and up, the half that "model" leaves
    assert f"[{LAYERS},{WIDTH // 4},{FFN // 2}]" in text
    # Two matrices, forward and back, for prompt and rows (for encoder and decoder).
    assert shapes(text, "all-gather").count(layer) >= 8
    assert f"[{LAYERS},{WIDTH},{FFN // 2}]" not in text
    arguments = compiled.memory_analysis().argument_size_in_bytes
    step = shape_check.abstract_step(config)
    weights = shape_check.device_bytes(config, data=4, model=2, weights="sharded")
    rows = sum(leaf.size for leaf in jax.tree.leaves(step.arguments[3])) * 4 / 4
    assert arguments == pytest.approx(weights + step.trained_bytes + rows, rel=0.01)
