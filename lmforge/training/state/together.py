"""What ranks decide together, so that one that fails does not leave the others waiting. Without a process group there is one rank."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

from lmforge.errors import LmforgeError

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gathered(value: T) -> list[T]:
    """Every rank's value, on every rank."""
    if world() == 1:
        return [value]
    values: list[T] = [value] * world()
    dist.all_gather_object(values, value)
    return values


def agree(problem: LmforgeError | None) -> None:
    """Raise the problem of the lowest rank that has one, on every rank."""
    for found in gathered(problem):
        if found is not None:
            raise found
