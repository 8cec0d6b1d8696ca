"""Recipes: what a pretraining run is. A run depends on its recipe and on its corpus only."""

import dataclasses
import hashlib
import json
import math
import re
import runpy
from pathlib import Path
from typing import Any

from softprompt.errors import UserError, nearest
from softprompt.models import ModelConfig
from softprompt.models.decoder import DecoderConfig
from softprompt.pretrained.ladder import PREFIX, RUNGS

ROW = 256  # positions of a row
CORPUS = ("addresses", "bibles", "headlines", "snippets", "questions")
EPOCH = 5_200_000  # about the tokens of the corpus
SNAPSHOTS = {"@1of8": 1 / 8, "@1of4": 1 / 4, "@1of2": 1 / 2, "": 1.0}
ADAPTED = {"@lm10": 0.1, "@lm50": 0.5, "@lm100": 1.0}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A pretraining run.

    Attributes:
        name: of the model, "ladder/NAME".
        config: its sizes.
        objective: "causal", "span_corruption" or "prefix_lm".
        tokens: tokens of text that it is trained on, about.
        keep: suffix of the name of each model that is kept, and its share of the steps.
        start: name of the model that it begins with; "" for random weights.
        corpus: sources of `softprompt.pretraining.corpus`, or paths of text files.
        row: positions of a row.
        rows: rows of a step.
        chunk: positions of a row whose logits exist at a time.
        rate: peak learning rate of AdamW.
        warmup: share of the steps with a rising rate; a cosine to zero follows.
        b2: decay of AdamW's second moment.
        weight_decay: of AdamW.
        clip: largest global norm of the gradient.
        dtype: of the computation; the trained weights are float32.
        seed: of the first weights and of the order of the rows.
    """

    name: str
    config: ModelConfig
    objective: str = "causal"
    tokens: int = EPOCH
    keep: dict[str, float] = dataclasses.field(default_factory=lambda: dict(SNAPSHOTS))
    start: str = ""
    corpus: tuple[str, ...] = CORPUS
    row: int = ROW
    rows: int = 16
    chunk: int = 32
    rate: float = 3e-3
    warmup: float = 0.05
    b2: float = 0.95
    weight_decay: float = 0.1
    clip: float = 1.0
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        kind = "causal" if isinstance(self.config, DecoderConfig) else "span_corruption, prefix_lm"
        if self.objective not in kind.split(", "):
            raise UserError(f"{self.name}: objective {self.objective!r}; allowed: {kind}")
        if not re.fullmatch(f"{PREFIX}[\\w.-]+(@lm)?", self.name):
            raise UserError(f"recipe's name {self.name!r}; allowed: {PREFIX}NAME")
        if self.tokens < 1 or not self.keep or max(self.keep.values()) != 1:
            raise UserError(f"{self.name}: allowed: tokens above 0, and a kept share of 1")

    @property
    def hash(self) -> str:
        """12 hex digits that identify the recipe, and the one that it starts from.

        Fields of `config` that have their defaults are left out, so that a new one changes no hash.
        """
        tree = dataclasses.asdict(self)
        usual = {field.name: field.default for field in dataclasses.fields(self.config)}
        tree["config"] = {k: v for k, v in tree["config"].items() if v != usual[k]}
        first = recipe_of(self.start).hash if self.start else ""
        content = json.dumps([tree, first], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def steps(self, tokens: int) -> int:
        """Steps of `tokens` tokens of text, such that every kept share is a number of steps."""
        unit = math.lcm(*(round(1 / share) for share in self.keep.values()))
        return unit * max(1, round(self.tokens / tokens / unit))

    @property
    def every(self) -> float:
        """The largest share of the steps of which all kept shares are multiples."""
        return 1 / math.lcm(*(round(1 / share) for share in self.keep.values()))

    def kept(self, suffix: str) -> str:
        """The name of a kept model."""
        return self.name.removesuffix("@lm") + suffix


def _ladder() -> dict[str, Recipe]:
    """The recipes of the ladder."""
    made = {}
    rates = {"d0": 6e-3, "d1": 5e-3, "d2": 4e-3, "d3": 3e-3, "d4": 2e-3, "t0": 5e-3, "t1": 3e-3}
    for name, config in RUNGS.items():
        rate = rates[name.removeprefix(PREFIX)]
        if isinstance(config, DecoderConfig):
            made[name] = Recipe(name, config, rate=rate)
            continue
        made[name] = Recipe(name, config, "span_corruption", rate=rate)
        adapted: dict[str, Any] = {"tokens": EPOCH // 2, "keep": dict(ADAPTED), "start": name}
        made[f"{name}@lm"] = Recipe(f"{name}@lm", config, "prefix_lm", rate=rate / 2, **adapted)
    return made


RECIPES = _ladder()


def recipe_of(name: str) -> Recipe:
    """The recipe of the ladder that makes a model.

    Args:
        name: such as "ladder/d1", "ladder/d1@1of8" or "ladder/t0@lm10".

    Raises:
        UserError: no recipe makes it.
    """
    for recipe in RECIPES.values():
        if name in (recipe.name, *map(recipe.kept, recipe.keep)):
            return recipe
    if name.endswith("@lm0"):
        return recipe_of(name.removesuffix("@lm0"))
    raise UserError(
        f"unknown model {name!r} of the ladder{nearest(name, RECIPES)}; known: {', '.join(RUNGS)}, "
        f"with {', '.join(filter(None, SNAPSHOTS))}, or of a t-model @lm0, {', '.join(ADAPTED)}"
    )


def load_recipe(name: str) -> Recipe:
    """The recipe of a name of the ladder, or of a Python file that defines `RECIPE`.

    Raises:
        UserError: no such name, or the file defines no recipe.
    """
    if not name.endswith(".py"):
        return recipe_of(name)
    file = Path(name).expanduser()
    if not file.is_file():
        raise UserError(f"recipe {name!r}: no such file")
    try:
        recipe = runpy.run_path(str(file)).get("RECIPE")
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{file}: {type(error).__name__}: {error}") from error
    if not isinstance(recipe, Recipe):
        raise UserError(f"{file}: RECIPE is {recipe!r}; allowed: a Recipe")
    if recipe.name in RECIPES:
        raise UserError(f"{file}: RECIPE is named {recipe.name!r}, a name of the ladder")
    return recipe
