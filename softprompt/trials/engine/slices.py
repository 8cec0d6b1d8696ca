"""TPU slices by name: their chips and hosts, and what Google Cloud's interfaces call them.

Source: https://docs.cloud.google.com/tpu/docs/tpu-versions (v5e, v5p, v6e, TPU7x) and
https://docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus, read in November 2026.
"""

import dataclasses

from softprompt.errors import UserError

# Topologies by number of chips, of chips that are connected in two and in three dimensions.
FLAT = {
    **{1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8"},
    **{64: "8x8", 128: "8x16", 256: "16x16"},
}
DEEP = {
    **{4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"},
    **{128: "4x4x8", 256: "4x8x8", 512: "8x8x8"},
}


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generation of TPUs.

    Attributes:
        api: its name in the Cloud TPU API, "" where that does not have it.
        runtime: the Cloud TPU API's image.
        gke: its name in GKE.
        machine: Compute Engine's machine type without the number of chips.
        image: Compute Engine's image family; "" where Compute Engine does not have it.
        topologies: by number of chips.
        number: what the number in a slice's name counts for each chip: cores, or 1.
    """

    api: str
    runtime: str
    gke: str
    machine: str
    image: str
    topologies: dict[int, str]
    number: int


_IMAGE = "ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e"
GENERATIONS = {
    "v5e": Generation(
        *("v5litepod", "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", "ct5lp-hightpu", ""),
        *(FLAT, 1),
    ),
    "v5p": Generation("v5p", "v2-alpha-tpuv5", "tpu-v5p-slice", "ct5p-hightpu", _IMAGE, DEEP, 2),
    "v6e": Generation("v6e", "v2-alpha-tpuv6e", "tpu-v6e-slice", "ct6e-standard", _IMAGE, FLAT, 1),
    "tpu7x": Generation(
        "", "", "tpu7x", "tpu7x-standard", "ubuntu-accel-2404-amd64-tpu-tpu7x", DEEP, 2
    ),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice of TPU chips, such as v6e-8: its generation and its number of chips."""

    name: str
    generation: Generation
    chips: int

    @property
    def topology(self) -> str:
        """How its chips are arranged, such as "2x4"."""
        return self.generation.topologies[self.chips]

    @property
    def chips_per_host(self) -> int:
        """The chips of each of its hosts: 4, but up to 8 chips in a plane share one host."""
        return self.chips if self.generation.number == 1 and self.chips <= 8 else 4

    @property
    def hosts(self) -> int:
        """The number of its hosts."""
        return self.chips // self.chips_per_host

    @property
    def machine_type(self) -> str:
        """Compute Engine's name of a host."""
        return f"{self.generation.machine}-{self.chips_per_host}t"

    @property
    def api_name(self) -> str:
        """The Cloud TPU API's name of the slice, such as "v5litepod-8" for v5e-8."""
        return f"{self.generation.api}-{self.chips * self.generation.number}"


def parse_slice(name: str) -> Slice:
    """Returns the slice of a name such as "v6e-8".

    The number counts chips for v5e and v6e, and cores, two a chip, for v5p and tpu7x, as Google
    Cloud does.

    Raises:
        UserError: there is no such slice; names those that there are.
    """
    kind, _, number = name.partition("-")
    generation = GENERATIONS.get(kind)
    if generation is None:
        raise UserError(f"--tpu is {name!r}; allowed: {', '.join(GENERATIONS)}, as in v6e-8")
    names = {f"{kind}-{chips * generation.number}": chips for chips in generation.topologies}
    if name not in names:
        raise UserError(f"--tpu is {name!r}; allowed: {', '.join(names)}")
    return Slice(name, generation, names[name])
