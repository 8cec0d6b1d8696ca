"""A Slurm cluster of one node on this machine: munged, slurmctld and slurmd in a folder of its own.

The partitions share the node. A job of `high` preempts those of `low` by requeueing them, and
leaves those of `steady` alone. A requeued job waits 5 s; with Slurm's defaults it waits 120 s.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from tests.engine.waiting import wait_for

DAEMONS = ("munged", "slurmctld", "slurmd")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
MailProg=/bin/true
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=low Nodes={host} Default=YES PriorityTier=1 GraceTime=20 MaxTime=30 OverSubscribe=NO
PartitionName=steady Nodes={host} PriorityTier=2 PreemptMode=OFF MaxTime=30 OverSubscribe=NO
PartitionName=high Nodes={host} PriorityTier=2 PreemptMode=OFF MaxTime=30 OverSubscribe=NO
"""


def missing() -> str:
    """What is missing for a cluster here, or "" when nothing is."""
    lacking = [name for name in DAEMONS if not shutil.which(name, path=_search_path())]
    if lacking:
        return f"needs {', '.join(lacking)} (Debian: munge, slurmctld, slurmd, slurm-client)"
    return "" if getpass.getuser() == "root" else "needs root"


def _search_path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Runs the daemons during the block; yields the environment for Slurm's commands.

    At the end all of its processes are gone.
    """
    host = socket.gethostname()
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    ctld_port, slurmd_port = free_port(), free_port()
    config = folder / "slurm.conf"
    ports = {"ctld_port": ctld_port, "slurmd_port": slurmd_port}
    config.write_text(CONFIG.format(host=host, folder=folder, **ports))
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    environment = os.environ | {"SLURM_CONF": str(config), "PATH": _search_path()}
    with ExitStack() as stack:
        munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket"]
        munged += [f"--key-file={folder}/munge.key", f"--pid-file={folder}/munged.pid"]
        munged += [f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"]
        stack.enter_context(daemon(munged, environment, folder))
        wait_for((folder / "munge.socket").exists, "munged's socket", 20)
        stack.enter_context(daemon(["slurmctld", "-D"], environment, folder))
        stack.enter_context(daemon(["slurmd", "-D", "-N", host], environment, folder))
        run = lambda *words: output(words, environment)  # noqa: E731
        wait_for(lambda: "idle" in run("sinfo", "-h", "-o", "%t"), "an idle node", 60)
        try:
            yield environment
        finally:
            run("scancel", "--user=root")
            kill_all(config)


def kill_all(config: Path) -> None:
    """Kills the processes of a cluster's jobs and daemons, wherever they are."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("SLURM_CONF") == str(config) and process.pid != os.getpid():
                process.kill()


@contextmanager
def daemon(words: Sequence[str], environment: dict[str, str], folder: Path) -> Iterator[None]:
    """Runs a program during the block, and stops it."""
    with (folder / f"{words[0]}.out").open("w") as out:
        process = subprocess.Popen(words, env=environment, stdout=out, stderr=out)
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def output(words: Sequence[str], environment: dict[str, str]) -> str:
    """The standard output of a command, which may fail."""
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    return done.stdout.strip()


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
