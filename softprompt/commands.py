"""The commands of the command line: functions (arguments, overrides) -> exit code.

Modules that are slow to import are imported by the commands that need them.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from softprompt.console import print_columns
from softprompt.distributed import start_jax
from softprompt.errors import UserError, unknown

if TYPE_CHECKING:
    from types import ModuleType

    from softprompt.data.tasks import Task

Overrides = list[tuple[str, str]]


def train(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Trains one trial and prints its scores."""
    import time

    from softprompt.config import resolve
    from softprompt.config.files import load_config

    config = load_config(arguments.config, overrides)  # its errors come before JAX is imported
    start_jax(arguments.distributed)
    if arguments.dry_run:
        from softprompt.trials.full_size import report

        print("\n".join(report(config)))
        return 0
    from softprompt.console import Progress
    from softprompt.results import cautions
    from softprompt.training.loop import Diverged
    from softprompt.trials.run import run_trial
    from softprompt.trials.session import Session
    from softprompt.trials.sweep import record_failure

    config = resolve(config)
    began = time.monotonic()
    try:
        with Progress() as progress:
            row = run_trial(config, arguments.workdir, session=Session(progress))
    except Diverged as error:
        record_failure(config, arguments.workdir, error, time.monotonic() - began)
        raise
    except UserError:
        raise
    except Exception as error:
        row = record_failure(config, arguments.workdir, error, time.monotonic() - began)
        print(
            f"softprompt: trial failed: {row['error']} (more in {arguments.workdir}/traceback.txt)",
            file=sys.stderr,
        )
        return 1
    for caution in cautions(row):
        print(f"softprompt: note: {caution}", file=sys.stderr)
    _print_json(
        {key: row[key] for key in ("trial", "name", "status", "steps", "seconds", "metrics")}
    )
    return 0


