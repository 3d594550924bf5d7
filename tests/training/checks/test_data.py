"""Examples that are really broken: each failure is one line, and names the example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny_run

from lmforge.errors import DataError
from lmforge.formats.tokens import Tokens
from lmforge.training.objective import Batch
from lmforge.training.objectives.causal_lm import CausalLM, PackedRows
from lmforge.training.objectives.preference import Preference
from tests.training.checks.broken import SEQ_LEN, check, edited, first_rows, loss_of_dpo, loss_of_orpo, named, sound


def test_an_example_without_a_supervised_token_is_named(chats: Path, tmp_path: Path) -> None:
    def clear(index: int, ids: list[int], mask: list[int]) -> None:
        if index in bad:
            mask[:] = [0] * len(mask)

    rows = CausalLM(chats, SEQ_LEN).dataset("train")
    starts = [start for row in first_rows(rows) for start, _ in rows.rows[row]]
    bad = {int(np.searchsorted(rows.tokens.offsets, starts[7], side="right")) - 1}
    broken = edited(chats, tmp_path / "tokens", clear)
    with pytest.raises(DataError, match=r"none of its \d+ tokens is supervised, so nothing is learned from it; look at the chat template") as error:
        check(CausalLM(broken, SEQ_LEN), tiny_run.tiny_llama(), tmp_path, broken)
    assert {named(error)} == bad
    bad = set(range(len(rows.tokens)))  # what a stock template without a generation marker gives
    with pytest.raises(DataError, match="is supervised"):
        check(CausalLM(all_zero := edited(chats, tmp_path / "zero", clear), SEQ_LEN), tiny_run.tiny_llama(), tmp_path, all_zero)


def test_a_first_token_alone_is_nothing_to_learn(answers: Path, tmp_path: Path) -> None:
    def only_first(index: int, ids: list[int], mask: list[int]) -> None:
        mask[:] = [1] + [0] * (len(mask) - 1)

    broken = edited(answers, tmp_path / "tokens", only_first)
    with pytest.raises(DataError, match="is supervised"):
        check(sound("feedback", broken, tmp_path / "reference", tiny_run.tiny_llama()), tiny_run.tiny_llama(), tmp_path, broken)


def test_an_end_token_that_is_not_supervised_is_named(chats: Path, tmp_path: Path) -> None:
    def unsupervised(index: int, ids: list[int], mask: list[int]) -> None:
        if sum(mask) > 1:
            mask[-1] = 0

    broken = edited(chats, tmp_path / "tokens", unsupervised)
    with pytest.raises(DataError, match=r"its supervised tokens end with \d+ at place \d+, not with an end token \(0\); the model would never learn") as error:
        check(CausalLM(broken, SEQ_LEN), tiny_run.tiny_llama(), tmp_path, broken)
    assert sum(Tokens(chats, "train").example(named(error))[1]) > 1


def test_every_turns_end_is_looked_at(chats: Path, tmp_path: Path) -> None:
    def early_turn(index: int, ids: list[int], mask: list[int]) -> None:
        if mask.index(1) >= 2:
            mask[0] = mask[1] = 1  # a first turn of the assistant, without an end
            mask[2] = 0

    broken = edited(chats, tmp_path / "tokens", early_turn)
    with pytest.raises(DataError, match=r"end with \d+ at place 1, not with an end token"):
        check(CausalLM(broken, SEQ_LEN), tiny_run.tiny_llama(), tmp_path, broken)


def test_an_example_cut_at_seq_len_need_not_end(chats: Path, tmp_path: Path) -> None:
    def cut(index: int, ids: list[int], mask: list[int]) -> None:
        ids[-1] = 7
        ids[:] = [5] * (16 - len(ids)) + ids
        mask[:] = [0] * (16 - len(mask)) + mask

    whole = edited(chats, tmp_path / "tokens", cut)
    assert check(CausalLM(whole, SEQ_LEN), tiny_run.tiny_llama(), tmp_path, whole)
    longer = edited(chats, tmp_path / "longer", cut, seq_len=17)  # so nothing was cut
    with pytest.raises(DataError, match="end with 7 at place 15"):
        check(CausalLM(longer, SEQ_LEN), tiny_run.tiny_llama(), tmp_path, longer)


def test_labels_that_get_lost_on_the_way_are_noticed(chats: Path, tmp_path: Path) -> None:
    class Losing(PackedRows):
        def batch(self, indices: Sequence[int]) -> Batch:
            batch = super().batch(indices)
            return {**batch, "labels": batch["labels"].masked_fill(batch["labels"] == tiny_run.EOS, -100)}  # as if EOS were padding

    @dataclass(frozen=True)
    class Objective(CausalLM):
        def dataset(self, split: str) -> PackedRows:
            return Losing(Tokens(self.tokens, split), self.seq_len)

    with pytest.raises(DataError, match=r"train: example \d+ .*: its row has \d+ labels for \d+ supervised tokens"):
        check(Objective(chats, SEQ_LEN), tiny_run.tiny_llama(), tmp_path, chats)


def test_a_pair_of_equals_is_named(pairs: Path, tmp_path: Path) -> None:
    read = Tokens(pairs, "train")
    bad = first_rows(Preference(pairs, None, loss_of_dpo).dataset("train"))[2]

    def same(index: int, ids: list[int], mask: list[int]) -> None:
        if index == 2 * bad + 1:
            ids[:], mask[:] = (part.astype(int).tolist() for part in read.example(2 * bad))

    broken = edited(pairs, tmp_path / "tokens", same)
    with pytest.raises(DataError, match=rf"train: pair {bad}, chosen \(ids .*: is the same tokens as the rejected one, so there is nothing to prefer"):
        check(Preference(broken, None, loss_of_orpo), tiny_run.tiny_llama(), tmp_path, broken)


@pytest.mark.parametrize(("kind", "word"), [(True, "undesirable"), (False, "desirable")])
def test_labels_of_one_kind_are_refused(kind: bool, word: str, answers: Path, tmp_path: Path) -> None:
    broken = edited(answers, tmp_path / "tokens", lambda index, ids, mask: None)
    np.save(broken / "train" / "labels.npy", np.full(len(Tokens(broken, "train")), kind, np.uint8))
    objective = sound("feedback", broken, tmp_path / "reference", tiny_run.tiny_llama())
    with pytest.raises(DataError, match=rf"like all 60 it is not {word}, and the loss needs answers of both kinds") as error:
        check(objective, tiny_run.tiny_llama(), tmp_path, broken)
    assert named(error) == first_rows(objective.dataset("train"))[0]
