"""Contract 1: every decoder family against transformers on PyTorch, in float32.

Models are random, made and saved by transformers in its own format.
"""

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt.models.decoder import Decoder
from softprompt.models.positions import rotary_table
from softprompt.models.rows import Rows
from softprompt.pretrained.families import DECODERS, read_family
from softprompt.pretrained.loading import Loaded, load_model
from tests.families import SLIDING, VARIANTS, VOCAB, write_family_folder, write_small_tokenizer
from tests.parity.reference import random_model, read_back  # noqa: E402

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch")

LENGTHS = (40, 9, 1, 23)
TOLERANCE = 1e-4
PROMPT = 9  # longer than the windows


@functools.cache
def both(name: str) -> tuple[Any, Loaded]:
    """A random model of a family in transformers, and ours, read from what transformers saved."""
    with tempfile.TemporaryDirectory() as folder:
        random_model(name).save_pretrained(folder)
        write_small_tokenizer(Path(folder))
        return read_back(folder), load_model(folder)


def texts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, length).tolist() for length in LENGTHS]


def theirs(model: Any, ids: list[list[int]], prompt_PD: np.ndarray | None = None) -> list[Any]:
    """Logits [T, V] of each text, all in one batch padded on the right, after a prompt if any."""
    longest = max(map(len, ids))
    tokens_BT = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids])
    mask_BT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    inputs: dict[str, Any] = {"input_ids": tokens_BT, "attention_mask": mask_BT}
    length = 0
    if prompt_PD is not None:
        length = len(prompt_PD)
        x_BTD = model.get_input_embeddings()(tokens_BT)
        x_BPD = torch.tensor(prompt_PD).expand(len(ids), *prompt_PD.shape)
        ones = torch.ones(len(ids), length, dtype=torch.long)
        inputs = {
            "inputs_embeds": torch.cat([x_BPD, x_BTD], 1),
            "attention_mask": torch.cat([ones, mask_BT], 1),
        }
    with torch.no_grad():
        logits_BTV = model(**inputs).logits.numpy()
    return [x[length : length + len(row)] for x, row in zip(logits_BTV, ids, strict=True)]


@functools.partial(jax.jit, static_argnames="model")
def row_logits(model: Decoder, variables: Any, row: Rows) -> Any:
    context = model.apply(variables, method="prompt_context")
    x_TD = model.apply(variables, context, row, method="hidden")
    return model.apply(variables, x_TD, method="logits")


def packed(
    ours: Loaded, rows: list[list[int]], prompt_PD: np.ndarray | None = None
) -> list[np.ndarray]:
    """Logits [T, V] of each text, all in one row after one context, padding behind."""
    tokens, segments, positions = (np.zeros(sum(LENGTHS) + 5, np.int32) for _ in range(3))
    first, spans = 0, []
    for number, row in enumerate(rows):
        span = slice(first, first + len(row))
        tokens[span], segments[span], positions[span] = row, number + 1, np.arange(len(row))
        first += len(row)
        spans.append(span)
    delta = {} if prompt_PD is None else {"prompt": jnp.asarray(prompt_PD)}
    variables = {"params": ours.weights, "delta": delta}
    logits_TV = np.asarray(row_logits(ours.model, variables, Rows(tokens, segments, positions)))
    return [logits_TV[span] for span in spans]


def largest(a: list[Any], b: list[Any]) -> float:
    return max(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True))


def prompt_of(ours: Loaded) -> np.ndarray:
    rng = np.random.default_rng(1)
    width = ours.config.prompt_width
    return (ours.config.embed_scale * 0.5 * rng.standard_normal((PROMPT, width))).astype("float32")


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_alone_padded_and_packed(name):
    model, ours = both(name)
    ids = texts()
    wanted = theirs(model, ids)
    assert 1 < np.std(wanted[0]) < 30
    assert largest([packed(ours, [row])[0] for row in ids], wanted) < TOLERANCE
    assert largest(packed(ours, ids), wanted) < TOLERANCE


@pytest.mark.parametrize("name", VARIANTS)
def test_a_soft_prompt_is_a_context(name):
    """A prompt enters where `inputs_embeds` does; in a window, it is left behind."""
    model, ours = both(name)
    ids, prompt_PD = texts(), prompt_of(ours)
    wanted = theirs(model, ids, prompt_PD)
    assert largest(wanted, theirs(model, ids)) > 0.1
    assert largest(packed(ours, ids, prompt_PD), wanted) < TOLERANCE


