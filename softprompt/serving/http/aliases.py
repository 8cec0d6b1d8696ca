"""A/B aliases: names that stand for one of several tasks."""

import bisect
import dataclasses
import hashlib
import itertools
import math
import secrets
from collections.abc import Collection, Iterable, Sequence

from softprompt.errors import UserError, unknown
from softprompt.serving.folders import NAME


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
    """Checks that aliases have names of their own, and arms among the folders of the root.

    Which tasks a trial has is known when it is loaded; see `check_arms`.

    Args:
        aliases: to check.
        taken: names of the base model and of the folders.

    Raises:
        UserError: a name is taken, or an arm's folder is not there.
    """
    if taken[0] in taken[1:]:
        raise UserError(f"task {taken[0]!r} has the name of the model; rename its folder")
    used = set(taken)
    for alias in aliases:
        if alias.name in used:
            raise UserError(f"--alias {alias.name}: the name is taken; give another")
        used.add(alias.name)
        check_arms(alias, [arm.partition(":")[0] for arm in alias.arms], taken[1:])


def check_arms(alias: Alias, arms: Iterable[str], tasks: Collection[str]) -> None:
    """Checks that an alias' arms, or the trials that have them, are among the tasks.

    Raises:
        UserError: an arm is not.
    """
    for arm in arms:
        if arm not in tasks:
            raise unknown(f"arm of --alias {alias.name}", arm, tasks)
