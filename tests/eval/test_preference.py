from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lmforge.errors import DataError
from lmforge.eval.preference import Pair, choose_pairs, paired_difference, read_pairs, score_pairs, summarize, write_pairs
from lmforge.formats.tokens import Tokens
from lmforge.inference.checkpoint import open_model


def log_probability(model: torch.nn.Module, tokens: Tokens, example: int) -> float:
    """One example alone, summed over the tokens its mask marks."""
    ids, mask = tokens.example(example)
    with torch.no_grad():
        logs = model(torch.tensor(ids.astype(np.int64))[None]).logits[0].double().log_softmax(-1)
    return sum(float(logs[place - 1, int(ids[place])]) for place in range(1, len(ids)) if mask[place])


@pytest.mark.parametrize("batch_tokens", [1, 200, 10_000])
def test_scores_are_those_of_a_loop_over_examples(checkpoint: Path, preference_tokens: Path, batch_tokens: int) -> None:
    model, tokens = open_model(checkpoint), Tokens(preference_tokens, "heldout")
    scored = score_pairs(model, tokens, choose_pairs(tokens, None), batch_tokens=batch_tokens, progress=lambda done, total, text: None)
    assert [pair.pair for pair in scored] == list(range(12))
    right = 0
    for pair in scored:
        chosen, rejected = (log_probability(model, tokens, 2 * pair.pair + side) for side in (0, 1))
        assert (pair.chosen, pair.rejected) == pytest.approx((chosen, rejected), rel=1e-4)
        assert pair.chosen_tokens == int(tokens.example(2 * pair.pair)[1].sum())
        right += chosen > rejected
    summary = summarize(scored)
    assert summary["preference_accuracy"] == right / 12
    assert summary["preference_accuracy_standard_error"] == pytest.approx(math.sqrt(right / 12 * (1 - right / 12) / 12))
    assert 0 < right < 12


def test_a_tie_counts_half() -> None:
    summary = summarize([Pair(0, -1.0, -2.0, 1, 1), Pair(1, -2.0, -2.0, 1, 1), Pair(2, -3.0, -2.0, 1, 1), Pair(3, -3.0, -3.0, 1, 1)])
    assert (summary["preference_accuracy"], summary["preference_ties"]) == (0.5, 2)
    assert summary["preference_margin_nats"] == 0.0


def test_the_paired_difference_by_hand(tmp_path: Path) -> None:
    before = [Pair(index, -2.0, -1.0, 3, 3) for index in range(4)]  # all wrong
    after = [Pair(index, -1.0 if index < 2 else -2.0, -1.5, 3, 3) for index in range(4)]  # two of them right
    write_pairs(tmp_path / "a.jsonl", before)
    write_pairs(tmp_path / "b.jsonl", after)
    assert read_pairs(tmp_path / "b.jsonl") == after
    found = paired_difference(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert found == {"difference": 0.5, "standard_error": pytest.approx(math.sqrt(1 / 3 / 4)), "pairs": 4}  # changes 1 1 0 0: variance 1/3
    write_pairs(tmp_path / "c.jsonl", after[1:])
    with pytest.raises(DataError, match="other pairs"):
        paired_difference(tmp_path / "a.jsonl", tmp_path / "c.jsonl")


def test_max_pairs_is_spread_over_the_split(preference_tokens: Path, text_tokens: Path) -> None:
    tokens = Tokens(preference_tokens, "heldout")
    assert choose_pairs(tokens, 3) == [0, 6, 11]
    assert choose_pairs(tokens, 100) == list(range(12))
