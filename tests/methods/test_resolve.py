"""A method's settings become what its functions take: words become token ids."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt.config import initializer_settings, method_settings
from softprompt.data.encode import encode
from softprompt.errors import UserError
from softprompt.methods import METHODS
from softprompt.methods.base import Setup
from softprompt.methods.delta_file import save_delta
from softprompt.methods.fewshot import balanced_draw
from softprompt.methods.initializers import prompt_rows
from softprompt.pretrained.loading import load_model
from softprompt.trials.prepare import prepare
from tests.contracts.examples import SNIPPETS, session, trial_config, write_task
from tests.families import write_family_folder

KEY = jax.random.key(0)
TEXTS = ("a warm film", "the plot is old", "good good good", "a mess", "very warm", "not funny")


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    return load_model(str(tiny_folder))


@pytest.fixture(scope="module")
def train(loaded):
    return encoded(loaded, eos=False)


def encoded(loaded, *, eos):
    """The tiny task's examples, three labels in turns."""
    records = [
        {"id": str(n), "text": text, "label": SNIPPETS.labels[n % 3]}
        for n, text in enumerate(TEXTS)
    ]
    sizes = {"max_input": 64, "max_target": 16}
    return encode(records, SNIPPETS, loaded.tokenizer, **sizes, bos=False, eos=eos)


def resolved(loaded, train, *, room=400, **changes):
    """The static configuration of a config's method."""
    config = trial_config("tiny", "jsonl:x", **changes)
    settings, initializer = method_settings(config), initializer_settings(config)
    setup = Setup(
        loaded.config,
        seed=config.seed,
        room=room,
        initializer_settings=initializer,
        loaded=loaded,
        train=train,
    )
    return METHODS[settings.name].resolve(settings, setup)


def rows_of(loaded, train, **method):
    """The first prompt of a config."""
    cfg = resolved(loaded, train, **{f"method__{key}": value for key, value in method.items()})
    return np.asarray(cfg.initializer(KEY, embedding(loaded), cfg.length))


def embedding(loaded):
    return np.asarray(loaded.weights["embed"]["embedding"])


def test_initializers_by_name(loaded, train, tmp_path):
    """Mutation: two names swapped; the paper's uniform scaled."""
    table = embedding(loaded)
    rms = np.sqrt(np.mean(table**2))
    paper = rows_of(loaded, train, init="uniform_paper", length=200)
    scaled = rows_of(loaded, train, init="uniform", length=200)
    assert np.abs(paper).max() == pytest.approx(0.5, rel=1e-2)
    assert np.abs(scaled).max() == pytest.approx(rms * 3**0.5, rel=1e-2)
    ids = loaded.tokenizer.encode("the city")
    rows = rows_of(loaded, train, init="text", init_text="the city", length=len(ids))
    np.testing.assert_array_equal(rows, table[ids])
    file = tmp_path / "delta.safetensors"
    save_delta(file, {"prompt": scaled[:4]}, {})
    np.testing.assert_array_equal(prompt_rows(str(file))[0], scaled[:4])
    rows = rows_of(loaded, train, init="file", init_file=str(file), length=6)
    np.testing.assert_array_equal(rows[:4], scaled[:4])


@pytest.mark.parametrize("eos", [False, True])
def test_a_labels_row_is_the_mean_of_its_verbalizers_tokens(loaded, eos):
    """Breaks when EOS, which ends candidates with `task.eos`, is averaged in."""
    table = embedding(loaded)
    words = [loaded.tokenizer.encode(text) for text in SNIPPETS.verbalizers.values()]
    assert {len(ids) for ids in words} != {1}
    rows = rows_of(loaded, encoded(loaded, eos=eos), init="labels", length=5)
    means = [table[ids].mean(axis=0) for ids in words]
    np.testing.assert_allclose(rows[:3], means, rtol=1e-5, atol=1e-6)


