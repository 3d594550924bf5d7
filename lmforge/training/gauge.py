"""What a training is measured by: seconds and tokens of its steps, and the memory of the fullest rank; what a plan predicted is held against it."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lmforge.hardware.here import cpu_name


@dataclass(frozen=True)
class Timed:
    """One step, from the end of the step before to its own; whatever lies between counts (data, logging, a state that is written)."""

    step: int
    seconds: float
    tokens: int


class Gauge:
    """Ends of steps, by the device's own clock where it has one: a host runs ahead of its GPU and would time the launches.

    `period` is after how many steps the work repeats (a rollout and the updates on it), so that only whole periods are counted.
    """

    def __init__(self, device: torch.device, period: int) -> None:
        self.device, self.period = device, period
        self.ends: list[tuple[int, int, Any]] = []  # step, tokens and when, of those not read yet, and of the last one that was
        self.timed: list[Timed] = []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def end(self, step: int, tokens: int) -> None:
        """The device has `step` behind it when it gets here."""
        now: Any = time.perf_counter()
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            now.record()
        self.ends.append((step, tokens, now))

    def read(self) -> None:
        """Turn ends into seconds. Waits for the device, so it is for moments at which the host waits anyway."""
        if self.device.type == "cuda" and self.ends:
            self.ends[-1][2].synchronize()
        for (_, _, before), (step, tokens, after) in zip(self.ends, self.ends[1:], strict=False):
            self.timed.append(Timed(step, before.elapsed_time(after) / 1e3 if self.device.type == "cuda" else after - before, tokens))
        self.ends = self.ends[-1:]

    def result(self) -> dict[str, Any]:
        """Seconds a step (the median, without the first), tokens/s and bytes of the fullest rank; None for what cannot be told. All ranks call it.

        `peak_bytes` are what CUDA's allocator had handed out at most; a CPU has no such count, only the process's resident set, which is no sum of tensors.
        """
        self.read()
        whole = self._periods()
        seconds, tokens = sum(one.seconds for steps in whole for one in steps), sum(one.tokens for steps in whole for one in steps)
        cuda = self.device.type == "cuda"
        kept = (torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)) if cuda else (0, 0)
        peak, reserved, resident = self._fullest(*kept, resident_bytes())
        return {
            "step_seconds": statistics.median(sum(one.seconds for one in steps) / self.period for steps in whole) if whole else None,
            "tokens_per_second": tokens / seconds if seconds else None,
            "timed_steps": len(whole) * self.period,
            "peak_bytes": peak if cuda else None,
            "reserved_bytes": reserved if cuda else None,
            "resident_bytes": resident,
            "device": torch.cuda.get_device_name(self.device) if cuda else cpu_name(),
        }

    def _periods(self) -> list[list[Timed]]:
        """Whole periods, but the first: it holds compilation, warm-up and the first touch of memory."""
        by_period: dict[int, list[Timed]] = {}
        for one in self.timed:
            by_period.setdefault(one.step // self.period, []).append(one)
        # The first step has no step before it, so the period it is in is never whole.
        return [steps for steps in by_period.values() if len(steps) == self.period]

    def _fullest(self, *counts: int) -> list[int]:
        """The most of each over all ranks."""
        if not dist.is_initialized():
            return list(counts)
        values = torch.tensor(counts, dtype=torch.int64, device=self.device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return [int(value) for value in values]


def resident_bytes() -> int:
    """The most host memory that this process ever held, in bytes (Linux counts in KiB, macOS in bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
