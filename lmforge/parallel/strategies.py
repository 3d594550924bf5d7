"""Lightning strategies out of parallel nodes. Ranks are started by torchrun or Lightning's own launcher."""
# No `from __future__ import annotations` here: torch reads a hook's annotations and wants the types themselves.

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch.nn.parallel import DistributedDataParallel

BACKEND = {"cpu": "gloo", "cuda": "nccl"}


def reduce_in(dtype: torch.dtype, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    """Average a flat bucket of gradients over all ranks in `dtype`; divided first, so that float16 does not overflow."""
    gradients = bucket.buffer()
    small = (gradients / dist.get_world_size()).to(dtype)
    summed: torch.futures.Future[list[torch.Tensor]] = dist.all_reduce(small, async_op=True).get_future()
    return summed.then(lambda done: gradients.copy_(done.value()[0]))


class ReducingDDP(DDPStrategy):
    """DDP that averages gradients in `reduce_dtype`, on CPU too, where Lightning drops a hook unsaid and torch refuses its own."""

    def __init__(self, backend: str, reduce_dtype: str) -> None:
        # A language model's buffers are constants, so that they need no broadcast.
        super().__init__(process_group_backend=backend, gradient_as_bucket_view=True, broadcast_buffers=False)
        self.reduce_dtype = reduce_dtype

    def configure_ddp(self) -> None:
        """Wrap the model; gradients that have the dtype already need no hook."""
        super().configure_ddp()
        assert isinstance(self.model, DistributedDataParallel)
        dtype = getattr(torch, self.reduce_dtype)
        if any(parameter.dtype != dtype for parameter in self.model.parameters()):
            self.model.register_comm_hook(dtype, reduce_in)


def single(accelerator: str) -> Strategy:
    """One device: the CPU, or the first GPU that CUDA shows."""
    return SingleDeviceStrategy(device=torch.device("cuda", 0) if accelerator == "cuda" else torch.device("cpu"))


def ddp(accelerator: str, reduce_dtype: str) -> Strategy:
    """Gradients averaged over all ranks; the buckets they travel in are the gradients' own memory."""
    return ReducingDDP(BACKEND[accelerator], reduce_dtype)
