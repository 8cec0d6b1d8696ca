"""The T5 family against transformers on PyTorch, in float32, from folders that it saved."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt.models.rows import Rows
from softprompt.models.t5 import T5
from softprompt.models.t5_layers import bucket
from tests.parity.reference import saved_by_transformers  # noqa: E402
from tests.tiny_t5 import VARIANTS, load_weights, write_t5_folder

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch")

RNG = np.random.default_rng(0)
PAIRS = [
    (RNG.integers(2, 99, n).tolist(), [0, *RNG.integers(2, 99, m).tolist()])
    for n, m in ((9, 4), (1, 1), (17, 0), (30, 8))
]
LENGTHS = {"encoder": 3, "decoder": 2}
ROW = {"encoder": 72, "decoder": 30}


@pytest.fixture(scope="module", params=VARIANTS)
def models(request, tmp_path_factory) -> tuple[Any, Any]:
    """transformers' model, and ours as a compiled function of delta and rows."""
    folder = tmp_path_factory.mktemp("t5")
    theirs = saved_by_transformers(folder, request.param)
    config, weights, _ = load_weights(
        folder, dtype=np.dtype(np.float32), put=lambda path, leaf: jnp.asarray(leaf)
    )
    model = T5(config)

    def row(delta: Any, encoder: Rows, decoder: Rows) -> jax.Array:
        variables = {"params": weights, "delta": delta}
        contexts = model.apply(variables, method="prompt_context")
        index_T = jnp.arange(len(decoder.tokens))
        both = dataclasses.replace(decoder, encoder=encoder, index=index_T)
        x_TD = model.apply(variables, contexts, both, method="target_states")
        return model.apply(variables, x_TD, method="unembed")

    return theirs, jax.jit(row)


def one_row(sequences: list[list[int]], slots: int, length: int) -> tuple[np.ndarray, ...]:
    """Tokens, segments, positions and prompt index of sequences in one row, padding last."""
    columns = []
    for segment, tokens in enumerate(sequences, start=1):
        columns += [(0, segment, 0, p) for p in range(slots)]
        columns += [(t, segment, i, -1) for i, t in enumerate(tokens)]
    columns += [(0, 0, 0, -1)] * (length - len(columns))
    return tuple(np.array(column) for column in zip(*columns, strict=True))


def ours(models: Any, pairs: list[Any], delta: Any, rows: dict[str, int]) -> list[np.ndarray]:
    """Logits of each pair, all of them packed into one row."""
    slots = {k: v["prompt"].shape[0] for k, v in delta.items()}
    parts = [
        one_row([pair[i] for pair in pairs], slots.get(stack, 0), rows[stack])
        for i, stack in enumerate(("encoder", "decoder"))
    ]
    prompted = [
        Rows(*p[:3], prompt_index=p[3] if s in delta else None)
        for p, s in zip(parts, ("encoder", "decoder"), strict=True)
    ]
    logits_TV = np.asarray(models[1](delta, *prompted))
    segments_T, index_T = parts[1][1], parts[1][3]
    return [logits_TV[(segments_T == i + 1) & (index_T < 0)] for i in range(len(pairs))]


def reference(model: Any, pair: Any, delta: Any) -> np.ndarray:
    """Logits of a pair alone, prompts fed as embeddings."""
    embeds = []
    for stack, tokens in zip(("encoder", "decoder"), pair, strict=True):
        x = model.shared.weight[tokens]
        if stack in delta:
            x = torch.cat([torch.tensor(np.asarray(delta[stack]["prompt"])), x])
        embeds.append(x[None])
    with torch.no_grad():
        logits = model(inputs_embeds=embeds[0], decoder_inputs_embeds=embeds[1]).logits[0]
    return logits[-len(pair[1]) :].numpy()


def prompts(*stacks: str) -> dict[str, Any]:
    rng = np.random.default_rng(7)
    draws = {s: rng.standard_normal((n, 20)).astype(np.float32) for s, n in LENGTHS.items()}
    return {stack: {"prompt": draws[stack]} for stack in stacks}


def compare(what: str, results: list[np.ndarray], expected: list[np.ndarray]) -> None:
    worst = max(np.abs(a - b).max() for a, b in zip(results, expected, strict=True))
    size = max(np.abs(b).max() for b in expected)
    print(f"{what}: largest difference of logits {worst:.2e}, largest logit {size:.1f}")
    assert size > 1
    assert worst < 1e-4


STACKS = [(), ("encoder",), ("decoder",), ("encoder", "decoder")]


@pytest.mark.parametrize("stacks", STACKS, ids=lambda s: "+".join(s) or "no prompt")
def test_packed_rows_equal_each_example_alone(models, stacks):
    # Breaks if: a mask, a bias, or the place of a prompt's slots is another.
    delta = prompts(*stacks)
    expected = [reference(models[0], pair, delta) for pair in PAIRS]
    compare("packed", ours(models, PAIRS, delta, ROW), expected)


def test_padded_batches(models):
    # Breaks if: padding is seen.
    longest = [max(len(pair[i]) for pair in PAIRS) for i in (0, 1)]
    ids, mask, targets = [], [], []
    for tokens, target in PAIRS:
        ids.append(tokens + [0] * (longest[0] - len(tokens)))
        mask.append([1] * len(tokens) + [0] * (longest[0] - len(tokens)))
        targets.append(target + [0] * (longest[1] - len(target)))
    arguments = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": targets}
    with torch.no_grad():
        logits = models[0](**{k: torch.tensor(v) for k, v in arguments.items()}).logits.numpy()
    expected = [row[: len(pair[1])] for row, pair in zip(logits, PAIRS, strict=True)]
    alone = [ours(models, [pair], {}, ROW)[0] for pair in PAIRS]
    compare("padded", alone, expected)


def test_beyond_the_largest_distance(models):
    # Breaks if: buckets do not saturate, or do so elsewhere.
    rng = np.random.default_rng(3)
    pair = (rng.integers(2, 99, 300).tolist(), [0, *rng.integers(2, 99, 199).tolist()])
    delta = prompts("encoder", "decoder")
    result = ours(models, [pair], delta, {"encoder": 310, "decoder": 210})
    compare("300 to 200 tokens", result, [reference(models[0], pair, delta)])


@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (20, 128), (32, 256), (8, 20)])
@pytest.mark.parametrize("causal", [False, True])
def test_buckets(buckets, furthest, causal):
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = np.arange(-2000, 2001)
    theirs = T5Attention._relative_position_bucket(
        torch.tensor(distance), not causal, num_buckets=buckets, max_distance=furthest
    )
    mine = bucket(distance, buckets=buckets, max_distance=furthest, causal=causal)
    np.testing.assert_array_equal(mine, theirs.numpy())


def test_bfloat16_and_sharded_folders(tmp_path):
    from transformers import T5ForConditionalGeneration

    theirs = T5ForConditionalGeneration.from_pretrained(
        write_t5_folder(tmp_path / "a"), dtype=torch.bfloat16
    )
    theirs.save_pretrained(tmp_path / "b", max_shard_size="20KB")
    assert (tmp_path / "b" / "model.safetensors.index.json").exists()
    config, weights, _ = load_weights(
        tmp_path / "b", dtype=np.dtype(np.float32), put=lambda path, leaf: jnp.asarray(leaf)
    )
    logits_TV = T5(config).apply({"params": weights}, *map(jnp.array, PAIRS[0]))
    compare("bfloat16", [np.asarray(logits_TV)], [reference(theirs.float().eval(), PAIRS[0], {})])
