"""Recipes that start workers on Cloud TPU or Slurm: files to keep, and commands to run.

Nothing here calls a cloud. Every recipe names the documentation that it follows and when it was
read. Workers on Google's machines install softprompt from the archive in the sweep's store.
"""

import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path

from softprompt.errors import UserError, unknown
from softprompt.trials.engine.scripts import render
from softprompt.trials.engine.slices import GENERATIONS, Slice, parse_slice
from softprompt.trials.engine.slurm import batch_script

PYTHON = ">=3.11,<3.15"
RAY = "2.60.0"
CONFIG_MAP = "kubectl create configmap softprompt-startup --from-file=startup.sh"


@dataclasses.dataclass(frozen=True)
class Order:
    """What is to be started.

    Attributes:
        workdir: the sweep's folder, whose plan is written.
        experiment: the name of the sweep's experiment.
        archive: the path or gs:// address of the commit's archive, a .tar.gz file.
        commit: the commit's hash.
        tpu: the name of a slice such as "v6e-8".
        count: the number of slices, or of Slurm's jobs; each has one worker.
        spot: whether to ask for spot capacity.
        slurm: options of sbatch.
    """

    workdir: str
    experiment: str
    archive: str
    commit: str
    tpu: str
    count: int
    spot: bool
    slurm: str


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Files by name, and the commands that use them, to be run in their folder."""

    files: dict[str, str]
    commands: list[str]


def make_recipe(target: str, order: Order) -> Recipe:
    """Returns the recipe for a target.

    Raises:
        UserError: an unknown target or slice, one that the target does not have, or a folder that
            its machines cannot reach.
    """
    if target not in TARGETS:
        raise unknown("target --on", target, TARGETS)
    if order.count < 1:
        raise UserError(f"--count is {order.count}; allowed: 1 or more")
    if target == "slurm":
        return _slurm(order)
    if not order.workdir.startswith("gs://"):
        raise UserError(f"{order.workdir}: machines of --on {target} need a folder at gs://")
    return RECIPES[target](order, parse_slice(order.tpu))


def startup_script(order: Order, *, extras: str, hosts: int = 1) -> str:
    """Returns the script that prepares a machine and keeps a worker running on it.

    Args:
        order: names the folder, the archive and the commit.
        extras: of softprompt, such as "tpu,gcs".
        hosts: the number of hosts of a slice, each of which runs this script.
    """
    return render(
        "startup.sh",
        archive=shlex.quote(order.archive),
        commit=order.commit,
        extras=extras,
        hosts=hosts,
        python=PYTHON,
        workdir=shlex.quote(order.workdir),
    )


def _slurm(order: Order) -> Recipe:
    """A job array, whose jobs use this softprompt from a file system that all nodes share."""
    workdir = order.workdir if "://" in order.workdir else str(Path(order.workdir).absolute())
    script = batch_script(
        ["softprompt", "work", workdir], workers=order.count, options=order.slurm, logs="."
    )
    return Recipe({"slurm.sh": script}, ["sbatch slurm.sh"])


def _sky(order: Order, slice_: Slice) -> Recipe:
    """SkyPilot's managed jobs, one for each slice: they come back after a preemption."""
    _check_api(order, slice_, "sky")
    files = {
        "startup.sh": startup_script(order, extras="tpu,gcs", hosts=slice_.hosts),
        "sky.yaml": render("sky.yaml", slice=slice_, spot=order.spot),
    }
    launches = [
        f"sky jobs launch --yes --detach-run --name softprompt-{number} sky.yaml"
        for number in _numbers(order)
    ]
    return Recipe(files, [*launches, "sky jobs queue"])


def _queued(order: Order, slice_: Slice) -> Recipe:
    """Queued resources of the Cloud TPU API, one for each slice.

    A preempted one is to be deleted and created again. Source:
    https://docs.cloud.google.com/tpu/docs/queued-resources, read in November 2026.
    """
    _check_api(order, slice_, "queued")
    create = (
        "gcloud compute tpus queued-resources create softprompt-{0} --node-id=softprompt-{0} "
        f'--zone="$ZONE" --accelerator-type={slice_.api_name} '
        f"--runtime-version={slice_.generation.runtime}{' --spot' if order.spot else ''} "
        "--metadata-from-file=startup-script=startup.sh"
    )
    delete = (
        'gcloud compute tpus queued-resources delete softprompt-{0} --zone="$ZONE" --force --async'
    )
    script = startup_script(order, extras="tpu,gcs", hosts=slice_.hosts)
    return Recipe(
        {"startup.sh": script},
        [
            *(create.format(number) for number in _numbers(order)),
            "# when nothing is left to do:",
            *(delete.format(number) for number in _numbers(order)),
        ],
    )