def test_a_file_of_two_stacks_gives_the_one_that_is_trained(tmp_path):
    """Mutation: the encoder's prompt starts the decoder's; one of two is chosen unasked; rows are
    taken without the network, or the tasks' factors, that make a prompt of them."""
    first_PD, second_PD = np.ones((2, 48), np.float32), np.full((3, 48), 2.0, np.float32)
    file = str(tmp_path / "d.safetensors")
    save_delta(file, {"encoder": {"prompt": first_PD}, "decoder": {"prompt": second_PD}}, {})
    np.testing.assert_array_equal(prompt_rows(file, "encoder")[0], first_PD)
    np.testing.assert_array_equal(prompt_rows(file, "decoder")[0], second_PD)
    with pytest.raises(UserError, match="encoder and decoder; .* is 'both'; allowed: encoder, dec"):
        prompt_rows(file, "both")
    save_delta(file, {"decoder": {"prompt": second_PD}}, {})
    np.testing.assert_array_equal(prompt_rows(file, "encoder")[0], second_PD)
    for name in ("net", "task_cols"):
        save_delta(file, {"prompt": first_PD, name: {"a": first_PD}}, {})
        with pytest.raises(UserError, match=f"without its other tensors, {name}; allowed"):
            prompt_rows(file)


def test_a_prompt_of_other_weights_is_not_a_start_by_chance(loaded, train, tmp_path):
    """Mutations: where a file says it comes from is not read; the key that allows it is not; a file
    that says nothing is refused; another width is said to need the key.
    """
    file, rows_PD = tmp_path / "d.safetensors", np.ones((5, 48), np.float32)
    given = {"init": "file", "init_file": str(file)}
    for origin in ({}, {"fingerprint": loaded.fingerprint}):
        save_delta(file, {"prompt": rows_PD}, origin)
        np.testing.assert_array_equal(rows_of(loaded, train, **given), rows_PD)
    save_delta(file, {"encoder": {"prompt": rows_PD}}, {"fingerprint": "others"})
    with pytest.raises(UserError) as caught:
        rows_of(loaded, train, **given)
    assert str(caught.value) == (
        f"{file} was trained on weights others, {loaded.name} has {loaded.fingerprint}; "
        "method.init_any_weights=True starts from it nevertheless"
    )
    found = rows_of(loaded, train, **given, init_any_weights=True)
    np.testing.assert_array_equal(found, rows_PD)
    save_delta(file, {"prompt": rows_PD[:, :40]}, {"fingerprint": "others"})
    with pytest.raises(UserError, match=r"a prompt of shape \[5, 40\] does not fit this model"):
        rows_of(loaded, train, **given)


@pytest.mark.parametrize("name", ["prompt", "multitask", "prefix"])
def test_words_begin_as_a_model_that_scales_embeddings_reads_them(tmp_path, train, name):
    """As Gemma does. Mutations: `embed_scale` is left out of a prompt's config, or a prefix's."""
    gemma = load_model(str(write_family_folder(tmp_path, "gemma")))
    ids = gemma.tokenizer.encode("the city")
    method = {"name": name, "init": "text", "init_text": "the city", "length": len(ids)}
    changes = {f"method__{key}": value for key, value in method.items()}
    cfg = resolved(gemma, train, **changes)
    delta = METHODS[name].init(KEY, gemma.model, gemma.weights, cfg)
    given = delta if name == "prefix" else {"prompt": delta["prompt"]}
    apply = functools.partial(gemma.model.apply, {"params": gemma.weights, "delta": given})
    context, words = apply(method="prompt_context"), jnp.array(ids)
    wanted = gemma.model.apply({"params": gemma.weights}, words, method="text_context")
    np.testing.assert_allclose(context.k_LPGK, wanted.k_LPGK, atol=1e-5)
    np.testing.assert_allclose(context.v_LPGK, wanted.v_LPGK, atol=1e-5)


def ids_in(loaded, rows):
    return set(np.all(rows[:, None] == embedding(loaded)[None], axis=-1).argmax(axis=1).tolist())


