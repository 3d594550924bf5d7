"""Preference accuracy: does the model find the chosen answer likelier than the rejected one."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lmforge.errors import DataError
from lmforge.formats.packing import IGNORE, collate_pairs, pairs
from lmforge.formats.tokens import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Pair:
    """Log-probabilities of both answers of held-out pair `pair`, in nats, summed over the answer's tokens and its end token."""

    pair: int
    chosen: float
    rejected: float
    chosen_tokens: int
    rejected_tokens: int

    @property
    def credit(self) -> float:
        """1 where the chosen answer is likelier, 1/2 on a tie, else 0."""
        return 1.0 if self.chosen > self.rejected else 0.5 if self.chosen == self.rejected else 0.0


def choose_pairs(tokens: Tokens, max_pairs: int | None) -> list[int]:
    """Indices of all pairs, or of `max_pairs`, spread evenly. DataError where there are none."""
    there = pairs(tokens.offsets)
    if not there:
        raise DataError(str(tokens.folder / tokens.split), "holds no preference pairs", "raise the data's held-out share")
    return [int(index) for index in np.linspace(0, there - 1, min(there, max_pairs or there)).round()]


def score_pairs(model: PreTrainedModel, tokens: Tokens, indices: Sequence[int], *, batch_tokens: int, progress: Callable[[int, int, str], None]) -> list[Pair]:
    """Score both answers of each pair; pairs of like length share a batch. In the order of `indices`."""
    found: dict[int, Pair] = {}
    for batch in _batches(tokens, indices, batch_tokens):
        arrays = collate_pairs(batch, tokens)
        sums, counts = _logprobs(model, arrays), (arrays["labels"] != IGNORE).sum(1)
        for row, index in enumerate(batch):
            a, b = 2 * row, 2 * row + 1
            found[index] = Pair(index, float(sums[a]), float(sums[b]), int(counts[a]), int(counts[b]))
        progress(len(found), len(indices), "preference pairs")
    return [found[index] for index in indices]


def _logprobs(model: PreTrainedModel, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    """Of every row's labels, summed, in nats. The logits are gone when the next batch runs."""
    import torch

    from lmforge.inference import forward

    inputs = {name: torch.from_numpy(arrays[name]).to(model.device) for name in ("input_ids", "position_ids", "attention_mask")}
    labels = torch.from_numpy(arrays["labels"]).to(model.device)
    with torch.inference_mode():
        logits = forward.logits(model, inputs).float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
    found: NDArray[np.float64] = -losses.view_as(labels).double().sum(1).cpu().numpy()
    return found


def _batches(tokens: Tokens, indices: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    lengths = np.diff(tokens.offsets)
    width = {index: int(max(lengths[2 * index], lengths[2 * index + 1])) for index in indices}
    batch: list[int] = []
    for index in sorted(width, key=lambda one: -width[one]):  # the longest first: memory is at its height at once
        if batch and 2 * (len(batch) + 1) * width[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def summarize(scored: Sequence[Pair]) -> dict[str, float]:
    """Accuracy with its binomial standard error, and the mean log-probability margin in nats."""
    accuracy = sum(pair.credit for pair in scored) / len(scored)
    return {
        "preference_accuracy": accuracy,
        "preference_accuracy_standard_error": math.sqrt(accuracy * (1 - accuracy) / len(scored)),
        "preference_pairs": len(scored),
        "preference_ties": sum(pair.credit == 0.5 for pair in scored),
        "preference_margin_nats": sum(pair.chosen - pair.rejected for pair in scored) / len(scored),
    }


def write_pairs(path: Path, scored: Sequence[Pair]) -> None:
    """One JSON line a pair, written atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(asdict(pair)) + "\n" for pair in scored), encoding="utf-8")
    os.replace(temporary, path)


def read_pairs(path: Path) -> list[Pair]:
    """What `write_pairs` wrote."""
    return [Pair(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def paired_difference(before: Path, after: Path) -> dict[str, float]:
    """Accuracy of `after` minus that of `before` (two preference.jsonl files), with the standard error of the paired difference.

    The same pairs are easy or hard for both models, so this error is smaller than that of two independent shares. DataError where the pairs differ.
    """
    first, second = read_pairs(before), read_pairs(after)
    if [pair.pair for pair in first] != [pair.pair for pair in second] or not first:
        raise DataError(str(after), f"holds other pairs than {before}", "compare evaluations of the same held-out pairs")
    changes = np.array([b.credit - a.credit for a, b in zip(first, second, strict=True)])
    error = float(changes.std(ddof=1) / math.sqrt(len(changes))) if len(changes) > 1 else math.nan
    return {"difference": float(changes.mean()), "standard_error": error, "pairs": len(changes)}
