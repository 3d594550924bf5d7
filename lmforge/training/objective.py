"""What is minimized: rows of data, and a loss as a sum with its weight, so that means are right over any split into micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn

if TYPE_CHECKING:
    from lmforge.training.order import GlobalBatch

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


# What an objective may have besides; the training module asks for each by its methods. An objective with `dropout = False` is trained without dropout,
# an adapter's included: it compares log-probs with those that a reference, or the policy of a rollout, gave without. One whose steps are not alike has a
# `period`, the number of steps after which the work repeats.


@runtime_checkable
class Preparing(Protocol):
    """An objective that needs the model before the loss: KTO's KL over the global batch, the rollouts of PPO and GRPO."""

    def prepare(self, model: nn.Module | Any, batch: GlobalBatch) -> GlobalBatch:
        """What to train on in place of `batch`; called on every rank at the start of each step, without gradient and in the step's autocast.

        The step's random state is set before it, so what is drawn depends on (seed, step, rank) alone. Collectives are allowed: all ranks come here.
        """
        ...


class OfLogits(Protocol):
    """An objective that a pipeline can run: its last stage has the logits already."""

    def of_logits(self, logits: Tensor, labels: Tensor) -> LossParts:
        """The loss of logits [rows, seq_len, vocabulary] and labels [rows, seq_len]."""
        ...


@runtime_checkable
class Resumable(Protocol):
    """An objective with a state between steps, such as a rollout that is trained on for several of them."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, lists and dicts of them, the same on every rank: rank 0's is the one that is kept."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave; tensors come on the CPU."""
        ...


@runtime_checkable
class Figured(Protocol):
    """An objective with metrics that are no sums over a batch."""

    def figures(self) -> dict[str, float]:
        """Means since this was last asked, the same on every rank; merged into the logged metrics."""
        ...
