"""What a step costs as it grows: its points, its count of operations, its table and figure."""

import io

import numpy as np
import pytest

from experiments import cost_growth
from experiments.cost_growth import AXES, BASE, Point
from softprompt.config import from_dict, set_key, to_dict
from softprompt.console import Progress
from softprompt.errors import UserError
from softprompt.pretrained.loading import load_model
from softprompt.trials.outputs import write_outputs
from tests.own_task import make_config, write_task

ASKED = [
    Point(),
    Point(length=0),
    Point(length=100),
    Point(batch=8),
    Point(members=2),
    Point(layers=1),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory, tiny_folder):
    """The rows of a few points of a tiny model, of two rounds."""
    place = write_task(tmp_path_factory.mktemp("growth"))
    shared = from_dict(to_dict(make_config(place, tiny_folder)))
    set_key(shared, "method.init", "uniform")
    deeper = [Point(layers=3), Point(layers=20)]  # as the model is, and more: left out
    return cost_growth.measure([*ASKED, *deeper], shared, rounds=2, progress=Progress())


def test_points_differ_from_the_base_in_one_field():
    """Mutation: a point grows in two ways; the base is measured twice."""
    for subset, most in (("quick", 11), ("full", 21)):
        found = cost_growth.points(subset)
        assert found[0] == BASE
        assert len(set(found)) == len(found) == most
        for point in found[1:]:
            changed = [name for name in AXES if getattr(point, name) != getattr(BASE, name)]
            assert len(changed) == 1
        assert {0, 1000} <= {point.length for point in found}
    with pytest.raises(UserError, match="unknown subset 'half'; known: full, quick"):
        cost_growth.points("half")


def test_a_shorter_model_is_the_first_layers(tiny_folder):
    """Mutation: the last layers; the config keeps the number, so that the scan fails."""
    loaded = load_model(str(tiny_folder))
    short = cost_growth.shorter(loaded, 2)
    assert cost_growth.shorter(loaded, 3) is cost_growth.shorter(loaded, 0) is loaded
    tokens = np.arange(2, 9)
    kernel = short.weights["layers"]["attn"]["q"]["kernel"]
    np.testing.assert_array_equal(kernel, loaded.weights["layers"]["attn"]["q"]["kernel"][:2])
    assert short.config.layers == short.model.config.layers == 2
    logits, whole = (one.model.apply({"params": one.weights}, tokens) for one in (short, loaded))
    assert np.isfinite(logits).all()
    assert np.abs(logits - whole).max() > 0.1


@pytest.mark.matrix
def test_rows(rows):
    """Mutation: operations of one trial for all; those of all layers for one; a backward pass where
    nothing is trained; the prompt's tokens among the examples'; the first round is timed."""
    base, plain, long, few, two, one = rows
    for row in rows:
        assert len(row["seconds"]) == 2
        assert min(row["seconds"]) > 0
    assert two["flops"] == 2 * base["flops"]
    assert 0.3 < plain["flops"] / base["flops"] < 0.5
    assert base["flops"] * 1.3 < long["flops"] < base["flops"] * 8
    assert (base["layers"], one["layers"]) == (3, 1)
    assert 1 / 3 < one["flops"] / base["flops"] < 0.6
    assert few["tokens"] == pytest.approx(base["tokens"] / 2, abs=1)
    assert {row["tokens"] for row in (plain, long, two, one)} == {base["tokens"]}


@pytest.mark.matrix
def test_the_prediction_is_the_base_at_the_base(rows):
    """Mutation: the mean of seconds; every panel is set equal at its first point."""
    rows = [{**row, "seconds": [6.0, 1.0, 2.0]} for row in rows]
    table = cost_growth.table(rows)
    assert table["grows"].value_counts().to_dict() == {
        "Prompt length P": 3,
        "Tokens of examples a step": 2,
        "Trials together": 2,
        "Layers": 2,
    }
    base, two = rows[0], rows[4]
    assert cost_growth.predicted(base, rows) == 2.0
    assert cost_growth.predicted(two, rows) == 4.0
    lines = table[table["grows"] == "Prompt length P"]
    assert lines["to"].tolist() == [0, 20, 100]
    assert (lines["measured / predicted"] == 1).tolist()[1]
    assert cost_growth.table(rows[1:])["predicted s"].isna().all(), "the base is missing"


@pytest.mark.matrix
def test_outputs(rows, tmp_path):
    """Mutation: a panel is left out, or has another's points; what is missing is an error."""
    drawn = cost_growth.figure(rows)
    assert [axes.get_xlabel() for axes in drawn.axes] == list(AXES.values())
    for axes, count in zip(drawn.axes, (3, 2, 2, 2), strict=True):
        dashes, *_ = axes.lines
        assert len(dashes.get_xdata()) == count
    tokens = sorted(row["tokens"] for row in (rows[0], rows[3]))
    assert drawn.axes[1].lines[0].get_xdata().tolist() == tokens
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=160, bbox_inches="tight")
    assert len(buffer.getvalue()) < 100_000
    for part in (rows, rows[1:], rows[:1], []):
        write_outputs(cost_growth, part, tmp_path)
