"""MkDocs hooks: pages generated from the code, and the figures of the experiments."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from softprompt.commands import COMMANDS
from softprompt.config import KEYS
from softprompt.results import FACTS
from softprompt.settings import allowed

REPOSITORY = Path(__file__).resolve().parent.parent
FIGURES = REPOSITORY / "experiments" / "figures"
PACKAGES = (
    *("api", "config", "models", "pretrained", "methods", "data", "training"),
    *("evaluation", "inference", "interchange", "trials", "analysis", "results"),
    *("pretraining", "serving"),
)


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated pages and the figures to the site's files."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    for figure in sorted(FIGURES.glob("*.png")):
        files.append(File.generated(config, f"figures/{figure.name}", abs_src_path=str(figure)))
    return files


def pages() -> dict[str, str]:
    """The generated pages as Markdown, by their path below docs/."""
    found = {"reference/commands.md": commands_page(), "reference/config.md": config_page()}
    found |= {"reference/rows.md": rows_page()}
    return found | {f"reference/python/{name}.md": python_page(name) for name in PACKAGES}


def commands_page() -> str:
    """Every command with its arguments and an example."""
    configurable = [name for name, command in COMMANDS.items() if command.takes_overrides]
    lines = [
        "# Commands",
        "Results go to standard output, progress to standard error. A command exits with 0 when "
        "it is done, 1 when a trial failed, 2 when an argument is wrong, 75 when SIGTERM stopped "
        "it (the same command resumes) and 130 when it was interrupted.",
        f"`--config.KEY=VALUE` sets any [config key](config.md) for {_list(configurable)}.",
    ]
    for name, command in COMMANDS.items():
        lines += [f"## {name}", f"{command.summary[0].upper()}{command.summary[1:]}."]
        lines.append("\n".join(["| argument | meaning |", "| --- | --- |", *_flags(command.flags)]))
        lines.append(f"```sh\n{command.example}\n```")
    return "\n\n".join(lines) + "\n"


def _flags(flags: list[tuple[str, dict]]) -> Iterator[str]:
    """A table's line for each argument."""
    for flag, said in flags:
        value = said.get("metavar", "").replace("|", "\\|")
        name = f"{flag} {value}".strip() if flag.startswith("-") else value or flag
        notes = [said["help"]] if "help" in said else []
        notes += [f"one of {', '.join(said['choices'])}"] if "choices" in said else []
        notes += ["required"] if said.get("required") else []
        default = said.get("default")
        notes += [f"default: {default}"] if default and "default" not in notes[0] else []
        yield f"| `{name}` | {'; '.join(notes)} |"


def config_page() -> str:
    """Every key of a config, a heading each."""
    lines = [
        "# Config keys",
        "Set a key on the command line with `--config.KEY=VALUE`, or in a "
        "[config file](../tutorial.md#6-keep-settings-in-a-config-file). An unknown key is an "
        "error that names the nearest ones.",
    ]
    section = None
    for key in KEYS.values():
        if (own := key.name.rpartition(".")[0]) != section:
            section = own
            lines += [f"## {section}"] if section else []
        lines += [f"### `{key.name}` {{ #{key.name} }}", _sentence(key.help), _facts(key)]
    return "\n\n".join(lines) + "\n"


def rows_page() -> str:
    """Every fact of a row."""
    lines = [f"| `{name}` | {_sentence(meaning)} |" for name, meaning in FACTS.items()]
    return "\n".join(
        [
            "# Rows",
            "",
            "Beside its config, versions, devices, data digests, seconds and "
            "[metrics](../guides/results.md#rows), a trial's `result.json` has these numbers, or "
            "null where they were not measured.",
            "",
            "| key | meaning |",
            "| --- | --- |",
            *lines,
            "",
        ]
    )


def _facts(key: Any) -> str:
    """What a key is by default, what it may be, and when it counts."""
    default = f"`{key.default}`" if key.default not in ("", {}) else "empty"
    facts = [f"Default: {default}.", f"Takes: {allowed(key)}."]
    for chooser, owners in key.owners.items():
        facts.append(f"Only with `{chooser}` = {_list(owners)}.")
    if key.needs:
        facts.append(f"Only with {_list(key.needs)} set.")
    if not key.scientific:
        facts.append("Not part of a trial's id.")
    return "<br>\n".join(facts)


def _sentence(text: str) -> str:
    """A key's help as a sentence."""
    return f"{text[0].upper()}{text[1:]}."


def _list(names: Any) -> str:
    """Names as code, with commas."""
    return ", ".join(f"`{name}`" for name in names)


def python_page(name: str) -> str:
    """The public modules of a package, or a single module."""
    path = REPOSITORY / "softprompt" / name
    path = path if path.is_dir() else path.with_suffix(".py")
    files = sorted(path.rglob("*.py")) or [path]
    modules = [f"::: {_module(file)}" for file in files if _is_public(file)]
    if path.is_file():  # its own name is the page's title
        modules[0] += "\n    options:\n      show_root_heading: false"
    return "\n\n".join([f"# softprompt.{name}", *modules]) + "\n"


def _module(file: Path) -> str:
    """A file's name as a module."""
    parts = file.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def _is_public(file: Path) -> bool:
    """Whether a file defines a public function or class."""
    body = ast.parse(file.read_text()).body
    names = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return any(not name.startswith("_") for name in names)
