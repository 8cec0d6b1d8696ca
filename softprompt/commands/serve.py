"""The command that serves tasks over HTTP.

Modules that are slow to import are imported when it runs.
"""

import argparse
import importlib.util
from typing import TYPE_CHECKING

from softprompt.commands.base import Command, Overrides, path
from softprompt.distributed import start_jax
from softprompt.errors import UserError

if TYPE_CHECKING:
    from softprompt.console import Progress
    from softprompt.serving.engine import Engine
    from softprompt.serving.http.settings import Settings

NEEDED = ("prometheus_client", "starlette", "uvicorn")


def serve(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Serves the tasks of a folder until it is stopped."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"serve needs {', '.join(missing)}; install the extra serve")
    from softprompt.console import Progress
    from softprompt.pretrained.chat import read_chat_template
    from softprompt.serving.folders import find_tasks, task_folder
    from softprompt.serving.http.aliases import check_arms
    from softprompt.serving.http.app import make_app
    from softprompt.serving.http.server import listen, make_server

    settings = read_settings(arguments)
    with listen(arguments.host, arguments.port, has_key=bool(settings.key)) as listener:
        start_jax()
        with Progress() as progress:
            progress.stage(f"load {arguments.model}")
            engine = make_engine(arguments, progress)
            for name in find_tasks(settings.root):
                progress.stage(f"load {name}")
                engine.load(name, task_folder(settings.root, name))
            for alias in settings.aliases.values():
                check_arms(alias, alias.arms, [task.name for task in engine.tasks()])
            host, port = listener.getsockname()[:2]
            progress.say(f"{len(engine.tasks())} tasks at http://{host}:{port}")
        template = read_chat_template(arguments.model)
        make_server(make_app(engine, settings, chat_template=template)).run(sockets=[listener])
    return 0


def make_engine(arguments: argparse.Namespace, progress: "Progress") -> "Engine":
    """The engine of the model, with its pools' sizes."""
    from softprompt.serving.engine import Engine
    from softprompt.serving.placement import Sizes

    sizes = Sizes(rows=arguments.rows, input=arguments.max_input, new=arguments.max_tokens)
    return Engine(arguments.model, dtype=arguments.dtype, sizes=sizes, progress=progress)


def read_settings(arguments: argparse.Namespace) -> "Settings":
    """The server's settings, checked before the model is loaded.

    Raises:
        UserError: see the functions that it calls, or a bound that is not positive.
    """
    from pathlib import Path

    from softprompt.serving.folders import find_tasks
    from softprompt.serving.http.aliases import check_aliases, parse_alias
    from softprompt.serving.http.server import read_key
    from softprompt.serving.http.settings import Settings

    for flag in ("rows", "max_input", "max_tokens", "timeout"):
        if not 0 < getattr(arguments, flag) < 2**31:
            shown = flag.replace("_", "-")
            raise UserError(f"--{shown} is {getattr(arguments, flag)}; allowed: 1 and more")
    root, aliases = Path(arguments.root), [parse_alias(text) for text in arguments.alias]
    local = Path(arguments.model).expanduser()
    base = local.name if local.exists() else arguments.model  # no path is shown
    check_aliases(aliases, [base, *find_tasks(root)])
    return Settings(
        base=base,
        root=root,
        key=read_key(arguments.key_file) if arguments.key_file else "",
        admin_key=read_key(arguments.admin_key_file) if arguments.admin_key_file else "",
        aliases={alias.name: alias for alias in aliases},
        max_tokens=arguments.max_tokens,
        seconds=arguments.timeout,
    )


COMMANDS = {
    "serve": Command(
        serve,
        "serve every task of a folder over HTTP, mixed in one batch, to OpenAI's clients",
        "softprompt serve runs/tasks --model smollm2-135m-instruct-q4",
        [
            ("root", {"type": path, "metavar": "ROOT", "help": "its folders are the tasks"}),
            ("--model", {"required": True, "metavar": "NAME", "help": "the frozen model"}),
            (
                "--dtype",
                {"default": "float32", "choices": ("float32", "bfloat16"), "help": "of the model"},
            ),
            (
                "--rows",
                {
                    "type": int,
                    "default": 8,
                    "help": "rows of a pool; each kind of task has one pool for a single task and "
                    "one for mixed tasks",
                },
            ),
            (
                "--host",
                {"default": "127.0.0.1", "help": "an address other than loopback needs a key"},
            ),
            ("--port", {"type": int, "default": 8000, "help": "0: any that is free"}),
            ("--key-file", {"default": "", "metavar": "FILE", "help": "holds the requests' key"}),
            (
                "--admin-key-file",
                {
                    "default": "",
                    "metavar": "FILE",
                    "help": "holds the key to load and unload tasks; without it both are off",
                },
            ),
            (
                "--alias",
                {
                    "nargs": "+",
                    "default": [],
                    "metavar": "NAME=TASK:WEIGHT,TASK:WEIGHT",
                    "help": "a name that stands for several tasks, each for a share of the users",
                },
            ),
            (
                "--max-input",
                {
                    "type": int,
                    "default": 512,
                    "help": "the most tokens of an input, up to the model's context",
                },
            ),
            (
                "--max-tokens",
                {"type": int, "default": 512, "help": "the most that a request may ask for"},
            ),
            (
                "--timeout",
                {"type": float, "default": 120.0, "help": "seconds that a request may take"},
            ),
        ],
    )
}
