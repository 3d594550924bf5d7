"""KTO: single answers that are desirable or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from lmforge.errors import DataError
from lmforge.formats import packing
from lmforge.formats.tokens import Tokens
from lmforge.inference.forward import evaluating
from lmforge.training.losses.preference import kto
from lmforge.training.meter import Meter
from lmforge.training.objective import Batch, LossParts
from lmforge.training.objectives.preference import logprobs, read_reference
from lmforge.training.order import GlobalBatch

OTHER = "mismatched/"  # what a batch calls the rows of prompts with another prompt's answer


class FeedbackRows:
    """Single answers from one split of a `tokens` folder: {input_ids, labels, position_ids, keep, desirable [rows]}, right-padded.

    "mismatched/..." holds the same of each prompt with the answer half a split away. With `reference`, log-probs of the examples and of the
    mismatched ones, each [examples], a batch also holds `reference` and "mismatched/reference" [rows].
    """

    def __init__(self, tokens: Tokens, reference: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None) -> None:
        if (view := tokens.meta["view"]) != "feedback":
            raise DataError(str(tokens.folder), f"are tokens of the {view} view", "use tokens of the feedback view")
        assert tokens.labels is not None
        self.tokens, self.labels, self.reference = tokens, tokens.labels, reference
        for values in reference or ():
            if values.shape != (len(tokens),):
                what = f"log-probs of shape {values.shape} for {len(tokens):,} examples in {tokens.folder / tokens.split}"
                raise DataError("reference", what, "run the reference step again")

    def __len__(self) -> int:
        return len(self.tokens)

    def lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of each example."""
        return np.diff(self.tokens.offsets)[indices]

    def batch(self, indices: Sequence[int]) -> Batch:
        chosen = [int(index) for index in indices]
        batch = _tensors(packing.collate_examples(chosen, self.tokens), "")
        batch |= _tensors(packing.collate_mismatched(chosen, self.tokens), OTHER)
        batch["desirable"] = torch.from_numpy(self.labels[chosen] == 1)
        for prefix, values in zip(("", OTHER), self.reference or (), strict=False):
            batch[prefix + "reference"] = torch.from_numpy(np.asarray(values[chosen], np.float32))
        return batch


def _tensors(arrays: packing.Batch, prefix: str) -> Batch:
    return {prefix + name: torch.from_numpy(array) for name, array in arrays.items() if name != "attention_mask"}


def other(batch: Batch) -> Batch:
    """The mismatched rows of a batch."""
    return {name.removeprefix(OTHER): value for name, value in batch.items() if name.startswith(OTHER)}


@dataclass
class Kto:
    """KTO against cached reference log-probs, weighted by answers; the KL baseline z0 is that of the whole global batch.

    z0 = max(0, mean of policy - reference log-probs of prompts with another prompt's answer), over all micro-batches and ranks, so that the gradient
    does not depend on how the batch is cut. `reference` is a folder of {split}.npy and {split}_kl.npy.
    """

    dropout: ClassVar[bool] = False  # z0 and the reference are measured without

    tokens: Path
    reference: Path
    beta: float
    desirable_weight: float
    undesirable_weight: float
    _meter: Meter | None = field(default=None, init=False, repr=False)

    def dataset(self, split: str) -> FeedbackRows:
        return FeedbackRows(Tokens(self.tokens, split), (read_reference(self.reference, split), read_reference(self.reference, f"{split}_kl")))

    def weight(self, batch: Batch) -> Tensor:
        return torch.tensor(len(batch["input_ids"]))

    def prepare(self, model: Any, batch: GlobalBatch) -> GlobalBatch:
        """The same micro-batches with the baseline `kl` [] in each."""
        sums = torch.zeros(2, dtype=torch.float64, device=batch.weight.device)  # log-ratios, and how many
        with evaluating(model):
            for micro_batch in batch.micro_batches:
                rows = other(micro_batch)
                ratios = logprobs(model, rows)[0].detach() - rows["reference"]
                sums += torch.stack([ratios.double().sum(), torch.full_like(sums[1], len(ratios))])
        if dist.is_initialized():
            dist.all_reduce(sums)
        kl = (sums[0] / sums[1]).clamp_min(0).float()
        return replace(batch, micro_batches=[{**micro_batch, "kl": kl} for micro_batch in batch.micro_batches])

    def loss(self, model: Any, batch: Batch) -> LossParts:
        """Of a batch that `prepare` has seen."""
        logps, _ = logprobs(model, batch)
        weights = {"beta": self.beta, "desirable_weight": self.desirable_weight, "undesirable_weight": self.undesirable_weight}
        loss, rewards = kto(logps, batch["reference"], batch["desirable"], batch["kl"], **weights)
        self._count(batch, rewards, logps.detach())
        return LossParts(loss.sum(), self.weight(batch).to(loss.device), {"kl": batch["kl"] * len(rewards)})

    def _count(self, batch: Batch, rewards: Tensor, logps: Tensor) -> None:
        self._meter = self._meter or Meter(rewards.device)
        for kind, those in (("chosen", batch["desirable"]), ("rejected", ~batch["desirable"])):
            for name, values in (("count", torch.ones_like(rewards)), ("rewards", rewards), ("logps", logps)):
                self._meter.add(f"{name}/{kind}", (values * those).sum())

    def figures(self) -> dict[str, float]:
        """Rewards and log-probs over the desirable (chosen) and the undesirable (rejected) answers since the last call; none of a kind that did not come."""
        sums, self._meter = self._meter.read() if self._meter else {}, None
        found = {
            f"{name}/{kind}": sums[f"{name}/{kind}"] / count
            for kind in ("chosen", "rejected")
            for name in ("rewards", "logps")
            if (count := sums.get(f"count/{kind}", 0))
        }
        if "rewards/chosen" in found and "rewards/rejected" in found:
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"meter": self._meter.state_dict() if self._meter else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["meter"] is not None:
            # Counted on the device of what is added to it.
            self._meter = Meter(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
            self._meter.load_state_dict(state["meter"])
