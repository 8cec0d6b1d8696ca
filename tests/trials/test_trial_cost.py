"""`train --dry-run`: the paper's trials on every set and size, traced at full size from shapes."""

import pytest

from softprompt import cli
from softprompt.config import base_config, validate
from softprompt.config.files import load_config
from softprompt.data.builtin_tasks import TASKS, get_task
from softprompt.trials import trial_cost
from softprompt.trials.trial_cost import PEAK, SHARE
from tests.matrix import matrix

SIZES = {  # parameters (the paper's Table 4), width
    "small": (76_961_152, 512),
    "base": (247_577_856, 768),
    "large": (783_150_080, 1024),
    "xl": (2_849_757_184, 2048),
    "xxl": (11_135_332_352, 4096),
}
SETS = [name for name, task in TASKS.items() if name.endswith("_dev")]


def paper(size, task):
    return load_config(f"configs/paper.py:{size},task={task}")


@pytest.mark.parametrize("size", SIZES)
def test_every_set_has_the_papers_setting(size):
    """Breaks when a set of the paper has no config, is not selected by generated answers, or is
    not measured by ranked candidates where it has some."""
    assert len(SETS) == 13
    for name in SETS:
        config = paper(size, name)
        validate(config)
        task = get_task(config.task)
        assert config.eval.metric in task.metrics["generation"] and config.task.form == "t5"
        named = config.eval.metrics.split(",")
        assert all(any(one in names for one in named) for names in task.metrics.values())
        assert (config.method.init == "vocabulary") == (name == "squad_dev")


@pytest.mark.parametrize("size", matrix(SIZES, keep=("small",)))
def test_a_step_is_traced_at_full_size(size):
    """Breaks when a step's shapes do not fit, or parameters are not the paper's."""
    found = trial_cost.trial_cost(paper(size, "boolq_dev"))
    parameters, width = SIZES[size]
    assert (found["frozen"], found["trained"]) == (parameters, 100 * width)
    assert (found["steps"], found["batch"]) == (30_000, 32)
    assert found["chip_hours"] == pytest.approx(found["flops"] / (PEAK * SHARE) / 3600)
    held = found["weight_bytes"] + found["delta_bytes"] + found["activation_bytes"]
    assert found["fits"] == (held <= 16 * 2**30)


def test_cost_of_a_trial_by_hand():
    """Breaks when a step counts the frozen model as trained, evaluations are left out, or the
    longest inputs are not what is counted."""
    config = paper("small", "rte_dev")
    # Matrices of T5 1.1 small, in a layer of encoder and decoder; what reads the encoder's states.
    d, h, f, layers, vocab = 512, 6 * 64, 1024, 8, 32128
    encoder, decoder, cross = (4 * d * h + 3 * d * f, 6 * d * h + 3 * d * f, 2 * d * h)
    own, inputs = 8, 612

    def forward(targets, sequences):
        matrices = layers * (encoder + cross) * inputs + layers * decoder * own * sequences
        keys = layers * (inputs**2 + sequences * own * (inputs + (own + 1) / 2))
        return 2 * (matrices + targets * vocab * d), 4 * h * keys

    products, attention = forward(own, 1)
    steps = 30_000 * 32 * (2 * products + 3 * attention)
    evaluations = 32 * 277 * sum(forward(2 * own, 2))  # 31 of validation, and the test
    found = trial_cost.trial_cost(config)
    assert found["flops"] == pytest.approx(steps + evaluations, rel=0.01)
    assert evaluations / steps > 0.004


@pytest.mark.parametrize("task", matrix(("record_dev", "wsc_dev", "squad_dev"), keep=("wsc_dev",)))
def test_sets_without_labels_are_traced(task, tmp_path, capsys):
    """Breaks when candidates of their own, or class-label words, do not go through."""
    words = ["train", "--config", f"configs/paper.py:small,task={task}", "--dry-run"]
    assert cli.main([*words, "--workdir", str(tmp_path / "w")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["trial", "steps", "memory", "cost"]
    assert "30,000 of 32 examples" in lines[1] and "v5e at 40%" in lines[3]
    assert not (tmp_path / "w").exists()


def test_what_is_in_no_catalogue_or_not_trained_on_is_one_line(tmp_path, capsys):
    """Breaks when a dry run loads a model, or a test-only set is trained on."""
    words = ["train", "--dry-run", "--workdir", str(tmp_path)]
    assert cli.main([*words, "--config.model.name=google/t5-smal-lm-adapt"]) == 2
    assert "(did you mean 'google/t5-small-lm-adapt'?)" in capsys.readouterr().err
    assert cli.main([*words, "--config", "configs/paper.py:small,task=mrqa_race"]) == 2
    assert "task 'mrqa_race' has no train split; allowed: test" in capsys.readouterr().err
    assert base_config().task.form == "prose"
