"""Style: does a model behind a prompt for a kind of text write such text?

Question: of 64 continuations behind a prompt that was trained on verses of the Bible, and of 64
behind one that was trained on headlines, how many have that style, and how many of the model's own?

Prediction: at least 80 % of each prompt's, and at most 10 % of the model's own for each style. Each
is refuted otherwise.

Command:
    softprompt sweep paper/style --workdir runs/paper
    python -m experiments.paper.style --workdir runs/paper

Cost: 3 trials on SmolLM2 of about 3 minutes on one core, the four of `domain`, and 2 minutes for
the continuations. The judge, naive Bayes over words, has to know 95 % of held-out verses and of
held-out headlines.

Found: 1 holds, 1 refuted, 2 undecided. Holds: at most 10 % of the continuations without a prompt
are verses: 2.6 (1.1 to 6.0). Refuted: at most 10 % of the continuations without a prompt are
headlines: 17.2 (12.5 to 23.2). Undecided: at least 80 % of the continuations behind a verse prompt
are verses: 60.9 (36.7 to 85.2); at least 80 % of the continuations behind a headline prompt are
headlines: 50.5 (19.2 to 81.9).
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from etils import epath
from matplotlib.figure import Figure
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import Pipeline, make_pipeline

from experiments.paper import domain, study
from experiments.paper.command_line import run_command
from experiments.paper.domain import START, VERSES
from softprompt.analysis.comparisons import Estimate, Prediction, at_least, at_most, mean_score
from softprompt.analysis.plots import category_plot
from softprompt.analysis.tables import wilson_interval
from softprompt.config import ConfigDict, resolve
from softprompt.console import Progress
from softprompt.data.builtin_tasks import TASKS, get_task
from softprompt.data.splits import read_split
from softprompt.data.subsets import hash_fraction
from softprompt.errors import UserError
from softprompt.evaluation.perplexity import read_text
from softprompt.files import read_json, write_text
from softprompt.inference.sampling import sampling
from softprompt.results import Row, is_done
from softprompt.trials.evaluate import Predictor
from softprompt.trials.session import Session
from softprompt.trials.sweep import trial_folder

COUNT, NEW = 64, 32  # continuations for each seed, and their tokens
WORDS, END = 16, " |"  # what the judge reads of a text, and the end of its line
# Beside the State of the Union.
OTHERS = ("movie_sentiment", "amazon_sentiment", "nyt_sentiment", "sms_spam")
STYLES = (*domain.SOURCES, "other")
KNOWN = 0.95  # what the judge has to reach on held-out texts of each style
FILE = "continuations.json"
KINDS = {  # of continuations -> the text and the method of their trials
    "no prompt": (VERSES, "none"),
    "verse prompt": (VERSES, "prompt"),
    "headline prompt": ("headlines", "prompt"),
}

CAPTION = (
    f"Share in % that a judge takes for each style, with 95 % intervals over seeds and texts: of "
    f"held-out texts, and of {COUNT} continuations for each of three seeds, sampled at temperature "
    f"1 after a line break, of {NEW} tokens up to the end of the line. The judge, naive Bayes over "
    f"words, marks and pairs of them, reads the first {WORDS} words, with their case: these "
    "headlines have no capitals. Other: movie snippets, product reviews, editorials, text messages "
    "and sentences of the State of the Union addresses."
)


def sweep(subset: str = "full") -> list[ConfigDict]:
    """Returns the configs of "full": the model as it is, and the prompts for both texts.

    Raises:
        UserError: another subset.
    """
    study.check_full(subset)
    return [config for kind in KINDS for config in configs(kind)]


def configs(kind: str) -> list[ConfigDict]:
    """The trials of one of `KINDS`."""
    text, method = KINDS[kind]
    return [domain.trial(text, "none")] if method == "none" else domain.prompts(text)


def texts(split: str) -> dict[str, list[str]]:
    """The real texts of each style in a split, train or test."""
    found = {
        name: [one["label"] for one in read_split(get_task(domain.trial(name, "none").task), split)]
        for name in domain.SOURCES
    }
    other = [one["text"] for name in OTHERS for one in read_split(TASKS[name], split)]
    for sentence in re.split(r"(?<=[.?!])\s+|\n+", read_text(domain.OTHER)):
        if (hash_fraction(sentence) < 0.8) == (split == "train"):
            other.append(sentence)
    return found | {STYLES[-1]: other}


def opening(text: str) -> str:
    """What the judge reads of a text: the first words of its first line, and a mark at its end."""
    words = text.strip().split("\n")[0].split()
    return " ".join(words[:WORDS]) + END * (0 < len(words) <= WORDS)


def make_judge() -> tuple[Pipeline, dict[str, dict[str, float]]]:
    """Returns what tells styles apart, and for each style the shares of held-out texts by judgment.

    Raises:
        UserError: it does not know enough of held-out verses or headlines.
    """
    words = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]", lowercase=False)
    judge = make_pipeline(words, MultinomialNB(fit_prior=False))
    train = [(opening(text), style) for style, some in texts("train").items() for text in some]
    judge.fit(*zip(*train, strict=True))
    found = {}
    for style, some in texts("test").items():
        judged = judge.predict([opening(text) for text in some])
        found[style] = {name: float(np.mean(judged == name)) for name in STYLES}
        if style in domain.SOURCES and found[style][style] < KNOWN:
            raise UserError(
                f"the judge of style knows {found[style][style]:.3f} of held-out {style}; allowed: "
                f"{KNOWN} or more"
            )
    return judge, found


def run(workdir: epath.PathLike) -> None:
    """Writes the continuations of each finished trial into its folder, and their judged styles.

    What was generated is not generated again.
    """
    judge, known = make_judge()
    with Progress() as progress:
        session = Session(progress)
        for config in sweep():
            folder = trial_folder(workdir, resolve(config))
            if not is_done(folder):
                progress.say(f"{folder.name} is not done, and has no continuations")
                continue
            seeds = study.SEEDS if config.method.name == "none" else (config.seed,)
            made = read(folder).get("texts") or continuations(folder, seeds, session)
            judged = {seed: [style_of(judge, text) for text in some] for seed, some in made.items()}
            found = {"judge": known, "judged": judged, "texts": made}
            write_text(folder / FILE, json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def continuations(
    folder: epath.PathLike, seeds: Sequence[int], session: Session
) -> dict[str, list[str]]:
    """Seed -> continuations behind a trial's prompt."""
    predictor = Predictor(folder, session.progress, session=session)
    starts, how = [START] * COUNT, sampling(1.0)
    return {
        str(seed): predictor.generate(starts, max_new=NEW, sampling=how, seed=seed)
        for seed in seeds
    }


