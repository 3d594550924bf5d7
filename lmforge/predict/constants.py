"""Small tensors that no stage trains, and what a device gives the framework."""

from __future__ import annotations

from lmforge.adapter.low_rank import Lora
from lmforge.adapter.targets import ALL_LINEAR, chosen, linears
from lmforge.hardware.nodes import Machine
from lmforge.predict.job import Job

CODES = 2 * 1024  # bytes of a quantized matrix's code tables and scalars (bitsandbytes' QuantState, nested)
CONTEXT = 2**29  # bytes: CUDA's context with torch's kernels; stated by nobody, so to be calibrated
CHANNELS, CHANNEL = 16, 2 * 2**22  # NCCL: channels of a group, and the buffers of one (NCCL_BUFFSIZE, its documentation)
WORKSPACE = {True: 2**25, False: 8519680}  # cuBLAS on Hopper and before (torch's notes, CUBLAS_WORKSPACE_CONFIG)


def constants(job: Job) -> int:
    """Bytes of frequencies, of code tables under a base in 4 bits, and of PiSSA's first A and B."""
    shape, adapter = job.shape, getattr(job.stage, "adapter", None)
    found = shape.rotary_dim * 4  # two tables of half as many
    if adapter is not None and adapter.four_bit:
        found += sum(one.count for one in chosen(linears(job.weights), (ALL_LINEAR,))) * CODES
    if isinstance(adapter, Lora) and adapter.init == "pissa":
        found += sum(one.numel for one in adapter.trainable(job.weights)) * job.stage.precision.param_bytes
    return found


def reserve(machine: Machine, ranks: int) -> int:
    """What a GPU loses outside tensors. On a CPU tensors alone are counted: the host's memory is everybody's."""
    if machine.accelerator != "cuda":
        return 0
    hopper = any(name in machine.name.lower() for name in ("h100", "h200", "gh200", "b200"))
    return CONTEXT + WORKSPACE[hopper] + (CHANNELS * CHANNEL if ranks > 1 else 0)
