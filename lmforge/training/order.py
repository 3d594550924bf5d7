"""Which rows a step takes. The step's number alone decides it, so the data position of a run is its step, and no loader has a state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lmforge.errors import DataError
from lmforge.training.objective import Batch, Objective, Rows


class RowOrder:
    """An endless order over `rows` rows: epoch after epoch, each a permutation drawn from (seed, epoch)."""

    def __init__(self, rows: int, seed: int) -> None:
        if rows < 1:
            raise DataError("data", "no rows to train on", "give more text, or a shorter seq_len")
        self.rows, self.seed = rows, seed
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def take(self, start: int, end: int) -> NDArray[np.int64]:
        """Rows at the places [start, end) of the order."""
        parts = []
        while start < end:
            epoch, at = divmod(start, self.rows)
            part = self._of(epoch)[at : at + end - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts)

    def _of(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.rows)
        return self._permutation


@runtime_checkable
class Uneven(Protocol):
    """Rows of different lengths, which a batch pads to its longest."""

    def lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of each of these rows, or what grows with them."""
        ...


def longest_first(rows: Rows | Any, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same rows with those of like length together, so that less is padded, and memory at its height first; equal ones in their order."""
    return indices[np.argsort(-rows.lengths(indices), kind="stable")] if isinstance(rows, Uneven) else indices


@dataclass(frozen=True)
class GlobalBatch:
    """One rank's share of one optimizer step's data."""

    step: int
    micro_batches: Sequence[Batch]
    weight: Tensor  # scalar, of this rank's share
    tokens: int  # of this rank's share

    def to(self, device: torch.device) -> GlobalBatch:
        """Lightning moves a batch through this; from pinned memory the copy does not block."""
        batches = [{name: value.to(device, non_blocking=True) for name, value in batch.items()} for batch in self.micro_batches]
        return GlobalBatch(self.step, batches, self.weight.to(device, non_blocking=True), self.tokens)

    def pin_memory(self) -> GlobalBatch:
        """The DataLoader calls this where pinning is on."""
        batches = [{name: value.pin_memory() for name, value in batch.items()} for batch in self.micro_batches]
        return GlobalBatch(self.step, batches, self.weight.pin_memory(), self.tokens)


class StepData(Dataset[GlobalBatch]):
    """Item i is this rank's share of the global batch of step i, cut into micro-batches of at most `micro_batch_size` rows."""

    def __init__(self, objective: Objective, rows: Rows, *, rows_per_step: int, micro_batch_size: int, seed: int, rank: int, world: int) -> None:
        self.objective, self.rows, self.order = objective, rows, RowOrder(len(rows), seed)
        self.rows_per_step, self.micro_batch_size = rows_per_step, micro_batch_size
        share = rows_per_step // world
        self.first, self.last = rank * share, (rank + 1) * share

    def __getitem__(self, step: int) -> GlobalBatch:
        start = step * self.rows_per_step
        # A sum over rows weighs each alike, so the gradient does not depend on which of them share a micro-batch.
        indices = longest_first(self.rows, self.order.take(start + self.first, start + self.last))
        batches = [self.rows.batch(part.tolist()) for part in self._cut(indices)]
        weight = torch.stack([self.objective.weight(batch) for batch in batches]).sum()
        return GlobalBatch(step, batches, weight, sum(batch["input_ids"].numel() for batch in batches))

    def taken(self, step: int) -> NDArray[np.int64]:
        """The rows of the whole global batch of `step`, over all ranks."""
        return self.order.take(step * self.rows_per_step, (step + 1) * self.rows_per_step)

    def _cut(self, indices: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        for start in range(0, len(indices), self.micro_batch_size):
            yield indices[start : start + self.micro_batch_size]
