"""Numbers of a model on held-out rows, without gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmforge.inference.forward import evaluating
from lmforge.training.objective import Batch, Figured, Objective, Preparing, Rows
from lmforge.training.order import GlobalBatch, longest_first


@torch.no_grad()
def evaluate(objective: Objective, model: Any, split: str, rows_per_batch: int) -> dict[str, float]:
    """Mean `loss` over a whole split, weighted as in training (exp of it is the perplexity for CausalLM), the objective's metrics, and `weight`.

    An objective that prepares a global batch is given the whole split as one.
    """
    rows, sums = objective.dataset(split), {"weight": 0.0, "loss": 0.0}
    with evaluating(model):
        batches: Iterator[Batch] | Sequence[Batch] = (batch for _, batch in _batches(model, rows, rows_per_batch))
        if isinstance(objective, Preparing):
            batches = list(batches)
            weight = torch.stack([objective.weight(batch) for batch in batches]).sum()
            batches = objective.prepare(model, GlobalBatch(0, batches, weight.to(_device(model)), 0)).micro_batches
        for batch in batches:
            parts = objective.loss(model, batch)
            for name, value in {"weight": parts.weight, "loss": parts.sum, **parts.metrics}.items():
                sums[name] = sums.get(name, 0.0) + float(value)
    total = sums.pop("weight")
    figures = objective.figures() if isinstance(objective, Figured) else {}
    return {**{name: value / max(total, 1.0) for name, value in sums.items()}, **figures, "weight": total}


@torch.no_grad()
def score(model: Any, rows: Rows, rows_per_batch: int, of: Callable[[Any, Batch], Tensor]) -> NDArray[np.float32]:
    """`of(model, batch)` [rows of the batch, ...] for all rows of a split, in their order."""
    found: NDArray[np.float32] | None = None
    with evaluating(model):
        for indices, batch in _batches(model, rows, rows_per_batch):
            values = of(model, batch).float().cpu().numpy()
            if found is None:
                found = np.empty((len(rows), *values.shape[1:]), np.float32)
            found[indices] = values
    return np.empty(0, np.float32) if found is None else found


def _batches(model: Any, rows: Rows, size: int) -> Iterator[tuple[NDArray[np.int64], Batch]]:
    """All rows with their indices, on the model's device; those of like length share a batch, the longest first."""
    indices = longest_first(rows, np.arange(len(rows)))
    for start in range(0, len(indices), size):
        some = indices[start : start + size]
        yield some, {name: value.to(_device(model)) for name, value in rows.batch(some.tolist()).items()}


def _device(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device
