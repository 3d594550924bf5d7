"""The tokens folder: what is written is read back, and damage is noticed when a split is opened."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lmforge.errors import DataError
from lmforge.formats.tokens import Meta, SplitWriter, Tokens, id_dtype, write_meta

EXAMPLES = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
MASKS = [[0, 1, 1], [0, 1], [0, 0, 1, 1]]


def meta(vocab_size: int, tokens: dict[str, int]) -> Meta:
    none = {"train": 0, "heldout": 0}
    return {
        "view": "chat",
        "seq_len": 4,
        "vocab_size": vocab_size,
        "read": none,
        "rows": none,
        "tokens": tokens,
        "supervised": none,
        "bytes": none,
        "truncated": 0,
        "dropped": {},
        "eos_token_id": 0,
        "stop_token_ids": [0],
    }


def write(folder: Path, vocab_size: int = 100) -> Path:
    with SplitWriter(folder, "train", vocab_size) as train:
        train.extend(EXAMPLES[:1], MASKS[:1])
        train.extend([])
        train.extend(EXAMPLES[1:], MASKS[1:])
    with SplitWriter(folder, "heldout", vocab_size) as heldout:
        pass
    write_meta(folder, meta(vocab_size, {"train": train.tokens, "heldout": heldout.tokens}))
    return folder


@pytest.mark.parametrize(("vocab_size", "dtype"), [(100, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_what_is_written_is_read_back(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    tokens = Tokens(write(tmp_path, vocab_size), "train")
    assert [tokens.example(index)[0].tolist() for index in range(len(tokens))] == EXAMPLES
    assert [tokens.example(index)[1].tolist() for index in range(len(tokens))] == MASKS
    assert tokens.offsets.tolist() == [0, 3, 5, 9]
    assert isinstance(tokens.ids, np.memmap)
    assert tokens.ids.dtype == id_dtype(vocab_size) == dtype
    assert np.load(tmp_path / "train/ids.npy").tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]  # plain numpy opens it too
    with pytest.raises(IndexError):
        tokens.example(3)


def test_an_empty_split_has_no_examples(tmp_path: Path) -> None:
    tokens = Tokens(write(tmp_path), "heldout")
    assert len(tokens) == len(tokens.ids) == 0
    assert tokens.offsets.tolist() == [0]


def test_an_exception_while_writing_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="id 100, beyond a vocabulary of 100"), SplitWriter(tmp_path, "train", 100) as writer:
        writer.extend([*EXAMPLES, [100]])
    assert not list((tmp_path / "train").iterdir())


def test_without_masks_everything_is_supervised(tmp_path: Path) -> None:
    with SplitWriter(tmp_path, "train", 100) as writer:
        writer.extend(EXAMPLES)
    assert writer.supervised == writer.tokens == 9


def cut(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:-1])

    return damage


def shorter(folder: Path) -> None:
    np.save(folder / "train/mask.npy", np.zeros(8, np.uint8))


def disordered(folder: Path) -> None:
    np.save(folder / "train/offsets.npy", np.array([0, 5, 3, 9]))


def wide(folder: Path) -> None:
    np.save(folder / "train/ids.npy", np.arange(9))


def unfinished(folder: Path) -> None:
    (folder / "meta.json").unlink()


def other_count(folder: Path) -> None:
    found = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**found, "tokens": {"train": 12, "heldout": 0}}))


def keyless(folder: Path) -> None:
    (folder / "meta.json").write_text('{"view": "text"}')


def pickled(folder: Path) -> None:
    np.save(folder / "train/mask.npy", np.array([{}] * 9, dtype=object), allow_pickle=True)


def absent(folder: Path) -> None:
    (folder / "train/ids.npy").unlink()


@pytest.mark.parametrize(
    ("damage", "where"),
    [
        (cut("train/ids.npy"), "ids.npy: cannot be read"),
        (cut("train/mask.npy"), "mask.npy: cannot be read"),
        (cut("train/offsets.npy"), "offsets.npy: cannot be read"),
        (cut("meta.json"), ""),
        (absent, "ids.npy: cannot be read"),
        (shorter, "9 ids and 8 mask values"),
        (disordered, "does not cut the ids"),
        (wide, "holds int64"),
        (unfinished, "unfinished"),
        (other_count, "meta.json says 12"),
        (keyless, "has no bytes, dropped"),
        (pickled, "mask.npy"),
    ],
)
def test_damage_is_refused(tmp_path: Path, damage: Callable[[Path], None], where: str) -> None:
    damage(write(tmp_path))
    if where:
        with pytest.raises(DataError, match=where):
            Tokens(tmp_path, "train")
    else:  # only the newline at the end was lost
        assert len(Tokens(tmp_path, "train")) == 3
        (tmp_path / "meta.json").write_text((tmp_path / "meta.json").read_text()[:-1])
        with pytest.raises(DataError, match="not readable JSON"):
            Tokens(tmp_path, "train")


def beside(folder: Path, view: str, names: tuple[str, ...]) -> Path:
    for split in ("train", "heldout"):
        with SplitWriter(folder, split, 100, names) as writer:
            for index in range(4 if split == "train" else 0):
                writer.extend([[index, 9]], [[0, 1]])
                if "labels" in names:
                    writer.label(index % 2 == 0)
                if "answers" in names:
                    writer.answer(f"line\u2028{index}\n" if index else None)
                if "margins" in names and index < 2:
                    writer.margin((None, 0.25)[index])
    write_meta(folder, meta(100, {"train": 8, "heldout": 0}) | {"view": view})  # type: ignore[arg-type]
    return folder


def test_labels_answers_and_margins_are_read_back(tmp_path: Path) -> None:
    feedback = beside(tmp_path / "feedback", "feedback", ("labels",))
    labels = Tokens(feedback, "train").labels
    assert labels is not None
    assert labels.tolist() == [1, 0, 1, 0]
    empty = Tokens(feedback, "heldout").labels
    assert empty is not None
    assert empty.tolist() == []
    prompts = beside(tmp_path / "prompt", "prompt", ("answers",))
    assert Tokens(prompts, "train").answers == [None, "line\u20281\n", "line\u20282\n", "line\u20283\n"]
    assert Tokens(prompts, "heldout").answers == []
    pairs = beside(tmp_path / "pairs", "preference", ("margins",))
    margins = Tokens(pairs, "train").margins
    assert margins is not None
    assert margins.tolist() == [0.0, 0.25]
    assert Tokens(pairs, "heldout").margins is None
    chats = Tokens(write(tmp_path / "chat"), "train")
    assert (chats.labels, chats.margins, chats.answers) == (None, None, [])


BESIDE = [("feedback", "labels", "labels.npy"), ("prompt", "answers", "answers.jsonl"), ("preference", "margins", "margins.npy")]


@pytest.mark.parametrize(("view", "kind", "file"), BESIDE)
def test_what_stands_beside_the_ids_has_their_length(tmp_path: Path, view: str, kind: str, file: str) -> None:
    folder = beside(tmp_path / "tokens", view, (kind,))
    path = folder / "train" / file
    if file.endswith(".npy"):
        np.save(path, np.load(path)[:-1])
    else:
        path.write_text("null\n")
    with pytest.raises(DataError, match=file):
        getattr(Tokens(folder, "train"), kind)


@pytest.mark.parametrize(("view", "kind", "file"), BESIDE[:2])
def test_what_belongs_beside_the_ids_is_missed(tmp_path: Path, view: str, kind: str, file: str) -> None:
    folder = beside(tmp_path / "tokens", view, (kind,))
    (folder / "train" / file).unlink()
    with pytest.raises(DataError, match=rf"{file}: cannot be read"):
        getattr(Tokens(folder, "train"), kind)
