# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # Scaling laws
#
# **Question.** How does a loss fall with the size of a model, and how far can the fitted law be
# trusted? The law is loss = E + A N^-a: E is the loss of an infinite model, a the exponent.
#
# **Cost.** Half a minute on a laptop. No model is loaded.
#
# **Reads.** `experiments/paper/results/ladder.json`, the pretraining losses of the ladder. The
# first half needs no file: its losses are simulated, so that the right answer is known.

# %%
# %matplotlib inline
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

# The repository: the first folder from here up that holds the study.
ROOT = next(
    folder
    for folder in (Path.cwd(), *Path.cwd().parents)
    if (folder / "experiments/paper").is_dir()
)
sys.path.insert(0, str(ROOT))

from softprompt.analysis.plots import COLOURS, STYLE
from softprompt.analysis.scaling import FEWEST, ScalingLaw, fit, fit_with_interval
from softprompt.errors import UserError

plt.rcParams.update(STYLE)

# %% tags=["parameters"]
SEEDS = 6  # simulated runs of each size
DRAWS = 200  # resamples of an interval or a band
STUDIES = 40  # simulated studies, to count how often their intervals contain the truth
LADDER = ""  # a file of losses; "" is the committed one

# %% [markdown]
# ## Simulated losses, of which the law is known
#
# Nine sizes from 0.1M to 1,000M parameters, with 1 % noise in each loss and 1 % in what all sizes
# of a seed have in common, such as the order of the data.

# %%
TRUTH = ScalingLaw(floor=1.7, scale=60.0, exponent=0.3)
sizes = np.geomspace(1e5, 1e9, 9)


def simulate(study: int) -> np.ndarray:
    """Losses of a study, [seeds, sizes]."""
    random = np.random.default_rng(study)
    common_S1 = random.normal(0, 0.01, (SEEDS, 1))
    return TRUTH(sizes) * np.exp(common_S1 + random.normal(0, 0.01, (SEEDS, len(sizes))))


def fit_seeds(losses_SN: np.ndarray, count: int) -> ScalingLaw:
    """The law of the first so many sizes, with an interval over seeds."""
    seeds = np.repeat(np.arange(SEEDS), count).tolist()
    axis, some = np.tile(sizes[:count], SEEDS).tolist(), losses_SN[:, :count].ravel().tolist()
    return fit_with_interval(axis, some, seeds, draws=DRAWS)


losses_SN = simulate(0)
law = fit_seeds(losses_SN, len(sizes))
pd.DataFrame(
    {"truth": [TRUTH.floor, TRUTH.exponent], "fit": [law.floor, law.exponent]}, ["E", "a"]
).assign(low=[np.nan, law.low], high=[np.nan, law.high]).round(3)

# %%
inside = "contains" if law.low <= TRUTH.exponent <= law.high else "does not contain"
print(f"The interval of a, {law.low:.3f} to {law.high:.3f}, {inside} the true {TRUTH.exponent}.")

# %% [markdown]
# One interval that contains the truth may be luck. Of many studies, 95 % should have one that does:
# count them. Resampled exponents of few seeds are spread out, as Student's distribution is.

# %%
laws = [fit_seeds(simulate(study), len(sizes)) for study in range(1, STUDIES + 1)]
hits = sum(one.low <= TRUTH.exponent <= one.high for one in laws)
print(f"{hits} of {STUDIES} intervals contain the true exponent.")

# %% [markdown]
# ## A band, and what it says beyond the data
#
# The band is where 95 % of the laws lie that are fitted to resampled seeds. On the left is a law
# that was fitted to the five smallest sizes. On the right are the bands of two fits, relative to
# the true law; the vertical lines are the largest sizes that they were fitted to. A band is narrow
# where there are losses, and opens beyond them: it is about noise, not about whether the law goes
# on.


# %%
def band(losses_SN: np.ndarray, count: int, grid: np.ndarray) -> np.ndarray:
    """The ends of the 95 % band of laws at the sizes of a grid, from the first so many sizes."""
    draws = np.random.default_rng(1)
    curves = []
    for _ in range(DRAWS):
        some_SN = losses_SN[draws.integers(SEEDS, size=SEEDS), :count]
        curves.append(fit(np.tile(sizes[:count], SEEDS), some_SN.ravel())(grid))
    return np.quantile(curves, [0.025, 0.975], axis=0)


def millions(size: float) -> str:
    """A size such as 0.1M or 1,000M."""
    return f"{float(f'{size / 1e6:.3g}'):,g}M"


def size_axis(axes: Axes, ticks: Iterable[float]) -> None:
    """A logarithmic axis of sizes."""
    axes.set_xscale("log")
    axes.set_xticks(list(ticks), [millions(tick) for tick in ticks])
    axes.xaxis.minorticks_off()
    axes.set_xlabel("Parameters")


grid = np.geomspace(5e4, 1e11, 80)
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4))
few, means_N = 5, losses_SN.mean(0)
left.plot(grid, fit_seeds(losses_SN, few)(grid), color=COLOURS[0], label="fit")
left.plot(sizes[:few], means_N[:few], "o", color=COLOURS[0], label="fitted to")
left.plot(sizes[few:], means_N[few:], "o", mfc="none", color=COLOURS[0], label="held out")
left.axhline(TRUTH.floor, color="#555555", linestyle=":", linewidth=1, label="true E")
left.set_ylabel("Loss")
for count, colour in ((few, COLOURS[0]), (len(sizes), COLOURS[1])):
    low, high = 100 * (band(losses_SN, count, grid) / TRUTH(grid) - 1)
    right.fill_between(
        grid, low, high, color=colour, alpha=0.3, linewidth=0, label=f"{count} sizes"
    )
    right.axvline(sizes[count - 1], color=colour, linewidth=1, linestyle="--")
right.axhline(0, color="#555555", linestyle=":", linewidth=1)
right.set_ylabel("95 % band over true loss (%)")
for axes in (left, right):
    size_axis(axes, [1e5, 1e7, 1e9])
    axes.set_xlim(grid[0], grid[-1] * 2)
left.legend(frameon=False)
right.legend(frameon=False, loc="upper left")
plt.show()

# %% [markdown]
# ## How well does a fit predict larger models?
#
# Fit the smaller sizes and predict the largest. With the fewest sizes, three numbers are fitted to
# four: E and a trade off against each other, and the interval is widest.

# %%
lines = []
for count in range(FEWEST, len(sizes)):
    fitted = fit_seeds(losses_SN, count)
    error = fitted(sizes[-1]) / losses_SN[:, -1].mean() - 1
    line = {"sizes": count, "largest": millions(sizes[count - 1]), "E": fitted.floor}
    line |= {"a": fitted.exponent, "low": fitted.low, "high": fitted.high}
    lines.append(line | {"error at 1,000M (%)": 100 * float(error)})
pd.DataFrame(lines).set_index("sizes").round(3)

# %% [markdown]
# ## What is refused
#
# Three numbers fit any three points exactly, so fewer than four sizes are an error. So are losses
# that are not positive, and an interval from a single seed.

# %%
for what, call in {
    "three sizes": lambda: fit(sizes[:3], losses_SN[0, :3]),
    "a negative loss": lambda: fit(sizes, -losses_SN[0]),
    "one seed": lambda: fit_with_interval(list(sizes), list(losses_SN[0]), [0] * len(sizes)),
}.items():
    try:
        call()
    except UserError as error:
        print(f"{what}: {error}")

# %% [markdown]
# ## The ladder
#
# The decoders `ladder/d0` to `ladder/d4` were trained here on the same text in the same order. Each
# size has one run, so the exponent has no interval over seeds; the range over fits that leave one
# size out says how much hangs on a single model. The T5s have another objective and are left out.
# `experiments/paper/scaling_law.py` asks the same of the test losses of prompts and full
# fine-tuning, which have seeds.

# %%
file = Path(LADDER or ROOT / "experiments/paper/results/ladder.json")
ladder = pd.DataFrame(
    json.loads(file.read_text()) if file.is_file() else [],
    columns=["name", "parameters", "tokens", "loss"],
)
ladder = ladder[ladder["name"].str.fullmatch(r"ladder/d\d+")].sort_values("parameters")
if not file.is_file():
    print(f"There are no losses of the ladder: {file.name} is missing.")
ladder.reset_index(drop=True)

# %%
enough = len(ladder) >= FEWEST
if not enough:
    print(f"{len(ladder)} sizes of the ladder; a fit needs {FEWEST}. The figure is not drawn.")
else:
    found = fit(ladder["parameters"], ladder["loss"])
    print(f"E = {found.floor:.3f}, A = {found.scale:.1f}, a = {found.exponent:.3f}")
    if len(ladder) > FEWEST:
        others = [ladder.drop(index) for index in ladder.index]
        exponents = [fit(some["parameters"], some["loss"]).exponent for some in others]
        print(f"a without one size: {min(exponents):.3f} to {max(exponents):.3f}")
        smaller, largest = ladder.iloc[:-1], ladder.iloc[-1]
        share = fit(smaller["parameters"], smaller["loss"])(largest["parameters"]) / largest["loss"]
        print(f"{largest['name']} predicted from the smaller ones: {100 * (share - 1):+.1f} %")

# %%
if enough:
    grid = np.geomspace(ladder["parameters"].min() / 2, ladder["parameters"].max() * 2, 80)
    figure, axes = plt.subplots(figsize=(6, 3.6))
    axes.plot(grid, found(grid), color=COLOURS[0], label="fit")
    axes.plot(ladder["parameters"], ladder["loss"], "o", color=COLOURS[1], label="ladder")
    for _, one in ladder.iterrows():
        where = (one["parameters"], one["loss"])
        axes.annotate(one["name"], where, (6, 4), textcoords="offset points")
    size_axis(axes, list(ladder["parameters"]))
    axes.set(xlabel="Parameters of the layers", ylabel="Held-out loss (nats)")
    axes.legend(frameon=False)
    plt.show()

# %% [markdown]
# ## Next
#
# * Your own sizes: set `LADDER` to a JSON file of the same form, or call `fit` on two lists.
# * Several seeds a size give intervals: `fit_with_interval`, with the seed as cluster.
# * `softprompt pretrain ladder/d0` makes a model of the ladder; see the guide to pretraining.
# * Prompt length works as an axis too: `fit` takes any positive numbers.
