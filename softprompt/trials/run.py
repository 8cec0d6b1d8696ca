"""Runs one trial, from a config to a result row. A rerun in the same folder resumes it."""

import functools
import json
import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from softprompt.analysis.flops import machine_flops
from softprompt.config import (
    ConfigDict,
    differences,
    from_dict,
    method_settings,
    task_configs,
    to_dict,
    trial_id,
    trial_name,
)
from softprompt.data.pipeline import pad_rows
from softprompt.data.subsets import check_digests
from softprompt.errors import UserError
from softprompt.files import check_writable, read_json, write_text
from softprompt.methods import METHODS
from softprompt.methods.delta_file import DELTA, load_delta, save_delta
from softprompt.pretrained.loading import Loaded
from softprompt.results import Row, is_done, make_row, read_result, write_result
from softprompt.training import checkpoints, loop
from softprompt.training.logs import MetricsLog, open_sinks, read_log
from softprompt.training.memory import bytes_of, peak_memory
from softprompt.training.optimizers import set_rate
from softprompt.training.sharding import put_batch
from softprompt.training.step import StepCall, StepResult
from softprompt.trials.lock import locked_folder
from softprompt.trials.measure import final_metrics, measure
from softprompt.trials.prepare import (
    Prepared,
    initial_state,
    learning_rates,
    prepare,
    step_flops,
    train_source,
    trial_dropout,
)
from softprompt.trials.session import Session, optimizer_config

Tree = Any
TrialSteps = Generator[StepCall, StepResult, Row]
CONFIG = "config.json"


def run_trial(config: ConfigDict, folder: epath.PathLike, *, session: Session) -> Row:
    """Trains and tests one config, and resumes an earlier run that did not finish.

    On several hosts, each process calls `jax.distributed.initialize()` and then this function with
    the same arguments; `folder` must be on shared storage. The mesh spans the devices of all
    processes. Process 0 writes. A SIGTERM to one process stops all of them.

    Args:
        config: resolved and valid.
        folder: of this trial only, local or gs://. Afterwards it holds config.json, metrics.jsonl,
            checkpoints, delta.safetensors (the selected delta), predictions.jsonl and, written
            last, result.json.
        session: the caches that all trials of the process share.

    Raises:
        UserError: any error that the user can fix, such as a folder with another config.
        KeyboardInterrupt: after SIGINT; the state is saved.
        SystemExit: with 75 after SIGTERM or SIGHUP; the state is saved.
    """
    row: Row = session.run(trial_steps(config, folder, session=session))
    return row


def trial_steps(config: ConfigDict, folder: epath.PathLike, *, session: Session) -> TrialSteps:
    """A trial as a generator of its training steps: see `run_trial`.

    Yields:
        The arguments of each step. The caller sends the step's outputs.

    Returns:
        The result row.
    """
    folder = epath.Path(folder)
    began = time.monotonic()
    check_folder(folder, config)
    compiled_before = session.compile_seconds
    with session.claimed(config, folder), locked_folder(folder):
        row = read_result(folder)
        if row is not None and row["status"] == "done":
            session.progress.say(f"{trial_name(config)} is done already (in {folder})")
            return row
        prepared = prepare(config, session, folder.parent)
        if method_settings(config).trains:
            made = yield from train_delta(prepared, folder)
        else:
            write_config(folder, config)
            made = Trained({}, {"validation": measure(prepared, {}, "validation")[0]}, {})
        with session.pauses():
            metrics = made.metrics | final_metrics(prepared, folder, made.delta)
            save_delta(
                folder / DELTA,
                made.delta,
                provenance(config, prepared.loaded) | {"data": prepared.data.digests},
            )
        size = (folder / DELTA).stat().length if jax.process_index() == 0 else None
        row = make_row(
            config,
            status="done",
            metrics=metrics,
            seconds=made.seconds + time.monotonic() - began,
            compile_seconds=session.compile_seconds - compiled_before,
            peak_memory_bytes=peak_memory(),
            trainable=made.parameters,
            stored=parameters(made.delta),
            delta_bytes=size,
            weight_bytes=bytes_of(prepared.frozen),
            data=prepared.data.digests,
            shared_texts=sum(one.shared_texts for one in prepared.tasks),
            **made.facts,
        )
        write_result(folder, row)
    return row


