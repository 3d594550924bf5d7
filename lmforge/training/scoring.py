"""Numbers of a model on held-out rows, without gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lmforge.training.objective import Batch, Objective, Rows
from lmforge.training.objectives.dpo import PairRows, pair_logprobs


@torch.no_grad()
def evaluate(objective: Objective, model: Any, split: str, rows_per_batch: int) -> dict[str, float]:
    """Mean `loss` over a whole split, weighted as in training (exp of it is the perplexity for CausalLM), the objective's metrics, and `weight`."""
    sums: dict[str, float] = {"weight": 0.0, "loss": 0.0}
    for batch in _batches(model, objective.dataset(split), rows_per_batch):
        parts = objective.loss(model, batch)
        for name, value in {"weight": parts.weight, "loss": parts.sum, **parts.metrics}.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    weight = sums.pop("weight")
    return {**{name: value / max(weight, 1.0) for name, value in sums.items()}, "weight": weight}


@torch.no_grad()
def preference_logprobs(model: Any, rows: PairRows, pairs_per_batch: int) -> NDArray[np.float32]:
    """Log-prob of every response of a preference split, as the `reference` artifact holds them: [2 * pairs], chosen and rejected in turn."""
    parts = [pair_logprobs(model, batch).float().cpu().numpy() for batch in _batches(model, rows, pairs_per_batch)]
    return np.concatenate([np.empty(0, np.float32), *parts])


def _batches(model: Any, rows: Rows, size: int) -> Iterator[Batch]:
    """All rows in order, on the model's device, with the model in evaluation mode until the last one is used."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        for start in range(0, len(rows), size):
            batch = rows.batch(range(start, min(start + size, len(rows))))
            yield {name: value.to(device) for name, value in batch.items()}
    finally:
        model.train(training)
