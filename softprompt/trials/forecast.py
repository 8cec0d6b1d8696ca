"""How long the trials of a sweep that are left will take."""

import statistics
from collections.abc import Callable, Mapping, Sequence

from softprompt.config import ConfigDict, method_settings, weights_key

Estimate = Callable[[ConfigDict], Mapping[str, float]]

DECAY = 0.5  # weight of an observation, against the next one of its kind


class Forecast:
    """Estimates of the trials that are left, scaled by how estimates held for finished ones.

    The scale is seconds over estimated seconds: of trials that train something and of those that
    only score, each by itself, the last ones weighted most. A kind of which none is finished takes
    the other's scale.

    An estimate loads the trial's model, so it is made when the model's turn comes; until then a
    trial counts like the mean of the others.

    Attributes:
        todo: the trials that are left, by index.
    """

    def __init__(self, todo: Mapping[int, ConfigDict], estimate: Estimate | None) -> None:
        self.todo = dict(todo)
        self._estimate = estimate
        self._expected: dict[int, float] = {}  # seconds by index, of finished trials too
        self._running: set[int] = set()  # left to finish, but counted as finished
        self._observed: dict[bool, list[tuple[float, float]]] = {True: [], False: []}

    def estimate_model(self, config: ConfigDict) -> None:
        """Estimates all trials of a config's model."""
        key = weights_key(config)
        for index, other in self.todo.items():
            if index not in self._expected and weights_key(other) == key:
                self._expected[index] = self._seconds(other)

    def _seconds(self, config: ConfigDict) -> float:
        """A trial's estimate; 0 where there is none, since the trial will fail for that reason."""
        try:
            return self._estimate(config)["seconds"] if self._estimate else 1.0
        except Exception:
            return 0.0

    def end(self, index: int, seconds: float, *, done: bool, beside: Sequence[int] = ()) -> None:
        """Takes note of a finished trial.

        Args:
            index: of the trial.
            seconds: since the last one ended, or since this one began.
            done: False where it failed, which says nothing of the others.
            beside: trials that ran at the same time and are about as long, so that they will end
                soon: what was spent until now was spent on them too.
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
        """Seconds until all trials are finished; None where nothing is known."""
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
