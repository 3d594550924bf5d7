"""Machines a plan is made for: one that is stated, or the one we are on. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from lmforge.registry import Key, Node, node, register

Accelerator = Literal["cpu", "cuda"]


@node
class PeakFlops(Node):
    """Dense matrix FLOP/s of one device by dtype, without structured sparsity; null where nobody states it."""

    float32: Annotated[float | None, Key("peak with float32 inputs, no TF32", unit="FLOP/s", gt=0)]
    bfloat16: Annotated[float | None, Key("peak with bfloat16 inputs", unit="FLOP/s", gt=0)]
    float16: Annotated[float | None, Key("peak with float16 inputs", unit="FLOP/s", gt=0)]

    def of(self, dtype: str) -> float | None:
        """The peak of one dtype by its torch name, such as 'bfloat16'."""
        return {"float32": self.float32, "bfloat16": self.bfloat16, "float16": self.float16}[dtype]


@dataclass(frozen=True)
class Machine:
    """What a plan is placed on. On `cuda` a device is a GPU; on `cpu` a device is a core that could carry a rank."""

    name: str
    accelerator: Accelerator
    devices: int
    memory_bytes: int  # of one GPU; on cpu the host's memory, which all ranks share
    peak_flops: PeakFlops  # of one device

    def memory_per_device(self, devices: int) -> int:
        """Bytes that each of `devices` ranks may use: its GPU's own, or its share of the host."""
        return self.memory_bytes if self.accelerator == "cuda" else self.memory_bytes // devices


class Hardware(Node):
    """Where steps run; it never decides what they compute."""

    group = "hardware"
    identity = False

    def machine(self) -> Machine:
        """The machine a plan is placed on; PlanError where it cannot be told."""
        raise NotImplementedError


@register("hardware", "stated")
class Stated(Hardware):
    """A machine described by its figures, so that a plan can be made away from it."""

    name: Annotated[str, Key("what a person calls it")]
    accelerator: Annotated[Accelerator, Key("kind of device")]
    devices: Annotated[int, Key("devices in all: GPUs, or CPU cores that could each carry a rank", gt=0)]
    memory_bytes: Annotated[int, Key("memory of one GPU, or of the whole host on cpu", unit="bytes", gt=0)]
    peak_flops: Annotated[PeakFlops, Key("dense peak of one device by dtype", unit="FLOP/s")]

    def machine(self) -> Machine:
        return Machine(self.name, self.accelerator, self.devices, self.memory_bytes, self.peak_flops)


@register("hardware", "here")
class Here(Hardware):
    """The machine lmforge runs on: its NVIDIA GPUs where there are any, else its CPU cores and memory."""

    peak_flops: Annotated[PeakFlops, Key("dense peak of one device, from its datasheet; null = not known", unit="FLOP/s")]

    def machine(self) -> Machine:
        from lmforge.hardware import here

        name, accelerator, devices, memory_bytes = here.detect()
        return Machine(name, accelerator, devices, memory_bytes, self.peak_flops)
