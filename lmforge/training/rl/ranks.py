"""This process among the ranks, and tensors of all of them. Without a process group there is one rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lmforge.training.state.together import rank, world

__all__ = ["gathered", "rank", "share", "world"]


def share(rows: int) -> Tensor:
    """This rank's rows of `rows`: equally many on every rank, so that the last ones may begin again at row 0."""
    each = -(-rows // world())
    return torch.arange(rank() * each, (rank() + 1) * each) % rows


def gathered(part: Tensor, rows: int, device: torch.device) -> Tensor:
    """The ranks' shares [each, ...] put together on the CPU: [rows, ...]. `device` is where collectives run."""
    if world() == 1:
        return part.cpu()[:rows]
    part = part.to(device).contiguous()
    parts = [torch.empty_like(part) for _ in range(world())]
    dist.all_gather(parts, part)
    return torch.cat(parts).cpu()[:rows]
