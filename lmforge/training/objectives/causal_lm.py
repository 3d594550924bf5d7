"""Next-token prediction on text and on chats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmforge.errors import DataError
from lmforge.formats import packing
from lmforge.formats.tokens import Tokens
from lmforge.inference import forward
from lmforge.training.losses.tokens import IGNORE, token_cross_entropy
from lmforge.training.objective import Batch, LossParts

ROWS = {"text": packing.stream_rows, "chat": packing.bfd_rows}


class PackedRows:
    """Rows of packed examples from one split of a `tokens` folder: text as a stream, chats by best fit, or (not `packed`) a chat a row."""

    def __init__(self, tokens: Tokens, seq_len: int, packed: bool = True) -> None:
        view = tokens.meta["view"]
        if view not in ROWS:
            raise DataError(str(tokens.folder), f"tokens of the {view} view cannot be packed into rows", f"use one of: {', '.join(ROWS)}")
        self.tokens, self.seq_len = tokens, seq_len
        self.rows: Sequence[packing.Row] = ROWS[view](tokens.offsets, seq_len) if packed else packing.single_rows(tokens.offsets)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int]) -> Batch:
        arrays = packing.collate([self.rows[int(index)] for index in indices], self.tokens, self.seq_len)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


@dataclass(frozen=True)
class CausalLM:
    """Cross entropy of every supervised token, weighted by tokens; documents in a row do not see each other."""

    tokens: Path
    seq_len: int
    packed: bool = True  # False: an example a row, as a soft prompt wants

    def dataset(self, split: str) -> PackedRows:
        return PackedRows(Tokens(self.tokens, split), self.seq_len, self.packed)

    def weight(self, batch: Batch) -> Tensor:
        return (batch["labels"] != IGNORE).sum()

    def loss(self, model: Any, batch: Batch) -> LossParts:
        return self.of_logits(forward.logits(model, batch), batch["labels"])

    def of_logits(self, logits: Tensor, labels: Tensor) -> LossParts:
        """The loss of logits [rows, seq_len, vocabulary] that are there already, as in a pipeline's last stage."""
        return LossParts(token_cross_entropy(logits, labels).sum(), (labels != IGNORE).sum(), {})
