"""A corpus's rows into the `tokens` artifact, a batch at a time: memory does not grow with the corpus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmforge.errors import DataError
from lmforge.formats import corpus, tokens
from lmforge.step import Report
from lmforge.tokenizer.chat import MARKERS, TEMPLATE, BadRow, Chat, Piece
from lmforge.tokenizer.encode import Encoder, Example

BATCH_ROWS, BATCH_CHARS = 1024, 2**20
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
    work = _Work(folder, view, seq_len, Encoder(tokenizer, markers=view != "text"), Chat(tokenizer), report)
    counts, sizes, supervised = {}, {}, {}
    for split in tokens.SPLITS:
        with tokens.SplitWriter(out, split, vocab_size) as writer:
            counts[split] = work.split(split, writer)
            sizes[split], supervised[split] = writer.tokens, writer.supervised
    tokenizer.save_pretrained(out / "tokenizer")
    stops = {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(sorted(work.chat.stops))}
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
    seq_len: int
    encoder: Encoder
    chat: Chat
    report: Report
    done: int = 0

    def split(self, split: str, writer: tokens.SplitWriter) -> Count:
        """Write a split and count it; DataError where no row of it can be used, or the training split has none."""
        count = Count()
        splits = corpus.account(self.folder).views
        total = splits[self.view].train + splits[self.view].heldout if self.view in splits else 0
        for rows in _batches(corpus.read(self.folder, self.view, split)):
            (self._texts if self.view == "text" else self._chats)(rows, writer, count)
            count.read += len(rows)
            self.done += len(rows)
            self.report.progress(self.done, total, f"{split}: {writer.tokens:,} tokens")
        where = str(self.folder / self.view / f"{split}.jsonl")
        if count.read and not count.rows:
            reason, times = count.dropped.most_common(1)[0]
            raise DataError(where, f"none of its {count.read:,} rows can be used", f"for {times:,} of them: {reason}")
        if split == "train" and not count.read:
            raise DataError(where, "has no rows", "choose data that offers some")
        return count

    def _texts(self, rows: list[dict[str, Any]], writer: tokens.SplitWriter, count: Count) -> None:
        texts = [row["text"] for row in rows if row["text"]]
        count.dropped.update({"empty text": len(rows) - len(texts)} if len(rows) > len(texts) else {})
        writer.extend(self.encoder.documents(texts))
        count.rows += len(texts)
        count.bytes += sum(_size(text) for text in texts)

    def _chats(self, rows: list[dict[str, Any]], writer: tokens.SplitWriter, count: Count) -> None:
        rendered: list[Rendered] = []
        for row in rows:
            try:
                rendered.append(self._render(row))
            except BadRow as bad:
                count.dropped[str(bad)] += 1
        examples = iter(self.encoder.conversations([pieces for one in rendered for pieces in one]))
        for one in rendered:
            try:
                kept = self._fit([next(examples) for _ in one], count)
            except BadRow as bad:
                count.dropped[str(bad)] += 1
                continue
            writer.extend([ids for ids, _ in kept], [mask for _, mask in kept])
            count.rows += 1
            count.bytes += sum(_size(text) for pieces in one for text, _ in pieces)

    def _render(self, row: dict[str, Any]) -> Rendered:
        if self.view == "chat":
            return [self.chat.pieces(row["messages"])]
        if row["chosen"] == row["rejected"]:
            raise BadRow("chosen equals rejected")
        sides = [self.chat.pieces([_turn("user", row["prompt"]), _turn("assistant", row[side])]) for side in ("chosen", "rejected")]
        if sides[0] == sides[1]:
            raise BadRow("chosen equals rejected as the chat template writes them")
        return sides

    def _fit(self, examples: list[Example | None], count: Count) -> list[Example]:
        """A row's examples cut to seq_len; BadRow where that leaves nothing to learn."""
        whole = [example for example in examples if example is not None]
        if len(whole) < len(examples):
            raise BadRow("a token crosses the edge of the assistant's text")
        if len({tuple(ids[: mask.index(1)]) for ids, mask in whole}) > 1:
            raise BadRow("chosen and rejected do not share the prompt's tokens")
        kept = [(ids[: self.seq_len], mask[: self.seq_len]) for ids, mask in whole]
        if not all(any(mask) for _, mask in kept):
            raise BadRow("the prompt alone fills seq_len")
        if len(kept) == 2 and kept[0] == kept[1]:
            raise BadRow("chosen equals rejected within seq_len")
        count.truncated += sum(len(ids) > self.seq_len for ids, _ in whole)
        return kept


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


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
