"""Runs a recipe: text, tokenizer, first weights, training loop, and the folders of kept models."""

import dataclasses
import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from softprompt.analysis.flops import machine_flops, train_flops
from softprompt.console import Progress
from softprompt.data.pipeline import pad_rows
from softprompt.errors import UserError
from softprompt.files import write_text
from softprompt.methods.delta_file import load_delta
from softprompt.models.shapes import leaf_shapes
from softprompt.models.t5_layers import T5Config
from softprompt.pretrained.ladder import PREFIX, PROVENANCE, is_made, ladder_dir, model_folder
from softprompt.pretrained.loading import load_model, make_model, read_tokenizer
from softprompt.pretrained.save import save_folder
from softprompt.pretrained.tokenizer import Tokenizer
from softprompt.pretraining import objectives
from softprompt.pretraining.corpus import corpus_digest, read_corpus
from softprompt.pretraining.objectives import Pieces, cut, piece_length
from softprompt.pretraining.recipe import Recipe, recipe_of
from softprompt.pretraining.tokenizers import sentinel_ids, train_tokenizer
from softprompt.results import devices, versions
from softprompt.source import commit
from softprompt.training import checkpoints, loop
from softprompt.training.logs import MetricsLog, read_log
from softprompt.training.optimizers import AdamW, OptimizerConfig, make_optimizer, rates, set_rate
from softprompt.training.sharding import make_mesh, put_batch, weight_shardings
from softprompt.training.step import StepConfig, loss_fn
from softprompt.trials.lock import locked_folder
from softprompt.trials.prepare import state_shardings
from softprompt.trials.run import mean_share
from softprompt.trials.session import Session

Tree = Any

TESTED_ROWS = 64  # rows that are never trained on; their loss is reported
LOG_EVERY, CHECKPOINT_EVERY = 20, 100


@dataclasses.dataclass(frozen=True)
class Text:
    """The corpus of a recipe as tokens.

    Attributes:
        tokenizer: trained on it, or that of the model that training starts from.
        train: the batches.
        test: batches of other pieces.
        digest: of the documents.
        facts: sizes, for the provenance.
    """

    tokenizer: Tokenizer
    train: Pieces
    test: Pieces
    digest: str
    facts: dict[str, Any]


def pretrain(recipe: Recipe, session: Session) -> Path:
    """Trains the model of a recipe, after the one that it starts from, and keeps its models.

    The same call resumes a run that was stopped, and does nothing for one that is done.

    Returns:
        The folder of the last model.

    Raises:
        UserError: the folder holds the model of another recipe, or the corpus cannot be read.
        KeyboardInterrupt: after SIGINT; the state is saved.
        SystemExit: with 75 after SIGTERM or SIGHUP; the state is saved.
    """
    if recipe.start:
        pretrain(recipe_of(recipe.start), session)
    if is_done(recipe):
        session.progress.say(f"{recipe.name} is done already")
        return last_folder(recipe)
    work = ladder_dir() / ".work" / f"{recipe.name.removeprefix(PREFIX)}-{recipe.hash}"
    with locked_folder(work):
        facts = train(recipe, work, session)
        if jax.process_index() == 0:
            publish(recipe, work, facts)
            shutil.rmtree(work / "checkpoints")
            shutil.rmtree(work / "snapshots")
    return last_folder(recipe)


def run_alone(recipe: Recipe) -> Path:
    """`pretrain` in a session of its own, with progress on standard error."""
    with Progress() as progress:
        return pretrain(recipe, Session(progress))


def last_folder(recipe: Recipe) -> Path:
    """The folder of the model that has all of the recipe's tokens."""
    suffix = next(suffix for suffix, share in recipe.keep.items() if share == 1)
    return model_folder(recipe.kept(suffix))


def is_done(recipe: Recipe) -> bool:
    """Whether the recipe's last model is there.

    Raises:
        UserError: the model that is there was made by another recipe.
    """
    folder = last_folder(recipe)
    if not (folder / PROVENANCE).is_file():
        return False
    made = json.loads((folder / PROVENANCE).read_text())["recipe_hash"]
    if made != recipe.hash:
        raise UserError(
            f"{folder} was made by recipe {made}, {recipe.name} is recipe {recipe.hash} now; "
            "delete the folder to make it anew"
        )
    return True


def read_text(recipe: Recipe, session: Session) -> Text:
    """Reads the corpus, trains the tokenizer, and cuts the text into pieces."""
    progress, config = session.progress, recipe.config
    progress.stage("read the corpus")
    documents = read_corpus(recipe.corpus)
    if recipe.start:
        tokenizer = read_tokenizer(str(model_folder(recipe.start)))
    else:
        progress.stage("train the tokenizer")
        kind = isinstance(config, T5Config)
        tokenizer = train_tokenizer(documents, vocab=config.vocab, encoder_decoder=kind)
    progress.stage("encode the corpus")
    encodings = tokenizer.backend.encode_batch_fast(documents, add_special_tokens=False)
    text_X = np.concatenate([[*one.ids, tokenizer.eos_id] for one in encodings]).astype(np.int32)
    size = sum(len(document.encode()) for document in documents)
    facts = {"documents": len(documents), "bytes": size, "tokens": len(text_X)}
    train, test = sources(recipe, text_X, tokenizer)
    return Text(tokenizer, train, test, corpus_digest(documents), facts)


