"""Pretraining runs of tiny models: killed, repeated, found by name, and moved in archives."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from softprompt import cli
from softprompt.errors import UserError
from softprompt.pretrained.ladder import PROVENANCE, RUNGS, ladder_dir, model_folder
from softprompt.pretrained.loading import load_model
from softprompt.pretraining import recipe as recipes
from softprompt.pretraining import train
from softprompt.pretraining.ladder import import_archive
from softprompt.pretraining.recipe import Recipe, load_recipe, recipe_of
from softprompt.training.logs import read_log
from softprompt.training.sharding import make_mesh
from tests.contracts.trials import scientific
from tests.own_task import REPOSITORY
from tests.tiny import tiny_config
from tests.tiny_t5 import tiny_t5_config

KEPT = ("", "@1of2", "@1of4", "@1of8")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache with the models of the tiny recipe."""
    cache = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        plainly(patch, cache)
        run(tiny_recipe())
    return cache


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for every test."""
    plainly(monkeypatch, tmp_path / "cache")


def plainly(patch, cache):
    """Runs use this cache and one device, and do not measure the machine."""
    patch.setenv("SOFTPROMPT_CACHE", str(cache))
    patch.setattr(train, "make_mesh", lambda: make_mesh(devices=jax.devices()[:1]))
    patch.setattr(train, "machine_flops", lambda dtype: 1e11)


def corpus():
    """The text of the documentation."""
    return (str(REPOSITORY / "docs" / "tutorial.md"), str(REPOSITORY / "docs" / "how-it-works.md"))


SIZES = {"rows": 8, "row": 32, "chunk": 8, "tokens": 24 * 256}


def tiny_recipe(**changes):
    config = tiny_config(width=16, layers=2, ffn=24, vocab=400, context=64)
    return Recipe("ladder/tiny", config, **{"corpus": corpus(), **SIZES, **changes})


def tiny_t5(**changes):
    config = tiny_t5_config(width=16, vocab=400)
    return Recipe(
        **{
            "name": "ladder/tiny5",
            "config": config,
            "objective": "span_corruption",
            "corpus": corpus(),
            **SIZES,
            **changes,
        }
    )


run = train.run_alone


def weights(name, root=None):
    folder = (root or ladder_dir()) / name.removeprefix("ladder/")
    return load_file(folder / "model.safetensors")


def check_same(one, other):
    """Two caches hold the same models, and their logs differ in times only."""
    for suffix in KEPT:
        ours, theirs = (weights(f"tiny{suffix}", cache / "ladder") for cache in (one, other))
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=f"{suffix} {name}")
    logs = []
    for cache in (one, other):
        (folder,) = (cache / "ladder" / ".work").iterdir()
        logs.append(scientific(folder))
    assert logs[0] == logs[1]


RECIPE = """
from softprompt.models.decoder import DecoderConfig
from softprompt.pretraining import train
from softprompt.pretraining.ladder import import_archive
from softprompt.pretraining.recipe import Recipe
train.CHECKPOINT_EVERY, train.LOG_EVERY = 10, 1
RECIPE = Recipe(
    "ladder/tiny",
    DecoderConfig(vocab=400, width=16, layers=2, heads=2, kv_heads=2, head_size=8, ffn=24,
                  context_length=64),
    corpus={corpus!r}, rows=8, row=32, chunk=8, tokens=80 * 256,
)
"""


class Launcher:
    """Starts the same command again and again, each time with what the last one left."""

    def __init__(self, folder):
        self.cache, self.file = folder / "cache", folder / "recipe.py"
        folder.mkdir()
        self.file.write_text(RECIPE.format(corpus=corpus()))
        self.env = {**os.environ, "SOFTPROMPT_CACHE": str(self.cache)}
        self.env.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder.parent / "programs"))
        self.env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

    def step(self):
        """The last step in the log, -1 where there is none."""
        found = list(self.cache.glob("ladder/.work/*/metrics.jsonl"))
        lines = read_log(found[0].parent) if found else []
        return max([line["step"] for line in lines], default=-1)

    def start(self):
        command = [sys.executable, "-m", "softprompt", "pretrain", str(self.file)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=REPOSITORY, env=self.env, stderr=pipe, text=True)

    def stop(self, number=None, *, after=0):
        """Sends a signal after some more logged steps; returns the exit code and what it said."""
        process = self.start()
        try:
            target = self.step() + after
            while number and process.poll() is None and self.step() < target:
                time.sleep(0.002)
            if number:
                process.send_signal(number)
            said = process.communicate(timeout=240)[1]
        finally:
            process.kill()
        return process.returncode, said


@pytest.mark.matrix
def test_a_run_that_is_stopped_is_as_if_it_never_was(tmp_path):
    """Breaks when anything but the checkpoint decides what the rest of a run does: the order of the
    rows, the tokenizer, the rate, the log. A half-done run is no model.
    """
    stopped, alone = Launcher(tmp_path / "stopped"), Launcher(tmp_path / "alone")
    process = alone.start()
    try:
        for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)):
            assert stopped.stop(number, after=25)[0] == code
            assert not list(stopped.cache.glob(f"ladder/tiny*/{PROVENANCE}"))
        code, said = stopped.stop()
        assert code == 0, said
        assert "resumes from step" in said
        process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0
    check_same(stopped.cache, alone.cache)


def test_the_same_recipe_twice_gives_the_same_bits(made, tmp_path, capsys):
    """Breaks when a run depends on a seed of the process, on time, or on where it is."""
    folder = run(tiny_recipe())
    check_same(made, tmp_path / "cache")
    facts = json.loads((folder / PROVENANCE).read_text())
    assert facts["recipe_hash"] == tiny_recipe().hash
    assert facts["loss"] < facts["first_loss"] < np.log(400) + 1
    assert facts["trained_tokens"] == facts["steps"] * 256 == 24 * 256
    half = json.loads((model_folder("ladder/tiny@1of2") / PROVENANCE).read_text())
    assert half["trained_tokens"] == 12 * 256 and half["loss"] > facts["loss"]
    capsys.readouterr()
    run(tiny_recipe())
    assert "done already" in capsys.readouterr().err
    with pytest.raises(UserError, match=rf"recipe {facts['recipe_hash']}.*delete the folder"):
        run(tiny_recipe(rate=1e-3))


@pytest.mark.matrix
def test_adaptation_starts_from_the_corrupted_spans(monkeypatch):
    """Breaks when the adaptation has first weights or a tokenizer of its own, or its shares are
    those of the first run.
    """
    first = tiny_t5()
    adapted = tiny_t5(
        name="ladder/tiny5@lm",
        objective="prefix_lm",
        start=first.name,
        keep=recipes.ADAPTED,
        row=16,
    )
    monkeypatch.setattr(recipes, "RECIPES", {one.name: one for one in (first, adapted)})
    folder = run(adapted)
    assert folder == model_folder("ladder/tiny5@lm100")
    assert model_folder("ladder/tiny5@lm0") == model_folder("ladder/tiny5")
    start = load_model("ladder/tiny5@lm0")
    np.testing.assert_array_equal(
        train.first_weights(adapted)["embed"]["embedding"], start.weights["embed"]["embedding"]
    )
    facts = [
        json.loads((model_folder(f"ladder/tiny5@lm{share}") / PROVENANCE).read_text())
        for share in (10, 50, 100)
    ]
    assert [one["trained_steps"] / one["steps"] for one in facts] == [0.1, 0.5, 1.0]
    loaded = load_model("ladder/tiny5@lm100")
    assert loaded.tokenizer.backend.to_str() == start.tokenizer.backend.to_str()
    assert loaded.fingerprint != start.fingerprint
    assert adapted.hash != tiny_t5(name=adapted.name, objective="prefix_lm").hash


def test_a_model_that_is_not_there_says_how_it_is_made(capsys):
    """Breaks when a name of the ladder is looked for on the hub."""
    for name in ("ladder/d1", "ladder/d1@1of8", "ladder/t0@lm10"):
        with pytest.raises(UserError, match=f"softprompt pretrain {name}`"):
            load_model(name)
    assert cli.main(["ladder"]) == 0
    said = capsys.readouterr().out
    assert all(f"softprompt pretrain {name}" in said for name in RUNGS)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("ladder/d1", "ladder/d1"),
        ("ladder/d4@1of4", "ladder/d4"),
        ("ladder/t1@lm0", "ladder/t1"),
        ("ladder/t1@lm50", "ladder/t1@lm"),
    ],
)
def test_recipes_are_found_by_every_name_that_they_make(name, wanted):
    """Breaks when a kept model has no recipe."""
    assert recipe_of(name).name == wanted


@pytest.mark.parametrize("content", ["", "RECIPE = 1", "RECIPE = x", "import nothing_there"])
def test_recipes_that_are_none(tmp_path, content):
    """Breaks when a mistake in a file is a traceback."""
    file = tmp_path / "recipe.py"
    file.write_text(content)
    with pytest.raises(UserError, match="recipe.py"):
        load_recipe(str(file))
    with pytest.raises(UserError, match="ladder/d9.*ladder/d1"):
        load_recipe("ladder/d9")


def test_objectives_fit_their_models():
    """Breaks when a decoder may be trained to fill spans."""
    with pytest.raises(UserError, match="allowed: causal"):
        tiny_recipe(objective="prefix_lm")
    with pytest.raises(UserError, match="allowed: span_corruption"):
        tiny_t5(objective="causal")


def test_an_archive_moves_models_and_refuses_a_wrong_byte(made, tmp_path, monkeypatch, capsys):
    """Breaks when a byte of the archive is not covered by its digest, or an import changes what is
    there before all is checked.
    """
    shutil.copytree(made, tmp_path / "cache")
    file, again = tmp_path / "ladder.tar", tmp_path / "again.tar"
    for target in (file, again):
        assert cli.main(["ladder", "pack", str(target)]) == 0
    assert file.read_bytes() == again.read_bytes()
    assert cli.main(["ladder", "import", str(file)]) == 0  # the same models: nothing to do
    content = file.read_bytes()
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "other"))
    capsys.readouterr()
    rng = np.random.default_rng(0)
    for place in (0, *rng.integers(0, len(content), 8), len(content) - 1, len(content)):
        wrong = bytearray(content)
        wrong[place : place + 1] = [] if place == len(content) else [wrong[place] ^ 1]
        wrong += b"0" if place == len(content) else b""
        again.write_bytes(wrong)
        assert cli.main(["ladder", "import", str(again)]) == 2
        said = capsys.readouterr().err
        assert "again.tar" in said and said.count("\n") == 1
        assert not ladder_dir().exists()
    assert cli.main(["ladder", "import", str(file)]) == 0
    for suffix in KEPT:
        ours, theirs = (
            weights(f"tiny{suffix}", tmp_path / c / "ladder") for c in ("cache", "other")
        )
        assert all((ours[name] == theirs[name]).all() for name in ours)
    model = model_folder("ladder/tiny") / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="other weights"):
        import_archive(str(file))
