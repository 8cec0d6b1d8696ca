"""The floors of the library: an import never goes up."""

import ast
from pathlib import Path

import softprompt

ROOT = Path(softprompt.__file__).parent

# From the top down. A name is a folder or a file of softprompt/.
FLOORS = (
    ("__main__",),
    ("cli",),
    ("commands", "api"),
    ("pretraining", "serving"),
    ("trials",),
    ("analysis",),
    ("results",),
    ("config",),
    ("interchange",),
    ("evaluation",),
    ("inference",),
    ("training",),
    ("methods",),
    ("data",),
    ("pretrained",),
    ("models",),
    ("console", "distributed", "downloads", "files", "interrupts", "settings", "source"),
    ("errors",),
)


def imported(file: Path) -> set[str]:
    """The folders and files of softprompt/ that a file imports, wherever it does."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "softprompt":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("softprompt."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("softprompt.")]
            found |= {name.split(".")[1] for name in names}
    return found


def test_no_import_goes_up() -> None:
    """Breaks when a module imports one of a floor above it, or a folder has no floor."""
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    there = {
        path.stem for path in ROOT.iterdir() if path.name not in ("__init__.py", "__pycache__")
    }
    assert there == floor.keys()
    up = []
    for file in ROOT.rglob("*.py"):
        own = file.relative_to(ROOT).parts[0].removesuffix(".py")
        if own != "__init__":  # which imports the names of the API when they are used
            above = [name for name in imported(file) & floor.keys() if floor[name] < floor[own]]
            up += [f"{file.relative_to(ROOT)} imports {name}" for name in above]
    assert not up