def evaluate(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Prints a trained prompt's scores as JSON, a list of them where there are several."""
    start_jax()
    from softprompt.console import Progress
    from softprompt.trials.evaluate import evaluate_runs

    with Progress() as progress:
        scores = evaluate_runs(
            arguments.run,
            task=arguments.task,
            split=arguments.split,
            generated=arguments.generate,
            any_weights=arguments.any_weights,
            progress=progress,
        )
    named = [{"run": run, **one} for run, one in zip(arguments.run, scores, strict=True)]
    _print_json(scores[0] if len(scores) == 1 else named)
    return 0


def predict(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Prints an answer for each line of standard input."""
    if sys.stdin is None:
        raise UserError("standard input is closed; predict reads lines of text from it")
    import json

    start_jax()

    from softprompt.console import Progress
    from softprompt.trials.evaluate import predict_lines

    options = {"task": arguments.task, "any_weights": arguments.any_weights}
    options |= {"group": 1} if sys.stdin.isatty() else {}
    with Progress() as progress:
        for answer in predict_lines(arguments.run, _lines(sys.stdin.buffer), progress, **options):
            if arguments.format == "json":
                print(json.dumps(answer, ensure_ascii=False), flush=True)
            elif "answer" in answer:  # to a free-text task
                print(answer["answer"], flush=True)
            else:
                shares = [f"{name}={share:.4f}" for name, share in answer["probabilities"].items()]
                print("\t".join([answer["label"], *shares]), flush=True)
    return 0


def _lines(stream: Iterable[bytes]) -> Iterator[str]:
    """Lines of text without their ends.

    Raises:
        UserError: one that is not UTF-8.
    """
    for number, line in enumerate(stream, 1):
        try:
            yield line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"line {number} of the input is not UTF-8: {error}") from error


def export(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Writes a trial's delta for another program, and prints a report."""
    start_jax()
    from softprompt.trials.convert import export_run

    report = export_run(arguments.run, kind=arguments.format, to=arguments.to)
    _print_json(report)
    return 0


def import_(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Makes a trial's folder from another program's file, and prints a report."""
    from softprompt.config.files import load_config

    for key, _ in overrides:
        if key.startswith("method.") and key != "method.bos":
            raise UserError(
                f"--config.{key}: import takes the method from the file; allowed: "
                "--config.method.bos"
            )
    # Errors in the config come before JAX is imported.
    config = load_config(arguments.config, [*overrides, ("model.name", arguments.model)])
    start_jax()
    from softprompt.console import Progress
    from softprompt.trials.convert import import_run

    with Progress() as progress:
        progress.stage(f"load {arguments.model}")
        report = import_run(
            arguments.source, config, workdir=arguments.workdir, any_weights=arguments.any_weights
        )
    _print_json(report)
    return 0


def sweep(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Runs an experiment's trials, or prints what they would cost."""
    from softprompt.trials import shards
    from softprompt.trials import sweep as sweeps

    experiment = sweeps.load_experiment(arguments.experiment)
    shard = shards.parse_shard(arguments.shard)
    minutes = shards.parse_minutes(arguments.minutes)
    start_jax(arguments.distributed)  # before a config is resolved, which needs the devices
    trials = sweeps.make_trials(experiment, arguments.subset, overrides)
    trials = shards.take_shard(trials, shard)
    import jax

    from softprompt.console import Progress
    from softprompt.results import read_rows
    from softprompt.trials.estimate import estimate
    from softprompt.trials.outputs import claim_outputs
    from softprompt.trials.session import Session

    with Progress() as progress:
        session = Session(progress)
        if arguments.dry_run:
            from softprompt.analysis.tables import to_markdown

            costs = sweeps.dry_run(trials, arguments.workdir, lambda c: estimate(c, session))
            print(to_markdown(costs), end="")
            return int(any(str(state).startswith("fails") for state in costs["state"]))
        if jax.process_index() == 0:
            claim_outputs(experiment, arguments.workdir)
        failed = sweeps.run_trials(trials, arguments.workdir, session, minutes)
        if session.compiled:
            progress.say(f"{len(session.compiled)} training programs compiled")
    for row in failed:
        print(f"softprompt: trial {row['name']} failed: {row['error']}", file=sys.stderr)
    if failed:
        print(
            f"softprompt: {len(failed)} of {len(trials)} trials failed; the same command tries "
            "them again",
            file=sys.stderr,
        )
    if jax.process_index() == 0:
        if any(row["status"] == "done" for row in read_rows(arguments.workdir)):
            _write_outputs(experiment, arguments.workdir)
    return 1 if failed else 0


def table(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Prints a table of results."""
    from softprompt import results
    from softprompt.analysis import tables
    from softprompt.trials.sweep import load_experiment

    if arguments.experiment:
        _write_outputs(load_experiment(arguments.experiment), arguments.folder)
    else:
        rows = results.read_rows(arguments.folder)
        if not rows:
            raise UserError(f"no result.json below {arguments.folder!r}")
        print(tables.to_markdown(tables.overview(rows)), end="")
    return 0


def _write_outputs(experiment: "ModuleType", folder: str) -> None:
    """Writes the table and figure of all rows below a folder, and prints the table."""
    from etils import epath

    from softprompt.trials.outputs import write_trial_outputs

    files = write_trial_outputs(experiment, folder)
    print((epath.Path(folder) / files[0]).read_text(), end="")
    print(f"wrote {', '.join(files)} in {folder}", file=sys.stderr)


def pretrain(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Pretrains a model, and prints its folder."""
    from softprompt.pretraining.recipe import load_recipe

    recipe = load_recipe(arguments.recipe)
    start_jax(arguments.distributed)
    from softprompt.pretraining.train import run_alone

    print(run_alone(recipe))
    return 0


def ladder(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Lists the pretrained models, or packs or imports them."""
    from softprompt.pretraining.ladder import import_archive, listing, pack

    if arguments.action == "list":
        print_columns(*listing())
    elif not arguments.file:
        raise UserError(f"ladder {arguments.action} needs FILE, the archive")
    else:
        move = pack if arguments.action == "pack" else import_archive
        print("\n".join(move(arguments.file)))
    return 0


def config(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Prints config keys: default, what is allowed, what reads them, and what they mean."""
    import json
    import textwrap
    from fnmatch import fnmatchcase

    from softprompt.config.schema import describe
    from softprompt.settings import allowed

    keys = {key.name: key for key in describe()}
    patterns = arguments.keys or ["*"]
    for pattern in patterns:
        names = [
            name for name in keys if fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")
        ]
        if not names:
            sections = {name.partition(".")[0] for name in keys}
            raise unknown("config key", pattern, {*keys, *sections})
        for name in names:
            key = keys[name]
            readers = [
                f"with {by}={', '.join(who)}"
                for by, who in key.owners.items()
                if set(who) != set(keys[by].choices)
            ]
            facts = "; ".join([allowed(key), *readers])
            print(f"{name} = {json.dumps(key.default)}  ({facts})")
            print(textwrap.indent(textwrap.fill(key.help, 92), "    "))
    return 0


def models(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Prints the catalogue of models, or checks their training steps at full size."""
    if arguments.check:  # on virtual devices, which are set up before JAX looks for others
        from softprompt.trials import shape_check

        return shape_check.run(arguments.names)
    from softprompt.pretrained.catalog import listing

    print_columns(*listing(arguments.names))
    print(
        "config.model.name also takes any hub name (org/repo), a folder, a .gguf file, or a T5X "
        "checkpoint (a folder or gs:// address)."
    )
    return 0


def data(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Lists the tasks, prepares one's data, or shows its examples."""
    from softprompt.config import members
    from softprompt.config.files import load_config
    from softprompt.data.builtin_tasks import TASKS, get_task

    if arguments.action == "list":
        lines = [(task.name, task.source, task.about) for task in TASKS.values()]
        print_columns(("NAME", "SOURCE", "ABOUT"), lines)
        print("For your own data see configs/own_data.py.")
        return 0
    if not (arguments.task or arguments.config or overrides):
        raise UserError(f"data {arguments.action} needs a task; known: {', '.join(sorted(TASKS))}")
    named = [("task.name", arguments.task), ("data.mixture", "")] if arguments.task else []
    for member in members(load_config(arguments.config, [*named, *overrides])):
        _show(get_task(member.task), examples=3 if arguments.action == "show" else 0)
    return 0


def _show(task: "Task", *, examples: int) -> None:
    """Prints a task's examples, label counts and overlaps of splits; reading prepares the data."""
    import json

    from softprompt.data.splits import overlaps, read_split
    from softprompt.data.subsets import label_counts
    from softprompt.data.tasks import target_text

    splits = {}
    for split in task.splits:
        records = splits[split] = read_split(task, split)
        counts = label_counts(records).items()
        shares = ", ".join(f"{label} {count:,}" for label, count in counts)
        print(f"{task.name} {split}: {len(records):,} examples ({shares})")
        for record in records[:examples] if split == next(iter(task.splits)) else ():
            target = target_text(task, record["label"])
            print(f"  id      {record['id']}")
            print(f"  input   {json.dumps(task.template.format(**record), ensure_ascii=False)}")
            print(f"  target  {json.dumps(target, ensure_ascii=False)}")
    for line in overlaps(task, splits)[1]:
        print(line)


def _print_json(value: object) -> None:
    import json

    print(json.dumps(value, indent=2, ensure_ascii=False))


RUN: dict[str, Callable[[argparse.Namespace, Overrides], int]] = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "export": export,
    "import": import_,
    "sweep": sweep,
    "table": table,
    "pretrain": pretrain,
    "ladder": ladder,
    "config": config,
    "models": models,
    "data": data,
}
