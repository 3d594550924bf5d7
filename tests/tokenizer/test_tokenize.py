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
from lmforge.formats.tokens import Tokens, quarantined
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


QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
LONG = [*QUESTION, {"role": "user", "content": "Double it."}]


def prompt_of(tokenizer: Any, prompt: Any) -> list[int]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return ids


def opened(folder: Path, split: str = "train") -> tuple[Tokens, Any]:
    return Tokens(folder, split), AutoTokenizer.from_pretrained(str(folder / "tokenizer"))


def test_a_pair_after_several_turns_learns_the_last_answer_only(kit: SimpleNamespace, bpe: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": LONG, "chosen": "yes", "rejected": "no", "margin": 1.5}, {"prompt": "q", "chosen": "a", "rejected": "b"}]
    folder = kit.write_corpus(tmp_path / "corpus", {("preference", "train"): pairs, ("preference", "heldout"): pairs[1:]})
    kit.tokenize(folder, bpe, tmp_path / "tokens", "preference")
    tokens, tokenizer = opened(tmp_path / "tokens")
    for index, text in enumerate(("yes", "no")):
        ids, mask = tokens.example(index)
        assert ids[mask == 0].tolist() == prompt_of(tokenizer, LONG)
        assert tokenizer.decode(ids[mask == 1]) == f"{text}<|end|>"
    assert tokens.margins is not None
    assert tokens.margins.dtype == np.float32
    assert tokens.margins.tolist() == [1.5, 0.0]
    assert (tokens.labels, tokens.answers) == (None, [])
    assert Tokens(tmp_path / "tokens", "heldout").margins is None
    assert not (tmp_path / "tokens/heldout/margins.npy").exists()


def test_feedback_has_a_label_for_each_example(kit: SimpleNamespace, bpe: Path, tmp_path: Path) -> None:
    rows = [{"prompt": LONG, "completion": "yes", "label": True}, {"prompt": "q " * 90, "completion": "a", "label": True}]
    rows += [{"prompt": "q", "completion": "no", "label": False}]
    folder = kit.write_corpus(tmp_path / "corpus", {("feedback", "train"): rows, ("feedback", "heldout"): []})
    meta = kit.tokenize(folder, bpe, tmp_path / "tokens", "feedback", seq_len=64)
    tokens, tokenizer = opened(tmp_path / "tokens")
    assert tokens.labels is not None
    assert tokens.labels.dtype == np.uint8
    assert tokens.labels.tolist() == [1, 0]
    assert [tokenizer.decode(ids[mask == 1]) for ids, mask in map(tokens.example, range(2))] == ["yes<|end|>", "no<|end|>"]
    ids, mask = tokens.example(0)
    assert ids[mask == 0].tolist() == prompt_of(tokenizer, LONG)
    assert meta["dropped"] == {"the prompt alone fills seq_len": 1}
    assert adds_up(meta)


def test_feedback_made_of_pairs_wants_the_chosen_and_not_the_rejected(kit: SimpleNamespace, small_corpus: Path, bpe: Path, tmp_path: Path) -> None:
    meta = kit.tokenize(small_corpus, bpe, tmp_path / "tokens", "feedback")
    kit.tokenize(small_corpus, bpe, tmp_path / "pairs", "preference")
    for split in ("train", "heldout"):
        feedback, pairs = Tokens(tmp_path / "tokens", split), Tokens(tmp_path / "pairs", split)
        assert feedback.ids.tolist() == pairs.ids.tolist()
        assert feedback.mask.tolist() == pairs.mask.tolist()
        assert feedback.labels is not None
        assert feedback.labels.tolist() == [1, 0] * (len(pairs) // 2)
    assert meta["rows"] == {"train": 4, "heldout": 2}
    assert adds_up(meta)


def test_prompts_are_rendered_for_generation_once_each_and_whole(kit: SimpleNamespace, bpe: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "q", "answer": "naïve"}, {"prompt": LONG, "answer": None}, {"prompt": "q", "answer": "again"}, {"prompt": "q " * 90, "answer": "x"}]
    rows = [one | {"source": f"file.jsonl:{line}"} for line, one in enumerate(rows, 1)]
    folder = kit.write_corpus(tmp_path / "corpus", {("prompt", "train"): rows, ("prompt", "heldout"): [{"prompt": "r", "answer": None}]})
    meta = kit.tokenize(folder, bpe, tmp_path / "tokens", "prompt", seq_len=64)
    tokens, tokenizer = opened(tmp_path / "tokens")
    assert [tokens.example(index)[0].tolist() for index in range(len(tokens))] == [prompt_of(tokenizer, "q"), prompt_of(tokenizer, LONG)]
    assert not tokens.mask.any()
    assert tokens.answers == ["naïve", None]
    assert Tokens(tmp_path / "tokens", "heldout").answers == [None]
    assert meta["dropped"] == {"duplicate prompt": 1, "the prompt is longer than seq_len": 1}
    assert list(quarantined(tmp_path / "tokens")) == [
        {"source": "file.jsonl:3", "reason": "duplicate prompt"},
        {"source": "file.jsonl:4", "reason": "the prompt is longer than seq_len"},
    ]
    assert adds_up(meta)
    exact = len(prompt_of(tokenizer, "q"))
    assert kit.tokenize(folder, bpe, tmp_path / "exact", "prompt", seq_len=exact)["rows"] == {"train": 1, "heldout": 1}


def test_prompts_made_of_chats_pairs_and_feedback(kit: SimpleNamespace, small_corpus: Path, bpe: Path, tmp_path: Path) -> None:
    kit.tokenize(small_corpus, bpe, tmp_path / "chats", "prompt")  # the chats come before the pairs
    tokens, tokenizer = opened(tmp_path / "chats")
    assert tokens.answers == [row["messages"][-1]["content"] for row in kit.chats]
    assert [tokens.example(index)[0].tolist() for index in range(len(tokens))] == [prompt_of(tokenizer, row["messages"][:-1]) for row in kit.chats]
    feedback = [{"prompt": "q", "completion": "good", "label": True}, {"prompt": "r", "completion": "bad", "label": False}]
    for view, rows, answers in (("preference", kit.pairs, ["return 2 * value", "values"]), ("feedback", feedback, ["good", None])):
        folder = kit.write_corpus(tmp_path / f"corpus_{view}", {(view, "train"): rows, (view, "heldout"): []})
        kit.tokenize(folder, bpe, tmp_path / view, "prompt")
        tokens, tokenizer = opened(tmp_path / view)
        assert tokens.answers == answers
        assert tokens.example(1)[0].tolist() == prompt_of(tokenizer, rows[1]["prompt"])


def test_a_prompt_of_the_prompt_view_is_the_prompt_of_the_chat(kit: SimpleNamespace, small_corpus: Path, bpe: Path, tmp_path: Path) -> None:
    """One template text, and one tokenization of it, from SFT to generation."""
    kit.tokenize(small_corpus, bpe, tmp_path / "chat", "chat", seq_len=400)
    kit.tokenize(small_corpus, bpe, tmp_path / "prompt", "prompt", seq_len=400)
    chats, prompts = Tokens(tmp_path / "chat", "train"), Tokens(tmp_path / "prompt", "train")
    for index in range(len(prompts)):
        prompt = prompts.example(index)[0].tolist()
        assert chats.example(index)[0][: len(prompt)].tolist() == prompt


BAD_CHATS = [
    ([], "no messages"),
    ([{"role": "user", "content": "q"}, {"role": "user", "content": "q"}], "two user turns in a row"),
    ([{"role": "user", "content": "say <|end|>"}, {"role": "assistant", "content": "a"}], "a content holds a special token"),
    ([{"role": "user", "content": "q"}], "no assistant turn"),
]


def test_every_dropped_row_is_in_quarantine_by_file_and_line(kit: SimpleNamespace, bpe: Path, tmp_path: Path) -> None:
    rows = [{"messages": messages, "source": f"file.jsonl:{line}"} for line, (messages, _) in enumerate(BAD_CHATS, 1)]
    folder = kit.write_corpus(tmp_path / "corpus", {("chat", "train"): [*rows, kit.chats[0]], ("chat", "heldout"): []})
    meta = kit.tokenize(folder, bpe, tmp_path / "tokens", "chat")
    expected = [{"source": f"file.jsonl:{line}", "reason": reason} for line, (_, reason) in enumerate(BAD_CHATS, 1)]
    assert list(quarantined(tmp_path / "tokens")) == expected
    assert meta["dropped"] == {reason: 1 for _, reason in BAD_CHATS}
    bad = kit.write_corpus(tmp_path / "bad", {("chat", "train"): rows})
    with pytest.raises(DataError) as caught:
        kit.tokenize(bad, bpe, tmp_path / "none", "chat")
    assert str(caught.value) == "data error: file.jsonl:1: no messages; every one of the 4 train rows is bad for the chat view, and this is the first"
    assert [path for path in (tmp_path / "none").rglob("*") if path.is_file()] == []


def test_a_view_that_can_be_made_of_nothing_there(kit: SimpleNamespace, bpe: Path, tmp_path: Path) -> None:
    folder = kit.write_corpus(tmp_path / "corpus", {("text", "train"): kit.texts(0, 2)})
    with pytest.raises(DataError, match="no prompt/train rows in this corpus; it offers: text; prompt can also be made of: chat, preference, feedback"):
        kit.tokenize(folder, bpe, tmp_path / "tokens", "prompt")
