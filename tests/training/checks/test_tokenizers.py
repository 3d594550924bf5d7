"""Tokenizers and templates that are not the same everywhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny_run

from lmforge.errors import DataError
from lmforge.formats.tokens import Tokens
from lmforge.training.objectives.causal_lm import CausalLM
from tests.training.checks.broken import SEQ_LEN, WORDS, check, edited, write_tokenizer


@pytest.fixture
def named_chats(chats: Path, tmp_path: Path) -> Path:
    folder = edited(chats, tmp_path / "named", lambda index, ids, mask: None)
    write_tokenizer(folder / "tokenizer", WORDS, "{{ messages }}", ["<|user|>"])
    return folder


def test_an_examples_beginning_is_decoded(named_chats: Path, chats: Path, tmp_path: Path) -> None:
    def unsupervised(index: int, ids: list[int], mask: list[int]) -> None:
        mask[:] = [0] * len(mask)

    broken = edited(chats, tmp_path / "tokens", unsupervised)
    (named_chats / "tokenizer").rename(broken / "tokenizer")
    with pytest.raises(DataError, match=r"train: example (\d+) \('(w\d+ )+") as error:
        check(CausalLM(broken, SEQ_LEN), tiny_run.tiny_llama(), tmp_path, broken)
    found = re.search(r"example (\d+) \('(w\d+) ", str(error.value))
    assert found
    assert found[2] == f"w{Tokens(broken, 'train').example(int(found[1]))[0][0]}"


def test_one_tokenizer_and_template_pass(named_chats: Path, tmp_path: Path) -> None:
    objective, model = CausalLM(named_chats, SEQ_LEN), tiny_run.tiny_llama()
    assert check(objective, model, tmp_path, named_chats, named_chats / "tokenizer")
    bare = write_tokenizer(tmp_path / "bare", WORDS, None)  # a base model, whose tokens got our markers and template
    assert check(objective, model, tmp_path, named_chats, bare)
    assert check(objective, model, tmp_path, named_chats, tmp_path)  # weights without a tokenizer


def test_a_published_tokenizer_is_what_transformers_saves_of_it(named_chats: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import AutoTokenizer

    published = tmp_path / "published"
    published.mkdir()
    Tokenizer(BPE({letter: index for index, letter in enumerate("abcdefgh")}, [])).save(str(published / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "a", "chat_template": "{{ messages }}"}
    (published / "tokenizer_config.json").write_text(json.dumps(config))
    AutoTokenizer.from_pretrained(published).save_pretrained(named_chats / "tokenizer")
    files = [(folder / "tokenizer.json").read_text() for folder in (published, named_chats / "tokenizer")]
    assert json.loads(files[0]) != json.loads(files[1]), "there is nothing to see through"
    assert check(CausalLM(named_chats, SEQ_LEN), tiny_run.tiny_llama(), tmp_path, named_chats, published)


def test_another_template_is_refused_with_both_digests(named_chats: Path, tmp_path: Path) -> None:
    other = write_tokenizer(tmp_path / "other", WORDS, "{{ messages[0] }}", ["<|user|>"])
    with pytest.raises(DataError, match=r"were rendered with the chat template [0-9a-f]{8}, but .*other comes with [0-9a-f]{8}; one template serves") as error:
        check(CausalLM(named_chats, SEQ_LEN), None, tmp_path, named_chats, other)
    digests = re.findall(r"\b[0-9a-f]{8}\b", str(error.value))
    assert len(set(digests)) == 2
    older = tmp_path / "older"  # the template inside tokenizer_config.json, as before transformers 5
    older.mkdir()
    (older / "tokenizer_config.json").write_text(json.dumps({"chat_template": [{"name": "default", "template": "{{ messages[0] }}"}]}))
    with pytest.raises(DataError, match=digests[1]):
        check(CausalLM(named_chats, SEQ_LEN), None, tmp_path, named_chats, older)


@pytest.mark.parametrize("whose", ["checkpoint", "reward_model"])
def test_another_tokenizer_is_refused(whose: str, named_chats: Path, tmp_path: Path) -> None:
    swapped = [WORDS[0], WORDS[2], WORDS[1], *WORDS[3:]]
    for index, (words, template, added) in enumerate(((swapped, None, ()), (WORDS, "{{ messages }}", ()), (WORDS, "{{ messages }}", ("<|other|>",)))):
        other = write_tokenizer(tmp_path / f"{index}", words, template, added)
        given = {"checkpoint": other} if whose == "checkpoint" else {"reward_model": other}
        with pytest.raises(DataError, match=rf"the {whose.replace('_', ' ')} .* has [0-9a-f]{{8}}, so an id means another text there"):
            check(CausalLM(named_chats, SEQ_LEN), None, tmp_path, named_chats, **given)


def test_prompts_have_tokenizers_to_compare_and_nothing_to_learn(chats: Path, named_chats: Path, tmp_path: Path) -> None:
    prompts = edited(chats, tmp_path / "prompts", lambda index, ids, mask: None, view="prompt")
    assert check(None, None, tmp_path, prompts) == {}
    (named_chats / "tokenizer").rename(prompts / "tokenizer")
    other = write_tokenizer(tmp_path / "other", [*WORDS[:-1], "new"], None)
    with pytest.raises(DataError, match="an id means another text there"):
        check(None, None, tmp_path, prompts, reward_model=other)
