"""Packing against plain Python and against the model: packed rows give the logits and losses of the examples alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lmforge.errors import DataError
from lmforge.formats.packing import IGNORE, bfd_rows, collate, collate_pairs, pairs, stream_rows
from lmforge.formats.tokens import Meta, SplitWriter, Tokens, write_meta

VOCAB, EOS = 50, 0


def tokens_of(folder: Path, lengths: list[int], prompts: bool) -> Tokens:
    """Random examples ended by EOS; with prompts, the first half of each is not supervised."""
    generator = np.random.default_rng(0)
    ids = [[*generator.integers(1, VOCAB, length - 1).tolist(), EOS] for length in lengths]
    masks = [[int(not prompts or at >= length // 2) for at in range(length)] for length in lengths]
    with SplitWriter(folder, "train", VOCAB) as writer:
        writer.extend(ids, masks)
    count = {"train": len(lengths), "heldout": 0}
    write_meta(
        folder,
        Meta(
            view="chat",
            seq_len=16,
            vocab_size=VOCAB,
            read=count,
            rows=count,
            tokens={"train": sum(lengths), "heldout": 0},
            supervised=count,
            bytes=count,
            truncated=0,
            dropped={},
            eos_token_id=EOS,
            stop_token_ids=[EOS],
        ),
    )
    return Tokens(folder, "train")


def model() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, attn_implementation="sdpa", initializer_range=0.3, **shape)).eval()


@torch.no_grad()
def alone(network: Any, tokens: Tokens) -> tuple[list[torch.Tensor], float, int]:
    """Each example by itself: its logits, and transformers' own summed loss and number of labels."""
    logits, total, count = [], 0.0, 0
    for index in range(len(tokens)):
        ids, mask = (torch.tensor(np.asarray(one, np.int64))[None] for one in tokens.example(index))
        labels = torch.where(mask == 1, ids, IGNORE)
        found = network(input_ids=ids, labels=labels, use_cache=False)
        labelled = int((labels[:, 1:] != IGNORE).sum())
        logits.append(found.logits[0])
        total += float(found.loss) * labelled if labelled else 0.0
        count += labelled
    return logits, total, count


def test_stream_rows_cover_every_token_once_in_order() -> None:
    offsets = np.array([0, 3, 3, 10, 11, 25])
    rows = stream_rows(offsets, 8)
    assert rows[:] == [[(0, 3), (3, 8)], [(8, 10), (10, 11), (11, 16)], [(16, 24)], [(24, 25)]]
    assert rows[-1] == [(24, 25)]
    with pytest.raises(IndexError):
        rows[4]
    assert len(stream_rows(np.array([0]), 8)) == 0


@pytest.mark.parametrize("seq_len", [1, 2, 7, 16, 100])
def test_stream_rows_equal_a_loop_over_tokens(seq_len: int) -> None:
    offsets = np.concatenate([[0], np.cumsum(np.random.default_rng(seq_len).integers(0, 12, 40))])
    expected: list[list[tuple[int, int]]] = []
    for token in range(int(offsets[-1])):
        if token % seq_len == 0:
            expected.append([])
        if token % seq_len == 0 or token in offsets:
            expected[-1].append((token, token))
        expected[-1][-1] = (expected[-1][-1][0], token + 1)
    assert stream_rows(offsets, seq_len)[:] == expected


def test_stream_labels_are_the_next_token_of_the_document_also_across_a_cut(tmp_path: Path) -> None:
    lengths = [5, 1, 9, 20, 3]
    tokens = tokens_of(tmp_path, lengths, prompts=False)
    rows = stream_rows(tokens.offsets, 8)
    batch = collate(rows, tokens, 8)
    ends = set(tokens.offsets.tolist())
    expected = [IGNORE if at + 1 in ends else int(tokens.ids[at + 1]) for at in range(sum(lengths))]
    padding = 8 * len(rows) - sum(lengths)
    assert batch["labels"].ravel().tolist() == expected + [IGNORE] * padding
    assert batch["input_ids"].ravel().tolist() == tokens.ids.tolist() + [EOS] * padding
    assert (batch["labels"] != IGNORE).sum() == sum(lengths) - len(lengths)
    assert batch["position_ids"].tolist()[:2] == [[0, 1, 2, 3, 4, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 0]]
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int64)}


