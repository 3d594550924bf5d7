"""Machines a plan is made for: one that is stated, or the one we are on. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from lmforge.errors import PlanError
from lmforge.hardware.calibration import Calibration, fingerprint
from lmforge.registry import Key, Node, node, register

Accelerator = Literal["cpu", "cuda"]


@node
class PeakFlops(Node):
    """Dense matrix FLOP/s of one device by dtype, without structured sparsity; null where the device has none, or nobody states it."""

    float32: Annotated[float | None, Key("peak with float32 inputs, no TF32", unit="FLOP/s", gt=0)]
    bfloat16: Annotated[float | None, Key("peak with bfloat16 inputs", unit="FLOP/s", gt=0)]
    float16: Annotated[float | None, Key("peak with float16 inputs", unit="FLOP/s", gt=0)]

    def of(self, dtype: str) -> float | None:
        """The peak of one dtype by its torch name, such as 'bfloat16'; PlanError for a dtype that no key is of."""
        stated = self._stated
        if dtype not in stated:
            raise PlanError("hardware.peak_flops", f"{dtype} is no dtype that hardware states a peak of", f"it is one of: {', '.join(stated)}")
        return stated[dtype]

    @property
    def known(self) -> tuple[str, ...]:
        """The dtypes that have a peak."""
        return tuple(dtype for dtype, peak in self._stated.items() if peak is not None)

    @property
    def _stated(self) -> dict[str, float | None]:
        return {"float32": self.float32, "bfloat16": self.bfloat16, "float16": self.float16}


@node
class Link(Node):
    """One kind of connection; a message of n bytes takes latency + n / bandwidth."""

    bandwidth: Annotated[float, Key("in one direction", unit="bytes/s", gt=0)]
    latency: Annotated[float, Key("until the first byte is there", unit="seconds", ge=0)]


@node
class Links(Node):
    """What devices are connected by; null where there is none, or nobody states it."""

    within: Annotated[Link | None, Key("from one device to the others of its node")]
    between: Annotated[Link | None, Key("from one node, with all its devices, to the others")]
    host: Annotated[Link | None, Key("from one device to its host's memory")]


@node
class Factors(Node):
    """What kernels get of the figures above: the prior that a time is estimated from where `lmforge calibrate` has not measured the machine."""

    matmul: Annotated[float, Key("of the peak, in a large matrix product", gt=0, le=1)]
    attention: Annotated[float, Key("of the peak, in the fused attention kernel's forward pass", gt=0, le=1)]
    memory: Annotated[float, Key("of memory_bandwidth, in a kernel that only moves data", gt=0, le=1)]
    link: Annotated[float, Key("of a link's bandwidth, in large messages", gt=0, le=1)]
    exposed: Annotated[float, Key("of traffic that runs beside compute: the share that compute still waits for", ge=0, le=1)]
    launch: Annotated[float, Key("that the host takes to start a kernel", unit="seconds", gt=0)]
    loader: Annotated[float, Key("that one process reads and packs", unit="tokens/s", gt=0)]


@dataclass(frozen=True)
class Machine:
    """What a plan is placed on. On `cuda` a device is a GPU; on `cpu` a device is a core that could carry a rank."""

    name: str
    accelerator: Accelerator
    devices: int
    memory_bytes: int  # of one GPU; on cpu the host's memory, which all ranks share
    peak_flops: PeakFlops  # of one device
    devices_per_node: int  # that share the links within
    memory_bandwidth: float | None  # bytes/s of one GPU; on cpu of the host, shared
    units: int | None  # streaming multiprocessors of a GPU
    links: Links
    factors: Factors
    power_watts: float | None  # of one device
    price_per_device_hour: float | None
    calibration: Calibration | None = None  # what was measured on it

    def memory_per_device(self, devices: int) -> int:
        """Bytes that each of `devices` ranks may use: its GPU's own, or its share of the host."""
        return self.memory_bytes if self.accelerator == "cuda" else self.memory_bytes // devices

    @property
    def fingerprint(self) -> str:
        """What a calibration belongs to; how many there are of a GPU does not count."""
        return fingerprint(self.name, self.accelerator, self.memory_bytes, self.devices)


@node
class Hardware(Node):
    """Where steps run; it never decides what they compute. Null is not known: then a time is not estimated."""

    group = "hardware"
    identity = False

    peak_flops: Annotated[PeakFlops, Key("dense peak of one device by dtype", unit="FLOP/s")]
    memory_bandwidth: Annotated[float | None, Key("of one GPU's memory, or of the whole host's on cpu", unit="bytes/s", gt=0)]
    units: Annotated[int | None, Key("streaming multiprocessors of a GPU, over which a matrix product runs in waves; null on cpu", gt=0)]
    links: Annotated[Links, Key("what devices are connected by")]
    factors: Annotated[Factors, Key("what kernels get of these figures until `lmforge calibrate` has measured it")]
    power_watts: Annotated[float | None, Key("of one device under load", unit="W", gt=0)]
    price_per_device_hour: Annotated[float | None, Key("what an hour of one device costs, in your currency", ge=0)]

    def machine(self) -> Machine:
        """The machine a plan is placed on; PlanError where it cannot be told."""
        raise NotImplementedError

    def figures(self) -> dict[str, Any]:
        """The keys that every kind of hardware has."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Hardware)}


@register("hardware", "stated")
class Stated(Hardware):
    """A machine described by its figures, so that a plan can be made away from it."""

    name: Annotated[str, Key("what a person calls it")]
    accelerator: Annotated[Accelerator, Key("kind of device")]
    devices: Annotated[int, Key("devices in all: GPUs, or CPU cores that could each carry a rank", gt=0)]
    devices_per_node: Annotated[int, Key("devices that share the links within; the last node may have fewer", gt=0)]
    memory_bytes: Annotated[int, Key("memory of one GPU, or of the whole host on cpu", unit="bytes", gt=0)]

    def machine(self) -> Machine:
        return Machine(self.name, self.accelerator, self.devices, self.memory_bytes, devices_per_node=self.devices_per_node, **self.figures())


@register("hardware", "here")
class Here(Hardware):
    """The machine lmforge runs on: its NVIDIA GPUs where there are any, else its CPU cores and memory."""

    def machine(self) -> Machine:
        from lmforge.hardware import here

        name, accelerator, devices, memory_bytes = here.detect()
        return Machine(name, accelerator, devices, memory_bytes, devices_per_node=devices, **self.figures())
