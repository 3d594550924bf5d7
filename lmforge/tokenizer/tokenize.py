"""A corpus's rows into the `tokens` artifact, a batch at a time: memory does not grow with the corpus."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmforge.errors import DataError
from lmforge.formats import conversation, corpus, tokens
from lmforge.formats.streams import LineStream
from lmforge.step import Report
from lmforge.tokenizer.chat import Chat, Request, Result
from lmforge.tokenizer.encode import Encoder, Example
from lmforge.tokenizer.markers import MARKERS, TEMPLATE
from lmforge.tokenizer.shapes import BadRow, Piece
from lmforge.tokenizer.templates import Renderer
from lmforge.tokenizer.views import Row, derive

BATCH_ROWS, BATCH_CHARS = 1024, 2**20
BESIDE = {"feedback": ("labels",), "prompt": ("answers",), "preference": ("margins",)}
ANSWERS = {"preference": ("chosen", "rejected"), "feedback": ("completion",)}  # a row's fields that answer its prompt
Rendered = list[list[Piece]]  # a row's examples: one, or chosen and rejected


@dataclass
class Count:
    """One split's account: read = rows + dropped."""

    read: int = 0
    rows: int = 0
    bytes: int = 0
    truncated: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


def write(folder: Path, tokenizer_folder: Path, out: Path, view: str, seq_len: int, vocab_size: int, report: Report) -> dict[str, Any]:
    """Fill `out` with the tokens of both splits; returns the numbers of meta.json."""
    tokenizer = open_tokenizer(tokenizer_folder, view, vocab_size)
    source = corpus.source_view(view, corpus.views(folder)) or view
    counts, sizes, supervised = {}, {}, {}
    with ExitStack() as stack:
        chat = None if view == "text" else Chat(tokenizer, stack.enter_context(Renderer(tokenizer)))
        quarantine = stack.enter_context(LineStream(out / tokens.QUARANTINE))
        work = _Work(folder, view, source, seq_len, Encoder(tokenizer, markers=view != "text"), chat, quarantine, report)
        for split in tokens.SPLITS:
            with tokens.SplitWriter(out, split, vocab_size, BESIDE.get(view, ())) as writer:
                counts[split] = work.split(split, writer)
                sizes[split], supervised[split] = writer.tokens, writer.supervised
        ends = chat.ends() if chat else set()
    tokenizer.save_pretrained(out / "tokenizer")
    stops = {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(sorted(ends))}
    meta: tokens.Meta = {
        "view": view,
        "seq_len": seq_len,
        "vocab_size": vocab_size,
        "read": {split: count.read for split, count in counts.items()},
        "rows": {split: count.rows for split, count in counts.items()},
        "tokens": sizes,
        "supervised": supervised,
        "bytes": {split: count.bytes for split, count in counts.items()},
        "truncated": sum(count.truncated for count in counts.values()),
        "dropped": dict(sorted(sum((count.dropped for count in counts.values()), Counter()).items())),
        "eos_token_id": tokenizer.eos_token_id,
        "stop_token_ids": sorted(stops),
    }
    tokens.write_meta(out, meta)
    return dict(meta)


