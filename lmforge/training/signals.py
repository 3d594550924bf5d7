"""Ctrl-C and SIGTERM, taken at the end of the running step, and by all ranks at the end of the same one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Remembers the first signal in `requested`; a second Ctrl-C interrupts at once. Does nothing outside the main thread.

    `restore` brings back the handlers there were when this was made, for Lightning sets some of its own in between.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before = {number: signal.getsignal(number) for number in SIGNALS}

    def install(self) -> None:
        self._set(dict.fromkeys(SIGNALS, self._take))

    def restore(self) -> None:
        self._set(self._before)

    def _set(self, handlers: Mapping[signal.Signals, Any]) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


class StopVote:
    """Whether any rank was asked to stop and whether a state is due, told with the weight of the global batch, which ranks sum in every step anyway."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def ask(self, weight: Tensor, stop: bool, late: bool = False) -> Tensor:
        """The sum of the ranks' weights [scalar, float64]; without ranks the weight itself. `late`: the first rank's clock says that a state is due."""
        due = late and (not dist.is_initialized() or dist.get_rank() == 0)
        asked = torch.tensor([float(stop), float(due)], dtype=torch.float64, device=self.device)
        shared = torch.cat([weight.to(torch.float64).view(1), asked])
        if dist.is_initialized():
            dist.all_reduce(shared)
        self._votes = shared[1:].to("cpu", non_blocking=True)
        if self.device.type == "cuda":
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
        return shared[0]

    def wanted(self) -> bool:
        """Whether a rank is to stop: the same answer on every rank."""
        return bool(self._read()[0])

    def late(self) -> bool:
        """Whether a state is due: the same answer on every rank."""
        return bool(self._read()[1])

    def _read(self) -> Tensor:
        """Waits until the device has begun the step, not until it has ended it, so that it never runs dry."""
        if self.device.type == "cuda":
            self._copied.synchronize()
        return self._votes
