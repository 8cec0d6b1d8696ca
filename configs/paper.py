"""The paper's default setting on one of its sets: 100 vectors on a frozen, LM-adapted T5.

Question: does a prompt trained as Lester et al. 2021 trained theirs reach what they report?
The argument chooses the size and the task, as in `configs/paper.py:xl,task=rte_dev`.

Command:
    softprompt train --config configs/paper.py:base --workdir runs/paper_base
    softprompt train --config configs/paper.py:xxl,task=record_dev --workdir runs/x --dry-run

Cost: 30,000 steps of 32 examples, by arithmetic about 1e17 operations at base size (250 positions
an example): four days at 300 GFLOP/s (two CPU cores), 17 minutes at 100 TFLOP/s. Not measured. With
--dry-run the step is traced at full size, and memory and chip-hours of a v5e are printed.

Expected: not run here. SPoT (arXiv 2110.07904, Table 4) prints the paper's SuperGLUE averages:
59.8, 63.1, 74.5, 79.2 and 88.8 for small to XXL. BoolQ by itself is printed for XXL alone: 91.1 on
average over five prompts (the paper's Table 3).

As in the paper, text is in T5's form, generated answers select the delta and are reported (ranked
candidates are measured beside them), and the development set does both (tasks named NAME_dev; a
plain NAME selects on a tenth of train). SQuAD's prompt is selected by F1 and evaluated on MRQA's
sets with `softprompt evaluate --task mrqa_race`. What differs: a target longer than max_target is
an error rather than cut, so answers have room for 64 tokens, or 128 to questions.

Source: arXiv 2104.08691, section 3 and Appendix A; lengths, z-loss and dropout from its released
configs (and, for the rate of the latter, T5X's for fine-tuning, which they include).
"""

from ml_collections import ConfigDict

from softprompt.config import base_config
from softprompt.config.files import parse_arg
from softprompt.data.builtin_tasks import get_task
from softprompt.errors import UserError

SIZES = ("small", "base", "large", "xl", "xxl")


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config of one prompt.

    Args:
        arg: a size, "small", "base" (the default), "large", "xl" or "xxl", and "task=NAME,seed=0".

    Raises:
        UserError: two sizes, or an unknown argument.
    """
    given = parse_arg(arg, **dict.fromkeys(SIZES, False), task="boolq_dev", seed=0)
    sizes = [size for size in SIZES if given[size]] or ["base"]
    if len(sizes) > 1:
        raise UserError(f"config argument {arg!r} names {' and '.join(sizes)}; allowed: one size")
    config = base_config()
    config.seed = given.seed
    config.model.name = f"google/t5-{sizes[0]}-lm-adapt"
    config.method.length, config.method.common_text = 100, "vocabulary"
    config.task.name, config.task.form = given.task, "t5"
    config.task.max_input, config.task.eos = 512, True
    task = get_task(config.task)
    questions = "context" in task.fields
    config.task.max_target = 8 if task.verbalizers else 128 if questions else 64
    config.method.init = "labels" if task.verbalizers or task.words else "vocabulary"
    score = "generated_task_score" if task.reported else "generated_accuracy"
    config.eval.metric = "f1" if questions else score
    config.eval.metrics = ",".join(names[0] for names in task.metrics.values())
    config.optimizer.name, config.optimizer.weight_decay = "adafactor_t5x", 1e-5
    config.optimizer.rate, config.optimizer.schedule = 0.3, "constant"
    config.train.steps, config.train.batch, config.train.z_loss = 30_000, 32, 1e-4
    config.train.dropout = 0.1
    config.eval.every = config.log.checkpoint_every = 1000
    config.log.every = 100
    return config