def check_folder(folder: epath.Path, config: ConfigDict) -> None:
    """Checks that a folder is new or belongs to this trial.

    Raises:
        UserError: the folder holds another config (lists the differences) or an imported delta, or
            it is not writable.
    """
    check_writable(folder)
    if not (folder / CONFIG).exists():
        return
    theirs = read_config(folder)
    if trial_id(theirs) != trial_id(config):
        raise UserError(
            f"{folder} holds another trial ({'; '.join(differences(config, theirs))}: requested, "
            "stored); give another --workdir"
        )
    delta = folder / DELTA
    if delta.exists() and not is_done(folder) and "imported" in load_delta(delta)[1]:
        raise UserError(
            f"{folder} holds an imported delta, which training would replace; give another "
            "--workdir (method.init=file starts a prompt from one)"
        )


def write_config(folder: epath.Path, config: ConfigDict) -> None:
    """Writes config.json, after all checks of the user's input.

    A command that fails a check leaves the folder free, so that it can be corrected and rerun.
    """
    file = folder / CONFIG
    if jax.process_index() == 0 and not file.exists():
        write_text(file, json.dumps(to_dict(config), indent=2) + "\n")


def check_trained(folder: epath.PathLike) -> None:
    """Checks that a trial has a delta.

    Raises:
        UserError: it has none yet.
    """
    if not (epath.Path(folder) / DELTA).exists():
        raise UserError(f"{folder}: the trial has no {DELTA} yet; finish it with softprompt train")


def read_config(folder: epath.PathLike) -> ConfigDict:
    """The resolved config of a trial's folder.

    Raises:
        UserError: there is no config.json, or it is not a trial's config.
    """
    file = epath.Path(folder) / CONFIG
    if not file.exists():
        raise UserError(f"{folder}: not a trial's folder (it has no {CONFIG})")
    tree = read_json(file)
    try:
        return from_dict(tree)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


class Trained(NamedTuple):
    """The result of training, or of a method that trains nothing.

    Attributes:
        delta: the selected delta, without parameters that only training needs.
        metrics: its "validation" scores and "selected_step".
        facts: entries of the trial's row, see `training_facts`.
        parameters: number of trained parameters, including those that only training needs.
        seconds: wall time of the trial's earlier processes.
    """

    delta: Tree
    metrics: dict[str, Any]
    facts: dict[str, Any]
    parameters: int = 0
    seconds: float = 0.0


def train_delta(prepared: Prepared, folder: epath.Path) -> Generator[StepCall, StepResult, Trained]:
    """Trains the delta, from the newest checkpoint if there is one."""
    config, session = prepared.config, prepared.session
    state = initial_state(prepared)
    inputs = loop_inputs(prepared, state, folder)
    if not prepared.frozen:  # the weights are trained, and were copied into the delta
        session.release(config)
    with open_sinks(
        folder,
        trial_name(config),
        to_dict(config),
        tensorboard=config.log.tensorboard,
        wandb=config.log.wandb,
    ) as sinks:
        write_config(folder, config)
        with checkpoints.checkpoint_manager(folder / "checkpoints") as manager:
            check = functools.partial(check_origin, prepared, folder)
            restored = loop.restore(manager, state, check=check, say=session.progress.say)
            if restored is not None:
                session.progress.say(f"{trial_name(config)} resumes from step {restored.step}")
            state = restored or state
            log = MetricsLog(folder, step=restored.step if restored else None, sinks=sinks)
            state = yield from loop.train(loop_config(config), inputs, state, log, manager)
    chosen, scores, at = state.selected(config.eval.select)
    return Trained(
        delta=inputs.fold(chosen),
        metrics={"validation": scores, "selected_step": at},
        facts=training_facts(inputs, state, session),
        parameters=parameters(state.delta),
        seconds=state.seconds,
    )


