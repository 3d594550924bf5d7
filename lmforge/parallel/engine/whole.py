"""Every rank holds the whole model: one device, and DDP."""
# No `from __future__ import annotations` here: torch reads a hook's annotations and wants the types themselves.

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch.nn.parallel import DistributedDataParallel

from lmforge.parallel.engine.base import BACKEND, Engine, patience
from lmforge.parallel.layout import ONE, Spread


def reduce_in(dtype: torch.dtype, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    """Average a flat bucket of gradients over all ranks in `dtype`; divided first, so that float16 does not overflow."""
    gradients = bucket.buffer()
    small = (gradients / dist.get_world_size()).to(dtype)
    summed: torch.futures.Future[list[torch.Tensor]] = dist.all_reduce(small, async_op=True).get_future()
    return summed.then(lambda done: gradients.copy_(done.value()[0]))


class OneDevice(Engine, SingleDeviceStrategy):
    """The CPU, or the first GPU that CUDA shows."""

    mesh = ONE


class ReducingDDP(Engine, DDPStrategy):
    """DDP that averages gradients in `reduce_dtype`, on CPU too, where Lightning drops a hook unsaid and torch refuses its own."""

    def __init__(self, spread: Spread, timeout_s: float) -> None:
        # A language model's buffers are constants, so that they need no broadcast.
        backend, waits = BACKEND[spread.accelerator], patience(timeout_s)
        super().__init__(process_group_backend=backend, timeout=waits, gradient_as_bucket_view=True, broadcast_buffers=False)
        self.mesh, self.reduce_dtype = spread.mesh, spread.reduce_dtype

    def configure_ddp(self) -> None:
        """Wrap the model; gradients that have the dtype already need no hook."""
        super().configure_ddp()
        assert isinstance(self.model, DistributedDataParallel)
        dtype = getattr(torch, self.reduce_dtype)
        if any(parameter.dtype != dtype for parameter in self.model.parameters()):
            self.model.register_comm_hook(dtype, reduce_in)

    def accumulating(self, module: LightningModule, *, last: bool) -> AbstractContextManager[Any]:
        """The buckets that gradients travel in are the gradients' own memory."""
        assert isinstance(self.model, DistributedDataParallel)
        return contextlib.nullcontext() if last else self.model.no_sync()


def single(spread: Spread) -> OneDevice:
    """One device."""
    return OneDevice(device=torch.device("cuda", 0) if spread.accelerator == "cuda" else torch.device("cpu"))
