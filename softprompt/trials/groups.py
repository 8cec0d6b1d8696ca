"""Which trials of a sweep run at a time, and how."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import jax
from etils import epath

from softprompt.analysis.flops import machine_flops
from softprompt.config import ConfigDict, method_settings, trial_name, weights_key
from softprompt.results import Row
from softprompt.training.memory import MEMORY_SHARE, bytes_here, device_memory
from softprompt.trials.estimate import step_memory, trained
from softprompt.trials.population import Population
from softprompt.trials.prepare import Prepared, delta_shapes, kept_shares, prepare, train_source
from softprompt.trials.run import run_trial
from softprompt.trials.session import Session, optimizer_config

Job = tuple[ConfigDict, epath.Path]
Run = Callable[[ConfigDict, epath.Path], Row]

# Members of a population where the config leaves it open.
MOST = {"cpu": 2}
MOST_ELSEWHERE = 16
# Where they run side by side, each with the program of a trial alone. A CPU's cores are busy with
# one step, but for waiting for one another: it gains by a second program, not by a larger one.
APART = ("cpu",)


class Together:
    """Runs trials of one process in groups."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def plan(self, trials: Sequence[ConfigDict]) -> Iterator[tuple[list[int], int]]:
        """Groups of trials, as their places in `trials`, and how many of each run at a time.

        Trials are of one group when their steps are one program on the same weights: they may
        differ in seed, initialiser, rate, schedule, length of training, how much is dropped where
        the same is, and task where rows have equal shapes. Groups of a model come one after
        another, and are told apart when its turn comes: a sweep over models loads each once.
        """
        models: dict[Any, list[int]] = {}
        for place, config in enumerate(trials):
            models.setdefault(weights_key(config) if _most(config) > 1 else place, []).append(place)
        for places in models.values():
            yield from self._groups(trials, places)

    def _groups(
        self, trials: Sequence[ConfigDict], places: Sequence[int]
    ) -> Iterator[tuple[list[int], int]]:
        """The groups of one model's trials."""
        groups: dict[Any, list[int]] = {}
        widths: dict[Any, int] = {}
        for place in places:
            key, width = self._program(trials[place])
            groups.setdefault(key or place, []).append(place)
            widths[key or place] = width
        for key, group in groups.items():
            width = min(widths[key], len(group))
            if width == 1:
                yield from (([place], 1) for place in group)
                continue
            self.session.progress.say(
                f"{len(group)} trials like {trial_name(trials[group[0]])} share a program: {width} "
                "of them run at a time"
            )
            yield group, width

    def _program(self, config: ConfigDict) -> tuple[Any, int]:
        """What a trial's program is told by, and how many members it may have; None where alone."""
        if _most(config) == 1:
            return None, 1
        try:
            prepared = prepare(config, self.session)
            shape = train_source(prepared).template.shape
            leaves = jax.tree_util.tree_leaves_with_path(delta_shapes(prepared))
        except Exception:  # the trial will say what is wrong with it
            return None, 1
        sizes = tuple((str(path), leaf.shape, str(leaf.dtype)) for path, leaf in leaves)
        drops = jax.tree.structure(kept_shares(config))
        rows = (shape, prepared.layout, sizes)
        key = (prepared.step, drops, optimizer_config(config), weights_key(config), rows)
        return key, max(1, min(_most(config), room(prepared)))

    def run(
        self, jobs: Sequence[Job], width: int, one: Callable[[ConfigDict, epath.Path, Run], Row]
    ) -> Iterator[tuple[int, Row]]:
        """Runs a group's trials, `width` at a time; a place that falls free takes the next.

        Their steps are one program, or on one device of `APART` each trial's own.

        Args:
            jobs: configs and their folders.
            width: how many run at a time.
            one: runs a config in its folder with the function it is given, and returns its row.

        Yields:
            A trial's place in `jobs` and its row, as it ends.

        Raises:
            SystemExit: with 75 after SIGTERM; every member is saved.
        """
        single = self.session.mesh(jobs[0][0]).size == 1
        machine_flops(jobs[0][0].model.dtype)  # measured while nothing else runs
        population = Population(width if single and jax.default_backend() in APART else 0)
        population.coming, population.queued = min(width, len(jobs)), len(jobs)

        def work(config: ConfigDict, folder: epath.Path) -> Row:
            with self.session.progress.part(trial_name(config)) as progress, population.trial():
                member = self.session.member(progress, population)
                return one(config, folder, lambda c, f: run_trial(c, f, session=member))

        with ThreadPoolExecutor(width) as pool:
            try:
                places = {pool.submit(work, *job): place for place, job in enumerate(jobs)}
                for future in as_completed(places):
                    yield places[future], future.result()
            except BaseException:
                population.stop()
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def _most(config: ConfigDict) -> int:
    """How many trials like this may run at a time; 1 of those that never do with others."""
    method = method_settings(config)
    if not method.trains or method.trains_weights or jax.process_count() > 1:
        return 1
    if config.eval.latency:  # would time the others too
        return 1
    automatic = MOST.get(jax.default_backend(), MOST_ELSEWHERE)
    return int(config.mesh.population or automatic)


def room(prepared: Prepared) -> int:
    """How many trials like this fit into memory, by estimate; rows or trials lie over "data"."""
    each = step_memory(prepared, train_source(prepared).template.shape) + trained(prepared)[1]
    devices = 1 if jax.default_backend() == "cpu" else prepared.mesh.shape["data"]
    return int((MEMORY_SHARE * device_memory() - bytes_here(prepared.frozen)) * devices // each)
