"""Workers on Ray: where they are placed, and a cluster whose parts are killed."""

from pathlib import Path

import pytest

ray = pytest.importorskip("ray")

from softprompt.trials.engine.ray import Placement, place  # noqa: E402

WORKER = Path(__file__).with_name("counting_worker.py")
REPOSITORY = Path(__file__).parents[2]


def node(identity: str, *, slice_name="", worker=0, topology="", alive=True, **resources) -> dict:
    """An entry of `ray.nodes()`."""
    labels = {"ray.io/tpu-slice-name": slice_name, "ray.io/tpu-worker-id": str(worker)}
    labels |= {"ray.io/tpu-topology": topology}
    return {
        "NodeID": identity,
        "Alive": alive,
        "NodeManagerAddress": f"host-{identity}",
        "Resources": resources,
        "Labels": labels if slice_name else {},
    }


def test_every_whole_host_gets_a_worker():
    """Breaks when a slice that lacks a host gets workers, when the head without accelerators gets
    one, or when the processes of a slice are numbered by the order in which nodes joined.
    """
    nodes = [
        node("0a0000", CPU=8),  # the head
        node("0b0000", slice_name="one", topology="2x4", TPU=8),
        node("0c0000", slice_name="gone", topology="2x4", TPU=8, alive=False),
        node("0e0000", slice_name="two", worker=1, topology="2x4", TPU=4),
        node("0d0000", slice_name="two", worker=0, topology="2x4", TPU=4),
        node("0f0000", slice_name="half", worker=1, topology="2x4", TPU=4),
    ]
    address = f"host-0d0000:{20000 + 0x0D0000 % 10000}"
    assert (
        place(nodes, "TPU")
        == place(nodes, "")
        == [
            Placement("0b0000", "", "TPU", 8),
            Placement("0d0000", f"{address},0,2", "TPU", 4),
            Placement("0e0000", f"{address},1,2", "TPU", 4),
        ]
    )
    assert place(nodes, "CPU") == place(nodes[:1], "") == [Placement("0a0000", "", "CPU", 8)]
