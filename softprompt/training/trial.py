"""One trial, from a config to a result row: an idempotent command on a folder."""

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from softprompt.analysis.flops import machine_flops, train_flops
from softprompt.config import ConfigDict, differences, from_dict, to_dict, trial_id, trial_name
from softprompt.data.pipeline import TrainSource, pad_rows
from softprompt.errors import UserError
from softprompt.evaluation.metrics import classification
from softprompt.evaluation.scoring import (
    normalise,
    score_batches,
    shared_function,
    text_context_function,
)
from softprompt.methods import METHODS
from softprompt.methods.setup import few_shot_tokens, prompt_config
from softprompt.models.decoder import Decoder
from softprompt.models.loading import Loaded
from softprompt.results import Row, make_row, read_result, write_result, write_text
from softprompt.training import checkpoints, loop
from softprompt.training.delta_file import save_delta
from softprompt.training.logs import MetricsLog, open_sinks, read_log
from softprompt.training.optimizers import make_optimizer, rates, set_rate
from softprompt.training.session import Session, TaskData, optimizer_config
from softprompt.training.sharding import path_name, put_batch, random_key, replicated
from softprompt.training.step import StepConfig

Tree = Any
CONFIG, DELTA, PREDICTIONS = "config.json", "delta.safetensors", "predictions.jsonl"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A config with everything it names: model, data, mesh and method.

    `bos`: texts begin with the tokenizer's BOS. `context_length`: P, a BOS before the prompt
    included. `shared` maps a delta to what every row of a forward pass shares (variables and
    context).
    """

    config: ConfigDict
    session: Session
    loaded: Loaded
    data: TaskData
    mesh: jax.sharding.Mesh
    step: StepConfig
    bos: bool
    context_length: int
    shared: Callable[[Tree], Any]


def run_trial(config: ConfigDict, folder: epath.PathLike, *, session: Session) -> Row:
    """Trains and tests one config, going on from where an earlier run of it stopped.

    On several hosts, call `jax.distributed.initialize()` first in each process and then this with
    the same arguments, `folder` on storage that all of them reach. The mesh spans the devices of
    all processes; the first process writes; a SIGTERM to one of them stops all.

    Args:
        config: resolved and valid.
        folder: of this trial alone, local or gs://. Afterwards holds config.json, metrics.jsonl,
            checkpoints, delta.safetensors (the selected delta), predictions.jsonl and, written
            last, result.json.
        session: what the process's trials share.

    Returns:
        The result row.

    Raises:
        UserError: anything the user can mend; the folder is another config's, for one.
        SystemExit: with 75 after SIGTERM; the state is saved.
    """
    folder = epath.Path(folder)
    began = time.monotonic()
    check_folder(folder, config)
    row = read_result(folder)
    if row is not None and row["status"] == "done":
        session.progress.say(f"{trial_name(config)} is done already (in {folder})")
        return row
    compiled_before = session.compile_seconds
    prepared = prepare(config, session)
    if config.method.name == "prompt":
        delta, metrics, facts = fit(prepared, folder)
    else:
        claim(folder, config)
        delta, metrics, facts = {}, {"validation": score(prepared, {}, "validation")[0]}, {}
    metrics["test"] = test(prepared, folder, delta)
    row = make_row(
        config,
        status="done",
        metrics=metrics,
        seconds=facts.pop("seconds", 0.0) + time.monotonic() - began,
        compile_seconds=session.compile_seconds - compiled_before,
        peak_memory_bytes=peak_memory(),
        trainable=sum(leaf.size for leaf in jax.tree.leaves(delta)),
        **facts,
    )
    if jax.process_index() == 0:
        save_delta(folder / DELTA, jax.device_get(delta), provenance(prepared))
        write_result(folder, row)
    return row


def check_folder(folder: epath.Path, config: ConfigDict) -> None:
    """Checks that a folder is new or this trial's.

    Raises:
        UserError: the folder holds another config; names what differs.
    """
    if not (folder / CONFIG).exists():
        return
    theirs = read_config(folder)
    if trial_id(theirs) != trial_id(config):
        raise UserError(
            f"{folder} holds another trial ({'; '.join(differences(config, theirs))}: asked, "
            "there); give another --workdir"
        )


def claim(folder: epath.Path, config: ConfigDict) -> None:
    """Writes the config into a new folder, once nothing the user asked for can be wrong any more.

    So a mistake leaves no folder behind that would refuse the corrected command.
    """
    file = folder / CONFIG
    if jax.process_index() == 0 and not file.exists():
        write_text(file, json.dumps(to_dict(config), indent=2) + "\n")


def read_config(folder: epath.PathLike) -> ConfigDict:
    """The resolved config of a trial's folder.

    Raises:
        UserError: no config.json, or not one of ours.
    """
    file = epath.Path(folder) / CONFIG
    if not file.exists():
        raise UserError(f"{folder}: no trial there (it has no {CONFIG})")
    try:
        tree = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error})") from error
    return from_dict(tree)


def prepare(config: ConfigDict, session: Session) -> Prepared:
    """Loads what a config names and sets up its method.

    Raises:
        UserError: see `load_model`, the task's source, and the method's settings.
    """
    mesh, loaded = session.mesh(config), session.model(config)
    method = config.method
    bos = loaded.tokenizer.add_bos and method.name != "fewshot" and method.bos == "after"
    room = loaded.config.context_length - config.task.max_input - config.task.max_target
    most = room - (method.bos == "before")
    if method.name == "prompt" and method.length > most:
        raise UserError(
            f"config key 'method.length' is {method.length}; allowed: at most {most} (the model's "
            f"context of {loaded.config.context_length} less task.max_input and task.max_target"
            f"{', and a BOS before the prompt' if most < room else ''})"
        )
    data = session.data(config, bos=bos)
    name = "prompt" if method.name == "prompt" else "none"
    cfg = prompt_config(config, loaded, data.train) if name == "prompt" else None
    step = StepConfig(loaded.model, name, cfg, config.train.z_loss, config.train.microbatches)
    if method.name == "fewshot":
        tokens_P = few_shot_tokens(config, loaded, data.train, room=room)
        context = text_context_function(loaded.model)(loaded.weights, jnp.asarray(tokens_P))
        length = len(tokens_P)
        shared: Callable[[Tree], Any] = lambda delta: ({}, context)  # noqa: E731
    else:
        compiled = shared_function(step, mesh)
        length = 0 if cfg is None else cfg.length + (cfg.bos_before is not None)
        shared = lambda delta: compiled(delta, loaded.weights)  # noqa: E731
    return Prepared(config, session, loaded, data, mesh, step, bos, length, shared)


def fit(prepared: Prepared, folder: epath.Path) -> tuple[Tree, dict[str, Any], dict[str, Any]]:
    """Trains the delta, from the newest checkpoint where there is one.

    Returns:
        The selected delta, its metrics, and facts for the row: steps, flops, peak_share, and the
        seconds that earlier processes spent.
    """
    config, session, mesh = prepared.config, prepared.session, prepared.mesh
    state = initial_state(prepared)
    source = train_source(prepared)
    key = random_key(config.seed, mesh)
    multiple = mesh.shape["data"] * config.train.microbatches
    batch = put_batch(mesh, pad_rows(source[0], multiple))
    opt_state = set_rate(state.opt_state, np.float32(0))
    arguments = (state.delta, opt_state, prepared.loaded.weights, batch, key)
    step = session.train_step(prepared.step, optimizer_config(config), mesh, arguments)
    parts = loop.Parts(
        step=step,
        weights=prepared.loaded.weights,
        source=source,
        rates=learning_rates(prepared),
        key=key,
        mesh=mesh,
        row_multiple=multiple,
        evaluate=lambda delta: score(prepared, delta, "validation")[0],
        folder=folder,
        notes={"config": to_dict(config), "fingerprint": prepared.loaded.fingerprint},
        step_flops=step_flops(prepared, source),
        machine_flops=machine_flops(config.model.dtype),
        stage=session.progress.stage,
    )
    sinks = open_sinks(config, folder, trial_name(config)) if jax.process_index() == 0 else []
    claim(folder, config)
    with checkpoints.checkpoint_manager(folder / "checkpoints") as manager:
        restored = loop.restore(manager, state)
        if restored is not None:
            session.progress.say(f"{trial_name(config)} goes on from step {restored.step}")
        state = restored or state
        log = MetricsLog(folder, step=restored.step if restored else None, sinks=sinks)
        state = loop.train(loop_config(config), parts, state, log, manager)
    facts = {
        "steps": state.step,
        "flops": state.step * parts.step_flops,
        "peak_share": mean_share(folder),
        "seconds": state.seconds,
    }
    if config.eval.select == "last":
        return state.delta, {"validation": state.last_scores, "selected_step": state.step}, facts
    return state.best, {"validation": state.best_scores, "selected_step": state.best_step}, facts


def mean_share(folder: epath.Path) -> float | None:
    """Share of the machine's peak over all logged training steps, evaluations left out."""
    lines = [line for line in read_log(folder) if "peak_share" in line]
    seconds = sum(line["seconds"] for line in lines)
    return sum(line["peak_share"] * line["seconds"] for line in lines) / seconds if lines else None


