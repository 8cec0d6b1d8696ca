"""The grid: which model, text, method and length is trained by which system, and in what order."""

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.bench.measure import FEWEST, cores
from softprompt.errors import UserError, unknown

MODELS = {
    "smollm2": "smollm2-135m-instruct-q4",
    "gemma3": "gemma3-270m-q4",
    "t5-small": "random google/t5-v1_1-small",  # no package carries trained weights
}
LENGTHS = (1, 20, 100, 500)
METHODS = ("prompt", "prefix", "lora", "full")
# A T5's prompt that does not attend to the input: keys and values that all examples share.
APART = "prompt, apart"
OWN_CONFIG = {APART: {"method.name": "prompt", "method.prompt_to_input": False}}
SAVINGS = ("context", "packing", "targets")  # what `experiments.bench.forms` switches off
DTYPES = ("bfloat16", "float32")

EXAMPLES = 16  # a step
WARMUP = 1  # steps of a process that are not counted
SPAN, PROCESSES = 100, 10  # steps that a process has examples for, and times that all take turns
TWICE = 2  # the most that a system stands in one turn
CHECKED = 3  # steps whose losses must agree with a saving and without it
LIMIT = 115.0  # seconds of timed steps after which a process begins no further one

# Tokens an example takes, about, and seconds that 1,000 positions take here on two x86 cores, and
# how many times that PEFT needs: what the time left is guessed from until there is something to go
# by.
LONG = {"movie": 35, "passage": 150}
SLOW = {
    "smollm2": {"bfloat16": 2.0, "float32": 3.3},
    "gemma3": {"bfloat16": 3.5, "float32": 6.0},
    "t5-small": {"bfloat16": 0.5, "float32": 0.8},
}
SLOWER = 2.0


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is trained. `length` is P of a prompt or prefix, 0 for other methods."""

    model: str
    text: str
    method: str
    length: int = 0


@dataclasses.dataclass(frozen=True)
class System:
    """What trains it.

    Attributes:
        side: "ours" or "peft".
        dtype: of weights and compute; "auto" is what this library would choose.
        off: the saving of ours that is switched off, one of `SAVINGS`, or "".
    """

    side: str
    dtype: str = "auto"
    off: str = ""


@dataclasses.dataclass(frozen=True)
class Task:
    """One process.

    Attributes:
        cell: what is trained.
        system: by what.
        purpose: "time"; "losses" of the first steps; or "threads", which number of them is best.
        process: 0, 1, ...: those of one system take different steps of the same run.
        steps: that are timed.
    """

    cell: Cell
    system: System
    purpose: str = "time"
    process: int = 0
    steps: int = 10

    @property
    def key(self) -> dict[str, Any]:
        """The part of its row that says what it is."""
        rest = {"purpose": self.purpose, "process": self.process, "steps": self.steps}
        return dataclasses.asdict(self.cell) | dataclasses.asdict(self.system) | rest

    @property
    def identity(self) -> str:
        """The same as text."""
        return json.dumps(self.key)

    @property
    def name(self) -> str:
        """For people."""
        parts = [*dataclasses.astuple(self.cell), *dataclasses.astuple(self.system)]
        words = [str(part) for part in parts if part]
        return " ".join(words + ([f"({self.purpose})"] if self.purpose != "time" else []))

    def guess(self) -> float:
        """Seconds that it may take on two x86 cores."""
        dtype = "bfloat16" if self.system.dtype == "auto" else self.system.dtype
        rate = SLOW.get(self.cell.model, SLOW["smollm2"])[dtype] / 1000
        own = EXAMPLES * LONG[self.cell.text]
        peft = self.system.side == "peft"
        again = EXAMPLES if peft or self.system.off == "context" else 1
        step = rate * (own + again * self.cell.length) * (SLOWER if peft else 1.0)
        return 12 + min(LIMIT + 3 * step, (self.steps + WARMUP) * step)


KEY = tuple(Task(Cell("", "", ""), System("")).key)


def identity(row: Mapping[str, Any]) -> str:
    """The `Task.identity` of what a row is of."""
    return json.dumps({name: row.get(name) for name in KEY})


def plan(subset: str, *, processes: int, steps: int) -> list[Task]:
    """The processes of "claimed", "t5" or "full", in order: systems of a cell take turns.

    Raises:
        UserError: another subset, too many steps or processes, or none.
    """
    for flag, value, most in (
        ("--steps", steps, SPAN - WARMUP),
        ("--processes", processes, PROCESSES),
    ):
        if not 1 <= value <= most:
            raise UserError(f"{flag} is {value}; allowed: 1 to {most}")
    subsets = {"claimed": claimed, "t5": t5, "full": full}
    if subset not in subsets:
        raise unknown("subset", subset, subsets)
    return list(subsets[subset](processes, steps))


def claimed(processes: int, steps: int) -> Iterator[Task]:
    """What the README says of speed, and no more.

    Where nothing is claimed against PEFT in float32 it only has to be seen that bfloat16 is the
    quicker: by one step on Gemma 3, and at P = 20 by the processes that try its threads. At
    P = 500 a step of it takes minutes and 17 GB.
    """
    yield from threads()
    ours, bfloat16, float32 = System("ours"), System("peft", "bfloat16"), System("peft", "float32")
    for model, length in (("smollm2", 100), ("smollm2", 20), ("smollm2", 500), ("gemma3", 100)):
        cell = Cell(model, "movie", "prompt", length)
        whole = (model, length) == ("smollm2", 100)
        # Ours stands beside what it is compared with: a machine's speed changes with the minutes.
        more = [float32, ours, *(System("ours", off=one) for one in SAVINGS)] if whole else []
        yield from turns([(cell, one) for one in (bfloat16, ours, *more)], processes, steps)
        if model == "gemma3":
            yield Task(cell, float32, steps=1)
    yield from t5(processes, steps)
    yield from losses("smollm2")


def t5(processes: int, steps: int) -> Iterator[Task]:
    """What the README says of a T5, inline and as a context of its own."""
    systems = System("peft", "bfloat16"), System("peft", "float32"), System("ours")
    for length in (20, 100):
        cell, apart = (Cell("t5-small", "movie", name, length) for name in ("prompt", APART))
        pairs = [*((cell, one) for one in systems), (apart, systems[-1])]
        yield from turns(pairs, processes, steps)


def full(processes: int, steps: int) -> Iterator[Task]:
    """All models, texts, methods, lengths, dtypes and savings."""
    both = [System(side, dtype) for dtype in DTYPES for side in ("ours", "peft")]
    off = [System("ours", off=off) for off in SAVINGS]
    yield from threads()
    for model in ("smollm2", "gemma3"):
        for text, method in itertools.product(LONG, METHODS):
            for length in LENGTHS if method in ("prompt", "prefix") else (0,):
                systems = both + (off if method == "prompt" else [])
                cell = Cell(model, text, method, length)
                yield from turns([(cell, one) for one in systems], processes, steps)
        yield from losses(model)


def turns(pairs: Sequence[tuple[Cell, System]], processes: int, steps: int) -> Iterator[Task]:
    """The pairs one after another, and again; one that stands twice has two processes a turn."""
    begun: Counter[tuple[Cell, System]] = Counter()
    for _, pair in itertools.product(range(processes), pairs):
        yield Task(*pair, "time", begun[pair], steps)
        begun[pair] += 1


def threads() -> Iterator[Task]:
    """One process a dtype that tries PEFT's numbers of threads."""
    for dtype in DTYPES:
        cell = Cell("smollm2", "movie", "prompt", 20)
        yield Task(cell, System("peft", dtype), "threads", steps=FEWEST)


