"""Commands that use the delta of a finished trial.

Modules that are slow to import are imported by the commands that need them.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator

from softprompt.commands.base import ANY_WEIGHTS, FOLDER, Command, Overrides, path, print_json
from softprompt.distributed import start_jax
from softprompt.errors import UserError


def evaluate(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Prints the scores of trained prompts as JSON: an object for one, a list for several."""
    start_jax()
    from softprompt.console import Progress
    from softprompt.trials.evaluate import evaluate_trials

    with Progress() as progress:
        scores = evaluate_trials(
            arguments.run,
            task=arguments.task,
            split=arguments.split,
            generated=arguments.generate,
            any_weights=arguments.any_weights,
            progress=progress,
        )
    named = [{"run": run, **one} for run, one in zip(arguments.run, scores, strict=True)]
    print_json(scores[0] if len(scores) == 1 else named)
    return 0


def predict(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Prints an answer for each line of standard input."""
    if sys.stdin is None:
        raise UserError("standard input is closed; predict reads lines of text from it")
    import json

    start_jax()

    from softprompt.console import Progress
    from softprompt.trials.evaluate import LINES, predict_lines

    with Progress() as progress:
        answers = predict_lines(
            arguments.run,
            _lines(sys.stdin.buffer),
            progress,
            task=arguments.task,
            batch_size=1 if sys.stdin.isatty() else LINES,
            any_weights=arguments.any_weights,
        )
        for answer in answers:
            if arguments.format == "json":
                print(json.dumps(answer, ensure_ascii=False), flush=True)
            elif "answer" in answer:  # to a free-text task
                print(answer["answer"], flush=True)
            else:
                shares = [f"{name}={share:.4f}" for name, share in answer["probabilities"].items()]
                print("\t".join([answer["label"], *shares]), flush=True)
    return 0


def export(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Writes trials' deltas for another program, and prints a report."""
    start_jax()
    from softprompt.trials.convert import export_run

    report = export_run(arguments.run, kind=arguments.format, to=arguments.to)
    print_json(report)
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
    # Errors in the config come before JAX opens the devices.
    config = load_config(arguments.config, [*overrides, ("model.name", arguments.model)])
    start_jax()
    from softprompt.console import Progress
    from softprompt.trials.convert import import_run

    with Progress() as progress:
        progress.stage(f"load {arguments.model}")
        report = import_run(
            arguments.source, config, workdir=arguments.workdir, any_weights=arguments.any_weights
        )
    print_json(report)
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


COMMANDS = {
    "evaluate": Command(
        evaluate,
        "score trained prompts on a split",
        "softprompt evaluate --run runs/first runs/second --task sms_spam --split test",
        [
            ("--run", {**FOLDER, "nargs": "+", "help": "trials' folders"}),
            ("--task", {"metavar": "NAME", "help": "default: the task or tasks of the trial"}),
            ("--split", {"default": "test", "help": "train, validation or test (default)"}),
            ("--generate", {"action": "store_true", "help": "also generate answers"}),
            ANY_WEIGHTS,
        ],
    ),
    "predict": Command(
        predict,
        "label lines from standard input with a trained prompt",
        "echo 'a quiet, moving film' | softprompt predict --run runs/first",
        [
            ("--run", {**FOLDER, "help": "a trial's folder"}),
            ("--task", {"metavar": "NAME", "help": "default: the task it was trained on"}),
            (
                "--format",
                {"default": "text", "choices": ("text", "json"), "help": "of the answers"},
            ),
            ANY_WEIGHTS,
        ],
    ),
    "export": Command(
        export,
        "write trained deltas: as an adapter, an array, part of their model, or for vLLM",
        "softprompt export --run runs/first --format peft --to adapters/first",
        [
            ("--run", {**FOLDER, "nargs": "+", "help": "trials' folders; several for hf and vllm"}),
            (
                "--format",
                {
                    "required": True,
                    "choices": ("peft", "npy", "hf", "vllm"),
                    "help": "an adapter's folder, a file, the whole model's folder, or prompts and "
                    "a client for vLLM",
                },
            ),
            ("--to", {**FOLDER, "metavar": "PATH", "help": "a new folder or file"}),
        ],
    ),
    "import": Command(
        import_,
        "make a trial's folder from a PEFT adapter or a prompt's array, for evaluate and predict",
        "softprompt import adapters/first --model HuggingFaceTB/SmolLM2-135M --workdir runs/theirs",
        [
            (
                "source",
                {
                    "type": path,
                    "metavar": "PATH",
                    "help": "an adapter's folder, or a .npy file [P, D]",
                },
            ),
            ("--model", {"required": True, "metavar": "NAME", "help": "the model of its training"}),
            ("--workdir", {**FOLDER, "help": "the new trial's folder"}),
            ("--config", {"default": "", "metavar": "FILE[:ARG]", "help": "config with the task"}),
            ANY_WEIGHTS,
        ],
        takes_overrides=True,
    ),
}
