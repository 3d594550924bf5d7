"""The `tokens` artifact on disk: flat arrays of ids, mask and example boundaries, written as a stream and read by memory map.

- {train,heldout}/ids.npy: uint16 (uint32 from a vocabulary of 65,537 on), every example after the other
- {train,heldout}/mask.npy: uint8, 1 = the model is trained to write this token; as long as ids
- {train,heldout}/offsets.npy: int64, n + 1 boundaries: example i is ids[offsets[i]:offsets[i + 1]]
- {train,heldout}/labels.npy: uint8, one an example, of the feedback view: 1 = desirable
- {train,heldout}/margins.npy: float32, one a pair, of a preference view whose rows give any (0 where one gives none)
- {train,heldout}/answers.jsonl: a JSON string or null a line, one an example, of the prompt view
- quarantine.jsonl: {"source","reason"} of every row that was dropped
- tokenizer/: the tokenizer that made them, with its chat template; it belongs into every checkpoint trained on them
- meta.json: `Meta`; written last, so a folder without it is unfinished
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from lmforge.errors import DataError
from lmforge.formats.streams import ArrayStream, LineStream

SPLITS = ("train", "heldout")
META, QUARANTINE = "meta.json", "quarantine.jsonl"
LABEL, MARGIN = np.dtype(np.uint8), np.dtype(np.float32)
AGAIN = "run the tokenize step again"


class Meta(TypedDict):
    """What meta.json says. `rows` are the view's rows (documents, conversations, pairs, ...): read = rows + dropped, over both splits."""

    view: str  # text, chat, preference, feedback or prompt
    seq_len: int  # no example of another view than text is longer
    vocab_size: int  # the model's; every id is below it
    read: dict[str, int]
    rows: dict[str, int]
    tokens: dict[str, int]
    supervised: dict[str, int]
    bytes: dict[str, int]  # UTF-8 bytes of the text, without the tokens a tokenizer adds and before any truncation
    truncated: int  # examples cut to seq_len
    dropped: dict[str, int]  # reason -> rows
    eos_token_id: int
    stop_token_ids: list[int]  # EOS and the end-of-turn tokens of the template: what ends a generation


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest of uint16 and uint32 that holds every id of a vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


class SplitWriter:
    """Writes one split as a stream: memory is that of one batch. On an exception nothing is left behind.

    `beside` names what is kept beside the ids: labels, margins, answers.
    """

    def __init__(self, folder: Path, split: str, vocab_size: int, beside: Collection[str] = ()) -> None:
        self.vocab_size, self.supervised = vocab_size, 0
        into = folder / split
        into.mkdir(parents=True, exist_ok=True)
        self._ids = ArrayStream(into / "ids.npy", id_dtype(vocab_size))
        self._mask = ArrayStream(into / "mask.npy", np.dtype(np.uint8))
        self._offsets = ArrayStream(into / "offsets.npy", np.dtype(np.int64))
        self._offsets.append(np.zeros(1, np.int64))
        self._labels = ArrayStream(into / "labels.npy", LABEL) if "labels" in beside else None
        self._margins = ArrayStream(into / "margins.npy", MARGIN) if "margins" in beside else None
        self._answers = LineStream(into / "answers.jsonl") if "answers" in beside else None
        self._any_margin = False

    @property
    def tokens(self) -> int:
        return self._ids.length

    def extend(self, ids: Sequence[Sequence[int]], masks: Iterable[Sequence[int]] | None = None) -> None:
        """Append examples; without masks every token is supervised. DataError on an id the model has no row for."""
        if not ids:
            return
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        flat = np.fromiter(chain.from_iterable(ids), np.int64, int(lengths.sum()))
        if flat.size and (flat.min() < 0 or flat.max() >= self.vocab_size):
            raise DataError("model.vocab_size", f"the tokenizer gave id {flat.max()}, beyond a vocabulary of {self.vocab_size:,}")
        mask = np.ones(flat.size, np.uint8) if masks is None else np.fromiter(chain.from_iterable(masks), np.uint8)
        if mask.size != flat.size:
            raise ValueError(f"{mask.size} mask values for {flat.size} ids")
        self._offsets.append(self._ids.length + np.cumsum(lengths))
        self._ids.append(flat)
        self._mask.append(mask)
        self.supervised += int(mask.sum())

    def label(self, desirable: bool) -> None:
        """The label of one example, in the examples' order."""
        assert self._labels is not None
        self._labels.append(np.array([desirable]))

    def margin(self, margin: float | None) -> None:
        """The margin of one pair, in the pairs' order; null counts as 0, and the file is only kept if any is given."""
        assert self._margins is not None
        self._any_margin |= margin is not None
        self._margins.append(np.array([margin or 0.0]))

    def answer(self, answer: str | None) -> None:
        """The reference answer of one example, in the examples' order."""
        assert self._answers is not None
        self._answers.append([answer])

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for stream in (self._ids, self._mask, self._offsets, self._labels, self._margins, self._answers):
            if stream is None:
                continue
            if kind is None and (stream is not self._margins or self._any_margin):
                stream.commit()
            else:
                stream.discard()