def losses(model: str) -> Iterator[Task]:
    """The first losses with all savings and without each, in float32."""
    for off in ("", *SAVINGS):
        system = System("ours", "float32", off)
        yield Task(Cell(model, "movie", "prompt", 100), system, "losses", steps=CHECKED - WARMUP)


def folders(workdir: Path, model: str) -> dict[str, str]:
    """Where a model's Hugging Face folder of each dtype is."""
    return {dtype: str(workdir / "models" / f"{model}-{dtype}") for dtype in DTYPES}


def examples_file(workdir: Path, cell: Cell) -> str:
    """Where the examples of all steps are.

    A prompt before a T5's input takes room in the rows, and so decides which examples share a step.
    """
    own = f"-{cell.method}-{cell.length}".replace(", ", "-") if cell.model.startswith("t5") else ""
    return str(workdir / "examples" / f"{cell.model}-{cell.text}{own}.npz")


def text_config(workdir: Path, text: str) -> dict[str, Any]:
    """Config keys of a text's task."""
    few = {"data.validation_examples": 16, "data.test_examples": 16}
    if text == "movie":
        return {"task.name": "movie_sentiment", **few}
    return {
        "task.name": "passages",
        "task.source": f"jsonl:{workdir / 'passages.jsonl'}",
        "task.template": "Passage: {passage}\nAnswer:",
        "task.verbalizers": {"no": " False", "yes": " True"},
        **few,
    }


def cell_config(workdir: Path, cell: Cell) -> dict[str, Any]:
    """Config keys of a cell, but for its model and length."""
    own = OWN_CONFIG.get(cell.method, {"method.name": cell.method})
    return text_config(workdir, cell.text) | {"train.batch": EXAMPLES} | own


def job(task: Task, workdir: Path, *, best_threads: Mapping[str, int]) -> dict[str, Any]:
    """What a process is told.

    Args:
        task: which one.
        workdir: of the whole benchmark.
        best_threads: PEFT's, by dtype.
    """
    cell, dtype = task.cell, task.system.dtype
    tried = sorted({1, cores()})
    best = best_threads.get(dtype, cores())
    return task.key | {
        "warmup": WARMUP,
        "start": task.process * SPAN,
        "limit": LIMIT,
        "rate": 1e-5 if cell.method == "full" else 1e-3,
        "config": cell_config(workdir, cell),
        "folders": folders(workdir, cell.model),
        "examples": examples_file(workdir, cell),
        "cache": str(workdir / "compiled"),
        "threads": tried if task.purpose == "threads" else [best],
    }
