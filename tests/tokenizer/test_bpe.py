"""The trained tokenizer: round trips, determinism, special tokens, and the folder that AutoTokenizer opens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from transformers import AutoTokenizer

from lmforge.codec import decode, keys
from lmforge.errors import ConfigError, DataError
from lmforge.tokenizer.markers import SPECIAL_TOKENS, TEMPLATE
from lmforge.tokenizer.nodes import BPE, SMALLEST, Own, Tokenizer

CONF = Path(__file__).parents[2] / "conf/model/tokenizer"


def test_any_text_round_trips_and_autotokenizer_opens_the_folder(kit: SimpleNamespace, bpe: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(bpe))
    for text in (kit.code, "\x00\t\r\n  ends in space ", "日本語 🙂 \u00e9e\u0301", "1234567 x=0.5", "\n\n\n    x\n\ty"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=False) == text
    assert len(tokenizer) <= kit.vocab
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4, 5]
    assert [len(tokenizer(token)["input_ids"]) for token in SPECIAL_TOKENS] == [1] * 6


def test_a_lines_end_and_the_next_lines_indentation_are_one_word(bpe: Path) -> None:
    split = AutoTokenizer.from_pretrained(str(bpe)).backend_tokenizer.pre_tokenizer.pre_tokenize_str
    words = [word.replace("Ġ", " ").replace("Ċ", "\n") for word, _ in split("if x:\n        return y\n\n    a = 12345\ndef f")]
    assert words == ["if", " x", ":\n       ", " return", " y", "\n\n   ", " a", " =", " ", "123", "45", "\n", "def", " f"]


def test_training_twice_gives_the_same_files(kit: SimpleNamespace, small_corpus: Path, bpe: Path, tmp_path: Path) -> None:
    again = kit.train_bpe(small_corpus, tmp_path / "again")
    names = sorted(path.name for path in bpe.iterdir())
    assert names == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert all((bpe / name).read_bytes() == (again / name).read_bytes() for name in names)


def test_it_trains_on_chats_where_there_is_no_text(kit: SimpleNamespace, tmp_path: Path) -> None:
    folder = kit.write_corpus(tmp_path / "corpus", {("chat", "train"): [kit.chat("zyzzyva zyzzyva", "zyzzyva")] * 5})
    tokenizer = AutoTokenizer.from_pretrained(str(kit.train_bpe(folder, tmp_path / "tokenizer", 300)))
    assert tokenizer.tokenize(" zyzzyva") == ["Ġzyzzyva"]


def test_no_training_rows_is_refused(kit: SimpleNamespace, tmp_path: Path) -> None:
    folder = kit.write_corpus(tmp_path / "corpus", {("text", "heldout"): kit.texts(0, 1)})
    with pytest.raises(DataError, match="no training rows"):
        kit.train_bpe(folder, tmp_path / "tokenizer")


@pytest.mark.parametrize("name", ["bpe", "own"])
def test_conf_holds_every_key(name: str) -> None:
    found = decode(Tokenizer, yaml.safe_load((CONF / f"{name}.yaml").read_text()), "tokenizer")
    assert type(found) is {"bpe": BPE, "own": Own}[name]
    assert found.trains is (name == "bpe")
    assert all(about.meaning for _, about in keys(type(found)).values())


def test_a_vocabulary_below_bytes_and_markers_is_refused() -> None:
    assert SMALLEST == 262
    with pytest.raises(ConfigError, match=r"tokenizer.vocab_size: 261 must be >= 262"):
        decode(Tokenizer, {"type": "bpe", "vocab_size": 261, "min_frequency": 2}, "tokenizer")
