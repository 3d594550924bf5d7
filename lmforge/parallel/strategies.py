"""Lightning strategies out of parallel nodes. Ranks are started by torchrun or Lightning's own launcher."""

from __future__ import annotations

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

BACKEND = {"cpu": "gloo", "cuda": "nccl"}
COMPRESS = {"bfloat16": bf16_compress_hook, "float16": fp16_compress_hook}


class ReducingDDP(DDPStrategy):
    """DDP that sums gradients in `reduce_dtype` on every device; Lightning's own argument for it does nothing on CPU, unsaid."""

    def __init__(self, backend: str, reduce_dtype: str) -> None:
        super().__init__(process_group_backend=backend, gradient_as_bucket_view=True)
        self.reduce_dtype = reduce_dtype

    def configure_ddp(self) -> None:
        """Wrap the model; without a hook gradients are summed in the dtype they have, float32."""
        super().configure_ddp()
        if self.reduce_dtype in COMPRESS:
            assert isinstance(self.model, DistributedDataParallel)
            self.model.register_comm_hook(None, COMPRESS[self.reduce_dtype])


def single(accelerator: str) -> Strategy:
    """One device: the CPU, or the first GPU that CUDA shows."""
    return SingleDeviceStrategy(device=torch.device("cuda", 0) if accelerator == "cuda" else torch.device("cpu"))


def ddp(accelerator: str, reduce_dtype: str) -> Strategy:
    """Gradients averaged over all ranks; the buckets they travel in are the gradients' own memory."""
    return ReducingDDP(BACKEND[accelerator], reduce_dtype)
