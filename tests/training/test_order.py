"""The step alone decides the rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lmforge.errors import DataError
from lmforge.training.objectives.causal_lm import CausalLM
from lmforge.training.objectives.reward import BradleyTerry
from lmforge.training.order import GlobalBatch, RowOrder, StepData


def test_every_row_once_an_epoch_in_another_order() -> None:
    order = RowOrder(10, seed=1)
    first, second = order.take(0, 10), order.take(10, 20)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first.tolist() != second.tolist()
    assert RowOrder(10, seed=2).take(0, 10).tolist() != first.tolist()
    assert RowOrder(10, seed=1).take(7, 34).tolist() == np.concatenate([first, second, order.take(20, 30), order.take(30, 40)])[7:34].tolist()
    with pytest.raises(DataError, match="no rows to train on"):
        RowOrder(0, seed=1)


def test_ranks_and_micro_batches_cut_the_same_global_batch(chat: Path) -> None:
    objective = CausalLM(chat, 16)
    rows = objective.dataset("train")

    def data(rank: int, world: int, micro: int) -> StepData:
        return StepData(objective, rows, rows_per_step=8, micro_batch_size=micro, seed=0, rank=rank, world=world)

    for step in (0, 5, 40):
        whole = data(0, 1, 8)[step]
        parts = [data(rank, 2, 3)[step] for rank in (0, 1)]
        assert [len(batch["input_ids"]) for batch in parts[0].micro_batches] == [3, 1]
        joined = torch.cat([batch["labels"] for part in parts for batch in part.micro_batches])
        assert torch.equal(joined, whole.micro_batches[0]["labels"])
        assert sum(int(part.weight) for part in parts) == int(whole.weight)
        assert sum(part.tokens for part in parts) == whole.tokens == 128


def test_rows_of_like_length_share_a_micro_batch(preference: Path) -> None:
    objective = BradleyTerry(preference, 0.0, 0.0)
    rows = objective.dataset("train")

    def data(micro: int) -> StepData:
        return StepData(objective, rows, rows_per_step=12, micro_batch_size=micro, seed=0, rank=0, world=1)

    order = RowOrder(len(rows), 0).take(12, 24)
    widths = [int(batch["unshared"].shape[1]) for batch in data(3)[1].micro_batches]
    assert widths == sorted(rows.lengths(order).tolist(), reverse=True)[::3]
    assert widths[0] > widths[-1]
    parts = torch.cat([batch["prompt_mask"].sum(1) for batch in data(3)[1].micro_batches])
    assert torch.equal(parts, data(12)[1].micro_batches[0]["prompt_mask"].sum(1))  # the same rows, and once each


ROWS = 12


class Numbered:
    """Rows that say which they are."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int]) -> Any:
        return self.rows.batch(indices) | {"row": torch.tensor(indices)}


def shares(chat: Path, world: int, micro: int, workers: int, steps: range) -> list[list[GlobalBatch]]:
    """What each rank has in each of these steps, read as `fit` does: a loader a rank, whose sampler is the steps."""
    objective = CausalLM(chat, 16)
    rows = Numbered(objective.dataset("train"))
    parts = [StepData(objective, rows, rows_per_step=ROWS, micro_batch_size=micro, seed=4, rank=rank, world=world) for rank in range(world)]
    loaders = [DataLoader(part, batch_size=None, sampler=steps, num_workers=workers) for part in parts]
    return [list(of_all) for of_all in zip(*loaders, strict=True)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_every_row_once_an_epoch_over_ranks_that_come_and_go(chat: Path, workers: int, accumulation: int) -> None:
    """1, 2, 4 and 1 data ranks, each from the step at which those before were stopped: each reads its own slice, no row twice in an epoch and none left out."""
    rows, steps = len(CausalLM(chat, 16).dataset("train")), 9
    read, tokens = [], 0
    for world, leg in ((1, range(0, 2)), (2, range(2, 5)), (4, range(5, 7)), (1, range(7, steps))):
        micro = ROWS // world // accumulation
        for step, of_all in zip(leg, shares(chat, world, micro, workers, leg), strict=True):
            assert [share.step for share in of_all] == [step] * world
            assert {tuple(len(batch["row"]) for batch in share.micro_batches) for share in of_all} == {(micro,) * accumulation}
            read += [int(row) for share in of_all for batch in share.micro_batches for row in batch["row"]]
            tokens += sum(share.tokens for share in of_all)
    assert len(read) == steps * ROWS > 2 * rows
    for epoch in range(len(read) // rows):
        assert sorted(read[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    one = [share for (share,) in shares(chat, 1, ROWS, 0, range(steps))]  # nobody came or went
    assert read == [int(row) for share in one for row in share.micro_batches[0]["row"]]
    assert tokens == sum(share.tokens for share in one)
