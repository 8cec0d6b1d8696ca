"""Contracts 3, 6, 9 and 10 in whole trials of every method, on both kinds of model.

Each method's trial runs among others, alone, and killed in between; the frozen weights and what a
checkpoint holds are looked at on the way.
"""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from softprompt.methods.delta_file import load_delta
from softprompt.trials.delta_checks import check_fit
from softprompt.trials.prepare import delta_shapes, prepare
from softprompt.trials.run import run_trial
from tests.contracts.examples import OneDevice, trial_config, two_tasks, write_task
from tests.contracts.trials import StopAt, check_same, stored
from tests.families import write_family_folder
from tests.matrix import matrix
from tests.tiny_t5 import write_complete_t5

METHODS = {
    "prompt": {"method__name": "prompt", "method__reparam": "residual"},
    "multitask": {"method__name": "multitask", "method__rank": 2},
    "prefix": {"method__name": "prefix", "method__init": "noise"},
    "lora": {"method__name": "lora", "method__dropout": 0.3, "train__dropout": 0.2},
    "dora": {"method__name": "dora", "method__targets": "q,v,down"},
    "adapter": {"method__name": "adapter", "method__bottleneck": 4},
    "bitfit": {"method__name": "bitfit"},
    "ia3": {"method__name": "ia3"},
    "full": {"method__name": "full"},
}
# On a T5, what differs there: two places, weights that only it has, and both trained as a whole.
PAIRS = [*(("gpt2", name) for name in METHODS), *(("t5", n) for n in ("prompt", "full"))]
KEPT = [("gpt2", "prompt")]
COMMON = {"eval__select": "last", "train__steps": 4, "optimizer__rate": 0.02, "eval__every": 2}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Of each family a model's folder, a task, and one session for all trials on it."""
    root = tmp_path_factory.mktemp("families")
    write_complete_t5(root / "t5")
    write_family_folder(root / "gpt2", "gpt2")
    source = write_task(root)
    return {name: (root / name, source, OneDevice(StopAt())) for name in ("gpt2", "t5")}


def named(tree):
    """Path -> shape of every leaf, as `stored` has them."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}


def check_kept(folder, trained):
    """Whether a trial's checkpoints hold what is trained, and nothing else but numbers."""
    found = stored(folder)
    assert {name.split("'")[1] for name in found} == {"delta", "best", "opt_state"}
    for place in ("4['delta']", "4['best']"):
        inside = {n.removeprefix(place): found[n] for n in found if n.startswith(place)}
        assert inside == trained
    for name, shape in found.items():
        assert shape == () or any(name.endswith(p) and shape == trained[p] for p in trained), name


def delta_of(folder):
    found = load_file(folder / "delta.safetensors")
    return np.concatenate([found[name].ravel() for name in sorted(found)])


@pytest.mark.parametrize(("family", "name"), matrix(PAIRS, keep=KEPT))
def test_among_others_alone_and_resumed(families, tmp_path, family, name):
    """Mutations: the step moves a frozen weight; a checkpoint holds one, if only a norm's scale; a
    trial begins with the delta or the moments of the one before; a restored delta is the best one,
    not the last; the log is not cut back to the restored step; a delta of this method, as it was
    trained, is taken for one that does not fit.
    """
    keys, (model, source, shared) = COMMON | METHODS[name], families[family]
    if name == "multitask":
        keys["data__mixture"] = two_tasks(source)
    if (family, name) == ("t5", "prompt"):
        keys["method__place"] = "both"
    config, other = (trial_config(model, source, seed=seed, **keys) for seed in (1, 2))
    frozen = name != "full"
    before = {}
    if frozen:
        weights = shared.model(config).weights
        before = jax.tree.map(lambda leaf: np.array(leaf, copy=True), weights)
    compiled = len(shared.compiled)
    run_trial(config, tmp_path / "first", session=shared)
    written, sizes = tmp_path / "first" / "delta.safetensors", shared.model(config).config
    check_fit(load_delta(written)[0], config, sizes, file=str(written))
    run_trial(other, tmp_path / "other", session=shared)
    run_trial(config, tmp_path / "again", session=shared)
    assert len(shared.compiled) == compiled + 1  # contract 10
    check_same(tmp_path / "again", tmp_path / "first")
    # full weights hardly differ from one seed to the next, but they do
    assert np.abs(delta_of(tmp_path / "other") - delta_of(tmp_path / "first")).max() > 1e-4
    if frozen:
        jax.tree.map(np.testing.assert_array_equal, before, shared.model(config).weights)
    check_kept(tmp_path / "first", named(delta_shapes(prepare(config, shared))))
    shared.progress.step = 3  # a step behind the checkpoint
    with pytest.raises(KeyboardInterrupt):
        run_trial(config, tmp_path / "killed", session=shared)
    run_trial(config, tmp_path / "killed", session=shared)
    check_same(tmp_path / "killed", tmp_path / "first")
