"""A sweep's plan: the trials that its workers run, written once to the store as `plan.json`.

The code travels beside it, as `code/COMMIT.tar.gz`, unless the repository has uncommitted changes.
Reading a plan needs no JAX; writing one needs no devices.
"""

import dataclasses
import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from softprompt.errors import UserError
from softprompt.source import archive, commit, is_clean
from softprompt.trials.engine.claims import QUEUE, STOP, View
from softprompt.trials.engine.store import Store, open_store

if TYPE_CHECKING:
    from softprompt.config import ConfigDict

PLAN = "plan.json"

# Keys in which trials may differ that are likely to share a compiled step.
_SHARED = ("seed", "train.steps", "train.dropout", "method.dropout")
_SHARED_SECTIONS = ("optimizer.", "method.init", "method.common", "eval.", "log.", "mesh.")


@dataclasses.dataclass(frozen=True)
class Job:
    """A trial of a plan.

    Attributes:
        trial: its id.
        name: for people.
        folder: the name of its folder in the store.
        group: equal for trials that are likely to share a compiled step.
        model: equal for trials with the same weights.
        most: how many such trials may run at a time; 0 if the device decides.
        config: the resolved config.
        start: the name of the folder of the trial whose prompt it starts from, or "". If that trial
            is in the plan, this one waits for it.
    """

    trial: str
    name: str
    folder: str
    group: str
    model: str
    most: int
    config: dict[str, Any]
    start: str = ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A sweep's plan.

    Attributes:
        experiment, subset: what was planned.
        commit: of the code; workers must run the same.
        target: the backend that the configs were resolved for; "" if none of them depends on it.
        dtype: what `model.dtype=auto` is on the target; "" without a target.
        token: random, so that two plans differ.
        jobs: the trials.
    """

    experiment: str
    subset: str
    commit: str
    target: str
    dtype: str
    token: str
    jobs: tuple[Job, ...]


def make_plan(
    experiment: str,
    subset: str,
    trials: Sequence["ConfigDict"],
    folders: Sequence[str],
    *,
    target: str,
) -> Plan:
    """Returns the plan of resolved trials whose folders have these names.

    Raises:
        UserError: a trial starts from the prompt of one that is not among them.
    """
    from softprompt.config import base_config, resolve, trial_id, trial_name
    from softprompt.trials.starts import start_id

    dtype = resolve(base_config(), backend=target).model.dtype if target else ""
    by_id = {trial_id(config): name for config, name in zip(trials, folders, strict=True)}
    for config in trials:
        if (one := start_id(config)) and one not in by_id:
            raise UserError(
                f"{trial_name(config)} starts from trial {one}, which is not in this sweep; "
                "allowed for workers: one that is"
            )
    starts = [by_id.get(start_id(config), "") for config in trials]
    jobs = tuple(map(_job, trials, folders, starts))
    return Plan(experiment, subset, commit(), target, dtype, secrets.token_hex(8), jobs)


def _job(config: "ConfigDict", folder: str, start: str) -> Job:
    from softprompt.config import runs_alone, to_dict, trial_id, trial_name, weights_key

    return Job(
        trial=trial_id(config),
        name=trial_name(config),
        folder=folder,
        group=program_group(config),
        model=_digest(weights_key(config)),
        most=1 if runs_alone(config) else int(config.compute.population),
        config=to_dict(config),
        start=start,
    )


def program_group(config: "ConfigDict") -> str:
    """A text that is equal for trials that are likely to share a compiled step."""
    from softprompt.config import flatten, weights_key

    keys = {
        key: value
        for key, value in flatten(config).items()
        if key not in _SHARED and not key.startswith(_SHARED_SECTIONS)
    }
    group = [weights_key(config), config.optimizer.name, keys]
    return _digest(json.dumps(group, sort_keys=True, default=dict))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def write_plan(store: Store, plan: Plan) -> Plan:
    """Writes a plan and its code, or takes up the same plan that is there; returns it.

    Trials that failed are tried again, and workers that were stopped may start again.

    Raises:
        UserError: the store has a plan of other trials or of another commit.
    """
    if store.read(PLAN) is None and is_clean(plan.commit):
        store.write(archive_name(plan), archive(plan.commit))
    content = json.dumps(dataclasses.asdict(plan)).encode()
    if store.create(PLAN, content):
        return plan
    found = read_plan(store)
    if found.commit != plan.commit:
        raise UserError(
            f"{PLAN} is of commit {found.commit}, this is {plan.commit}; give another --workdir, "
            "or run that commit"
        )
    if _trials(found) != _trials(plan):
        raise UserError(
            f"{PLAN} holds {found.experiment} ({found.subset}), {len(found.jobs)} trials, which "
            "are others than these; give another --workdir"
        )
    for trial in View(store.list(QUEUE)).failed:
        store.delete(f"{QUEUE}/failed/{trial}")
    store.delete(STOP)
    return found


def plan_sweep(
    workdir: str, experiment: str, subset: str, trials: Sequence["ConfigDict"], *, target: str
) -> Plan:
    """Writes the plan of a sweep; trials that have a row that is done already stay done.

    Raises:
        UserError: see `write_plan`.
    """
    from softprompt.results import is_done
    from softprompt.trials.sweep import trial_folders

    store = open_store(workdir)
    folders = trial_folders(workdir, trials)
    plan = make_plan(experiment, subset, trials, [one.name for one in folders], target=target)
    written = write_plan(store, plan)
    there = View(store.list(QUEUE)).done
    for folder, job in zip(folders, plan.jobs, strict=True):
        if job.trial not in there and is_done(folder):
            store.create(f"{QUEUE}/done/{job.trial}", plan.token.encode())
    return written


def _trials(plan: Plan) -> set[str]:
    return {job.trial for job in plan.jobs}


def archive_name(plan: Plan) -> str:
    """The name of the archive of the code in the store."""
    return f"code/{plan.commit}.tar.gz"


def read_plan(store: Store) -> Plan:
    """Returns the plan of a store.

    Raises:
        UserError: there is none, or it is not readable.
    """
    content = store.read(PLAN)
    if content is None:
        raise UserError(f"no {PLAN} in this folder; softprompt sweep --engine store writes one")
    try:
        found: Mapping[str, Any] = json.loads(content)
        return Plan(**{**found, "jobs": tuple(Job(**job) for job in found["jobs"])})
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{PLAN}: not a plan of this version ({error})") from error


def check_worker(plan: Plan) -> None:
    """Checks that a worker has the plan's code.

    Raises:
        UserError: it has not.
    """
    if plan.commit != commit():
        raise UserError(
            f"the plan is of commit {plan.commit}, this worker's is {commit()}; allowed: the code "
            f"in {archive_name(plan)}"
        )


def check_backend(plan: Plan, backend: str, dtype: str) -> None:
    """Checks that `model.dtype=auto` is on a worker's backend what it is on the plan's target.

    Raises:
        UserError: it is not.
    """
    if plan.target and dtype != plan.dtype:
        raise UserError(
            f"the plan is for {plan.target}, where model.dtype=auto is {plan.dtype}; on this "
            f"worker's {backend} it is {dtype}"
        )
