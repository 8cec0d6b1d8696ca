"""Predicts how long the trials of a sweep will take."""

import statistics
from collections.abc import Callable, Mapping, Sequence

from softprompt.config import ConfigDict, method_settings, weights_key

Estimate = Callable[[ConfigDict], Mapping[str, float]]

DECAY = 0.5  # weight of an observation, relative to the next one of its kind


class Forecast:
    """Predicts the remaining time, from estimates and from the times of finished trials.

    Estimates are multiplied by the ratio of actual to estimated seconds of finished trials, in
    which the latest count most. Trials that train and trials that only score have separate ratios,
    since their estimates have different errors. Until a trial of a kind has finished, the ratio of
    the other kind is used.

    An estimate loads the trial's model, so it is made when the first trial of that model starts.
    Until then it is the mean of the other estimates.

    Attributes:
        todo: the trials that have not ended, by index.
    """

    def __init__(self, todo: Mapping[int, ConfigDict], estimate: Estimate | None) -> None:
        self.todo = dict(todo)
        self._estimate = estimate
        self._expected: dict[int, float] = {}  # estimates, also of finished trials
        self._running: set[int] = set()  # in `todo`, but about to end
        self._observed: dict[bool, list[tuple[float, float]]] = {True: [], False: []}

    def estimate_model(self, config: ConfigDict) -> None:
        """Makes the estimates of all trials with a config's model."""
        key = weights_key(config)
        for index, other in self.todo.items():
            if index not in self._expected and weights_key(other) == key:
                self._expected[index] = self._seconds(other)

    def _seconds(self, config: ConfigDict) -> float:
        """A trial's estimate; 0 if it raises an error, since the trial will fail with it."""
        try:
            return self._estimate(config)["seconds"] if self._estimate else 1.0
        except Exception:
            return 0.0

    def end(self, index: int, seconds: float, *, done: bool, others: Sequence[int] = ()) -> None:
        """Records that a trial ended.

        Args:
            index: of the trial.
            seconds: since the previous trial of its group ended, or since the group began.
            done: False if it failed; its time is then ignored.
            others: concurrent trials that will end soon. `seconds` include their work.
        """
        config = self.todo.pop(index)
        if not done:
            return
        work = 0.0
        if index not in self._running:
            self._running.update(others)
            work = self._expected[index] + sum(self._expected[other] for other in others)
        self._running.discard(index)
        self._observed[method_settings(config).trains].append((seconds, work))

    def left(self) -> float | None:
        """Seconds until all trials end; None without an estimate and a finished trial."""
        if not self._estimate and not any(self._observed.values()):
            return None
        mean = statistics.fmean(self._expected.values()) if self._expected else 0.0
        return sum(
            self._expected.get(index, mean) * self._scale(method_settings(config).trains)
            for index, config in self.todo.items()
            if index not in self._running
        )

    def _scale(self, trains: bool) -> float:
        """The ratio of actual to estimated seconds."""
        for observed in (self._observed[trains], self._observed[not trains]):
            weighted = [(DECAY**age, *one) for age, one in enumerate(reversed(observed))]
            work = sum(weight * expected for weight, _, expected in weighted)
            if work:
                return sum(weight * seconds for weight, seconds, _ in weighted) / work
        return 1.0