@pytest.mark.parametrize("name", SLIDING)
def test_rows_reach_past_the_window(name):
    _, ours = both(name)
    windows = [window for window in ours.config.windows if window]
    assert windows and max(windows) < min(PROMPT, max(LENGTHS))


def test_every_architecture_has_a_variant():
    known = {raw["architectures"][0] for raw in VARIANTS.values()}
    assert known | {"Gemma3ForConditionalGeneration"} == set(DECODERS)


LINEAR, YARN = {"type": "linear", "factor": 2.0}, {"rope_type": "yarn", "factor": 8.0}
DEFAULT = {"rope_type": "default", "rope_theta": 7.0}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"rope_scaling": YARN}),
        ("llama", {"rope_scaling": {**YARN, "truncate": False, "attention_factor": 0.7}}),
        ("llama", {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}}),
        ("llama", {"rope_scaling": {**YARN, "beta_fast": 4, "beta_slow": 0.5}}),
        ("llama", {"rope_parameters": {**YARN, "original_max_position_embeddings": 64}}),
        ("llama", {"rope_scaling": YARN, "original_max_position_embeddings": 16}),
        ("llama", {"rope_scaling": LINEAR, "rope_parameters": DEFAULT}),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0}}),
        ("llama3", {"original_max_position_embeddings": 16}),
        ("qwen3", {"rope_parameters": DEFAULT}),
        ("neox", {"rope_scaling": LINEAR, "rope_parameters": DEFAULT}),
        ("neox", {"rope_scaling": {**YARN, "partial_rotary_factor": 0.5}}),
        ("gemma", {"rope_scaling": LINEAR, "rope_parameters": DEFAULT}),
        ("gemma3", {"rope_parameters": {"full_attention": DEFAULT}}),
        ("gemma3", {"rope_parameters": {"sliding_attention": DEFAULT}}),
        ("gemma3", {"rope_scaling": {**YARN, "original_max_position_embeddings": 32}}),
    ],
)
def test_rotary_tables_are_those_of_transformers(name, changes):
    """Breaks when a key of a scaling is misread, or YaRN's blend begins or ends elsewhere."""
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = {**VARIANTS[name], **copy.deepcopy(changes)}
    config = read_family(raw)[1]
    raw = {key: raw[key] for key in raw if key not in ("architectures", "model_type")}
    theirs = AutoConfig.for_model(VARIANTS[name]["model_type"], **raw)
    base = AutoModelForCausalLM.from_config(theirs).base_model
    positions = np.arange(0, 128, 7)
    whole = {"layer_type": "full_attention"} if name == "gemma3" else {}
    local = {"layer_type": "sliding_attention"} if name == "gemma3" else None
    size = config.rotary_size or config.head_size
    tables = [(whole, rotary_table(positions, size, config.rope_base, config.rope_scaling))]
    if local:
        tables.append((local, rotary_table(positions, size, config.rope_base_local)))
    for kind, (cos_TK, sin_TK) in tables:
        found = base.rotary_emb(torch.zeros(1), torch.tensor(positions)[None], **kind)
        for ours, wanted in zip((cos_TK, sin_TK), found, strict=True):
            np.testing.assert_allclose(ours, wanted[0, :, : ours.shape[1]].numpy(), atol=2e-5)


def test_the_text_part_of_a_gemma_that_sees_images(tmp_path):
    # Breaks if: a spelling of the tensors' names is left out, or text_config is not read.
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {key: value for key, value in VARIANTS["gemma3"].items() if key != "architectures"}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "intermediate_size": 16, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(
        text_config=text, vision_config=vision, image_token_index=VOCAB - 1, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.2 * torch.randn_like(tensor))
    model.save_pretrained(tmp_path)
    write_small_tokenizer(tmp_path)
    ours, ids = load_model(str(tmp_path)), [[i % (VOCAB - 1) for i in row] for row in texts()]
    wanted = theirs(model, ids)
    assert np.std(wanted[0]) > 1
    assert largest(packed(ours, ids), wanted) < TOLERANCE


@pytest.mark.parametrize("name", VARIANTS)
def test_the_tests_own_folders_are_read_by_transformers(tmp_path, name):
    write_family_folder(tmp_path, name)
    model, ours = read_back(tmp_path), load_model(str(tmp_path))
    assert largest(packed(ours, texts()), theirs(model, texts())) < TOLERANCE
