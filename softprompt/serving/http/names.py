"""Names of tasks and of A/B aliases, and the folders that they stand for."""

import bisect
import dataclasses
import hashlib
import itertools
import math
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

from softprompt.errors import UserError
from softprompt.serving.http.errors import Refusal

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,127}")
ALLOWED = "1 to 128 letters, digits and . _ + -, the first a letter, a digit or _"
MARKS = ("delta.safetensors", "adapter_config.json")  # a trial's folder, a PEFT adapter


def find_tasks(root: Path) -> list[str]:
    """The names of the tasks under a root: the folders in it that hold a trial or an adapter.

    Raises:
        UserError: no such folder, or no task in it.
    """
    if not root.is_dir():
        raise UserError(f"no folder {str(root)!r}; give one whose folders are trials")
    names = sorted(child.name for child in root.iterdir() if NAME.fullmatch(child.name))
    found = [name for name in names if any((root / name / mark).is_file() for mark in MARKS)]
    if not found:
        raise UserError(f"{root}: no folder in it holds {' or '.join(MARKS)}")
    return found


def task_folder(root: Path, name: str) -> Path:
    """The folder of a task, by its name alone; neither it nor what it holds may lie elsewhere.

    Raises:
        Refusal: not a name, no such folder, or a link that leaves the root.
    """
    if not NAME.fullmatch(name):
        raise Refusal(f"the task's name is {name[:128]!r}; allowed: {ALLOWED}")
    folder, home = root / name, root.resolve()
    if not any((folder / mark).is_file() for mark in MARKS):
        raise Refusal(f"task {name!r}: no folder of this name holds {' or '.join(MARKS)}", 404)
    for path in (folder, *folder.iterdir()):
        if not path.resolve().is_relative_to(home):
            raise Refusal(f"task {name!r}: {path.name!r} is a link that leaves the root")
    return folder


@dataclasses.dataclass(frozen=True)
class Alias:
    """A name that stands for one of several tasks, its arms.

    Attributes:
        name: of the alias.
        arms: names of tasks; the first is what the others are compared with.
        weights: of the arms, positive.
    """

    name: str
    arms: tuple[str, ...]
    weights: tuple[float, ...]

    def arm(self, user: str) -> str:
        """The arm of a user: always the same for the same weights. "" draws one."""
        digest = hashlib.sha256(f"{self.name}\0{user or secrets.token_hex(16)}".encode()).digest()
        ends = list(itertools.accumulate(self.weights))
        share = int.from_bytes(digest[:8], "big") / 2**64
        return self.arms[min(bisect.bisect_right(ends, share * ends[-1]), len(ends) - 1)]


def parse_alias(text: str) -> Alias:
    """Reads an alias such as "sentiment=short:0.9,long:0.1".

    Raises:
        UserError: another form, a weight that is not positive, or an arm named twice.
    """
    name, _, rest = text.partition("=")
    arms, weights = [], []
    for part in rest.split(","):
        arm, _, weight = part.rpartition(":")
        arms.append(arm)
        try:
            weights.append(float(weight))
        except ValueError:
            weights.append(math.nan)
    names = [name, *(part for arm in arms for part in arm.split(":", 1))]  # TRIAL:TASK
    named = all(map(NAME.fullmatch, names)) and len(set(arms)) == len(arms)
    if not named or not all(0 < weight < math.inf for weight in weights):
        raise UserError(
            f"--alias is {text!r}; allowed: NAME=TASK:WEIGHT,TASK:WEIGHT with different tasks and "
            "positive weights"
        )
    return Alias(name, tuple(arms), tuple(weights))


def check_aliases(aliases: Sequence[Alias], taken: Sequence[str]) -> None:
    """Checks that aliases have names of their own, and arms among the tasks.

    Args:
        aliases: to check.
        taken: names of the base model and of the tasks.

    Raises:
        UserError: a name is taken, or an arm is not a task.
    """
    if taken[0] in taken[1:]:
        raise UserError(f"task {taken[0]!r} has the name of the model; rename its folder")
    used = set(taken)
    for alias in aliases:
        if alias.name in used:
            raise UserError(f"--alias {alias.name}: the name is taken; give another")
        used.add(alias.name)
        for arm in alias.arms:
            if arm.partition(":")[0] not in taken[1:]:
                raise UserError(f"--alias {alias.name}: {arm!r} is no task of the root")
