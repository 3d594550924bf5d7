"""The tokenize step: every view against transformers' own calls, an account that adds up, and every refusal."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from lmforge.errors import DataError
from lmforge.formats.tokens import Tokens
from lmforge.step import Report

MARKERS = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|tool|>")


def adds_up(meta: dict[str, Any]) -> bool:
    return sum(meta["read"].values()) == sum(meta["rows"].values()) + sum(meta["dropped"].values())


def rows(folder: Path, view: str, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / view / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_documents_are_the_tokenizers_ids_each_ended_by_eos(kit: SimpleNamespace, small_corpus: Path, bpe: Path, tmp_path: Path) -> None:
    meta = kit.tokenize(small_corpus, bpe, tmp_path / "tokens", "text")
    tokenizer = AutoTokenizer.from_pretrained(str(bpe))
    for split in ("train", "heldout"):
        tokens, texts = Tokens(tmp_path / "tokens", split), [row["text"] for row in rows(small_corpus, "text", split)]
        assert [tokens.example(index)[0].tolist() for index in range(len(tokens))] == [[*tokenizer(text)["input_ids"], 0] for text in texts]
        assert tokens.mask.all()
        assert meta["tokens"][split] == len(tokens.ids) == np.diff(tokens.offsets).sum()
        assert meta["bytes"][split] == sum(len(text.encode()) for text in texts)
        assert meta["rows"][split] == len(texts)
    assert adds_up(meta)
    assert meta["stop_token_ids"] == [0]


def test_a_special_token_spelled_out_in_a_document_stays_text(kit: SimpleNamespace, bpe: Path, tmp_path: Path) -> None:
    text = "EOS = '<|endoftext|>'\n"
    folder = kit.write_corpus(tmp_path / "corpus", {("text", "train"): [{"text": text}, {"text": ""}]})
    meta = kit.tokenize(folder, bpe, tmp_path / "tokens", "text")
    ids = Tokens(tmp_path / "tokens", "train").ids.tolist()
    assert ids.count(0) == 1
    assert AutoTokenizer.from_pretrained(str(bpe)).decode(ids) == text + "<|endoftext|>"
    assert meta["dropped"] == {"empty text": 1}
    assert adds_up(meta)
    assert len(Tokens(tmp_path / "tokens", "heldout")) == 0


def test_chats_equal_apply_chat_template_and_end_tokens_are_supervised(kit: SimpleNamespace, small_corpus: Path, bpe: Path, tmp_path: Path) -> None:
    meta = kit.tokenize(small_corpus, bpe, tmp_path / "tokens", "chat", seq_len=400)
    tokenizer, tokens = AutoTokenizer.from_pretrained(str(tmp_path / "tokens/tokenizer")), Tokens(tmp_path / "tokens", "train")
    for index, row in enumerate(kit.chats):
        ids, mask = tokens.example(index)
        assert ids.tolist() == tokenizer.apply_chat_template(row["messages"], return_dict=False)
        answers = [message["content"] + "<|end|>" for message in row["messages"] if message["role"] == "assistant"]
        assert tokenizer.decode(ids[mask == 1]) == "".join(answers)
        assert ids[-1] == tokenizer.convert_tokens_to_ids("<|end|>")
        assert mask[-1] == 1
    assert meta["stop_token_ids"] == [0, 4]
    assert meta["supervised"]["train"] == tokens.mask.sum()
    assert meta["truncated"] == 0


def test_long_chats_are_cut_and_counted_or_dropped(kit: SimpleNamespace, bpe: Path, tmp_path: Path) -> None:
    chats = [kit.chat("q", "a " * 50), kit.chat("q " * 50, "a"), kit.chat("q", "a"), kit.chat("q", "")]
    folder = kit.write_corpus(tmp_path / "corpus", {("chat", "train"): chats})
    meta = kit.tokenize(folder, bpe, tmp_path / "tokens", "chat", seq_len=32)
    assert meta["truncated"] == 1
    assert meta["dropped"] == {"an empty turn": 1, "the prompt alone fills seq_len": 1}
    assert meta["rows"]["train"] == 2
    assert adds_up(meta)
    assert np.diff(Tokens(tmp_path / "tokens", "train").offsets).tolist()[0] == 32


def test_pairs_alternate_and_share_the_prompts_ids(kit: SimpleNamespace, bpe: Path, tmp_path: Path) -> None:
    long = {"prompt": "p", "chosen": "x " * 40 + "y", "rejected": "x " * 40 + "z"}
    bad = [
        {"prompt": "p", "chosen": "same", "rejected": "same"},
        {"prompt": "p", "chosen": "a", "rejected": " "},
        {"prompt": "", "chosen": "a", "rejected": "b"},
        {"prompt": "p " * 60, "chosen": "a", "rejected": "b"},
        long,
    ]
    folder = kit.write_corpus(tmp_path / "corpus", {("preference", "train"): [*kit.pairs, *bad]})
    meta = kit.tokenize(folder, bpe, tmp_path / "tokens", "preference", seq_len=48)
    assert meta["dropped"] == {"chosen equals rejected": 1, "an empty turn": 2, "the prompt alone fills seq_len": 1, "chosen equals rejected within seq_len": 1}
    assert meta["rows"]["train"] == 2
    assert adds_up(meta)
    tokens, tokenizer = Tokens(tmp_path / "tokens", "train"), AutoTokenizer.from_pretrained(str(bpe))
    assert len(tokens) == 4
    for index, pair in enumerate(kit.pairs):
        (chosen, on), (rejected, off) = tokens.example(2 * index), tokens.example(2 * index + 1)
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": pair["prompt"]}], add_generation_prompt=True, return_dict=False)
        assert chosen[on == 0].tolist() == rejected[off == 0].tolist() == prompt
        assert tokenizer.decode(chosen[on == 1]) == pair["chosen"] + "<|end|>"
        assert tokenizer.decode(rejected[off == 1]) == pair["rejected"] + "<|end|>"


def test_running_twice_gives_the_same_files(kit: SimpleNamespace, small_corpus: Path, bpe: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        kit.tokenize(small_corpus, bpe, tmp_path / name, "chat")
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 2 * 3 + 3 + 2
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_batches_do_not_show(kit: SimpleNamespace, small_corpus: Path, bpe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = kit.tokenize(small_corpus, bpe, tmp_path / "whole", "text")
    monkeypatch.setattr("lmforge.tokenizer.tokenize.BATCH_ROWS", 3)
    assert kit.tokenize(small_corpus, bpe, tmp_path / "parts", "text") == whole
    assert (tmp_path / "whole/train/ids.npy").read_bytes() == (tmp_path / "parts/train/ids.npy").read_bytes()
    assert (tmp_path / "whole/train/offsets.npy").read_bytes() == (tmp_path / "parts/train/offsets.npy").read_bytes()


def test_progress_ends_at_the_number_of_rows(kit: SimpleNamespace, small_corpus: Path, bpe: Path, tmp_path: Path) -> None:
    from lmforge.tokenizer import tokenize

    class Heard(Report):
        def __init__(self) -> None:
            self.calls: list[tuple[int, int]] = []

        def progress(self, done: int, total: int, text: str = "") -> None:
            self.calls.append((done, total))

    heard = Heard()
    (tmp_path / "tokens").mkdir()
    tokenize.write(small_corpus, bpe, tmp_path / "tokens", "text", 64, kit.vocab, heard)
    assert heard.calls[-1] == (45, 45)
    assert all(before[0] < after[0] for before, after in pairwise(heard.calls))


def foreign(bpe: Path, out: Path, drop: tuple[str, ...] = MARKERS) -> Path:
    """A tokenizer of a base model: no chat template, and no markers of ours."""
    found = json.loads((bpe / "tokenizer.json").read_text(encoding="utf-8"))
    found["added_tokens"] = [token for token in found["added_tokens"] if token["content"] not in drop]
    vocab = {word: index for word, index in found["model"]["vocab"].items() if word not in drop}
    found["model"]["vocab"] = {word: index for index, word in enumerate(sorted(vocab, key=lambda word: vocab[word]))}
    out.mkdir()
    (out / "tokenizer.json").write_text(json.dumps(found), encoding="utf-8")
    (out / "tokenizer_config.json").write_text((bpe / "tokenizer_config.json").read_text())
    return out


def test_a_tokenizer_without_a_template_gets_ours_where_there_is_room(kit: SimpleNamespace, small_corpus: Path, bpe: Path, tmp_path: Path) -> None:
    base = foreign(bpe, tmp_path / "base")
    entries = len(AutoTokenizer.from_pretrained(str(base)))
    meta = kit.tokenize(small_corpus, base, tmp_path / "tokens", "chat", vocab_size=entries + 5)
    made, tokens = AutoTokenizer.from_pretrained(str(tmp_path / "tokens/tokenizer")), Tokens(tmp_path / "tokens", "train")
    assert [made.convert_tokens_to_ids(marker) for marker in MARKERS] == list(range(entries, entries + 5))
    assert tokens.example(1)[0].tolist() == made.apply_chat_template(kit.chats[1]["messages"], return_dict=False)
    assert meta["stop_token_ids"] == [0, entries + 3]
    with pytest.raises(DataError, match=f"tokenizer has {entries + 5} entries with the 5 markers of our chat template.*but model.vocab_size is {entries + 4}"):
        kit.tokenize(small_corpus, base, tmp_path / "small", "chat", vocab_size=entries + 4)
    assert not (tmp_path / "small/meta.json").exists()


def test_a_tokenizer_bigger_than_the_models_vocabulary_is_refused(kit: SimpleNamespace, small_corpus: Path, bpe: Path, tmp_path: Path) -> None:
    entries = len(AutoTokenizer.from_pretrained(str(bpe)))
    kit.tokenize(small_corpus, bpe, tmp_path / "fits", "text", vocab_size=entries)
    with pytest.raises(DataError, match=f"tokenizer has {entries} entries, but model.vocab_size is {entries - 1}; set model.vocab_size to {entries}"):
        kit.tokenize(small_corpus, bpe, tmp_path / "tokens", "text", vocab_size=entries - 1)
    assert not list((tmp_path / "tokens").iterdir())


@pytest.mark.parametrize("content", ["{bad", "{}", '{"a": 1}', None])
def test_a_broken_tokenizer_is_refused(kit: SimpleNamespace, small_corpus: Path, bpe: Path, tmp_path: Path, content: str | None) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer_config.json").write_text((bpe / "tokenizer_config.json").read_text())
    if content is not None:
        (broken / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match="does not open as a tokenizer"):
        kit.tokenize(small_corpus, broken, tmp_path / "tokens", "text")


def test_a_split_without_a_usable_row_is_refused(kit: SimpleNamespace, bpe: Path, tmp_path: Path) -> None:
    none = kit.write_corpus(tmp_path / "none", {("text", "heldout"): kit.texts(0, 2)})
    with pytest.raises(DataError, match=r"text/train.jsonl: has no rows"):
        kit.tokenize(none, bpe, tmp_path / "a", "text")
    bad = kit.write_corpus(tmp_path / "bad", {("chat", "train"): [kit.chat("q", "")] * 3})
    with pytest.raises(DataError, match="test: an empty turn; every one of the 3 train rows is bad for the chat view, and this is the first"):
        kit.tokenize(bad, bpe, tmp_path / "b", "chat")
    with pytest.raises(DataError, match="no preference/train rows in this corpus; it offers: text"):
        kit.tokenize(none, bpe, tmp_path / "c", "preference")
    assert not list(tmp_path.glob("[abc]/*/*"))