def write_meta(folder: Path, meta: Meta) -> None:
    """The last file of a `tokens` folder, written atomically: it marks the folder finished."""
    temporary = folder / (META + ".tmp")
    temporary.write_text(json.dumps(meta, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, folder / META)


def read_meta(folder: Path) -> Meta:
    """DataError where the folder is unfinished, or meta.json is not what `write_meta` wrote."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(str(folder / META), "is missing, so these tokens are unfinished", AGAIN) from None
    except ValueError as error:
        raise DataError(str(folder / META), f"is not readable JSON ({error})", AGAIN) from error
    if not isinstance(meta, dict) or (absent := sorted(Meta.__required_keys__ - meta.keys())):
        what = "is not an object" if not isinstance(meta, dict) else f"has no {', '.join(absent)}"
        raise DataError(str(folder / META), what, AGAIN)
    return meta  # type: ignore[return-value]  # the keys were compared above


class Tokens:
    """One split of a `tokens` folder, memory-mapped: `ids`, `mask` [tokens], `offsets` [examples + 1], `meta`.

    Opening reads the boundaries, not the ids. DataError where a file is missing, cut short or does not fit the others.
    """

    def __init__(self, folder: Path, split: str) -> None:
        if split not in SPLITS:
            raise ValueError(f"{split!r} is not one of {SPLITS}")
        self.folder, self.split = Path(folder), split
        self.meta: Meta = read_meta(self.folder)
        self.ids: NDArray[Any] = self._open("ids.npy", id_dtype(self.meta["vocab_size"]))
        self.mask: NDArray[np.uint8] = self._open("mask.npy", np.dtype(np.uint8))
        self.offsets: NDArray[np.int64] = self._open("offsets.npy", np.dtype(np.int64))
        self._compare()

    def _open(self, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        path = self.folder / self.split / name
        try:
            # A memory map cannot be empty; an empty split is read as it is.
            array: NDArray[Any] = np.load(path, mmap_mode="r" if self.meta["tokens"].get(self.split) else None, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(str(path), f"cannot be read ({error})", AGAIN) from error
        if array.ndim != 1 or array.dtype != dtype:
            raise DataError(str(path), f"holds {array.dtype} of shape {array.shape}, not a list of {dtype}", AGAIN)
        return array

    def _compare(self) -> None:
        where, tokens = str(self.folder / self.split), self.meta["tokens"].get(self.split)
        if not len(self.ids) == len(self.mask) == tokens:
            what = f"{len(self.ids):,} ids and {len(self.mask):,} mask values, but meta.json says {tokens}"
        elif len(self.offsets) < 1 or self.offsets[0] != 0 or self.offsets[-1] != tokens or bool((np.diff(self.offsets) < 0).any()):
            what = "offsets.npy does not cut the ids into examples"
        else:
            return
        raise DataError(where, what, AGAIN)

    def __len__(self) -> int:
        """The number of examples; for a preference view twice the number of pairs."""
        return len(self.offsets) - 1

    def example(self, index: int) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        """(ids, mask) of one example, both [length], as views of the map."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        start, end = self.offsets[index], self.offsets[index + 1]
        return self.ids[start:end], self.mask[start:end]

    @cached_property
    def labels(self) -> NDArray[np.uint8] | None:
        """1 = desirable, [examples]; of the feedback view, else None."""
        return self._beside("labels.npy", LABEL, len(self)) if self.meta["view"] == "feedback" else None

    @cached_property
    def margins(self) -> NDArray[np.float32] | None:
        """[pairs], where the rows of a preference view give any, else None."""
        return self._beside("margins.npy", MARGIN, len(self) // 2) if (self.folder / self.split / "margins.npy").is_file() else None

    @cached_property
    def answers(self) -> list[str | None]:
        """The reference answer of each example of the prompt view, null where it has none; of another view, none at all."""
        if self.meta["view"] != "prompt":
            return []
        path = self.folder / self.split / "answers.jsonl"
        found = [None if one is None else str(one) for one in _lines(path)]
        if len(found) != len(self):
            raise DataError(str(path), f"{len(found):,} lines for {len(self):,} examples", AGAIN)
        return found

    def _beside(self, name: str, dtype: np.dtype[Any], length: int) -> NDArray[Any]:
        found = self._open(name, dtype)
        if len(found) != length:
            raise DataError(str(self.folder / self.split / name), f"{len(found):,} values where {length:,} belong", AGAIN)
        return found


def quarantined(folder: Path) -> Iterator[dict[str, str]]:
    """Every row that was dropped: {"source", "reason"}, in the rows' order."""
    return iter(_lines(folder / QUARANTINE))


def _lines(path: Path) -> list[Any]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise DataError(str(path), f"cannot be read ({error})", AGAIN) from error
