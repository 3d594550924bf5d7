"""A small corpus, our BPE trained on it, and the steps that made them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmforge.formats import corpus
from lmforge.step import Context
from lmforge.tokenizer.nodes import BPE, Tokenize

VOCAB = 600
CODE = 'def scale(values, by=2):\n    """Multiply."""\n    if not values:\n        return []\n\n    return [by * value for value in values]\n'
Rows = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]


def write_corpus(folder: Path, rows: Rows) -> Path:
    with corpus.Writer(folder) as writer:
        for (view, split), some in rows.items():
            writer.account.view(view)
            for row in some:
                writer.account.rows.entered += 1
                writer.account.rows.kept += 1
                writer.account.view(view).entered += 1
                writer.account.view(view).kept += 1
                writer.write(view, split, {"source": "test", **row})
    return folder


def texts(start: int, count: int) -> list[dict[str, Any]]:
    return [{"text": CODE.replace("scale", f"scale_{index}") + f"# naïve {index}, 🙂\n"} for index in range(start, start + count)]


def chat(*contents: str, system: str = "") -> dict[str, Any]:
    messages = [{"role": ("user", "assistant")[index % 2], "content": content} for index, content in enumerate(contents)]
    return {"messages": [{"role": "system", "content": system}, *messages] if system else messages}


CHATS = [
    chat("Write a function.", CODE.strip()),
    chat("hi", "hello there", "  and now?", "goodbye, naïve 🙂", system="Be brief."),
    chat("first", "one", "second", "two", "third", "three"),
]
PAIRS = [{"prompt": "Double it.", "chosen": "return 2 * value", "rejected": "return value"}, {"prompt": "Name a list.", "chosen": "values", "rejected": "by"}]


def train_bpe(folder: Path, out: Path, vocab_size: int = VOCAB) -> Path:
    out.mkdir(parents=True)
    BPE(vocab_size=vocab_size, min_frequency=2).run(Context(step="tokenizer", folder=out.parent, out=out, inputs={"corpus": folder}))
    return out


def tokenize(folder: Path, tokenizer: Path, out: Path, view: str, seq_len: int = 128, vocab_size: int = VOCAB) -> dict[str, Any]:
    out.mkdir(parents=True)
    step = Tokenize(view=view, seq_len=seq_len, vocab_size=vocab_size)  # type: ignore[arg-type]
    return step.run(Context(step="tokenize", folder=out.parent, out=out, inputs={"corpus": folder, "tokenizer": tokenizer}))


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """What the tests build with."""
    return SimpleNamespace(
        write_corpus=write_corpus, train_bpe=train_bpe, tokenize=tokenize, texts=texts, chat=chat, code=CODE, chats=CHATS, pairs=PAIRS, vocab=VOCAB
    )


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows: Rows = {
        ("text", "train"): texts(0, 40),
        ("text", "heldout"): texts(40, 5),
        ("chat", "train"): CHATS,
        ("chat", "heldout"): CHATS[:1],
        ("preference", "train"): PAIRS,
        ("preference", "heldout"): PAIRS[:1],
    }
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus", rows)


@pytest.fixture(scope="session")
def bpe(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_bpe(small_corpus, tmp_path_factory.mktemp("bpe") / "tokenizer")
