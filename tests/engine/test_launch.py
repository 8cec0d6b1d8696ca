"""Recipes: what they ask for, what they refuse, and their manifests by outside validators."""

import dataclasses
import math
import subprocess
from pathlib import Path

import pytest
import yaml

from softprompt.cli import main
from softprompt.commands import launch
from softprompt.errors import UserError
from softprompt.trials.engine.launch import RAY, TARGETS, Order, Recipe, make_recipe, write_recipe
from softprompt.trials.engine.slices import GENERATIONS, parse_slice

ORDER = Order(
    workdir="gs://BUCKET/x",
    experiment="prompt_length",
    archive="gs://BUCKET/x/code/abc.tar.gz",
    commit="abc",
    tpu="v6e-8",
    count=2,
    spot=True,
    slurm="--partition=gpu",
)


def recipe(target: str, **changes) -> Recipe:
    return make_recipe(target, dataclasses.replace(ORDER, **changes))


@pytest.mark.parametrize(
    ("name", "chips", "topology", "hosts", "machine", "api"),
    [
        ("v5e-1", 1, "1x1", 1, "ct5lp-hightpu-1t", "v5litepod-1"),
        ("v5e-16", 16, "4x4", 4, "ct5lp-hightpu-4t", "v5litepod-16"),
        ("v6e-8", 8, "2x4", 1, "ct6e-standard-8t", "v6e-8"),
        ("v6e-256", 256, "16x16", 64, "ct6e-standard-4t", "v6e-256"),
        ("v5p-8", 4, "2x2x1", 1, "ct5p-hightpu-4t", "v5p-8"),
        ("v5p-32", 16, "2x2x4", 4, "ct5p-hightpu-4t", "v5p-32"),
    ],
)
def test_slices_are_those_of_the_documentation(name, chips, topology, hosts, machine, api):
    """Breaks when v5p's number counts chips, or when eight chips of v6e have two hosts."""
    found = parse_slice(name)
    assert (found.chips, found.topology, found.hosts) == (chips, topology, hosts)
    assert (found.machine_type, found.api_name) == (machine, api)


def test_topologies_have_their_number_of_chips():
    """Breaks on a slip of the pen in a table, such as 64: "8x4"."""
    for generation in GENERATIONS.values():
        for chips, topology in generation.topologies.items():
            assert math.prod(map(int, topology.split("x"))) == chips


def test_the_ray_of_pods_is_the_locked_one():
    """Breaks when the constraints get another Ray than the image of KubeRay's pods."""
    locked = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    assert f"ray=={RAY}" in locked
    assert launch.TARGETS == TARGETS


@pytest.mark.parametrize("target", TARGETS)
def test_scripts_parse_and_manifests_ask_for_the_slices(target):
    """Breaks on an error of syntax in a template, or when --spot or --count is left out."""
    found = recipe(target, tpu="v5p-8" if target == "compute" else "v5p-32")
    for name, text in found.files.items():
        assert "{{" not in text and "{%" not in text
        if name.endswith(".sh"):
            assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
        else:
            assert yaml.safe_load(text)
    everything = "\n".join([*found.files.values(), *found.commands])
    assert "gs://BUCKET/x" in everything
    if target != "slurm":
        assert "spot" in everything.lower().replace("spot-compute", "")
        plain = recipe(target, spot=False, tpu="v5p-8")
        without = "\n".join([*plain.files.values(), *plain.commands]).lower()
        assert "gke-spot" not in without and "--spot" not in without
        assert "=spot" not in without and "use_spot: true" not in without
    if target in ("sky", "queued"):
        assert sum("softprompt-2" in line for line in found.commands) >= 1
    elif target == "slurm":
        assert "--array=1-2" in everything
    else:
        assert "replicas: 2" in everything or "--size=2" in everything


