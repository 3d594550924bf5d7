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


def single_rows(offsets: NDArray[np.int64]) -> list[Row]:
    """An example a row, where rows cannot be packed."""
    return [[(int(start), int(end))] for start, end in itertools.pairwise(offsets) if end > start]


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
    return collate_examples([example for index in indices for example in (2 * index, 2 * index + 1)], tokens)


def collate_examples(indices: Sequence[int], tokens: Tokens) -> Batch:
    """Examples as `collate_pairs` has them, one a row."""
    bounds = [(int(tokens.offsets[one]), int(tokens.offsets[one + 1])) for one in indices]
    return _padded([tokens.ids[start:end].astype(np.int64) for start, end in bounds], [_labels(tokens, start, end) for start, end in bounds], tokens)


def mismatched(index: int, examples: int) -> int:
    """Whose answer stands in for that of example `index` in KTO's KL baseline: half a split away, so that it is to another prompt."""
    return (index + examples // 2) % examples


def collate_mismatched(indices: Sequence[int], tokens: Tokens) -> Batch:
    """As `collate_examples`, with the answers of the `mismatched` examples after the prompts of these; cut to the tokens' seq_len."""
    ids, labels = [], []
    for index in indices:
        start, middle, _ = _answer(index, tokens)
        _, other, end = _answer(mismatched(index, len(tokens)), tokens)
        one = np.concatenate([tokens.ids[start:middle], tokens.ids[other:end]]).astype(np.int64)
        mask = np.concatenate([tokens.mask[start:middle], tokens.mask[other:end]])
        ids.append(one[: tokens.meta["seq_len"]])
        labels.append(np.append(np.where(mask == 1, one, IGNORE)[1 : len(ids[-1])], IGNORE))
    return _padded(ids, labels, tokens)


def _answer(index: int, tokens: Tokens) -> tuple[int, int, int]:
    """Where an example begins, where its answer does (its first supervised token), and where it ends."""
    start, end = int(tokens.offsets[index]), int(tokens.offsets[index + 1])
    supervised = tokens.mask[start:end] == 1
    return start, start + int(supervised.argmax()) if supervised.any() else end, end


def _padded(ids: Sequence[NDArray[np.int64]], labels: Sequence[NDArray[np.int64]], tokens: Tokens) -> Batch:
    """Sequences padded on the right to the longest; `keep` [...] are the places that hold a label in any row, ascending."""
    width = max(map(len, ids), default=0)
    batch = {"input_ids": _stacked(ids, width, tokens.meta["eos_token_id"]), "labels": _stacked(labels, width, IGNORE)}
    batch["position_ids"] = np.tile(np.arange(width), (len(ids), 1))
    batch["attention_mask"] = (np.arange(width) < np.array([len(one) for one in ids], np.int64)[:, None]).astype(np.int64)
    batch["keep"] = _supervised(batch["labels"])
    return batch


def collate_shared(indices: Sequence[int], tokens: Tokens) -> Batch:
    """Pairs as rows that hold their prompt once, [pairs, prompt + 2 * answer]: what both examples begin with, the rest of the chosen, the rest of the rejected.

    Each part is padded on the right to the batch's longest. An answer's part begins with the prompt's last token, so labels are a shift within it.
    - input_ids, labels, position_ids (places in the example, so both answers go on from the prompt): [pairs, prompt + 2 * answer]
    - prompt_mask [pairs, prompt]: 1 where a token is
    - ends [pairs, 2]: where in the row each example's last token is
    - unshared [2 * pairs, longest example]: the way back to plain rows, chosen and rejected in turn: places in the shared row, -1 = padding
    - unshared_keep: the places in plain rows that hold a label in any of them, ascending
    """
    pairs = [_parts(index, tokens) for index in indices]
    prompt = max((pair[0] for pair in pairs), default=0)
    answer = max((end - start for pair in pairs for start, end in pair[2:]), default=0)
    padding = {"input_ids": tokens.meta["eos_token_id"], "labels": IGNORE, "position_ids": 0}
    batch = {name: np.full((len(pairs), prompt + 2 * answer), fill, np.int64) for name, fill in padding.items()}
    plain: list[NDArray[np.int64]] = []
    for row, (shared, *segments) in enumerate(pairs):
        for part, (start, end) in enumerate(segments):
            at = prompt + (part - 1) * answer if part else 0
            place = slice(at, at + end - start)
            batch["input_ids"][row, place] = tokens.ids[start:end]
            batch["position_ids"][row, place] = np.arange(end - start) + (shared if part else 0)
            if part:
                batch["labels"][row, place] = _labels(tokens, start, end)
                plain.append(np.concatenate([np.arange(shared), np.arange(place.start, place.stop)]))
    batch["prompt_mask"] = (np.arange(prompt) < np.array([pair[0] for pair in pairs], np.int64)[:, None]).astype(np.int64)
    batch["ends"] = np.array([one[-1] for one in plain], np.int64).reshape(-1, 2)
    batch["unshared"] = _stacked(plain, max(map(len, plain), default=0), -1)
    labels = np.take_along_axis(batch["labels"].repeat(2, 0), batch["unshared"].clip(0), 1)
    batch["unshared_keep"] = _supervised(np.where(batch["unshared"] < 0, IGNORE, labels))
    return batch


def _parts(index: int, tokens: Tokens) -> tuple[int, Segment, Segment, Segment]:
    """How many first tokens both examples of a pair share, and the slices that hold those, the rest of the chosen and the rest of the rejected.

    One less than come before the first supervised token: none of them has a label.
    """
    (a, a_end), (b, b_end) = ((int(tokens.offsets[one]), int(tokens.offsets[one + 1])) for one in (2 * index, 2 * index + 1))
    most = min(a_end - a, b_end - b)
    differs = (tokens.ids[a : a + most] != tokens.ids[b : b + most]) | (tokens.mask[a : a + most] == 1) | (tokens.mask[b : b + most] == 1)
    shared = max(0, (int(differs.argmax()) if differs.any() else most) - 1)
    return shared, (a, a + shared), (a + shared, a_end), (b + shared, b_end)


def _stacked(rows: Sequence[NDArray[np.int64]], width: int, fill: int) -> NDArray[np.int64]:
    """Rows padded on the right to one width."""
    out = np.full((len(rows), width), fill, np.int64)
    for index, row in enumerate(rows):
        out[index, : len(row)] = row
    return out


def _supervised(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.flatnonzero((labels != IGNORE).any(0))
