"""Which trials of a plan a worker claims next."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence

from softprompt.trials.engine.claims import Claim, Claims, View
from softprompt.trials.engine.plan import Job, Plan


def take_next(
    plan: Plan, claims: Claims, view: View, *, widths: Mapping[str, int], model: str
) -> list[tuple[Job, Claim]]:
    """Claims trials of one group, up to its width; [] if there are none to claim.

    Near the end of the plan each worker takes its share of what is left. Trials of dead workers
    come last, since looking for them reads their claims. A trial that starts from another one's
    prompt is left until that one is over.

    Args:
        plan: the sweep's.
        claims: the worker's.
        view: of now.
        widths: how many trials of a group run at a time; "" is the default.
        model: the `Job.model` that the worker has in memory, or "".
    """
    waits_for = {job.folder: job.trial for job in plan.jobs if not view.over(job.trial)}
    left = [job for job in plan.jobs if not view.over(job.trial) and job.start not in waits_for]
    free = [job for job in left if view.free(job.trial)]
    free = [job for job in free if not claims.failed_here(job.trial, view)]
    share = max(1, len(free) // max(1, len(claims.alive(view))))
    taken: list[tuple[Job, Claim]] = []
    for group in (*_groups(free, model), *([job] for job in left if job not in free)):
        for job in group:
            alone = bool(claims.deaths(job.trial, view))  # it may have been this one's fault
            if alone and taken:
                continue
            claim = claims.take(job.trial, view)
            if claim is not None:
                taken.append((job, claim))
            width = widths.get(job.group, job.most or widths[""])
            if taken and (alone or len(taken) >= min(width, share)):
                return taken
        if taken:
            return taken
    return taken


def _groups(jobs: Sequence[Job], model: str) -> Iterator[list[Job]]:
    """Jobs by group: those of a model in memory first, otherwise in a random order.

    Workers that begin together therefore seldom try the same trial.
    """
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.group, []).append(job)
    names = list(groups)
    random.shuffle(names)
    for name in sorted(names, key=lambda name: groups[name][0].model != model):
        group = groups[name]
        start = random.randrange(len(group))
        yield [*group[start:], *group[:start]]


def all_over(plan: Plan, view: View) -> bool:
    """Whether every trial of a plan has its final row."""
    return all(view.over(job.trial) for job in plan.jobs)


def count(jobs: Iterable[Job], view: View) -> dict[str, int]:
    """The numbers of trials that are done, failed, claimed and waiting."""
    found = {"done": 0, "failed": 0, "claimed": 0, "waiting": 0}
    for job in jobs:
        if job.trial in view.done:
            state = "done"
        elif job.trial in view.failed:
            state = "failed"
        else:
            state = "waiting" if view.free(job.trial) else "claimed"
        found[state] += 1
    return found
