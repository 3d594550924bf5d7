"""Direct preference optimization on pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmforge.errors import DataError
from lmforge.formats import packing
from lmforge.formats.tokens import Tokens
from lmforge.training.losses import dpo_loss, sequence_logprobs
from lmforge.training.objective import Batch, LossParts


class PairRows:
    """Preference pairs from one split of a `tokens` folder; a batch alternates chosen and rejected.

    With `reference` (log-probs of every example [2 * pairs]) a batch also holds `reference` [2 * pairs of the batch].
    """

    def __init__(self, tokens: Tokens, reference: NDArray[np.float32] | None = None) -> None:
        self.tokens, self.reference = tokens, reference
        self.pairs = packing.pairs(tokens.offsets)
        if reference is not None and reference.shape != (2 * self.pairs,):
            what = f"log-probs of shape {reference.shape} for {self.pairs:,} pairs in {tokens.folder / tokens.split}"
            raise DataError("reference", what, "run the reference step again")

    def __len__(self) -> int:
        return self.pairs

    def batch(self, indices: Sequence[int]) -> Batch:
        arrays = packing.collate_pairs([int(index) for index in indices], self.tokens)
        # Padding is on the right, so a causal model never sees it before a real token and needs no mask.
        batch = {name: torch.from_numpy(arrays[name]) for name in ("input_ids", "labels", "position_ids")}
        if self.reference is not None:
            examples = np.stack([2 * np.asarray(indices), 2 * np.asarray(indices) + 1], axis=1).ravel()
            batch["reference"] = torch.from_numpy(np.asarray(self.reference[examples], np.float32))
        return batch


def pair_logprobs(model: Any, batch: Batch) -> Tensor:
    """Log-probability of each response, summed over its tokens: [2 * pairs], alternating chosen and rejected."""
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=None, use_cache=False).logits
    return sequence_logprobs(logits, batch["labels"])


@dataclass(frozen=True)
class Dpo:
    """DPO (Rafailov et al. 2023): log-probs summed over the response, not averaged; weighted by pairs.

    `reference` is the folder of the reference policy's log-probs, {train,heldout}.npy.
    """

    tokens: Path
    reference: Path
    beta: float
    label_smoothing: float

    def dataset(self, split: str) -> PairRows:
        path = self.reference / f"{split}.npy"
        try:
            reference = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(str(path), f"cannot be read ({error})", "run the reference step again") from error
        return PairRows(Tokens(self.tokens, split), reference)

    def weight(self, batch: Batch) -> Tensor:
        return torch.tensor(len(batch["input_ids"]) // 2)

    def loss(self, model: Any, batch: Batch) -> LossParts:
        logps, reference = pair_logprobs(model, batch), batch["reference"]
        loss, chosen, rejected = dpo_loss(logps[0::2], logps[1::2], reference[0::2], reference[1::2], beta=self.beta, label_smoothing=self.label_smoothing)
        metrics = {
            "rewards/chosen": chosen.sum(),
            "rewards/rejected": rejected.sum(),
            "rewards/margins": (chosen - rejected).sum(),
            "rewards/accuracies": (chosen > rejected).sum(),
            "logps/chosen": logps[0::2].detach().sum(),
            "logps/rejected": logps[1::2].detach().sum(),
        }
        return LossParts(loss.sum(), self.weight(batch).to(loss.device), metrics)
