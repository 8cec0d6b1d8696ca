"""Artefacts about a text's language: simulated trials, false results, the judge of style."""

import json

import numpy as np
import pytest

from experiments.paper import domain, style
from softprompt.config import resolve, to_dict, trial_id
from softprompt.errors import UserError

TOKENS = np.tile([10, 30], 200)


def language(config, verses, addresses=3.0):
    """A finished trial in which a verse's token costs so many nats, give or take 0.5."""
    config.model.dtype = "float32"
    config = resolve(config)
    random = np.random.default_rng([config.seed, int(100 * verses)])
    each = verses + 0.5 * np.random.default_rng(0).normal(size=400) + random.normal(0, 0.1, 400)
    costs = {"ids": "0" * 16, "nats": (each * TOKENS).tolist(), "tokens": TOKENS.tolist()}
    return {
        "trial": trial_id(config),
        "name": f"{config.method.name}-{config.task.name}-s{config.seed}",
        "status": "done",
        "config": to_dict(config),
        "metrics": {"text": {"nats": addresses}},
        "answers": {},
        "targets": {config.task.name: costs},
    }


def domain_trials(prompts, base=4.0):
    """Trials in which a verse's token costs so many nats without a prompt, and behind each."""
    ours = [language(one, n) for one, n in zip(domain.prompts("verses"), prompts, strict=True)]
    return [language(domain.trial("verses", "none"), base), *ours]


@pytest.mark.parametrize(
    ("nats", "verdict"),
    [
        ((3.6, 3.62, 3.58), "holds"),  # 33 %
        ((3.9, 3.92, 3.91), "refuted"),  # 10 %
        ((3.77, 3.79, 3.76), "undecided"),  # 20 to 21 %
        ((4.4, 4.41, 4.4), "refuted"),  # the base's and the prompts' numbers change places
        ((3.1, 3.9, 3.8), "undecided"),  # one seed alone
    ],
)
def test_perplexity(nats, verdict):
    """Breaks when the fall is the base's over the prompt's, in nats, or that of other text."""
    rows = domain_trials(nats)
    (found,) = domain.findings(rows)
    assert found.verdict == verdict and found.seeds == 3
    base, ours = domain.trials(rows).values()
    fall = 1 - np.exp(domain.nats(ours, "verses").mean() - domain.nats(base, "verses").mean())
    assert found.found.value == pytest.approx(100 * fall)
    assert domain.findings(rows[1:])[0].verdict == domain.findings(rows[:1])[0].verdict == "not run"
    lines = domain.table(rows).to_dict("records")
    assert lines[0]["perplexity, no prompt"].startswith(
        f"{np.exp(domain.nats(base, 'verses').mean()):.1f}"
    )
    assert lines[1]["fall (%)"] == "0.0"


def style_trials(hits):
    """Trials of which a kind has so many continuations of 64 in each style; the rest are other."""
    rows = []
    for kind, counts in hits.items():
        names = [name for name, count in counts.items() for _ in range(count)]
        names += ["other"] * (style.COUNT - len(names))
        for config in style.configs(kind):
            row = language(config, 3.0)
            drawn = np.random.default_rng(config.seed).permutation(names).tolist()
            of = (0, 1, 2) if config.method.name == "none" else (config.seed,)
            known = {one: {two: float(one == two) for two in style.STYLES} for one in style.STYLES}
            judged = {str(seed): drawn for seed in of}
            rows.append(row | {"style": {"judge": known, "judged": judged, "shown": ["a text"]}})
    return rows


def test_continuations():
    """Breaks when the styles change places, a prompt's continuations count for the base, or all of
    a few are taken for certainty."""
    usual = {
        "no prompt": {"verses": 1},
        "verse prompt": {"verses": 62},
        "headline prompt": {"headlines": 61},
    }
    rows = style_trials(usual)
    assert [one.verdict for one in style.findings(rows)] == ["holds"] * 4
    assert {one.seeds for one in style.findings(rows)} == {3}
    swapped = {
        "no prompt": {"headlines": 40, "verses": 20},
        "verse prompt": {"headlines": 62},
        "headline prompt": {"verses": 61},
    }
    assert [one.verdict for one in style.findings(style_trials(swapped))] == ["refuted"] * 4
    near = usual | {"verse prompt": {"verses": 54}}
    assert [one.verdict for one in style.findings(style_trials(near))][0] == "undecided"
    assert [one.verdict for one in style.findings(rows[:1])].count("not run") == 2
    apart = (
        style_trials({"verse prompt": {"verses": 64}})[:2] + style_trials({"verse prompt": {}})[2:]
    )
    assert style.share(apart, "verse prompt", "verses").high == 100
    every = style_trials({"verse prompt": {"verses": 64}})
    share = style.share(every, "verse prompt", "verses")
    assert share.value == share.high == 100 and 97 < share.low < 99
    lines = style.table(rows).to_dict("records")
    assert [line["text"] for line in lines][3:] == [f"held-out {name}" for name in style.STYLES]
    assert [str(line["seeds"]) for line in lines] == ["3"] * 3 + [""] * 3
    assert lines[1]["verses"].startswith("96.9 (")


TEXTS = {
    "verses": ["And he said unto them, Go.", "And it came to pass in the land."],
    "headlines": ["area man finds old film", "city to fix old road"],
    "other": ["The film is good.", "We will fix the economy."],
}


def test_the_judge(monkeypatch):
    """Breaks when a judge that does not know held-out texts judges, more than the first line of a
    text is read, or an empty line has a style."""
    monkeypatch.setattr(style, "texts", lambda split: TEXTS)
    judge, known = style.make_judge()
    assert known["verses"] == {"verses": 1.0, "headlines": 0.0, "other": 0.0}
    assert style.style_of(judge, "And he said unto her\narea man area man finds") == "verses"
    assert style.style_of(judge, "\n\n") == "other"
    assert style.opening("  a b\nc") == "a b |" and style.opening("a " * 40) == "a " * 15 + "a"
    wrong = TEXTS | {"verses": TEXTS["headlines"]}
    monkeypatch.setattr(style, "texts", lambda split: TEXTS if split == "train" else wrong)
    with pytest.raises(UserError, match="knows 0.000 of held-out verses; allowed: 0.95 or more"):
        style.make_judge()


def test_held_out_texts_are_not_learnt_from(monkeypatch):
    """Breaks when a sentence of the addresses stands in both splits, or a style has none."""
    records = {"train": [{"label": "v", "text": "m"}], "test": [{"label": "w", "text": "n"}]}
    monkeypatch.setattr(style, "read_split", lambda task, split: records[split])
    speech = " ".join(f"We will build {n} roads." for n in range(50))
    monkeypatch.setattr(style, "read_text", lambda name: speech)
    train, test = style.texts("train"), style.texts("test")
    assert set(train) == set(test) == set(style.STYLES)
    assert not any(set(train[name]) & set(test[name]) for name in style.STYLES)
    assert len(train["other"]) + len(test["other"]) == 50 + 2 * len(style.OTHERS)


def test_what_is_kept_of_continuations(tmp_path):
    """Breaks when whole texts are kept in records, or a trial without continuations has some."""
    assert style.measure(tmp_path) == {}
    made = {"judge": {}, "judged": {"0": ["verses"] * 4}, "texts": {"0": ["a\nb", "c", "d", "e"]}}
    (tmp_path / style.FILE).write_text(json.dumps(made))
    kept = style.measure(tmp_path)["style"]
    assert kept["shown"] == ["a", "c", "d"] and kept["judged"] == {"0": ["verses"] * 4}
