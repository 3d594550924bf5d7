"""The rows that preflight looks at: those of the first step, and the examples they are made of."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmforge.formats.tokens import Tokens
from lmforge.training.objective import Batch, Rows
from lmforge.training.objectives.causal_lm import PackedRows
from lmforge.training.objectives.kto import FeedbackRows
from lmforge.training.objectives.preference import PairRows
from lmforge.training.order import RowOrder

SHOWN_TOKENS, SHOWN_CHARS = 32, 60


@dataclass(frozen=True)
class Sample:
    """Rows of the first step, in the order in which they come: `indices` into `rows`, which are made from `tokens`."""

    rows: Rows
    tokens: Tokens
    indices: tuple[int, ...]

    @classmethod
    def first(cls, rows: Rows, tokens: Path, seed: int, count: int) -> Sample:
        """The first `count` rows of a run with this seed."""
        order = RowOrder(len(rows), seed)
        return cls(rows, Tokens(tokens, "train"), tuple(order.take(0, min(count, len(rows))).tolist()))

    def head(self, count: int) -> Sample:
        """Only the first `count` of them."""
        return Sample(self.rows, self.tokens, self.indices[:count])

    @cached_property
    def examples(self) -> tuple[int, ...]:
        """The examples that the rows are made of, each once, in order; none where the rows are of a kind of a plugin's own."""
        return tuple(dict.fromkeys(example for index in self.indices for example in self.examples_of(index)))

    def examples_of(self, index: int) -> Sequence[int]:
        """The examples of one row."""
        if isinstance(self.rows, PackedRows):
            starts = [start for start, _ in self.rows.rows[index]]
            return [int(one) - 1 for one in np.searchsorted(self.tokens.offsets, starts, side="right")]
        if isinstance(self.rows, PairRows):
            return (2 * index, 2 * index + 1)
        return (index,) if isinstance(self.rows, FeedbackRows) else ()

    def batch(self, device: torch.device) -> Batch:
        """All of them as one batch."""
        return {name: value.to(device) for name, value in self.rows.batch(list(self.indices)).items()}

    def name(self, example: int) -> str:
        """An example for a person: its place, and how it begins."""
        pair = f"pair {example // 2}, {('chosen', 'rejected')[example % 2]}" if self.tokens.meta["view"] == "preference" else f"example {example}"
        return f"{self.tokens.folder / self.tokens.split}: {pair} ({self._beginning(example)})"

    def _beginning(self, example: int) -> str:
        ids = self.tokens.example(example)[0][:SHOWN_TOKENS].tolist()
        folder = self.tokens.folder / "tokenizer"
        if not (folder / "tokenizer.json").is_file():
            return f"ids {ids}"
        from tokenizers import Tokenizer

        text: str = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(ids, skip_special_tokens=False)
        return repr(text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "...")


@contextlib.contextmanager
def undisturbed(model: Any) -> Iterator[torch.device]:
    """The model in evaluation mode, and its device; afterwards every module's mode and every generator's state are what they were."""
    modes = {module: module.training for module in model.modules()}
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    model.eval()
    try:
        yield next(model.parameters()).device
    finally:
        for module, training in modes.items():
            module.training = training
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if devices:
            torch.cuda.set_rng_state_all(devices)