def sources(recipe: Recipe, text_X: np.ndarray, tokenizer: Tokenizer) -> tuple[Pieces, Pieces]:
    """The batches to train on, and those to test on.

    Raises:
        UserError: the corpus is too short for a step of either.
    """
    config: Any = recipe.config
    row, eos, each = recipe.row, tokenizer.eos_id, 1
    assert eos is not None
    make: objectives.Make
    if recipe.objective == "causal":
        pieces_NL = cut(text_X, row, overlap=1)
        make, text = functools.partial(objectives.causal, eos=eos), row
    elif recipe.objective == "span_corruption":
        text = piece_length(row)
        pieces_NL = cut(text_X, text)
        ids: dict[str, Any] = {
            "sentinels": sentinel_ids(config.vocab),
            "eos": eos,
            "start": config.start,
        }
        make = functools.partial(objectives.span_corruption, **ids)
    else:
        text, each = row, 2
        pieces_NL = cut(text_X, text)
        make = functools.partial(objectives.prefix_lm, start=config.start)
    order_N = np.random.default_rng(recipe.seed).permutation(len(pieces_NL))
    tested = each * recipe.rows * max(1, TESTED_ROWS // recipe.rows)
    if len(order_N) < tested + each * recipe.rows:
        raise UserError(
            f"{recipe.name}: the corpus has {len(order_N)} pieces of {text} tokens; allowed: at "
            f"least {tested + each * recipe.rows}"
        )
    options = {"rows": recipe.rows, "each": each, "seed": recipe.seed, "text": text}
    parts = order_N[tested:], order_N[:tested]
    train, test = (Pieces(pieces_NL[np.sort(part)], make, **options) for part in parts)
    return train, test


def first_weights(recipe: Recipe) -> dict[str, Any]:
    """The float32 weights at step 0, as NumPy: random, or those of the model of `recipe.start`.

    Matrices are normal, with the variance 1 / inputs; those that add to the residual stream are
    divided by the root of twice the layers in a decoder. T5's are initialised as in its code:
    embeddings with variance 1, and queries with the scale that its attention lacks.
    """
    if recipe.start:
        folder = str(model_folder(recipe.start))
        return load_model(folder, put=lambda path, array: array.copy()).weights
    leaves: dict[str, np.ndarray] = {}
    for number, (path, shape) in enumerate(leaf_shapes(recipe.config).items()):
        rng = np.random.default_rng([recipe.seed, number])
        values = rng.standard_normal(shape, np.float32) * _scale(recipe.config, path, shape)
        leaves[path] = np.ones(shape, np.float32) if path.endswith("/scale") else values
    return dict(unflatten_dict(leaves, sep="/"))


def _scale(config: Any, path: str, shape: tuple[int, ...]) -> np.float32:
    """The standard deviation of a leaf's first values; 0 for biases, and for scales (1)."""
    t5 = isinstance(config, T5Config)
    if path.endswith(("/bias", "/scale")):
        return np.float32(0)
    if path.endswith("embedding"):
        inputs = 1.0 if t5 and path == "embed/embedding" else config.width if t5 else 2500.0
    elif path.endswith("/o/kernel"):
        inputs = config.heads * config.head_size
    else:
        inputs = shape[-3] if path.endswith(("/q/kernel", "/k/kernel", "/v/kernel")) else shape[-2]
    if t5 and path.endswith("/q/kernel"):
        inputs *= config.head_size
    if not t5 and path.endswith(("/o/kernel", "/down/kernel")):
        inputs *= 2 * config.layers
    return np.float32(inputs**-0.5)


def train(recipe: Recipe, work: Path, session: Session) -> dict[str, Any]:
    """Trains to the end, from the newest checkpoint if there is one.

    Returns:
        Facts for the provenance.
    """
    text = read_text(recipe, session)
    steps = recipe.steps(text.train.tokens(0))
    mesh = make_mesh()
    model = make_model(recipe.config, recipe.dtype).clone(
        unroll=mesh.devices.flat[0].platform == "cpu"
    )
    step = StepConfig(model, "full", None, loss_chunk=recipe.chunk)
    optimizer = OptimizerConfig(AdamW(b2=recipe.b2), recipe.weight_decay, recipe.clip)
    weights = first_weights(recipe)
    shardings = weight_shardings(weights, mesh)
    delta = jax.device_put(weights, shardings)
    tx = make_optimizer(optimizer)
    placed = state_shardings(tx, delta, shardings, mesh=mesh)
    opt_state = jax.jit(tx.init, out_shardings=placed)(delta)
    state = loop.State(delta, opt_state, best=jax.tree.map(jnp.copy, delta))
    batch = put_batch(mesh, pad_rows(text.train[0], mesh.shape["data"]))
    arguments: tuple[Any, ...] = (delta, set_rate(opt_state, np.float32(0)), {}, batch, None)
    inputs = loop.LoopInputs(
        program=session.program(step, optimizer, mesh, arguments),
        weights={},
        source=text.train,
        rates=rates("cosine", peak=recipe.rate, warmup=round(recipe.warmup * steps), steps=steps),
        dropout=None,
        mesh=mesh,
        row_multiple=mesh.shape["data"],
        evaluate=evaluator(step, text.test, mesh),
        fold=lambda delta: delta,
        folder=work,
        notes={"recipe": recipe.hash, "corpus": text.digest},
        step_flops=step_flops(recipe, text.train),
        machine_flops=machine_flops(recipe.dtype),
        stage=session.progress.stage,
        pauses=session.pauses,
    )
    state = run_loop(recipe, steps, inputs, state, session)
    lines = read_log(work)
    shares = {name: mean_share(lines, name) for name in ("peak_share", "input_wait_share")}
    return {
        "corpus": {"digest": text.digest, "sources": list(recipe.corpus), **text.facts},
        "steps": steps,
        "step_tokens": text.train.tokens(0),
        "seconds": state.elapsed(),
        "flops": steps * inputs.step_flops,
        **shares,
        "tokenizer": text.tokenizer,
    }


def run_loop(
    recipe: Recipe, steps: int, inputs: loop.LoopInputs, state: loop.State, session: Session
) -> loop.State:
    """Runs the training loop of trials, with the session's steps."""
    every = round(recipe.every * steps)
    config = loop.LoopConfig(
        steps=steps,
        log_every=LOG_EVERY,
        eval_every=every,
        checkpoint_every=CHECKPOINT_EVERY,
        snapshots=every,
        patience=0,
        metric="score",
    )

    def check(step: int, notes: Mapping[str, Any]) -> None:
        if notes["corpus"] != inputs.notes["corpus"]:
            raise UserError(
                f"{inputs.folder}: step {step} was trained on corpus {notes['corpus']}, which is "
                f"{inputs.notes['corpus']} now; delete the folder to begin anew"
            )

    say = session.progress.say
    with checkpoints.checkpoint_manager(inputs.folder / "checkpoints") as manager:
        restored = loop.restore(manager, state, check=check, say=say)
        if restored is not None:
            say(f"{recipe.name} resumes from step {restored.step} of {steps}")
        log = MetricsLog(inputs.folder, step=restored.step if restored else None, sinks=[])
        return session.run(loop.train(config, inputs, restored or state, log, manager))


def evaluator(
    step: StepConfig, test: Pieces, mesh: jax.sharding.Mesh
) -> Callable[[Tree], dict[str, float]]:
    """Delta -> the loss on the test pieces in nats per target, and a score that is its negative."""
    batches = [put_batch(mesh, pad_rows(test[n], mesh.shape["data"])) for n in range(test.steps)]
    one = jax.jit(lambda delta, batch: loss_fn(delta, {}, batch, None, config=step)[1]["loss"])

    def evaluate(delta: Tree) -> dict[str, float]:
        loss = sum(float(one(delta, batch)) for batch in batches) / len(batches)
        return {"loss": loss, "score": -loss}

    return evaluate


def step_flops(recipe: Recipe, source: Pieces) -> float:
    """Useful FLOPs of an average step."""
    taken = range(min(8, source.steps))
    flops = [train_flops(recipe.config, objectives.work(source[n]), weights=True) for n in taken]
    return sum(flops) / len(flops)


def publish(recipe: Recipe, work: Path, facts: dict[str, Any]) -> None:
    """Saves the kept models as Hugging Face folders, the last one last.

    A folder is written beside its target, and moved there when it is complete.
    """
    losses = {line["step"]: line for line in read_log(work) if "validation/loss" in line}
    tokenizer, steps = facts.pop("tokenizer"), facts["steps"]
    tree = dataclasses.asdict(recipe)
    for suffix, share in sorted(recipe.keep.items(), key=lambda item: item[1]):
        name, step = recipe.kept(suffix), round(share * steps)
        weights, _ = load_delta(work / "snapshots" / f"{step}.safetensors")
        staging = work / "publish"
        shutil.rmtree(staging, ignore_errors=True)
        save_folder(staging, recipe.config, weights, tokenizer)
        provenance = {
            "model": name,
            "recipe_hash": recipe.hash,
            "recipe": tree,
            "commit": commit(),
            "versions": versions(),
            "devices": devices(),
            "made": time.strftime("%Y-%m-%d"),
            "trained_steps": step,
            "trained_tokens": step * facts["step_tokens"],
            "loss": losses[step]["validation/loss"],
            "first_loss": losses[0]["validation/loss"],
            **facts,
        }
        write_text(staging / PROVENANCE, json.dumps(provenance, indent=2) + "\n")
        target = model_folder(name)
        if is_made(name):
            shutil.rmtree(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging, target)