def test_hosts_of_a_slice_are_numbered():
    """Breaks when the processes of a slice with several hosts do not join one another."""
    assert "--distributed" not in recipe("jobset").files["startup.sh"]
    script = recipe("jobset", tpu="v6e-16").files["startup.sh"]
    lines = script[script.index("metadata()") : script.index("keep ", script.index("metadata()"))]
    for environment in (
        {"TPU_WORKER_HOSTNAMES": "h0,h1,h2,h3", "TPU_WORKER_ID": "2"},
        {"SKYPILOT_NODE_IPS": "h0\nh1\nh2\nh3", "SKYPILOT_NODE_RANK": "2"},
    ):
        bash = ["bash", "-euc", f'worker=(work)\n{lines}\necho "${{worker[@]}}"']
        done = subprocess.run(bash, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["work", "--distributed", "h0:8476,2,4"]


@pytest.mark.parametrize(
    ("target", "changes", "named"),
    [
        ("sky", {"tpu": "v9-8"}, ("--tpu", "'v9-8'", "v6e")),
        ("sky", {"tpu": "v6e-7"}, ("--tpu", "'v6e-7'", "v6e-8")),
        ("sky", {"tpu": "tpu7x-8"}, ("--on sky", "'tpu7x-8'", "v5p")),
        ("compute", {"tpu": "v5e-8"}, ("--on compute", "'v5e-8'", "v6e")),
        ("compute", {"tpu": "v6e-16"}, ("--on compute", "'v6e-16'", "one host")),
        ("jobset", {"workdir": "runs/x"}, ("runs/x", "--on jobset", "gs://")),
        ("jobset", {"count": 0}, ("--count", "0", "1 or more")),
        ("slurm", {"slurm": "gpu"}, ("--slurm", "'gpu'", "options")),
        ("aws", {}, ("--on", "'aws'", "sky")),
    ],
)
def test_what_a_target_does_not_have_is_refused(target, changes, named):
    """Breaks when a check is left out: the cloud would refuse it later, or charge for it."""
    with pytest.raises(UserError) as raised:
        recipe(target, **changes)
    assert all(word in str(raised.value) for word in named), raised.value


def test_files_of_others_stay(tmp_path):
    """Breaks when recipes are written into a folder that has other files."""
    write_recipe(recipe("sky"), str(tmp_path / "new"))
    write_recipe(recipe("sky", count=3), str(tmp_path / "new"))  # its own are replaced
    with pytest.raises(UserError, match="sky.yaml"):
        write_recipe(recipe("queued"), str(tmp_path / "new"))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--engine", "ray", "--shard", "1/2"], ("--shard", "--engine")),
        (["--engine", "slurm", "--minutes", "5"], ("--minutes", "--engine")),
        (["--engine", "ray", "--workers", "3"], ("--workers", "--engine slurm")),
        (["--slurm", "gres=gpu:1"], ("--slurm", "--engine slurm")),
        (["--address", "head:6379"], ("--address", "--engine ray")),
        (["--target", "tpu"], ("--target", "--engine")),
        (["--engine", "slurm", "--workers", "0"], ("--workers", "0", "1 or more")),
        (["--engine", "ray"], ("--target", "auto", "tpu")),
    ],
)
def test_flags_that_do_not_go_together_are_refused(words, named, tmp_path, capsys):
    """Breaks when a flag that an engine does not heed is dropped silently."""
    assert main(["sweep", "prompt_length", "--workdir", str(tmp_path / "x"), *words]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in named), said
    assert not (tmp_path / "x").exists()


def test_a_folder_without_a_plan_is_refused(tmp_path, capsys):
    """Breaks when `launch` writes files for a sweep that nothing has planned."""
    words = ["launch", str(tmp_path), "--on", "slurm", "--to", str(tmp_path / "to")]
    assert main(words) == 2
    assert "plan.json" in capsys.readouterr().err
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize(("tpu", "spot"), [("v6e-8", True), ("v5p-32", False)])
def test_kubernetes_accepts_the_pods(tpu, spot):
    """Breaks when a field of a pod or a job has another name, type or place.

    kubernetes-validate has the schemas of Kubernetes itself. What is peculiar to RayCluster around
    its pods is in no schema here.
    """
    validator = pytest.importorskip("kubernetes_validate")
    jobset = yaml.safe_load(recipe("jobset", tpu=tpu, spot=spot).files["jobset.yaml"])
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice-0"}}
    job["spec"] = replicated["template"]["spec"]
    cluster = yaml.safe_load(recipe("kuberay", tpu=tpu, spot=spot).files["kuberay.yaml"])["spec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **group["template"]}
        for group in groups
    ]
    for resource in (job, *pods):
        validator.validate(resource, "1.34", strict=True)
    wanted = parse_slice(tpu).chips_per_host
    for pod in (job["spec"]["template"], pods[1]):
        (container,) = pod["spec"]["containers"]
        assert container["resources"]["limits"]["google.com/tpu"] == wanted


@pytest.mark.parametrize(("tpu", "spot"), [("v6e-8", True), ("v5p-32", False)])
def test_jobset_has_the_fields(tpu, spot):
    """Breaks when a field of the JobSet has another name, type or place.

    kubeflow-trainer-api has JobSet's types, generated from its schema; what they do not know is
    lost between reading and writing.
    """
    models = pytest.importorskip("kubeflow_trainer_api.models")
    jobset = yaml.safe_load(recipe("jobset", tpu=tpu, spot=spot).files["jobset.yaml"])
    assert models.JobsetV1alpha2JobSet.from_dict(jobset).to_dict() == jobset


@pytest.mark.parametrize(("tpu", "spot"), [("v6e-8", True), ("v5e-16", False)])
def test_skypilot_accepts_its_file(tpu, spot, tmp_path, monkeypatch):
    """Breaks when a key of the YAML is misspelt or SkyPilot does not know the accelerator."""
    sky = pytest.importorskip("sky")
    write_recipe(recipe("sky", tpu=tpu, spot=spot), str(tmp_path))
    monkeypatch.chdir(tmp_path)
    task = sky.Task.from_yaml("sky.yaml")
    (resources,) = task.resources
    assert resources.accelerators == {f"tpu-{parse_slice(tpu).api_name}": 1}
    assert resources.use_spot == spot
    assert resources.job_recovery["recover_on_exit_codes"] == [75]
