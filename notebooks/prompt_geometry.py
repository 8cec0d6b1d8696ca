# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # The geometry of prompts
#
# **Question.** What do the vectors of a trained prompt lie near to? The paper (section 7) finds
# that their nearest tokens form tight clusters of words of similar meaning, that prompts which
# started from label words keep them, and that in long prompts several vectors have the same
# neighbours.
#
# **Cost.** Half a minute on a laptop. SmolLM2 (93 MB) is fetched once into the cache.
#
# **Reads.** The prompts of `experiments/paper/results/prompts`, their trials' records, and the
# embeddings of SmolLM2-135M-Instruct. Without trained prompts it shows what they start from.

# %%
# %matplotlib inline
import dataclasses
import itertools
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt

# The repository: the first folder from here up that holds the study.
ROOT = next(
    folder
    for folder in (Path.cwd(), *Path.cwd().parents)
    if (folder / "experiments/paper").is_dir()
)
sys.path.insert(0, str(ROOT))

from experiments.paper import study
from softprompt.analysis import geometry
from softprompt.analysis.plots import COLOURS, STYLE
from softprompt.config import ConfigDict, from_dict, resolve
from softprompt.console import Progress
from softprompt.methods.delta_file import load_delta
from softprompt.models.quantize import embedding
from softprompt.trials.prepare import initial_state, prepare
from softprompt.trials.records import read_records
from softprompt.trials.run import read_config
from softprompt.trials.session import Session

plt.rcParams.update(STYLE)

# %% tags=["parameters"]
PROMPTS = ""  # a folder of deltas, or of trials; "" is the committed one
RECORDS = ""  # a file with the records of the deltas' trials; "" is the committed one
NEAR = 5  # tokens that count as near

# %% [markdown]
# ## The prompts
#
# A delta names its trial, and the trial's config says how the prompt started: label words first,
# then common words of the training texts, drawn by the seed. The start is made again here.

# %%
folder = Path(PROMPTS or ROOT / "experiments/paper/results/prompts")
records = read_records(RECORDS or ROOT / "experiments/paper/results/records.jsonl")
by_trial = {record["trial"]: record["config"] for record in records}
session = Session(Progress())


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A trained prompt, what it started from, and the tokens of its task's labels."""

    name: str
    task: str
    trained_PD: np.ndarray
    start_PD: np.ndarray
    labels: list[list[int]]


def make_prompt(config: ConfigDict, trained_PD: np.ndarray | None = None) -> Prompt:
    """The prompt of a trial; without trained vectors, as it starts."""
    config.model.dtype = "float32"
    prepared = prepare(config, session)
    start_PD = np.asarray(initial_state(prepared).delta["prompt"])
    train, task = prepared.data.train, config.task.name
    labels = [train.without_eos(ids).tolist() for ids in train.candidates]
    if config.method.init != "labels":
        labels = []
    after_PD = start_PD if trained_PD is None else trained_PD
    return Prompt(f"{task}, seed {config.seed}", task, after_PD, start_PD, labels)


def read_prompt(file: Path) -> Prompt | None:
    """The prompt of a file; None if it is not one of SmolLM2 whose trial is known."""
    delta, origin = load_delta(file)
    if "prompt" not in delta or origin["model"] != study.SMOLLM2:
        return None
    if (file.parent / "config.json").exists():
        return make_prompt(read_config(file.parent), delta["prompt"])
    config = by_trial.get(origin["trial"])
    return make_prompt(from_dict(config), delta["prompt"]) if config else None


files = sorted({*folder.glob("*.safetensors"), *folder.rglob("delta.safetensors")})
prompts = [prompt for prompt in map(read_prompt, files) if prompt]
print(f"{len(prompts)} trained prompts; {len(files) - len(prompts)} other files")
trained = bool(prompts)
if not trained:
    print("There is no trained prompt: below are prompts as they start, before any training.")
    starts = [study.trial(study.SMOLLM2, "prompt", seed) for seed in study.SEEDS]
    prompts = [make_prompt(resolve(config)) for config in starts]

# %%
loaded = session.model(resolve(study.trial(study.SMOLLM2, "prompt", model__dtype="float32")))
vocabulary_VD = np.asarray(embedding(loaded.weights["embed"])) * loaded.config.embed_scale
print(f"{len(vocabulary_VD):,} tokens of {vocabulary_VD.shape[1]} dimensions")

# %% [markdown]
# ## Nearest tokens
#
# By cosine. A token with a space before it is another token than the same word without one.


# %%
def words(ids: list[int]) -> str:
    """Tokens as text, in quotation marks."""
    return ", ".join(repr(loaded.tokenizer.decode([one])) for one in ids)


def nearest(prompt: Prompt, count: int) -> pd.DataFrame:
    """What the first vectors of a prompt started from, and what they are near to."""
    start = geometry.neighbours(prompt.start_PD[:count], vocabulary_VD, count=1)
    after = geometry.neighbours(prompt.trained_PD[:count], vocabulary_VD, count=NEAR)
    columns = {
        "started from": [words(ids) for ids in start.ids.tolist()],
        "nearest tokens": [words(ids) for ids in after.ids.tolist()],
        "cosine": after.similarity[:, 0].round(3),
        "tightness": after.tightness.round(3),
    }
    return pd.DataFrame(columns)


