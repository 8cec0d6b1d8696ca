"""Which kernel serves, by explicit checks that give their reason in words."""

import dataclasses
import re
from typing import NamedTuple

from jax.sharding import Mesh

from softprompt.errors import UserError

BLOCK = 128  # of splash: tokens, and entries of a head


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What mixes the values of a model's rows.

    Attributes:
        name: "reference" (the einsum form), "splash" or "cudnn".
        mesh: what the program runs on; None for one device.
        interpret: the kernel is run by ordinary operations, on any device (for tests).
    """

    name: str = "reference"
    mesh: Mesh | None = None
    interpret: bool = False

    def serving(self, case: "Case") -> "Kernel":
        """This kernel, or the reference where it cannot serve."""
        return REFERENCE if refusal(self.name, case) else self


REFERENCE = Kernel()
KERNELS = ("splash", "cudnn", "reference")  # what is chosen from, the first that serves


class Device(NamedTuple):
    """Where a kernel would run: "tpu", "gpu" or "cpu", and an NVIDIA GPU's compute capability."""

    platform: str
    capability: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True)
class Case:
    """What a kernel would have to serve.

    Attributes:
        dtype: of queries, keys and values.
        head_size: K.
        tokens: T of a row; None where it is not known yet.
        softcap: scores are capped.
        bias: something is added to scores.
        window: a layer's window ends inside the row or before it.
        branches: a token does not see all of its segment up to itself.
    """

    dtype: str
    head_size: int
    tokens: int | None = None
    softcap: bool = False
    bias: bool = False
    window: bool = False
    branches: bool = False


def device_of(mesh: Mesh) -> Device:
    """The kind of device that a mesh has."""
    device = mesh.devices.flat[0]
    found = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    return Device(device.platform, (int(found[1]), int(found[2])) if found else (0, 0))


def refusal(name: str, case: Case, device: Device | None = None) -> str:
    """Why a kernel cannot serve a case; "" where it can.

    Args:
        name: of the kernel.
        case: what is asked for.
        device: where it would run. None: where that has been looked at already.
    """
    checks = {"splash": _splash_checks, "cudnn": _cudnn_checks, "reference": lambda *_: []}
    return next((reason for refused, reason in checks[name](case, device) if refused), "")


def _splash_checks(case: Case, device: Device | None) -> list[tuple[bool, str]]:
    """What splash refuses. Heads of any size are filled up; dropped keys are dropped values."""
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
            "a layer's window is shorter than context and row, and layers are one program",
        ),
        (case.branches, "the row has branches"),
        (
            case.tokens is not None and case.tokens < BLOCK,
            f"its blocks are of {BLOCK} tokens, and rows have {case.tokens}",
        ),
    ]


def _cudnn_checks(case: Case, device: Device | None) -> list[tuple[bool, str]]:
    """What cuDNN refuses. Windows, branches and dropped keys are masks and values to it."""
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
    """The kernel for `config.mesh.attention`; "auto" takes the first that serves.

    Raises:
        UserError: what is wanted cannot serve.
    """
    if wanted == "auto":
        return next(name for name in KERNELS if not refusal(name, case, device))
    if reason := refusal(wanted, case, device):
        raise UserError(
            f"config key 'mesh.attention' is {wanted!r}, which cannot serve: {reason}; "
            "allowed here: auto, reference"
        )
    return wanted
