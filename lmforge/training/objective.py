"""What is minimized: rows of data, and a loss as a sum with its weight, so that means are right over any split into micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

Batch = dict[str, Tensor]


class Rows(Protocol):
    """Rows of one split, by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> Batch:
        """The rows at `indices` as CPU tensors. It holds `input_ids`, whose elements are counted as tokens."""
        ...


@dataclass(frozen=True)
class LossParts:
    """A loss as `sum / weight`. `metrics` are sums too, without gradient: their means are over the same weight."""

    sum: Tensor  # scalar fp32, with gradient
    weight: Tensor  # scalar: supervised tokens, or pairs
    metrics: Mapping[str, Tensor]


class Objective(Protocol):
    """A loss over rows of data."""

    def dataset(self, split: str) -> Rows:
        """The rows of `train` or `heldout`."""
        ...

    def weight(self, batch: Batch) -> Tensor:
        """The weight of a batch from its data alone; the global batch's is needed before the first backward."""
        ...

    def loss(self, model: nn.Module | Any, batch: Batch) -> LossParts:
        """Forward through a transformers model; `weight` equals `self.weight(batch)`."""
        ...