def train_source(prepared: Prepared) -> TrainSource:
    """The training batches of a trial, by step."""
    config, data = prepared.config, prepared.data
    return TrainSource(data.train, prepared.session.template(config, data), config.seed)


def initial_state(prepared: Prepared) -> loop.State:
    """The delta at step 0, and the optimizer's state, on every device.

    Raises:
        UserError: the delta has a leaf that no module reads.
    """
    config, model, cfg = prepared.config, prepared.loaded.model, prepared.step.method_config
    method, whole = METHODS[prepared.step.method], replicated(prepared.mesh)

    def make(key: jax.Array, weights: Tree) -> Tree:
        return method.init(key, model, weights, cfg)

    key = jax.random.fold_in(jax.random.key(config.seed), 1)  # apart from the steps' keys
    delta = jax.jit(make, out_shardings=whole)(key, prepared.loaded.weights)
    check_read(model, prepared.loaded.weights, delta, prepared.step)
    tx = make_optimizer(optimizer_config(config))
    opt_state = jax.jit(tx.init, out_shardings=whole)(delta)
    return loop.State(delta, opt_state, best=jax.tree.map(lambda leaf: leaf.copy(), delta))


def check_read(model: Decoder, weights: Tree, delta: Tree, step: StepConfig) -> None:
    """Checks that the model reads every variable that the delta becomes.

    Raises:
        UserError: names the leaves that no module reads.
    """

    def run() -> Any:
        variables = METHODS[step.method].variables(delta, weights, step.method_config, None)
        tokens_T = np.zeros(1, np.int32)
        collections = {"params": weights, "delta": variables}
        return variables, model.apply(collections, tokens_T, mutable=["read"])[1].get("read", {})

    variables, read = jax.eval_shape(run)
    names = [
        {path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree, stop)[0]}
        for tree, stop in ((variables, None), (read, lambda leaf: isinstance(leaf, tuple)))
    ]
    if unread := sorted(names[0] - names[1]):
        raise UserError(f"no module of the model reads the delta's {', '.join(unread)}")