def loop_inputs(prepared: Prepared, state: loop.State, folder: epath.Path) -> loop.LoopInputs:
    """The inputs of the training loop."""
    config, session, mesh = prepared.config, prepared.session, prepared.mesh
    source, dropout = train_source(prepared), trial_dropout(prepared)
    multiple = mesh.shape["data"] * config.train.microbatches
    if spare := -source.template.shape.rows % multiple:
        session.progress.say(f"a step computes {spare} empty rows, for a multiple of {multiple}")
    batch = put_batch(mesh, pad_rows(source[0], multiple))
    opt_state = set_rate(state.opt_state, np.float32(0))
    arguments = (state.delta, opt_state, prepared.frozen, batch, dropout)
    fold = METHODS[config.method.name].fold
    return loop.LoopInputs(
        program=session.program(prepared.step, optimizer_config(config), mesh, arguments),
        weights=prepared.frozen,
        source=source,
        rates=learning_rates(prepared),
        dropout=dropout,
        mesh=mesh,
        row_multiple=multiple,
        evaluate=lambda delta: measure(prepared, delta, "validation")[0],
        fold=jax.jit(functools.partial(fold, cfg=prepared.step.method_config)),
        folder=folder,
        notes={"config": to_dict(config), **origin(prepared)},
        step_flops=step_flops(prepared),
        machine_flops=machine_flops(config.model.dtype),
        stage=session.progress.stage,
        pauses=session.pauses,
    )


def training_facts(inputs: loop.LoopInputs, state: loop.State, session: Session) -> dict[str, Any]:
    """The entries of a trial's row about its training steps."""
    lines, speed = read_log(inputs.folder), "examples_per_second"
    seconds = [inputs.source.examples / line[speed] for line in lines if speed in line]
    return {
        "steps": state.step,
        "flops": state.step * inputs.step_flops,
        **{name: mean_share(lines, name) for name in ("peak_share", "input_wait_share")},
        "step_seconds": float(np.median(seconds)) if seconds else None,
        "step_memory_bytes": inputs.program.memory(),
        "members": session.members,
    }


def parameters(delta: Tree) -> int:
    """The number of parameters of a delta."""
    return sum(leaf.size for leaf in jax.tree.leaves(delta))


def mean_share(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The mean of a share, such as peak_share, over the steps in a log's lines; None without any.

    The time of evaluations does not count.
    """
    lines = [line for line in lines if name in line]
    seconds = sum(line["seconds"] for line in lines)
    return sum(line[name] * line["seconds"] for line in lines) / seconds if lines else None


def loop_config(config: ConfigDict) -> loop.LoopConfig:
    """The training loop's part of a config."""
    return loop.LoopConfig(
        steps=config.train.steps,
        log_every=config.log.every,
        eval_every=config.eval.every,
        checkpoint_every=config.log.checkpoint_every,
        snapshots=config.log.snapshots,
        patience=config.eval.patience,
        metric=config.eval.metric,
    )


def origin(prepared: Prepared) -> dict[str, Any]:
    """What a checkpoint depends on besides the config: weights and data."""
    return {"fingerprint": prepared.loaded.fingerprint, "data": prepared.data.digests}


def check_origin(
    prepared: Prepared, folder: epath.Path, step: int, notes: Mapping[str, Any]
) -> None:
    """Checks that a checkpoint was made with these weights and this data.

    Raises:
        UserError: names what has changed.
    """
    now = origin(prepared)
    if notes["fingerprint"] != now["fingerprint"]:
        raise UserError(
            f"{folder}: step {step} was trained on weights {notes['fingerprint']}, "
            f"the model has {now['fingerprint']} now; give another --workdir"
        )
    check_digests(now["data"], notes.get("data", {}), made=f"{folder}: step {step}")


def provenance(config: ConfigDict, loaded: Loaded) -> dict[str, Any]:
    """The metadata of a delta file."""
    return {
        "model": config.model.name,
        "fingerprint": loaded.fingerprint,
        "method": config.method.name,
        "bos": config.method.bos,
        "task": ",".join(one.task.name for one in task_configs(config)),
        "trial": trial_id(config),
    }