def open_tokenizer(folder: Path, view: str, vocab_size: int) -> Any:
    """The tokenizer, with our template and its markers where it has none and chats need one; DataError where it does not fit."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a broken tokenizer.json is a bare Exception from Rust
        raise DataError(str(folder), f"does not open as a tokenizer ({error})", "give a folder with tokenizer.json and tokenizer_config.json") from error
    if not tokenizer.is_fast:
        raise DataError(str(folder), "has no tokenizer.json, which exact masks need", "convert the tokenizer to a fast one")
    if tokenizer.eos_token_id is None:
        raise DataError(str(folder), "the tokenizer has no EOS token, so documents could not be ended", "name one in tokenizer_config.json")
    why = ""
    if view != "text" and tokenizer.chat_template is None:
        before = len(tokenizer)
        tokenizer.add_tokens([AddedToken(marker, special=True, normalized=False) for marker in MARKERS], special_tokens=True)
        tokenizer.chat_template = TEMPLATE
        why = f" with the {len(tokenizer) - before} markers of our chat template, as it has no template of its own"
    entries = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))
    if entries > vocab_size:
        what = f"tokenizer has {entries:,} entries{why}, but model.vocab_size is {vocab_size:,}"
        raise DataError("model.tokenizer", what, f"set model.vocab_size to {entries} or more, or choose a smaller tokenizer")
    return tokenizer


@dataclass
class _Work:
    folder: Path
    view: str
    source: str  # the corpus view it is read from
    seq_len: int
    encoder: Encoder
    chat: Chat | None  # of every view but text
    quarantine: LineStream
    report: Report
    done: int = 0
    first_bad: tuple[str, str] | None = None
    prompts: set[bytes] = field(default_factory=set)  # of this split, rendered

    def split(self, split: str, writer: tokens.SplitWriter) -> Count:
        """Write a split and count it; DataError where no row of it can be used, or the training split has none."""
        count = Count()
        self.first_bad = None
        self.prompts.clear()
        tally = corpus.account(self.folder).views.get(self.source)
        total = tally.train + tally.heldout if tally else 0
        for rows in _batches(corpus.read(self.folder, self.source, split)):
            wanted = [one for row in rows for one in derive(self.view, self.source, row)]
            (self._texts if self.view == "text" else self._chats)(wanted, writer, count)
            count.read += len(wanted)
            self.done += len(rows)
            self.report.progress(self.done, total, f"{split}: {writer.tokens:,} tokens")
        if self.first_bad and not count.rows:
            raise DataError(*self.first_bad, f"every one of the {count.read:,} {split} rows is bad for the {self.view} view, and this is the first")
        if split == "train" and not count.read:
            raise DataError(str(self.folder / self.source / f"{split}.jsonl"), "has no rows", "choose data that offers some")
        return count

    def _drop(self, row: Row, reason: str, count: Count) -> None:
        source = str(row.get("source", ""))
        count.dropped[reason] += 1
        self.quarantine.append([{"source": source, "reason": reason}])
        self.first_bad = self.first_bad or (source, reason)

    def _texts(self, rows: list[Row], writer: tokens.SplitWriter, count: Count) -> None:
        for row in rows:
            if not row["text"]:
                self._drop(row, "empty text", count)
        texts = [row["text"] for row in rows if row["text"]]
        writer.extend(self.encoder.documents(texts))
        count.rows += len(texts)
        count.bytes += sum(_size(text) for text in texts)

    def _chats(self, rows: list[Row], writer: tokens.SplitWriter, count: Count) -> None:
        assert self.chat is not None
        asked = [self._requests(row) for row in rows]
        answers = iter(self.chat.many([request for one in asked for request in one]))
        rendered = [_first_bad([next(answers) for _ in one]) for one in asked]
        examples = iter(self.encoder.conversations([pieces for one in rendered if isinstance(one, list) for pieces in one]))
        for row, one in zip(rows, rendered, strict=True):
            # the encoder's answers are taken in step with the rows it was given, also of those that are dropped afterwards
            encoded = [next(examples) for _ in one] if isinstance(one, list) else []
            try:
                if isinstance(one, BadRow):
                    raise one
                kept = self._fit(row, one, encoded, count)
            except BadRow as bad:
                self._drop(row, str(bad), count)
                continue
            writer.extend([ids for ids, _ in kept], [mask for _, mask in kept])
            self._beside(row, writer)
            count.rows += 1
            count.bytes += sum(_size(text) for pieces in one for text, _ in pieces)

    def _requests(self, row: Row) -> list[Request]:
        """The conversations that a row's examples are rendered from: one, or chosen and rejected."""
        if self.view == "chat":
            return [(row["messages"], "every")]
        if self.view == "prompt":
            return [(conversation.of(row["prompt"]), "prompt")]
        return [(conversation.of(row["prompt"], row[side]), "last") for side in ANSWERS[self.view]]

    def _fit(self, row: Row, pieces: Rendered, examples: list[Example | None], count: Count) -> list[Example]:
        """A row's examples cut to seq_len; BadRow where that leaves nothing to learn, or a prompt is not whole."""
        whole = [example for example in examples if example is not None]
        if len(whole) < len(examples):
            raise BadRow("a token crosses the edge of the assistant's text")
        if self.view == "prompt":
            return [self._prompt(pieces[0][0][0], *whole)]
        if self.view == "preference" and row["chosen"] == row["rejected"]:
            raise BadRow("chosen equals rejected")
        if len(pieces) == 2 and pieces[0] == pieces[1]:
            raise BadRow("chosen equals rejected as the chat template writes them")
        if len({tuple(ids[: mask.index(1)]) for ids, mask in whole}) > 1:
            raise BadRow("chosen and rejected do not share the prompt's tokens")
        kept = [(ids[: self.seq_len], mask[: self.seq_len]) for ids, mask in whole]
        if not all(any(mask) for _, mask in kept):
            raise BadRow("the prompt alone fills seq_len")
        if len(kept) == 2 and kept[0] == kept[1]:
            raise BadRow("chosen equals rejected within seq_len")
        count.truncated += sum(len(ids) > self.seq_len for ids, _ in whole)
        return kept

    def _prompt(self, text: str, example: Example) -> Example:
        key = hashlib.sha256(text.encode()).digest()[:16]
        if key in self.prompts:
            raise BadRow("duplicate prompt")
        if len(example[0]) > self.seq_len:
            raise BadRow("the prompt is longer than seq_len")
        self.prompts.add(key)
        return example

    def _beside(self, row: Row, writer: tokens.SplitWriter) -> None:
        if self.view == "feedback":
            writer.label(row["label"])
        elif self.view == "prompt":
            writer.answer(row["answer"])
        elif self.view == "preference":
            writer.margin(row.get("margin"))


def _first_bad(results: list[Result]) -> Rendered | BadRow:
    """A row's pieces, or what is wrong with the first of its conversations that has something wrong."""
    bad = next((one for one in results if isinstance(one, BadRow)), None)
    return bad if bad is not None else [one for one in results if not isinstance(one, BadRow)]


def _size(text: str) -> int:
    return len(text.encode())


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    chars = 0
    for row in rows:
        batch.append(row)
        chars += len(str(row))
        if len(batch) == BATCH_ROWS or chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch
