"""The scaling law's verdicts on simulated trials: true effects hold, false ones are refuted."""

import numpy as np
import pytest

from experiments.paper import figure1, figure3_length, scaling_law, study
from tests.paper.simulated import EXAMPLES, record, seeds
from tests.paper.test_artefacts import LARGE, verdicts


def with_loss(rows, loss):
    """The same trials, whose right labels cost so many nats on average."""
    for row in rows:
        nats = loss * np.where(np.arange(EXAMPLES) % 3, 0.5, 2)
        row["answers"][study.TASK]["label_centinats"] = (100 * nats * loss / nats.mean()).tolist()
    return rows


def rungs(method, losses, accuracy=0.75):
    """Two trials of Figure 1 on each model of the ladder, whose seeds differ a little."""
    return [
        row
        for model, loss in zip(scaling_law.LADDER, losses, strict=True)
        for seed, sign in enumerate((-1, 1))
        for row in with_loss([record(model, method, seed, accuracy)], loss * (1 + 0.001 * sign))
    ]


def test_scaling_law():
    """Breaks when the law knows the held-out loss, chance counts, or models are too few."""
    sizes = np.array([study.size(model) for model in scaling_law.LADDER], float)
    law = 0.4 + 20 * sizes**-0.4
    worse, two = law * [1, 1, 1, 1, 1.4], ["holds", "refuted"]
    assert verdicts(scaling_law, [*rungs("full", law), *rungs("prompt", worse)])[:2] == two
    assert verdicts(scaling_law, [*rungs("full", worse), *rungs("prompt", law)])[:2] == two[::-1]
    told = scaling_law.table(rungs("full", worse))["law (nats)"].astype(float)
    assert told.tolist() == pytest.approx(law.tolist(), abs=2e-3)
    rows = [*rungs("full", law), *rungs("prompt", law, accuracy=0.5)]
    assert verdicts(scaling_law, rows)[:2] == ["holds", "undecided"]
    table = scaling_law.table(rows)
    assert table["law (nats)"].tolist() == pytest.approx(table["loss (nats)"].tolist())
    assert len(scaling_law.figure(rows).axes[0].lines) > len(scaling_law.METHODS)
    without = [row for row in rows if study.value(row, "model.name") != "ladder/d2"]
    assert verdicts(scaling_law, without)[:2] == ["not run"] * 2


def test_the_figure():
    """Breaks when a method has another colour than in Figure 1, or a loss may be negative."""
    rows = [*rungs("full", [0.5] * 5), *rungs("prompt", [0.6] * 5)]
    drawn = [one.figure(rows).axes[0].texts for one in (scaling_law, figure1)]
    ours, theirs = ({text.get_text(): text.get_color() for text in texts} for texts in drawn)
    assert ours == theirs and ours.keys() == {"prompt", "full"}
    losses = {(study.TASK, seed): np.full(9, loss) for seed, loss in enumerate((0.1, 5.0))}
    wide = scaling_law.point("ladder/d0", losses)
    assert wide.low == 0 and wide.mean == pytest.approx(2.55)


def test_scaling_law_of_length():
    """Breaks when a longer prompt's gain has the other sign, or is that of the natural base."""

    def found(gain):
        trials = {
            n: with_loss(rows, 0.5 * (1 - gain) ** np.log10(n))
            for n, rows in {
                n: seeds(LARGE, "prompt", (0.8, 0.81), method__length=n)
                for n in figure3_length.LENGTHS
            }.items()
        }
        (one,) = scaling_law.findings([row for rows in trials.values() for row in rows])[2:]
        return one.found.value, one.verdict

    assert found(0.08) == (pytest.approx(8), "holds")
    assert found(0.16) == (pytest.approx(16), "refuted")