def test_bfd_keeps_every_example_whole_and_is_tight() -> None:
    lengths = np.random.default_rng(1).integers(1, 33, 500)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = bfd_rows(offsets, 32)
    assert Counter(segment for row in rows for segment in row) == Counter(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    assert max(sum(end - start for start, end in row) for row in rows) <= 32
    assert len(rows) <= 11 / 9 * -(-int(lengths.sum()) // 32) + 1  # the bound of (best-)fit decreasing, from below by volume
    assert bfd_rows(offsets, 32) == rows


def test_bfd_takes_the_tightest_row() -> None:
    offsets = np.concatenate([[0], np.cumsum([6, 5, 3, 4, 2])])
    assert bfd_rows(offsets, 8) == [[(0, 6), (18, 20)], [(6, 11), (11, 14)], [(14, 18)]]


def test_bfd_refuses_an_example_longer_than_a_row() -> None:
    with pytest.raises(DataError, match="example 1 has 9 tokens, but a row holds 8"):
        bfd_rows(np.array([0, 3, 12]), 8)


def test_packed_logits_and_loss_equal_the_examples_alone(tmp_path: Path) -> None:
    tokens, network = tokens_of(tmp_path, [5, 9, 16, 3, 2, 7, 1, 12, 4], prompts=True), model()
    rows = bfd_rows(tokens.offsets, 16)
    assert max(map(len, rows)) > 1
    batch = {key: torch.from_numpy(array) for key, array in collate(rows, tokens, 16).items()}
    logits, total, count = alone(network, tokens)
    with torch.no_grad():
        packed = network(input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=None, use_cache=False).logits
        leaky = network(input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=torch.ones(packed.shape[:2]), use_cache=False).logits
    starts = {start: index for index, start in enumerate(tokens.offsets[:-1].tolist())}
    leak = 0.0
    for row, segments in enumerate(rows):
        at = 0
        for start, end in segments:
            expected = logits[starts[start]]
            torch.testing.assert_close(packed[row, at : at + end - start], expected, atol=1e-5, rtol=1e-5)
            leak = max(leak, float((leaky[row, at : at + end - start] - expected).abs().max()))
            at += end - start
    assert leak > 0.1  # an attention mask of ones switches the detection off: the test can fail
    loss = torch.nn.functional.cross_entropy(packed.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE, reduction="sum")
    assert int((batch["labels"] != IGNORE).sum()) == count
    assert float(loss) == pytest.approx(total, rel=1e-5)


def test_pairs_collated_equal_the_examples_alone(tmp_path: Path) -> None:
    tokens, network = tokens_of(tmp_path, [5, 9, 16, 3, 2, 7], prompts=True), model()
    assert pairs(tokens.offsets) == 3
    numpy = collate_pairs([2, 0], tokens)
    batch = {key: torch.from_numpy(array) for key, array in numpy.items()}
    assert batch["input_ids"].shape == (4, 9)
    logits, _, _ = alone(network, tokens)
    with torch.no_grad():
        found = network(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits
    for row, example in enumerate((4, 5, 0, 1)):
        length = len(tokens.example(example)[0])
        torch.testing.assert_close(found[row, :length], logits[example], atol=1e-5, rtol=1e-5)
        ids, mask = tokens.example(example)
        assert batch["labels"][row, : length - 1].tolist() == [int(one) if on else IGNORE for one, on in zip(ids[1:], mask[1:], strict=True)]
        assert (numpy["labels"][row, length - 1 :] == IGNORE).all()
        assert numpy["attention_mask"][row].tolist() == [1] * length + [0] * (9 - length)
    with pytest.raises(DataError, match="3 examples do not make pairs"):
        pairs(np.array([0, 1, 2, 3]))
