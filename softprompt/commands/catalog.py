"""Commands about models, tasks and config keys.

Modules that are slow to import are imported by the commands that need them.
"""

import argparse
from typing import TYPE_CHECKING

from softprompt.commands.base import DISTRIBUTED, Command, Overrides
from softprompt.console import print_columns
from softprompt.distributed import start_jax
from softprompt.errors import UserError, unknown

if TYPE_CHECKING:
    from softprompt.data.tasks import Task


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

    from softprompt.config import KEYS, RENAMED, unknown_key
    from softprompt.settings import allowed

    patterns = arguments.keys or ["*"]
    for pattern in patterns:
        names = [
            name for name in KEYS if fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")
        ]
        if pattern in RENAMED:
            raise UserError(unknown_key(pattern, KEYS))
        if not names:
            sections = {name.partition(".")[0] for name in KEYS}
            raise unknown("config key", pattern, {*KEYS, *sections})
        for name in names:
            key = KEYS[name]
            readers = [
                f"with {by}={', '.join(who)}"
                for by, who in key.owners.items()
                if set(who) != set(KEYS[by].choices)
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
    from softprompt.config import task_configs
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
    for member in task_configs(load_config(arguments.config, [*named, *overrides])):
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


COMMANDS = {
    "pretrain": Command(
        pretrain,
        "pretrain a model on text; the same command resumes it, and does nothing once it is done",
        "softprompt pretrain ladder/d1",
        [
            ("recipe", {"metavar": "NAME|FILE", "help": "a name of the ladder, or a .py file"}),
            DISTRIBUTED,
        ],
    ),
    "ladder": Command(
        ladder,
        "list the pretrained models, or move them between machines in one archive",
        "softprompt ladder pack ladder.tar",
        [
            ("action", {"nargs": "?", "default": "list", "choices": ("list", "pack", "import")}),
            ("file", {"nargs": "?", "default": "", "metavar": "FILE", "help": "the archive"}),
        ],
    ),
    "config": Command(
        config,
        "list the config keys: defaults, what is allowed, what reads them, and what they mean",
        "softprompt config method 'train.*'",
        [("keys", {"nargs": "*", "metavar": "KEY", "help": "a section, key or pattern; all"})],
    ),
    "models": Command(
        models,
        "list the catalogue of models, or check their training steps at full size",
        "softprompt models 'EleutherAI/*' --check",
        [
            ("names", {"nargs": "*", "metavar": "NAME", "help": "a name, pattern or family"}),
            ("--check", {"action": "store_true", "help": "check shapes, sharding and memory"}),
        ],
    ),
    "data": Command(
        data,
        "list the tasks, prepare one's data, or show its examples",
        "softprompt data show movie_sentiment",
        [
            ("action", {"nargs": "?", "default": "list", "choices": ("list", "prepare", "show")}),
            ("task", {"nargs": "?", "default": "", "metavar": "TASK"}),
            ("--config", {"default": "", "metavar": "FILE[:ARG]", "help": "config with the task"}),
        ],
        takes_overrides=True,
    ),
}