def _compute(order: Order, slice_: Slice) -> Recipe:
    """A managed instance group of Compute Engine, which replaces preempted machines.

    Source: https://docs.cloud.google.com/tpu/docs/spot-compute and
    https://docs.cloud.google.com/tpu/docs/tpus-and-migs, read in November 2026.
    """
    if not slice_.generation.image or slice_.hosts > 1:
        kinds = ", ".join(name for name, kind in GENERATIONS.items() if kind.image)
        raise UserError(
            f"--tpu is {order.tpu!r}; allowed with --on compute: slices of one host of {kinds}"
        )
    spot = " --provisioning-model=SPOT --instance-termination-action=STOP" if order.spot else ""
    return Recipe(
        {"startup.sh": startup_script(order, extras="tpu,gcs")},
        [
            "gcloud compute instance-templates create softprompt "
            f"--machine-type={slice_.machine_type} --maintenance-policy=TERMINATE{spot} "
            "--image-project=ubuntu-os-accelerator-images "
            f"--image-family={slice_.generation.image} --boot-disk-size=100GB "
            "--scopes=cloud-platform --metadata-from-file=startup-script=startup.sh",
            "gcloud compute instance-groups managed create softprompt --template=softprompt "
            f'--size={order.count} --zone="$ZONE"',
            "# when nothing is left to do:",
            'gcloud compute instance-groups managed delete softprompt --zone="$ZONE"',
            "gcloud compute instance-templates delete softprompt",
        ],
    )


def _jobset(order: Order, slice_: Slice) -> Recipe:
    """A JobSet on GKE, with a job for each slice."""
    files = {
        "startup.sh": startup_script(order, extras="tpu,gcs", hosts=slice_.hosts),
        "jobset.yaml": render("jobset.yaml", slice=slice_, spot=order.spot, count=order.count),
    }
    apply, delete = "kubectl apply --filename=jobset.yaml", "kubectl delete jobset softprompt"
    return Recipe(files, [CONFIG_MAP, apply, "# when nothing is left to do:", delete])


def _kuberay(order: Order, slice_: Slice) -> Recipe:
    """A Ray cluster on GKE, and the sweep's driver as a job of Ray on its head."""
    manifest = render("kuberay.yaml", slice=slice_, spot=order.spot, count=order.count, ray=RAY)
    driver = shlex.join(
        ["softprompt", "sweep", order.experiment, "--workdir", order.workdir]
        + ["--engine", "ray", "--address", "auto"]
    )
    head = (
        "kubectl get pods --selector=ray.io/cluster=softprompt,ray.io/node-type=head --output=name"
    )
    return Recipe(
        {"startup.sh": startup_script(order, extras="tpu,gcs,ray"), "kuberay.yaml": manifest},
        [
            CONFIG_MAP,
            "kubectl apply --filename=kuberay.yaml",
            f'kubectl exec "$({head})" -- bash /softprompt/startup.sh ray job submit --no-wait -- '
            f"{driver}",
            "# when nothing is left to do:",
            "kubectl delete raycluster softprompt",
        ],
    )


def _check_api(order: Order, slice_: Slice, target: str) -> None:
    """Checks that the Cloud TPU API has this generation."""
    if not slice_.generation.api:
        kinds = ", ".join(name for name, kind in GENERATIONS.items() if kind.api)
        raise UserError(f"--tpu is {order.tpu!r}; allowed with --on {target}: {kinds}")


def _numbers(order: Order) -> range:
    return range(1, order.count + 1)


RECIPES: dict[str, Callable[[Order, Slice], Recipe]] = {
    "sky": _sky,
    "compute": _compute,
    "queued": _queued,
    "kuberay": _kuberay,
    "jobset": _jobset,
}
TARGETS = (*RECIPES, "slurm")


def write_recipe(recipe: Recipe, folder: str) -> None:
    """Writes a recipe's files into a new or empty folder.

    Raises:
        UserError: the folder has other files, or cannot be written to.
    """
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        others = {entry.name for entry in target.iterdir()} - recipe.files.keys()
        if others:
            raise UserError(f"--to {folder}: has {sorted(others)[0]}; allowed: an empty folder")
        for name, text in recipe.files.items():
            (target / name).write_text(text)
    except OSError as error:
        raise UserError(f"--to {folder}: cannot be written: {error.strerror}") from error
