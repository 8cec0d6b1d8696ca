"""The house itself: what is locked, what importing costs, how long files are."""

import ast
import re
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from softprompt.methods import METHODS

REPOSITORY = Path(__file__).resolve().parent.parent
PYTHON_FILES = [
    path
    for folder in ("softprompt", "experiments", "configs", "notebooks", "tests")
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
]


def constraints() -> list[Requirement]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def project() -> dict:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


# Mutation: keep uv's annotations, or a "name @ address" line.
def test_constraints_hold_names_versions_and_markers_only():
    text = (REPOSITORY / "constraints.txt").read_text()
    assert not re.search(r"://|^-|@|\s/", text, re.MULTILINE)
    for requirement in constraints():
        assert [specifier.operator for specifier in requirement.specifier] == ["=="], requirement


# Mutation: add a dependency without `make lock`, or raise a lower bound past the locked version.
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
def test_constraints_satisfy_every_dependency(version):
    environment = {"python_version": version, "python_full_version": f"{version}.0"}
    environment |= {"sys_platform": "linux", "platform_machine": "x86_64", "extra": ""}
    locked = {
        canonicalize_name(requirement.name): next(iter(requirement.specifier)).version
        for requirement in constraints()
        if requirement.marker is None or requirement.marker.evaluate(environment)
    }
    extras = project()["optional-dependencies"].values()
    wanted = [*project()["dependencies"], *(line for lines in extras for line in lines)]
    for requirement in map(Requirement, wanted):
        if requirement.name != "torch":
            found = locked.get(canonicalize_name(requirement.name))
            assert found, f"{requirement} is not locked for Python {version}"
            assert requirement.specifier.contains(found), f"{requirement}, locked: {found}"


# Mutation: add tensorflow to an extra, or lock torch.
def test_neither_tensorflow_nor_torch_is_locked():
    assert not {"tensorflow", "tensorflow-cpu", "torch", "keras"} & {
        requirement.name for requirement in constraints()
    }


def run_python(code: str) -> tuple[str, float]:
    """The output of a fresh interpreter and the processor seconds it used."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.returncode == 0, done.stderr
    return done.stdout, used


HEAVY = ("jax", "flax", "transformers", "tensorflow_datasets", "torch", "tensorflow", "sklearn")


# Mutation: `import jax` at the top of cli.py, commands/base.py or errors.py.
@pytest.mark.parametrize("module", ["softprompt", "softprompt.cli"])
def test_help_is_instant(module):
    code = f"import sys, {module}; print(*(name for name in {HEAVY} if name in sys.modules))"
    run_python(code)  # compiles what is new
    loaded, seconds = run_python(code)
    assert loaded.split() == []
    assert seconds < 1.5


# Mutation: `import torch` in any module of the library.
def test_the_library_imports_neither_torch_nor_tensorflow():
    modules = [
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        for path in PYTHON_FILES
        if path.is_relative_to(REPOSITORY / "softprompt") and not path.stem.startswith("__")
    ]
    code = (
        f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\n"
        "print(*({'torch', 'tensorflow'} & set(sys.modules)))"
    )
    assert run_python(code)[0].split() == []


# Mutation: import `loading` or the catalogue, which builds every published model, for LoRA.
def test_a_method_and_its_files_need_no_catalogue():
    code = (
        "import sys, softprompt.methods.lora, softprompt.interchange.peft\n"
        "names = {f'softprompt.pretrained.{n}' for n in ('catalog', 'published')}\n"
        "print(*names & set(sys.modules))"
    )
    assert run_python(code)[0].split() == []


# Mutation: misspell a target in README.md.
@pytest.mark.parametrize(
    "page",
    [
        *("README.md", "CONTRIBUTING.md", "docs/tutorial.md", "docs/contributing.md"),
        "docs/measurements.md",
    ],
)
def test_documented_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    commands = r"(?:^ *(?:\$ )?|`|gemma )make ([a-z-]+)"  # in a code block or between backquotes
    named = set(re.findall(commands, (REPOSITORY / page).read_text(), re.MULTILINE))
    assert named
    assert named <= targets


# Mutation: append a hundred lines to any file near the limit.
def test_files_and_functions_stay_readable():
    long = []
    for path in PYTHON_FILES:
        text = path.read_text()
        if text.count("\n") > 400:
            long.append(f"{path.relative_to(REPOSITORY)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                long.append(f"{path.relative_to(REPOSITORY)}:{node.lineno} {node.name}")
    assert long == []


def test_no_code_outside_methods_asks_a_methods_name():
    """Settings say what a method can do. Breaks on `config.method.name == "prefix"` anywhere else,
    by which a new method would have to be looked for all over the library.
    """
    found = []
    for path in PYTHON_FILES:
        if REPOSITORY / "softprompt" in path.parents and path.parent.name != "methods":
            for node in ast.walk(ast.parse(path.read_text())):
                sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
                words = {
                    one.value
                    for side in sides
                    for one in ast.walk(side)
                    if isinstance(one, ast.Constant)
                } - {"name"}
                asked = any("method" in ast.unparse(side) for side in sides)
                if asked and words & METHODS.keys():
                    found.append(f"{path.relative_to(REPOSITORY)}:{node.lineno}")
    assert found == []
