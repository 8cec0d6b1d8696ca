"""What SmolLM2-135M without most of its layers is worth, as a size between the ladder and SmolLM2.

Question: SmolLM2 has 106M parameters outside its embeddings, the ladder's largest model 7.4M. Would
6 or 12 of its 30 layers, trained further on the ladder's text, fill the gap?

Prediction: after the ladder's tokens their losses lie between those of d3 and SmolLM2.

Command:
    python -m experiments.cut_layers [--steps 20]

Cost: 14 s for a step of both models on two x86 cores, and a minute and a half for the losses.

Prints the loss, in nats per byte since tokenizers differ, of text on which the ladder is not
trained: of each model as it is, and of the cut ones after some steps. And the hours that as many
steps as the ladder's models have would take.
"""

import argparse
import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.console import Progress
from softprompt.models.decoder_layers import DecoderConfig
from softprompt.pretrained.ladder import RUNGS, is_made, model_folder
from softprompt.pretrained.loading import Loaded, load_model, make_model
from softprompt.pretraining import objectives
from softprompt.pretraining.objectives import Pieces
from softprompt.pretraining.recipe import RECIPES, ROW
from softprompt.pretraining.train import evaluator, read_text
from softprompt.training.optimizers import AdamW, OptimizerConfig, make_optimizer, set_rate
from softprompt.training.sharding import make_mesh
from softprompt.training.step import StepConfig, train_step
from softprompt.trials.session import Session

SMOLLM2 = "smollm2-135m-instruct-q4"
LAYERS = (6, 12)
STEPS = 1272  # of the ladder's decoders, of 4,096 tokens
RATE, WARMUP = 5e-4, 5


def keep_layers(whole: Loaded, count: int) -> Loaded:
    """The model with `count` of its layers, which are evenly spaced and include both ends."""
    assert isinstance(whole.config, DecoderConfig)
    kept = np.linspace(0, whole.config.layers - 1, count).round().astype(int)
    layers = jax.tree.map(lambda array: array[kept], whole.weights["layers"])
    config = dataclasses.replace(whole.config, layers=count)
    model = make_model(config, "float32").clone(unroll=True)
    weights = {**whole.weights, "layers": layers}
    return dataclasses.replace(whole, model=model, config=config, weights=weights)


def pieces(texts: list[str], loaded: Loaded, rows: int) -> tuple[Pieces, int]:
    """The texts in a model's tokens, in rows as in pretraining, and the number of tokens."""
    encodings = loaded.tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)
    eos = loaded.tokenizer.eos_id
    assert eos is not None
    text_X = np.concatenate([[*one.ids, eos] for one in encodings]).astype(np.int32)
    make = functools.partial(objectives.causal, eos=eos)
    cut_NL = objectives.cut(text_X, ROW, overlap=1)
    return Pieces(cut_NL, make, rows=rows, each=1, seed=0, text=ROW), len(text_X)


def step_config(loaded: Loaded, dtype: str = "float32") -> StepConfig:
    """The step of pretraining, for all weights."""
    model = make_model(loaded.config, dtype).clone(unroll=True)
    return StepConfig(model, "full", None, loss_chunk=32)


def loss_per_byte(loaded: Loaded, weights: Any, texts: list[str]) -> float:
    """Nats per byte of the texts."""
    source, tokens = pieces(texts, loaded, rows=8)
    loss = evaluator(step_config(loaded), source, make_mesh())(weights)["loss"]
    return loss * tokens / sum(len(text.encode()) for text in texts)


def train(loaded: Loaded, texts: list[str], steps: int, dtype: str) -> tuple[Any, float]:
    """The weights after some steps of pretraining, and the median seconds of a step."""
    source, _ = pieces(texts, loaded, rows=16)
    tx = make_optimizer(OptimizerConfig(AdamW(b2=0.95), 0.1, 1.0))
    one = functools.partial(train_step, config=step_config(loaded, dtype), tx=tx)
    step = jax.jit(one, donate_argnums=(0, 1))
    weights = jax.tree.map(lambda array: jnp.array(array, jnp.float32), loaded.weights)
    state, seconds = tx.init(weights), []
    for number in range(steps):
        state = set_rate(state, RATE * min(1, (number + 1) / WARMUP))
        begun = time.perf_counter()
        weights, state, metrics = step(weights, state, {}, source[number], None)
        loss = float(metrics["loss"])
        seconds.append(time.perf_counter() - begun)
        print(f"  step {number + 1}/{steps}: loss {loss:.3f}, {seconds[-1]:.1f} s", flush=True)
    return weights, float(np.median(seconds[1:]))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20, help="of each cut model")
    parser.add_argument("--dtype", default="bfloat16", help="of the steps' products")
    arguments = parser.parse_args()
    made = [name for name in RUNGS if is_made(name) and "/d" in name]
    if not made:
        parser.error("no decoder of the ladder is there; softprompt pretrain makes them")
    with Progress() as progress:
        text = read_text(RECIPES[made[-1]], Session(progress))
    decode = functools.partial(text.tokenizer.backend.decode_batch, skip_special_tokens=True)
    tested, trained = (decode(part.pieces_NL[:, :-1].tolist()) for part in (text.test, text.train))
    for name in made:
        model = load_model(str(model_folder(name)))
        print(f"{name}: {loss_per_byte(model, model.weights, tested):.3f} nats/byte", flush=True)
    whole = load_model(SMOLLM2)
    print(f"SmolLM2: {loss_per_byte(whole, whole.weights, tested):.3f} nats/byte", flush=True)
    for count in LAYERS:
        some = keep_layers(whole, count)
        before = loss_per_byte(some, some.weights, tested)
        print(f"{count} layers: {before:.3f} nats/byte", flush=True)
        weights, seconds = train(some, trained, arguments.steps, arguments.dtype)
        after = loss_per_byte(some, weights, tested)
        print(
            f"{count} layers, {arguments.steps} steps: {after:.3f} nats/byte; {STEPS} steps of "
            f"{seconds:.1f} s take {STEPS * seconds / 3600:.1f} h",
            flush=True,
        )


if __name__ == "__main__":
    main()
