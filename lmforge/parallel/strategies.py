"""Lightning strategies out of parallel nodes. Ranks are started by torchrun or Lightning's own launcher."""

from __future__ import annotations

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook

BACKEND = {"cpu": "gloo", "cuda": "nccl"}
# No hook: gradients are summed in the dtype they have.
COMPRESS = {"float32": None, "bfloat16": bf16_compress_hook, "float16": fp16_compress_hook}


def single(accelerator: str) -> Strategy:
    """One device: the CPU, or the first GPU that CUDA shows."""
    return SingleDeviceStrategy(device=torch.device(accelerator, 0) if accelerator == "cuda" else torch.device("cpu"))


def ddp(accelerator: str, reduce_dtype: str) -> Strategy:
    """Gradients averaged over all ranks in `reduce_dtype`; the buckets are the gradients' own memory."""
    return DDPStrategy(process_group_backend=BACKEND[accelerator], ddp_comm_hook=COMPRESS[reduce_dtype], gradient_as_bucket_view=True)
