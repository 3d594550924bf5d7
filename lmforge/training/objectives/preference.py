"""Losses on pairs of a chosen and a rejected answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmforge.errors import DataError
from lmforge.formats import packing
from lmforge.formats.tokens import Tokens
from lmforge.inference.forward import logits
from lmforge.training import shared_prompt
from lmforge.training.losses.preference import PairLoss, Pairs
from lmforge.training.losses.tokens import IGNORE, token_cross_entropy
from lmforge.training.objective import Batch, LossParts


class PairRows:
    """Preference pairs from one split of a `tokens` folder, a row each, as `packing.collate_shared` has them.

    With `reference` (log-probs of every example [2 * pairs]) a batch also holds `reference` [pairs of the batch, 2], and with margins in the tokens
    `margin` [pairs of the batch].
    """

    def __init__(self, tokens: Tokens, reference: NDArray[np.float32] | None = None) -> None:
        self.tokens = tokens
        self.pairs = packing.pairs(tokens.offsets)
        if reference is not None and reference.shape != (2 * self.pairs,):
            what = f"log-probs of shape {reference.shape} for {self.pairs:,} pairs in {tokens.folder / tokens.split}"
            raise DataError("reference", what, "run the reference step again")
        self.reference = None if reference is None else reference.reshape(-1, 2)

    def __len__(self) -> int:
        return self.pairs

    def lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of each pair's longer example."""
        sizes: NDArray[np.int64] = np.diff(self.tokens.offsets).reshape(-1, 2).max(1)
        return sizes[indices]

    def batch(self, indices: Sequence[int]) -> Batch:
        batch = {name: torch.from_numpy(array) for name, array in packing.collate_shared([int(index) for index in indices], self.tokens).items()}
        for name, values in (("reference", self.reference), ("margin", self.tokens.margins)):
            if values is not None:
                batch[name] = torch.from_numpy(np.asarray(values[np.asarray(indices)], np.float32))
        return batch


def pair_logprobs(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probability of each answer, summed over its tokens, and how many they are; both [pairs, 2], chosen and rejected.

    The prompt is computed once for both where that is exact; logits only where a label is.
    """
    if not shared_prompt.shares(model, batch):
        logps, tokens = logprobs(model, shared_prompt.unshare(batch))
        return logps.view(-1, 2), tokens.view(-1, 2)
    rows, prompt = batch["prompt_mask"].shape
    labels = batch["labels"][:, prompt:]
    keep = torch.arange(prompt, prompt + labels.shape[1], device=labels.device)
    losses = token_cross_entropy(logits(model, batch, keep, shared_prompt.mask(model, batch)), labels)
    return _sums(-losses.view(rows, 2, -1)), (labels != IGNORE).view(rows, 2, -1).sum(2)


def logprobs(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's answer and its tokens, both [rows]; logits at `keep` only, the places that hold a label."""
    labels = batch["labels"].index_select(1, batch["keep"])
    return _sums(-token_cross_entropy(logits(model, batch, batch["keep"]), labels)), (labels != IGNORE).sum(1)


def _sums(values: Tensor) -> Tensor:
    """Over the last dimension, in fp64: a log-ratio is a small difference of two large sums."""
    return values.double().sum(-1).float()


def read_reference(folder: Path, name: str) -> NDArray[np.float32]:
    """A file of the `reference` artifact, by memory map. DataError where it cannot be read."""
    path = folder / f"{name}.npy"
    try:
        found: NDArray[np.float32] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(str(path), f"cannot be read ({error})", "run the reference step again") from error
    return found


@dataclass(frozen=True)
class Preference:
    """A loss over pairs, weighted by pairs. `reference` is the folder of the reference policy's log-probs; None where the loss needs none."""

    dropout: ClassVar[bool] = False  # the reference is measured without

    tokens: Path
    reference: Path | None
    loss_of: Callable[[Pairs], PairLoss]

    def dataset(self, split: str) -> PairRows:
        return PairRows(Tokens(self.tokens, split), None if self.reference is None else read_reference(self.reference, split))

    def weight(self, batch: Batch) -> Tensor:
        return torch.tensor(len(batch["input_ids"]))

    def pairs(self, model: Any, batch: Batch) -> Pairs:
        """What the loss sees of a batch."""
        logps, tokens = pair_logprobs(model, batch)
        reference = batch["reference"].unbind(1) if "reference" in batch else (None, None)
        return Pairs(*logps.unbind(1), *reference, *tokens.unbind(1))

    def loss(self, model: Any, batch: Batch) -> LossParts:
        pairs = self.pairs(model, batch)
        loss, chosen_reward, rejected_reward = self.loss_of(pairs)
        nll = -pairs.means()[0] if pairs.nll is None else pairs.nll
        metrics = {
            "rewards/chosen": chosen_reward.sum(),
            "rewards/rejected": rejected_reward.sum(),
            "rewards/margins": (chosen_reward - rejected_reward).sum(),
            "rewards/accuracies": (chosen_reward > rejected_reward).sum(),
            "logps/chosen": pairs.chosen.detach().sum(),
            "logps/rejected": pairs.rejected.detach().sum(),
            "nll/chosen": nll.detach().sum(),
        }
        return LossParts(loss.sum(), self.weight(batch).to(loss.device), metrics)
