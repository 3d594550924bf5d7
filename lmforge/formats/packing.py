"""Examples into rows of one length, with a boundary between documents; numpy only.

A row is a list of segments, and a segment is a (start, end) slice into a `Tokens`' ids. `collate` turns rows into arrays in
which every segment begins at position 0. Where transformers (its masking_utils) is called with `position_ids` and with
attention_mask=None and use_cache=False, it takes each reset for a new sequence and masks attention between them.
Labels are already shifted: `labels[t]` is what the model should predict at t, so the loss is
cross_entropy(logits[t], labels[t]) with ignore_index=-100 and without another shift.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmforge.errors import DataError
from lmforge.formats.tokens import Tokens

IGNORE = -100  # torch's default ignore_index
Segment = tuple[int, int]
Row = list[Segment]
Batch = dict[str, NDArray[np.int64]]


class StreamRows(Sequence[Row]):
    """The rows of `stream_rows`, computed when asked for: memory does not grow with the corpus."""

    def __init__(self, offsets: NDArray[np.int64], seq_len: int) -> None:
        if seq_len < 1:
            raise ValueError(f"seq_len {seq_len} must be at least 1")
        self.offsets, self.seq_len = offsets, seq_len
        self.tokens = int(offsets[-1])

    def __len__(self) -> int:
        return -(-self.tokens // self.seq_len)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        row = index + len(self) if index < 0 else index
        if not 0 <= row < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start = row * self.seq_len
        end = min(start + self.seq_len, self.tokens)
        first, last = np.searchsorted(self.offsets, (start, end), side="right"), np.searchsorted(self.offsets, end, side="left")
        cuts = [start, *(int(cut) for cut in self.offsets[first[0] : last]), end]
        return [(a, b) for a, b in itertools.pairwise(cuts) if a < b]


def stream_rows(offsets: NDArray[np.int64], seq_len: int) -> StreamRows:
    """Text: all examples as one stream, cut every seq_len tokens; no token is lost, and the last row may be short.

    A document that a cut divides goes on in the next row as a segment of its own, from position 0 and without what came
    before it. Its last token before the cut still has its label: the token after the cut.
    """
    return StreamRows(offsets, seq_len)


def bfd_rows(offsets: NDArray[np.int64], seq_len: int) -> list[Row]:
    """Chats: whole examples by best fit, longest first, equal lengths in their order; rows come out long examples first, so shuffle.

    No example is cut or lost. DataError where one is longer than seq_len.
    """
    lengths = np.diff(offsets)
    if len(lengths) and lengths.max() > seq_len:
        longest = int(lengths.argmax())
        raise DataError("seq_len", f"example {longest} has {lengths[longest]:,} tokens, but a row holds {seq_len:,}", "tokenize with this seq_len")
    rows: list[Row] = []
    room: dict[int, list[int]] = {}  # free tokens -> rows with exactly that much
    sizes: list[int] = []  # the keys of `room`, in order
    for index in np.argsort(-lengths, kind="stable"):
        length = int(lengths[index])
        if length == 0:
            continue
        at = bisect.bisect_left(sizes, length)
        if at == len(sizes):
            row, free = len(rows), seq_len
            rows.append([])
        else:
            free = sizes[at]
            row = room[free].pop()
            if not room[free]:
                del room[free], sizes[at]
        rows[row].append((int(offsets[index]), int(offsets[index + 1])))
        if (left := free - length) > 0:
            if left not in room:
                bisect.insort(sizes, left)
            room.setdefault(left, []).append(row)
    return rows


def collate(rows: Sequence[Row], tokens: Tokens, seq_len: int) -> Batch:
    """Rows as {input_ids, labels, position_ids}, each int64 [rows, seq_len].

    labels[t] is the next token of the same example where that one is supervised (mask 1), and -100 otherwise: at an
    example's last token, on a prompt, on padding. Padding (EOS) is a segment of its own.
    """
    shape = (len(rows), seq_len)
    input_ids = np.full(shape, tokens.meta["eos_token_id"], np.int64)
    labels = np.full(shape, IGNORE, np.int64)
    position_ids = np.zeros(shape, np.int64)
    for index, row in enumerate(rows):
        at = 0
        for start, end in row:
            to = at + end - start
            if to > seq_len:
                raise ValueError(f"row {index} has more than {seq_len} tokens")
            input_ids[index, at:to] = tokens.ids[start:end]
            labels[index, at:to] = _labels(tokens, start, end)
            position_ids[index, at:to] = np.arange(end - start)
            at = to
        position_ids[index, at:] = np.arange(seq_len - at)
    return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}


def _labels(tokens: Tokens, start: int, end: int) -> NDArray[np.int64]:
    """Next tokens of a slice within one example; the slice may end before the example does, which still gives its last label."""
    boundary = int(tokens.offsets[np.searchsorted(tokens.offsets, start, side="right")])
    stop = min(end + 1, boundary)
    labels = np.full(end - start, IGNORE, np.int64)
    following = tokens.ids[start + 1 : stop].astype(np.int64)
    labels[: len(following)] = np.where(tokens.mask[start + 1 : stop] == 1, following, IGNORE)
    return labels


def pairs(offsets: NDArray[np.int64]) -> int:
    """How many preference pairs there are: pair i is examples 2i (chosen) and 2i + 1 (rejected). DataError on an odd number."""
    examples = len(offsets) - 1
    if examples % 2:
        raise DataError("tokens", f"{examples} examples do not make pairs", "use tokens of the preference view")
    return examples // 2


def collate_pairs(indices: Sequence[int], tokens: Tokens) -> Batch:
    """Pairs as {input_ids, labels, position_ids, attention_mask}, each int64 [2 * pairs, longest]; rows alternate chosen, rejected.

    Padded on the right with EOS, label -100, attention 0. Labels are shifted as in `collate`.
    """
    examples = [example for index in indices for example in (2 * index, 2 * index + 1)]
    lengths = [int(tokens.offsets[one + 1] - tokens.offsets[one]) for one in examples]
    width = max(lengths, default=0)
    rows = [[(int(tokens.offsets[one]), int(tokens.offsets[one + 1]))] for one in examples]
    batch = collate(rows, tokens, width)
    batch["position_ids"] = np.tile(np.arange(width), (len(rows), 1))
    batch["attention_mask"] = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int64)
    return batch