def style_of(judge: Pipeline, text: str) -> str:
    """The style of a text; that of an empty line is "other"."""
    read = opening(text)
    return str(judge.predict([read])[0]) if read else STYLES[-1]


def read(folder: epath.PathLike) -> dict[str, Any]:
    """A trial's continuations, as `run` writes them; {} for none."""
    file = epath.Path(folder) / FILE
    return read_json(file) if file.exists() else {}


def measure(folder: epath.PathLike) -> dict[str, Any]:
    """What a trial's record keeps of its continuations: the styles, and three texts; or {}."""
    if not (found := read(folder)):
        return {}
    shown = [opening(text).removesuffix(END) for some in found["texts"].values() for text in some]
    return {"style": {"judge": found["judge"], "judged": found["judged"], "shown": shown[:3]}}


def trials(rows: Sequence[Row], kind: str) -> list[Row]:
    """The trials of a kind that have continuations."""
    found = study.select(study.own(rows, configs(kind), answered=False))
    return [row for row in found if "style" in row]


def judged(rows: Sequence[Row], kind: str) -> np.ndarray:
    """The style of each continuation, [seeds, continuations]."""
    found = (row["style"]["judged"] for row in trials(rows, kind))
    return np.array([of_seed for by_seed in found for of_seed in by_seed.values()])


def share(rows: Sequence[Row], kind: str, style: str) -> Estimate | None:
    """The share of continuations of a style, in %.

    The continuations without a prompt are independent: Wilson's interval. Those behind a prompt are
    so within its seed only: Student's interval over the seeds' shares, where it is wider.
    """
    if not len(styles_SN := judged(rows, kind)):
        return None
    hits_SN = (styles_SN == style).astype(float)
    found = mean_score({style: hits_SN.mean(1, keepdims=True)})
    low, high = wilson_interval(found.value, hits_SN.size)
    if KINDS[kind][1] != "none":
        low, high = max(0.0, min(low, found.low)), min(1.0, max(high, found.high))
    return study.in_points(Estimate(found.value, low, high, found.draws))


def findings(rows: Sequence[Row]) -> list[study.Finding]:
    """The predictions, and what was found."""
    made = []
    for kind, (text, method) in KINDS.items():
        if method == "prompt":
            claim = f"at least 80 % of the continuations behind a {kind} are {text}"
            made.append(_finding(rows, claim, kind, text, at_least(80)))
            claim = f"at most 10 % of the continuations without a prompt are {text}"
            made.append(_finding(rows, claim, "no prompt", text, at_most(10)))
    return made


def _finding(
    rows: Sequence[Row], claim: str, kind: str, style: str, prediction: Prediction
) -> study.Finding:
    return study.Finding(claim, "", share(rows, kind, style), prediction, len(judged(rows, kind)))


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns one line for each kind of held-out text, and of continuations, with an example."""
    lines: list[dict[str, Any]] = []
    for kind in KINDS:
        if found := trials(rows, kind):
            shares = {style: study.shown(share(rows, kind, style)) for style in STYLES}
            text = {"text": f"continuations, {kind}", "seeds": len(judged(rows, kind))}
            lines.append(text | shares | {"example": found[0]["style"]["shown"][0]})
            known = found[0]["style"]["judge"]
    for name in STYLES if lines else ():
        lines.append({"text": f"held-out {name}"} | in_percent(known[name]))
    return pd.DataFrame(lines, dtype=object).fillna("")


def in_percent(shares: Mapping[str, float]) -> dict[str, str]:
    """Shares as text, in %."""
    return {name: f"{100 * value:.1f}" for name, value in shares.items()}


def figure(rows: Sequence[Row]) -> Figure:
    """Returns the share of each style among each kind of continuations."""
    series = {
        kind: {
            style: study.estimate_point(found)
            for style in STYLES
            if (found := share(rows, kind, style))
        }
        for kind in KINDS
        if trials(rows, kind)
    }
    return category_plot(series, {}, ylabel="Share (%)", title="Style")


def main(arguments: Sequence[str] | None = None) -> int:
    """Continues behind each prompt, and judges what was written."""
    return run_command("style", run, arguments)


if __name__ == "__main__":
    sys.exit(main())