def test_the_vocabulary_is_that_of_the_named_text(loaded, train, tmp_path):
    """Mutation: common_text is not read; common_tokens is not used; all ids, or BOS and EOS."""
    used = {int(token) for tokens in train.inputs for token in tokens}
    assert len(used) < 100
    added = [loaded.tokenizer.bos_id, loaded.tokenizer.eos_id]
    inputs = [np.array([added[0], *ids, added[1]], np.int32) for ids in train.inputs]
    train = dataclasses.replace(train, inputs=inputs)
    assert not used & set(added)
    assert ids_in(loaded, rows_of(loaded, train, init="vocabulary", length=200)) == used
    three = ids_in(loaded, rows_of(loaded, train, init="vocabulary", common_tokens=3, length=60))
    assert len(three) == 3 and three < used
    file = tmp_path / "words.txt"
    file.write_text("zebra\nquiz\n")
    words = {token for word in ("zebra", "quiz") for token in loaded.tokenizer.encode(word)}
    rows = rows_of(loaded, train, init="vocabulary", common_text=str(file), length=60)
    assert ids_in(loaded, rows) == words


def test_what_cannot_start_a_prompt_is_refused(loaded, train, tmp_path):
    """Mutation: start from nothing instead."""
    with pytest.raises(UserError, match="method.common_text.*nowhere.txt.*allowed: train"):
        rows_of(loaded, train, init="vocabulary", common_text=str(tmp_path / "nowhere.txt"))
    with pytest.raises(UserError, match="method.init.*no verbalizers"):
        rows_of(loaded, dataclasses.replace(train, candidates=()), init="labels")
    with pytest.raises(UserError, match="nowhere.safetensors"):
        rows_of(loaded, train, init="file", init_file=str(tmp_path / "nowhere.safetensors"))
    file = tmp_path / "delta.safetensors"
    save_delta(file, {"lora": np.ones((2, 2), np.float32)}, {})
    with pytest.raises(UserError, match="no tensor 'prompt' in it; it has lora"):
        prompt_rows(str(file))


def test_bos_stands_where_the_config_says(tiny_folder, tmp_path, loaded, monkeypatch):
    """Mutation: "after" puts BOS before the prompt, "before" puts it on both sides; without a
    prompt "before" has none."""
    tokenizer = dataclasses.replace(loaded.tokenizer, add_bos=True, bos_id=0)
    source = write_task(tmp_path)
    found = {}
    with session() as shared:
        ours = dataclasses.replace(loaded, tokenizer=tokenizer)
        monkeypatch.setattr(shared, "model", lambda config: ours)
        for bos, method in itertools.product(("after", "before", "none"), ("prompt", "none")):
            keys = {"method__bos": bos, "method__name": method}
            prepared = prepare(trial_config(tiny_folder, source, **keys), shared)
            starts = {tokens[0] == 0 for tokens in prepared.data.train.inputs}
            before = getattr(prepared.step.method_config, "bos_before", None)
            found[bos, method] = starts, before, prepared.contexts.decoder
    assert found == {
        ("after", "prompt"): ({True}, None, 5),
        ("before", "prompt"): ({False}, 0, 6),
        ("none", "prompt"): ({False}, None, 5),
        ("after", "none"): ({True}, None, 0),
        ("before", "none"): ({True}, None, 0),
        ("none", "none"): ({False}, None, 0),
    }


def test_a_bos_that_the_tokenizer_lacks_is_refused(loaded, train):
    """Mutation: train without BOS and say nothing."""
    without = dataclasses.replace(
        loaded, tokenizer=dataclasses.replace(loaded.tokenizer, bos_id=None)
    )
    for method in ("prompt", "fewshot"):
        with pytest.raises(UserError, match="method.bos.*no BOS"):
            resolved(without, train, method__name=method, method__bos="before", method__shots=2)


def shots(loaded, train, **more):
    return np.array(resolved(loaded, train, method__name="fewshot", **more).tokens)


