"""The command that generates for a file of inputs.

Modules that are slow to import are imported when it runs.
"""

import argparse
from typing import TYPE_CHECKING

from softprompt.commands.base import FOLDER, Command, Overrides, path
from softprompt.distributed import start_jax
from softprompt.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from softprompt.serving.files import Line
    from softprompt.serving.placement import Sizes


def generate(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Answers the lines of a file, in order; the same command resumes it."""
    import json
    from pathlib import Path

    from softprompt.serving.files import finished_lines, read_lines
    from softprompt.serving.folders import task_folder

    lines, output = read_lines(Path(arguments.input)), Path(arguments.to)
    done = finished_lines(output, lines)
    tasks = {str(line.record.get("task", "")) for line in lines} - {""}
    names = sorted({task.partition(":")[0] for task in tasks})  # of NAME:TASK
    folders = {name: task_folder(Path(arguments.root), name) for name in names}
    if done == len(lines):
        return 0
    start_jax()
    from softprompt.console import Progress
    from softprompt.pretrained.loading import load_model
    from softprompt.serving.engine import Engine
    from softprompt.serving.files import answers
    from softprompt.serving.requests import Request

    defaults = Request("", (), arguments.max_new, arguments.temperature, seed=arguments.seed)
    with Progress() as progress:
        progress.stage(f"load {arguments.model}")
        loaded = load_model(arguments.model, dtype=arguments.dtype)
        inputs = loaded.tokenizer.encode_batch([line.record["input"] for line in lines])
        progress.stage("compile")
        engine = Engine(loaded, sizes=_sizes(arguments, lines, inputs), queue=len(lines))
        try:
            for name, folder in folders.items():
                engine.load(name, folder)
            made = answers(
                engine,
                list(zip(lines, inputs, strict=True))[done:],
                defaults,
                ahead=4 * arguments.rows,
                progress=progress,
            )
            with output.open("a", encoding="utf-8") as stream:
                for answer in made:
                    stream.write(json.dumps(answer, ensure_ascii=False) + "\n")
                    stream.flush()
        finally:
            engine.close()
    return 0


def _sizes(
    arguments: argparse.Namespace, lines: "Sequence[Line]", inputs: "Sequence[Sequence[int]]"
) -> "Sizes":
    """Pools for the longest input and output, with a lane for each task if there is room."""
    from softprompt.serving.placement import Sizes

    rows, tasks = arguments.rows, len({line.record.get("task", "") for line in lines})
    if rows < 1 or rows & (rows - 1):
        raise UserError(f"--rows is {rows}; allowed: 1, 2, 4, 8 and so on")
    lanes = min(rows, 1 << (tasks - 1).bit_length())
    longest = 1 + max(map(len, inputs))  # BOS
    new = max(line.record.get("max_new", arguments.max_new) for line in lines)
    together = max(1, rows // 4)
    return Sizes(rows, longest, max(new, 1), lanes=lanes, together=together, scores=False)


COMMANDS = {
    "generate": Command(
        generate,
        "generate for the lines of a file, each with a task of its own; resumes",
        "softprompt generate in.jsonl --root runs --model smollm2-135m-instruct-q4 --to out.jsonl",
        [
            (
                "input",
                {
                    "type": path,
                    "metavar": "FILE",
                    "help": 'JSON lines: {"task": "first", "input": "a text"}, and what else '
                    "a request may set",
                },
            ),
            ("--root", {**FOLDER, "help": "its folders are the tasks: trials or PEFT adapters"}),
            ("--model", {"required": True, "metavar": "NAME", "help": "the frozen model"}),
            ("--to", {**FOLDER, "metavar": "FILE", "help": "the answers, one per line"}),
            ("--max-new", {"type": int, "default": 64, "help": "tokens of an answer, at most"}),
            ("--temperature", {"type": float, "default": 0.0, "help": "default: 0, greedy"}),
            ("--seed", {"type": int, "default": 0, "help": "line N has this seed plus N"}),
            ("--rows", {"type": int, "default": 16, "help": "answers at once, a power of two"}),
            (
                "--dtype",
                {
                    "default": "float32",
                    "choices": ("float32", "bfloat16"),
                    "help": "of the weights and the computation",
                },
            ),
        ],
    )
}
