"""Sums over one log interval, kept on the device: reading them is the only time the host waits for it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lmforge.errors import RunError

NEVER = 2**62


class Meter:
    """Means over an interval, weighted over micro-batches and ranks, and the first step that was not finite."""

    def __init__(self, device: torch.device, *, counts: bool = True) -> None:
        self.device, self.counts = device, counts  # of ranks that work on the same rows one counts them
        self.sums: dict[str, Tensor] = {}
        self.grad_norm = torch.zeros((), device=device)
        self.first_bad = torch.full((), NEVER, dtype=torch.int64, device=device)

    def add(self, name: str, value: Tensor) -> None:
        """Add to a sum; fp64, so that the mean does not depend on how many micro-batches there were."""
        if name not in self.sums:
            self.sums[name] = torch.zeros((), dtype=torch.float64, device=self.device)
        if self.counts:
            self.sums[name] += value.detach()

    def mark(self) -> None:
        """Remember the sums, for `forget` to take a step that is skipped out of them again."""
        self._marked = {name: value.clone() for name, value in self.sums.items()}

    def forget(self) -> None:
        """Back to the sums at the last `mark`."""
        self.sums = self._marked

    def watch(self, step: int, *values: Tensor) -> None:
        """Remember `step` if it is the first in which one of the scalars is not finite."""
        finite = torch.stack([value.detach().float() for value in values]).isfinite().all()
        self.first_bad = torch.where(finite, self.first_bad, self.first_bad.clamp_max(step))

    def refuse_bad(self) -> None:
        """RunError naming the first step whose loss or gradient was not finite. Waits for the device."""
        if (step := int(self.first_bad)) != NEVER:
            raise RunError("optimizer.lr", f"the loss or its gradient was not finite in step {step}", "a lower learning rate, more warm-up, or fp32")

    def read(self) -> dict[str, float]:
        """Sums over all ranks since the last read, by name; the next interval begins; none where all its steps were skipped. RunError as `refuse_bad`."""
        found = self._together()
        self.refuse_bad()
        self.sums = {}
        return {name: float(value) for name, value in found.items()}

    def _together(self) -> dict[str, Tensor]:
        """The sums over all ranks, and on all of them the first step that was not finite."""
        names = self._names()
        if not names:  # every step of the interval was skipped
            return {}
        values = torch.stack([self.sums.get(name, torch.zeros((), dtype=torch.float64, device=self.device)) for name in names])
        if dist.is_initialized():
            dist.all_reduce(values)
            dist.all_reduce(self.first_bad, op=dist.ReduceOp.MIN)
        return dict(zip(names, values.cpu(), strict=True))

    def _names(self) -> list[str]:
        """The sums of any rank: an early stage of a pipeline knows none of the loss's."""
        named = [sorted(self.sums)]
        if dist.is_initialized():
            named = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(named, sorted(self.sums))
        return sorted({name for one in named for name in one})

    def state_dict(self) -> dict[str, Any]:
        """The same on every rank; every rank calls it."""
        return {"sums": self._together(), "grad_norm": self.grad_norm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What all ranks had added up goes on as the first one's."""
        first = not dist.is_initialized() or dist.get_rank() == 0
        self.sums = {name: value.to(self.device) for name, value in state["sums"].items()} if first else {}
        self.grad_norm = state["grad_norm"].to(self.device)
