"""The sections of a config that say which examples a trial has, and how they become text."""

import dataclasses

from softprompt.errors import UserError
from softprompt.settings import Settings, setting

SEEDS = 2**32 - 1  # the largest seed

# Keys of the section `task` that apply only to the task it names, not to others of a mixture.
TASK_KEYS = (
    *("source", "template", "verbalizers"),
    *("label_field", "id_field", "group_field", "candidates_field"),
)


@dataclasses.dataclass(frozen=True)
class Task(Settings):
    """The task, and how its examples are turned into text."""

    section = "task"

    name: str = setting(
        "movie_sentiment", "a known task (`softprompt data`), or any name if `source` is set"
    )
    source: str = setting(
        "",
        "own data: tfds:NAME, or jsonl:, tsv:, csv: or mrqa:PATH; {split} in it stands for train, "
        "validation or test; without it, a file is split 8:1:1 by a hash of each id, or each text",
    )
    form: str = setting(
        "prose",
        "how a known task becomes text: prose, or t5 (`name: value` pairs of its fields, the bare "
        "label as target, as in the paper; a generated label must match exactly)",
        choices=("prose", "t5"),
    )
    template: str = setting(
        "", 'input text with {field} placeholders; the target follows it; "" is the task\'s own'
    )
    verbalizers: dict[str, str] = setting(
        {},
        "label -> target text, with its leading space; {} is the task's own; for own data, {} is a "
        "free-text task, whose targets are the answers",
    )
    label_field: str = setting(
        "label",
        "own data: the field that holds the label, or the answer (in JSON also a list of right "
        'answers); "" means that examples have none',
    )
    id_field: str = setting(
        "", 'own data: the field with an example\'s id; "" makes ids from line numbers or hashes'
    )
    group_field: str = setting(
        "",
        "own data: the field that names an example's group, such as its question. A group is in "
        "one split, and group_match is the share of groups that are right as a whole",
    )
    candidates_field: str = setting(
        "",
        "own data: the field with a list of the example's own candidates, of which the answer is "
        "one; they are ranked where eval.metric is accuracy",
    )
    max_input: int = setting(
        256,
        "largest number of tokens of an input; a longer input loses the end of its longest field",
        low=1,
    )
    max_target: int = setting(
        32, "largest number of tokens of a target; a longer one is an error", low=1
    )
    eos: bool = setting(False, "end each target with EOS")

    def check(self) -> None:
        """Checks the source of own data, and that the template it needs is set."""
        if not self.source:
            return
        if not self.source.startswith(("jsonl:", "tsv:", "csv:", "mrqa:", "tfds:")):
            raise UserError(
                f"config key 'task.source' is {self.source!r}; "
                "allowed: jsonl:PATH, tsv:PATH, csv:PATH, mrqa:PATH or tfds:NAME"
            )
        if not self.template:
            raise UserError(
                f"config key 'task.template' is empty; task.source={self.source} needs it"
            )


@dataclasses.dataclass(frozen=True)
class Data(Settings):
    """The examples."""

    section = "data"

    mixture: str = setting(
        "",
        "tasks to train on together instead of task.name alone, separated by commas: known tasks, "
        "and task.name for the one that `task` defines; or a JSON list, in which "
        '{"name": ..., "source": ...} has the keys of `task` for one task. "" is one task. Tasks '
        "are mixed in proportion to their examples and scored separately; their unweighted mean "
        "selects the delta. The sizes below are per task",
    )
    cap: int = setting(
        0,
        "largest number of training examples of a task; a larger task is cut to a balanced subset; "
        "0 is all",
        low=0,
    )
    train_examples: int = setting(
        0, "train on a balanced subset of this many examples; 0 is all", low=0
    )
    subset_seed: int = setting(
        0,
        "seed of the subsets of train_examples and cap",
        low=0,
        high=SEEDS,
        needs=("train_examples", "cap"),
    )
    validation_examples: int = setting(
        0, "validate on a seeded sample of this many examples; 0 is all", low=0
    )
    test_examples: int = setting(
        0, "test on a seeded sample of this many examples; 0 is all", low=0
    )