def test_few_shot_examples_are_solved_balanced_and_seeded(loaded, train):
    """Mutation: leave out targets; draw without regard to labels; one draw for all seeds."""
    text = loaded.tokenizer.decode(shots(loaded, train, method__shots=3).tolist())
    assert text.count("Review: ") == text.count("\nSentiment:") == 3
    for verbalizer in SNIPPETS.verbalizers.values():
        assert text.count(f"Sentiment:{verbalizer}\n\n") == 1
    draws = {tuple(shots(loaded, train, method__shots=3, seed=seed)) for seed in range(5)}
    assert len(draws) > 1
    again = shots(loaded, train, method__shots=3, seed=4)
    assert tuple(again) in draws
    everything = loaded.tokenizer.decode(shots(loaded, train, method__shots=6).tolist())
    assert all(f"Review: {one}\n" in everything for one in TEXTS)


def test_few_shot_examples_end_with_a_blank_line_and_no_eos(loaded, train):
    """Breaks when the EOS that `task.eos` ends targets with stands between two examples."""
    np.testing.assert_array_equal(
        shots(loaded, encoded(loaded, eos=True), method__shots=3),
        shots(loaded, train, method__shots=3),
    )


def test_few_shot_examples_of_free_text_are_drawn_among_the_answered(loaded, train):
    """Breaks when a task without labels has no example to draw, or an unanswered one is drawn."""
    targets = [ids if n != 2 else ids[:0] for n, ids in enumerate(train.targets)]
    labels = np.full(len(targets), -1, np.int32)
    free = dataclasses.replace(train, candidates=(), labels=labels, targets=targets)
    text = loaded.tokenizer.decode(shots(loaded, free, method__shots=5).tolist())
    assert all((f"Review: {one}\n" in text) == (n != 2) for n, one in enumerate(TEXTS))
    with pytest.raises(UserError, match="method.shots.*6; allowed: at most 5"):
        shots(loaded, free, method__shots=6)


def test_few_shot_limits(loaded, train):
    """Mutation: cut the text, or repeat examples."""
    with pytest.raises(UserError, match="method.shots.*7; allowed: at most 6"):
        shots(loaded, train, method__shots=7)
    with pytest.raises(UserError, match="method.shots.*room for 20"):
        shots(loaded, train, method__shots=3, room=20)


def test_few_shot_begins_with_bos_where_the_model_wants_one(loaded, train):
    """Mutation: a BOS before each example."""
    tokenizer = dataclasses.replace(loaded.tokenizer, add_bos=True, bos_id=0)
    ours = dataclasses.replace(loaded, tokenizer=tokenizer)
    plain = shots(loaded, train, method__shots=3)
    np.testing.assert_array_equal(shots(ours, train, method__shots=3), [0, *plain])
    np.testing.assert_array_equal(shots(ours, train, method__shots=3, method__bos="none"), plain)
    told = shots(loaded, train, method__shots=3, method__bos="before")
    np.testing.assert_array_equal(told, [loaded.tokenizer.bos_id, *plain])


def test_draws_are_balanced_while_the_labels_last():
    """Mutation: the first examples of each label; unlabelled examples drawn."""
    labels_N = np.array([0] * 20 + [1] * 20 + [2] * 3 + [-1] * 9)
    seen = set()
    for seed in range(20):
        drawn = balanced_draw(labels_N, 12, np.random.default_rng(seed))
        assert len(set(drawn.tolist())) == 12
        counts = np.bincount(labels_N[drawn], minlength=3)
        assert counts.sum() == 12 and counts[2] == 3 and abs(counts[0] - counts[1]) <= 1
        seen |= set(drawn.tolist())
    assert len(seen) > 30
    assert len(balanced_draw(labels_N, 99, np.random.default_rng(0))) == 43
    assert balanced_draw(np.array([-1, -1]), 3, np.random.default_rng(0)).size == 0
