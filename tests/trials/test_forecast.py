"""The time that a sweep has left, from estimates and finished trials."""

import pytest

from softprompt.trials.forecast import Forecast
from tests.trials.rows import config


@pytest.mark.parametrize("width", [1, 2, 4])
def test_trials_side_by_side_are_not_taken_for_one_after_another(width):
    """Breaks when the first of several that run at a time bears all of their time."""
    todo = {index: config(index + 1) for index in range(8)}
    forecast = Forecast(todo, lambda made: {"seconds": 10.0})
    forecast.estimate_model(todo[0])
    assert forecast.left() == 80
    left = []
    for index in range(8):
        first = index % width == 0  # of a round of 30 s, whose others end right behind
        beside = [other for other in todo if other in forecast.todo and other > index][: width - 1]
        forecast.end(index, 30.0 if first else 0.0, done=True, others=beside)
        left.append(forecast.left())
    assert left == pytest.approx([30 * (7 - index) // width * 1.0 for index in range(8)], abs=30)
    assert left[width - 1] == pytest.approx(30 * (8 / width - 1))
    assert left[0] == left[width - 1]


def test_a_forecast_learns_from_the_last_trials_of_a_kind():
    """Breaks when what zero-shot scoring took is the scale of training, once a trained trial is
    finished; when all trials count alike, or failed ones count."""
    todo = {index: config(index + 1, name="prompt" if index else "none") for index in range(6)}
    forecast = Forecast(todo, lambda made: {"seconds": 10.0})
    forecast.estimate_model(todo[0])
    forecast.end(0, 100.0, done=True)
    assert forecast.left() == 500, "nothing better is known"
    forecast.end(1, 20.0, done=True)
    assert forecast.left() == 80
    forecast.end(2, 1.0, done=False)
    assert forecast.left() == 60
    forecast.end(3, 10.0, done=True)
    assert 20 < forecast.left() < 2 * 15, "the last one counts most"
