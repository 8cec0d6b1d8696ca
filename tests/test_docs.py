"""The documentation: its commands and Python run on a tiny model, and what cannot run here parses.

Each page is read from top to bottom. A fenced block with a title is a file of the reader's,
`python` and `sh` blocks are run, and a block after `<!-- not run: reason -->` is only parsed.
"""

import inspect
import json
import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import pytest
import uvicorn

import softprompt as sp
from softprompt import cli
from softprompt.config import base_config, flatten, set_key
from softprompt.data.builtin_tasks import TASKS
from softprompt.data.tasks import Task
from softprompt.methods import METHODS
from softprompt.pretrained.catalog import CATALOG
from softprompt.trials.experiment import load_experiment
from tests.own_task import BAD, ENDINGS, GOOD, give
from tests.tiny import write_llama_folder

REPOSITORY = Path(__file__).parents[1]
PAGES = [
    str(page.relative_to(REPOSITORY))
    for page in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md")))
]
MODEL = "smollm2-135m-instruct-q4"
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n\n)?"
    r'^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$',
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block; `reason` says why it does not run here, "" where it does."""

    page: str
    language: str
    title: str
    reason: str
    text: str


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page."""
    text = (REPOSITORY / page).read_text()
    found = [Block(page, **match.groupdict(default="")) for match in BLOCK.finditer(text)]
    assert len(re.findall("^```", text, re.MULTILINE)) == 2 * len(found), "a block is not read"
    return found


ALL = [block for page in PAGES for block in blocks(page)]


def commands(block: Block) -> Iterator[tuple[str, list[str]]]:
    """What each line of a `sh` block gives to a program, and the program with its arguments."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        given = ""
        if "|" in words:
            pipe = words.index("|")
            assert words[0] == "echo", line
            given, words = " ".join(words[1:pipe]) + "\n", words[pipe + 1 :]
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # NAME=value before the program
            words = words[1:]
        if words:
            yield given, [Path(words[0]).name, *words[1:]]


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse_and_keys_exist(page):
    """Breaks when a command, an argument, an experiment or a config key of the docs is renamed."""
    config = base_config()
    for block in blocks(page):
        for _, (program, *words) in commands(block) if block.language == "sh" else ():
            if program != "softprompt":
                continue
            arguments, overrides = cli.parse(words)
            for key, value in overrides:
                set_key(config, key, value)
            experiment = getattr(arguments, "experiment", None)
            if experiment and not experiment.endswith(".py"):
                load_experiment(experiment)
    sections = "|".join(key for key, value in config.items() if key != "seed")
    named = re.findall(
        rf"`(?:--config\.)?((?:{sections})\.\w+)[=`]", (REPOSITORY / page).read_text()
    )
    assert set(named) <= flatten(config).keys()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_files_that_are_linked_exist(page):
    """Breaks when a page of docs/ is renamed. Links between pages of docs/ `make docs` checks."""
    links = re.findall(r"\]\(([^):#]+)\)", (REPOSITORY / page).read_text())
    assert links
    assert [link for link in links if not (REPOSITORY / link).exists()] == []


def test_every_method_has_a_section():
    """Breaks when a method has no section in the guide to methods."""
    text = (REPOSITORY / "docs/guides/methods.md").read_text()
    titles = " ".join(re.findall("^## (.*)$", text, re.MULTILINE)).split()
    assert METHODS.keys() <= set(titles)


def test_few_blocks_do_not_run():
    """Breaks when blocks are marked "not run" rather than mended."""
    not_run = [block for block in ALL if block.reason]
    assert len(not_run) <= 23, [f"{block.page}: {block.reason}" for block in not_run]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A reader's folder with the tutorial's first trial; the default model and tasks are tiny."""
    folder = tmp_path_factory.mktemp("desk")
    write_llama_folder(folder / MODEL, width=16, layers=2, heads=2, kv_heads=1, context=1024)
    device = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delitem(CATALOG, MODEL)  # so that the name is the folder's
        patch.setattr(jax, "devices", lambda: device)  # programs of one device compile sooner
        patch.setattr(jax, "device_count", lambda: 1)
        patch.setattr(uvicorn.Server, "run", lambda server, sockets: None)  # ends at once
        for name, task in TASKS.items():
            if task.fields == ("text",) and task.verbalizers:
                patch.setitem(TASKS, name, tiny_task(folder / "data", task))
        first = ["train", "--config", "configs/quickstart.py", "--workdir", "runs/first"]
        assert cli.main(first) == 0
        yield folder


def tiny_task(folder: Path, task: Task) -> Task:
    """The same task over a few lines."""
    folder.mkdir(exist_ok=True)
    texts = [f"{word} {end}" for end in ENDINGS[:3] for word in (*GOOD, *BAD)]
    labels = list(task.verbalizers)
    lines = [
        json.dumps({"text": text, "label": labels[number % len(labels)]}) + "\n"
        for number, text in enumerate(texts)
    ]
    for split in ("train", "validation", "test"):
        (folder / f"{task.name}-{split}.jsonl").write_text("".join(lines))
    source = f"jsonl:{folder}/{task.name}-{{split}}.jsonl"
    return Task(task.name, source, task.template, task.verbalizers)


RUN = [block for block in ALL if block.language in ("sh", "python") and not block.reason]


@pytest.mark.matrix
@pytest.mark.parametrize("page", dict.fromkeys(block.page for block in RUN))
def test_blocks_run(page, desk, monkeypatch):
    """Breaks when a command or Python of the docs no longer does what its page says."""
    names: dict[str, object] = {}
    for block in blocks(page):
        if block.title:
            (desk / block.title).write_text(block.text)
        elif block not in RUN:
            continue
        elif block.language == "python":
            exec(compile(block.text, f"{page}: {block.text[:40]!r}", "exec"), names)
        else:
            for given, (program, *words) in commands(block):
                assert program == "softprompt", f"{page}: {program} does not run in this test"
                give(monkeypatch, given)
                assert cli.main(words) == 0, f"{page}: softprompt {' '.join(words)}"


IN_A_NOTEBOOK = (
    *(sp.load_model, sp.make_config, sp.train, sp.load_trial, sp.Trial.evaluate, sp.Trial.predict),
    *(sp.Trial.generate, sp.Trial, sp.sweep, sp.rows, sp.plot_lengths, sp.plot_learning),
)


@pytest.mark.matrix
def test_examples_of_the_api_run(desk):
    """Breaks when an example no longer does what its docstring says, or a name has none."""
    assert {one.__name__ for one in IN_A_NOTEBOOK} > {*sp.__all__} - {"Loaded"}
    names: dict[str, object] = {"sp": sp}
    for one in IN_A_NOTEBOOK:
        code = re.search("^Example:\n(.*)", inspect.getdoc(one), re.MULTILINE | re.DOTALL)
        exec(textwrap.dedent(code[1]), names)