def learning_rates(prepared: Prepared) -> np.ndarray:
    """The rate of every step, in absolute units, float32 [steps]."""
    from softprompt.methods.initializers import embedding_rms

    o, peak = prepared.config.optimizer, prepared.config.optimizer.rate
    if o.rate_unit == "embedding_rms":
        loaded = prepared.loaded
        peak *= float(jax.jit(embedding_rms)(loaded.weights["embed"]["embedding"]))
        peak *= loaded.config.embed_scale
    return rates(o.schedule, peak=peak, warmup=o.warmup, steps=prepared.config.train.steps)


def step_flops(prepared: Prepared, source: TrainSource) -> float:
    """Useful operations of an average step: no padding, the context once."""
    lengths_N = source.lengths_N.astype(np.float64)
    targets_N = np.array([len(t) for t in prepared.data.train.targets])
    context, examples = prepared.context_length, source.template.examples
    keys_N = lengths_N * (lengths_N + 1) / 2 + lengths_N * context
    return train_flops(
        prepared.loaded.config,
        tokens=examples * lengths_N.mean(),
        keys=examples * keys_N.mean(),
        targets=examples * targets_N.mean(),
        context=context,
    )


def loop_config(config: ConfigDict) -> loop.LoopConfig:
    """The loop's half of a config."""
    return loop.LoopConfig(
        steps=config.train.steps,
        log_every=config.log.every,
        eval_every=config.eval.every,
        checkpoint_every=config.log.checkpoint_every,
        snapshots=config.log.snapshots,
        patience=config.eval.patience,
        metric=config.eval.metric,
    )


def score(prepared: Prepared, delta: Tree, split: str) -> tuple[dict[str, float], np.ndarray]:
    """Metrics of a split by rank scoring, and the scores [N, C] behind them."""
    session, data = prepared.session, prepared.data
    sums_NC, lengths_NC = score_batches(
        prepared.loaded.model,
        prepared.loaded.weights,
        prepared.shared(delta),
        session.eval_batches(data, split, mesh=prepared.mesh),
        mesh=prepared.mesh,
        progress=lambda done, total: session.progress.stage(f"score {split}", done, total),
    )
    scores_NC = normalise(sums_NC, lengths_NC, prepared.config.eval.score)
    labels_N = data.split(split).labels
    return classification(scores_NC.argmax(axis=1), labels_N, scores_NC.shape[1]), scores_NC


def test(prepared: Prepared, folder: epath.Path, delta: Tree) -> dict[str, float]:
    """Scores the test split, once, and writes the predictions by example id."""
    metrics, scores_NC = score(prepared, delta, "test")
    if jax.process_index() == 0:
        split, labels = prepared.data.test, list(prepared.data.task.verbalizers)
        lines = []
        for name, label, row_C in zip(split.ids, split.labels, scores_NC, strict=True):
            line = {
                "id": name,
                "label": labels[label] if label >= 0 else None,
                "predicted": labels[int(row_C.argmax())],
                "scores": dict(zip(labels, row_C.round(5).tolist(), strict=True)),
            }
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        write_text(folder / PREDICTIONS, "".join(lines))
    return metrics


def provenance(prepared: Prepared) -> dict[str, Any]:
    """What a delta file says of itself."""
    config = prepared.config
    return {
        "model": config.model.name,
        "fingerprint": prepared.loaded.fingerprint,
        "method": config.method.name,
        "bos": config.method.bos,
        "task": config.task.name,
        "trial": trial_id(config),
    }


def peak_memory() -> int:
    """Largest memory in use so far in bytes: of a device, or of this process on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return int(stats["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