print(prompts[0].name)
pd.set_option("display.max_colwidth", None)
nearest(prompts[0], 8)

# %% [markdown]
# ## Against random vectors
#
# Any vector has nearest tokens. What counts is whether they are nearer, and nearer to one another
# (*tightness*, the mean cosine between the nearest tokens), than those of random directions.


# %%
def random_like(prompt: Prompt) -> np.ndarray:
    """Random directions with the lengths of a prompt's vectors."""
    random = np.random.default_rng(zlib.crc32(prompt.name.encode()))
    rows_PD = random.normal(size=prompt.trained_PD.shape)
    norms_P1 = np.linalg.norm(prompt.trained_PD, axis=1, keepdims=True)
    return rows_PD / np.linalg.norm(rows_PD, axis=1, keepdims=True) * norms_P1


KINDS: dict[str, Callable[[Prompt], np.ndarray]] = {
    "start": lambda prompt: prompt.start_PD,
    "random": random_like,
}
if trained:
    KINDS = {"trained": lambda prompt: prompt.trained_PD, **KINDS}
found = {
    kind: [geometry.neighbours(vectors(one), vocabulary_VD, count=NEAR) for one in prompts]
    for kind, vectors in KINDS.items()
}

# %%
figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True)
for axes, what in zip(panels, ("nearest", "tightness"), strict=True):
    for number, some in enumerate(found.values()):
        values = [one.similarity[:, 0] if what == "nearest" else one.tightness for one in some]
        height = number + np.random.default_rng(0).uniform(-0.25, 0.25, sum(map(len, values)))
        axes.plot(np.concatenate(values), height, ".", color=COLOURS[number], alpha=0.5)
    axes.set_xlim(-0.02, 1.02)
panels[0].set_yticks(range(len(found)), list(found))
panels[0].invert_yaxis()
panels[0].set_xlabel("Cosine to the nearest token")
panels[1].set_xlabel(f"Mean cosine between the {NEAR} nearest tokens")
plt.show()

# %% [markdown]
# ## Each prompt in numbers
#
# * **cosine to the nearest, tightness**: means over the vectors, as in the figure.
# * **label persistence**: of the vectors that started from a label, the share that has it near.
# * **duplicates**: the share whose nearest token is also that of an earlier vector.
# * **norm**: the mean length of the vectors over that of the vocabulary's.
# * **displacement**: how far vectors moved, over their length at the start. A prompt that hardly
#   moved keeps its labels for that reason alone.

# %%
rows = []
for kind, some in found.items():
    for prompt, near in zip(prompts, some, strict=True):
        vectors_PD = KINDS[kind](prompt)
        numbers = geometry.measures(near, vectors_PD, prompt.start_PD, vocabulary_VD, prompt.labels)
        rows.append({"vectors": kind, "prompt": prompt.name} | numbers)
pd.DataFrame(rows).set_index(["vectors", "prompt"]).round(3)

# %% [markdown]
# ## Similar prompts
#
# The mean cosine over all pairs of vectors of two prompts. Prompts of one task that started
# differently can be compared with prompts of other tasks, and with their own starts: what the
# starts already have in common was not learned.

# %%
kinds = [kind for kind in KINDS if kind != "random"]
lines = []
for one, other in itertools.combinations(prompts, 2):
    line: dict[str, object] = {"tasks": "same" if one.task == other.task else "different"}
    for kind in kinds:
        pair = KINDS[kind](one), KINDS[kind](other)
        line[kind] = geometry.prompt_similarity(*pair)
    lines.append(line)
if lines:
    means = pd.DataFrame(lines).groupby("tasks")[kinds].agg(["count", "mean", "min", "max"])
    print(means.round(3).to_string())

# %% [markdown]
# Each pair of prompts. A prompt with itself is left out: its mean has the cosine 1 of each vector
# with itself.

# %%
similar = np.array(
    [
        [geometry.prompt_similarity(one.trained_PD, other.trained_PD) for other in prompts]
        for one in prompts
    ]
)
np.fill_diagonal(similar, np.nan)
names = [prompt.name for prompt in prompts]
with plt.rc_context({"axes.grid": False}):
    side = 2.4 + 0.5 * len(prompts)
    figure, axes = plt.subplots(figsize=(side + 0.6, side))
    image = axes.imshow(similar, cmap="Blues", vmin=0)
    for y, x in itertools.permutations(range(len(prompts)), 2):
        colour = "white" if similar[y, x] > 0.6 * np.nanmax(similar) else "black"
        axes.text(x, y, f"{similar[y, x]:.2f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.colorbar(image, label="Mean cosine", shrink=0.8)
    plt.show()

# %% [markdown]
# ## Next
#
# * Your own prompts: set `PROMPTS` to a folder of trials, such as `runs/first_prompt`. They must be
#   prompts of SmolLM2 on a task with labels.
# * Other starts: train with `method.init=vocabulary` or `uniform`, and compare the tightness.
# * `softprompt.analysis.geometry` takes any two arrays: embeddings of other models work too.
