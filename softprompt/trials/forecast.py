"""How long the trials of a sweep that are left will take."""

import statistics
from collections.abc import Callable, Mapping, Sequence

from softprompt.config import ConfigDict, method_settings, weights_key

Estimate = Callable[[ConfigDict], Mapping[str, float]]

DECAY = 0.5  # weight of an observation, against the next one of its kind


class Forecast:
    """Predicts the time that is left, from estimates and from how long finished trials took.

    Estimates are scaled by seconds over estimated seconds of finished trials. Trials that train and
    trials that only score have separate scales, since their estimates err differently; the latest
    trials weigh most. While no trial of a kind is finished, the other kind's scale is used.

    An estimate loads the trial's model, so it is made when the first trial of that model begins.
    Until then a trial is counted as the mean of the others.

    Attributes:
        todo: the trials that have not ended, by index.
    """

    def __init__(self, todo: Mapping[int, ConfigDict], estimate: Estimate | None) -> None:
        self.todo = dict(todo)
        self._estimate = estimate
        self._expected: dict[int, float] = {}  # estimates, of finished trials too
        self._running: set[int] = set()  # in `todo`, but about to end
        self._observed: dict[bool, list[tuple[float, float]]] = {True: [], False: []}

    def estimate_model(self, config: ConfigDict) -> None:
        """Makes the estimates of all trials of a config's model."""
        key = weights_key(config)
        for index, other in self.todo.items():
            if index not in self._expected and weights_key(other) == key:
                self._expected[index] = self._seconds(other)

    def _seconds(self, config: ConfigDict) -> float:
        """A trial's estimate; 0 where it raises an error, since the trial will fail by it."""
        try:
            return self._estimate(config)["seconds"] if self._estimate else 1.0
        except Exception:
            return 0.0

    def end(self, index: int, seconds: float, *, done: bool, beside: Sequence[int] = ()) -> None:
        """Records that a trial ended.

        Args:
            index: of the trial.
            seconds: since the previous trial of its group ended, or since the group began.
            done: False where it failed; its time then predicts nothing.
            beside: trials that ran at the same time and will end soon. `seconds` were spent on them
                too.
        """
        config = self.todo.pop(index)
        if not done:
            return
        work = 0.0
        if index not in self._running:
            self._running.update(beside)
            work = self._expected[index] + sum(self._expected[other] for other in beside)
        self._running.discard(index)
        self._observed[method_settings(config).trains].append((seconds, work))

    def left(self) -> float | None:
        """Seconds until all trials have ended; None without an estimate and a finished trial."""
        if not self._estimate and not any(self._observed.values()):
            return None
        mean = statistics.fmean(self._expected.values()) if self._expected else 0.0
        return sum(
            self._expected.get(index, mean) * self._scale(method_settings(config).trains)
            for index, config in self.todo.items()
            if index not in self._running
        )

    def _scale(self, trains: bool) -> float:
        """Seconds over estimated seconds."""
        for observed in (self._observed[trains], self._observed[not trains]):
            weighted = [(DECAY**age, *one) for age, one in enumerate(reversed(observed))]
            work = sum(weight * expected for weight, _, expected in weighted)
            if work:
                return sum(weight * seconds for weight, seconds, _ in weighted) / work
        return 1.0
