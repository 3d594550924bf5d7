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
from lmforge.formats.packing import (
    IGNORE,
    bfd_rows,
    collate,
    collate_examples,
    collate_mismatched,
    collate_pairs,
    collate_shared,
    mismatched,
    pairs,
    stream_rows,
)
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
        found = network(**{key: batch[key] for key in ("input_ids", "position_ids", "attention_mask")}, use_cache=False).logits
    for row, example in enumerate((4, 5, 0, 1)):
        length = len(tokens.example(example)[0])
        torch.testing.assert_close(found[row, :length], logits[example], atol=1e-5, rtol=1e-5)
        ids, mask = tokens.example(example)
        assert batch["labels"][row, : length - 1].tolist() == [int(one) if on else IGNORE for one, on in zip(ids[1:], mask[1:], strict=True)]
        assert (numpy["labels"][row, length - 1 :] == IGNORE).all()
        assert numpy["attention_mask"][row].tolist() == [1] * length + [0] * (9 - length)
    assert numpy["keep"].tolist() == sorted({int(at) for at in np.nonzero(numpy["labels"] != IGNORE)[1]})
    with pytest.raises(DataError, match="3 examples do not make pairs"):
        pairs(np.array([0, 1, 2, 3]))


def pair_tokens(folder: Path, triples: list[tuple[list[int], list[int], list[int]]], seq_len: int = 16) -> Tokens:
    """(prompt, chosen, rejected) as the tokens of a preference view."""
    both = [(prompt, answer) for prompt, *answers in triples for answer in answers]
    with SplitWriter(folder, "train", VOCAB) as writer:
        writer.extend([prompt + answer for prompt, answer in both], [[0] * len(prompt) + [1] * len(answer) for prompt, answer in both])
    count = {"train": writer.tokens, "heldout": 0}
    write_meta(
        folder,
        Meta(
            view="preference", seq_len=seq_len, vocab_size=VOCAB, read=count, rows=count, tokens=count, supervised=count, bytes=count, truncated=0,
            dropped={}, eos_token_id=EOS, stop_token_ids=[EOS],
        ),
    )  # fmt: skip
    return Tokens(folder, "train")


def test_a_shared_row_by_hand(tmp_path: Path) -> None:
    tokens = pair_tokens(tmp_path, [([1, 2, 3], [4, 5, EOS], [6, EOS]), ([7, 8], [9, EOS], [9, EOS])])
    batch = collate_shared([0, 1], tokens)
    # prompt but its last token | last token of the prompt and the chosen answer | the same and the rejected answer
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, EOS, 3, 6, EOS, EOS], [7, EOS, 8, 9, EOS, EOS, 8, 9, EOS, EOS]]
    no = IGNORE
    assert batch["labels"].tolist() == [[no, no, 4, 5, EOS, no, 6, EOS, no, no], [no, no, 9, EOS, no, no, 9, EOS, no, no]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 2, 3, 4, 0], [0, 0, 1, 2, 3, 0, 1, 2, 3, 0]]
    assert batch["prompt_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["ends"].tolist() == [[5, 8], [4, 8]]
    assert batch["unshared"].tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 6, 7, 8, -1], [0, 2, 3, 4, -1, -1], [0, 6, 7, 8, -1, -1]]
    assert batch["unshared_keep"].tolist() == [1, 2, 3, 4]


def test_shared_rows_lead_back_to_the_examples(tmp_path: Path) -> None:
    """Also without a prompt, with prompts that differ, and with answers that begin alike."""
    tokens = pair_tokens(tmp_path, [([], [4, 5, EOS], [6, EOS]), ([1, 2, 3], [4, 5, EOS], [4, 7, EOS]), ([3] * 12, [EOS], [9, EOS])])
    tokens.ids = np.array(tokens.ids)
    tokens.ids[int(tokens.offsets[3])] = 30  # the second prompt of a pair begins with another token
    batch, plain = collate_shared(range(3), tokens), collate_pairs(range(3), tokens)
    places = batch["unshared"]
    for name in ("input_ids", "labels", "position_ids"):
        back = np.take_along_axis(batch[name].repeat(2, 0), places.clip(0), 1)
        assert (back == plain[name])[plain["attention_mask"] == 1].all(), name
    assert ((places >= 0) == (plain["attention_mask"] == 1)).all()
    assert batch["unshared_keep"].tolist() == plain["keep"].tolist()
    assert batch["prompt_mask"].sum(1).tolist() == [0, 0, 11]
    assert (batch["labels"] != IGNORE).sum() == (plain["labels"] != IGNORE).sum()


def test_mismatched_rows_are_prompts_with_the_answers_of_half_a_split_on(tmp_path: Path) -> None:
    tokens = pair_tokens(tmp_path, [([1, 2, 3], [4, 5, EOS], [6, EOS]), ([7, 8], [9, EOS], [10, 11, 12, EOS])], seq_len=6)
    assert [mismatched(index, 4) for index in range(4)] == [2, 3, 0, 1]
    assert sorted(mismatched(index, 5) for index in range(5)) == list(range(5))
    batch = collate_mismatched([0, 1, 2], tokens)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9, EOS, EOS], [1, 2, 3, 10, 11, 12], [7, 8, 4, 5, EOS, EOS]]  # cut to seq_len
    assert batch["labels"].tolist() == [[IGNORE, IGNORE, 9, EOS, IGNORE, IGNORE], [IGNORE, IGNORE, 10, 11, 12, IGNORE], [IGNORE, 4, 5, EOS, IGNORE, IGNORE]]
    assert batch["keep"].tolist() == [1, 2, 3, 4]
    assert collate_examples([1, 2], tokens)["input_ids"].tolist() == [[1, 2, 3, 6, EOS], [7, 8, 9, EOS, EOS]]
