"""The choice of an attention kernel, by explicit checks that give their reasons in words."""

import dataclasses
import re
from typing import NamedTuple

from jax.sharding import Mesh

from softprompt.errors import UserError

BLOCK = 128  # of splash: tokens, and entries of a head, in a block


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An attention kernel.

    Attributes:
        name: "reference" (einsums), "splash" or "cudnn".
        mesh: the mesh of the program; None for one device.
        interpret: run the kernel by ordinary operations, on any device (for tests).
    """

    name: str = "reference"
    mesh: Mesh | None = None
    interpret: bool = False

    def serving(self, case: "Case") -> "Kernel":
        """This kernel if it supports the case, else the reference."""
        return REFERENCE if refusal(self.name, case) else self


REFERENCE = Kernel()
KERNELS = ("splash", "cudnn", "reference")  # in the order of preference


class Device(NamedTuple):
    """A kind of device: "tpu", "gpu" or "cpu", and the compute capability of an NVIDIA GPU."""

    platform: str
    capability: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True)
class Case:
    """A case of attention, which a kernel may support or not.

    Attributes:
        dtype: of queries, keys and values.
        head_size: K.
        tokens: T of a row; None if it is not known yet.
        softcap: scores are capped.
        bias: a bias is added to scores.
        window: a layer's window is shorter than context and row.
        branches: a token does not see all earlier tokens of its segment.
    """

    dtype: str
    head_size: int
    tokens: int | None = None
    softcap: bool = False
    bias: bool = False
    window: bool = False
    branches: bool = False


def device_of(mesh: Mesh) -> Device:
    """The kind of a mesh's devices."""
    device = mesh.devices.flat[0]
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    return Device(device.platform, (int(found[1]), int(found[2])) if found else (0, 0))


def refusal(name: str, case: Case, device: Device | None = None) -> str:
    """Why a kernel does not support a case; "" if it does.

    `device` is where the kernel would run; None: the device has been checked already.
    """
    checks = {"splash": _splash_checks, "cudnn": _cudnn_checks, "reference": lambda *_: []}
    return next((reason for refused, reason in checks[name](case, device) if refused), "")


def _splash_checks(case: Case, device: Device | None) -> list[tuple[bool, str]]:
    """What splash does not support. It pads heads of any size; dropout zeroes values."""
    platform = device.platform if device else "tpu"
    return [
        (platform != "tpu", f"it runs on TPUs, and this is a {platform}"),
        (case.bias, "the model adds a relative bias to its scores"),
        (
            case.dtype not in ("bfloat16", "float32"),
            f"it computes in bfloat16 or float32, and the model in {case.dtype}",
        ),
        (
            case.window,
            "a layer's window is shorter than context and row, and all layers share a program",
        ),
        (case.branches, "the row has branches"),
        (
            case.tokens is not None and case.tokens < BLOCK,
            f"its blocks are of {BLOCK} tokens, and rows have {case.tokens}",
        ),
    ]


def _cudnn_checks(case: Case, device: Device | None) -> list[tuple[bool, str]]:
    """What cuDNN does not support. Windows and branches are masks; dropout zeroes values."""
    capability = device.capability if device else (9, 0)
    largest = 256 if capability >= (9, 0) else 128
    return [
        (
            capability < (8, 0),
            "it runs on NVIDIA GPUs of compute capability 8.0 or later, "
            f"and this is {'an older one' if any(capability) else 'none'}",
        ),
        (case.bias, "the model adds a relative bias to its scores"),
        (case.softcap, "the model caps its scores"),
        (case.dtype != "bfloat16", f"it computes in bfloat16, and the model in {case.dtype}"),
        (
            case.head_size % 8 > 0 or case.head_size > largest,
            f"its heads have a multiple of 8 entries up to {largest}, the model's {case.head_size}",
        ),
        (
            case.tokens is not None and case.tokens % 2 > 0,
            f"its rows have an even number of tokens, these {case.tokens}",
        ),
    ]


def choose(wanted: str, case: Case, device: Device) -> str:
    """The kernel for `config.compute.attention`; "auto" is the first that supports the case.

    Raises:
        UserError: the wanted kernel does not support the case.
    """
    if wanted == "auto":
        return next(name for name in KERNELS if not refusal(name, case, device))
    if reason := refusal(wanted, case, device):
        raise UserError(
            f"config key 'compute.attention' is {wanted!r}, which cannot run here: {reason}; "
            "allowed here: auto, reference"
        )
    return wanted
