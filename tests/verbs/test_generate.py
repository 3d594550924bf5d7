"""generate: words and flags, on a real checkpoint of 0.02M parameters in a store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lmforge.__main__ import main
from lmforge.inference.generate import generate

Cli = Callable[..., Any]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
STEP = "sft-0123456789abcdef"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with one finished step, whose model has a context of 48 tokens."""
    output = tmp_path_factory.mktemp("store")
    folder = output / "steps" / STEP / "checkpoint"
    folder.mkdir(parents=True)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["def add(a, b):\n    return a + b\n"], vocab_size=280, special_tokens=["<eos>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=280, max_position_embeddings=48, initializer_range=0.3, bos_token_id=None, eos_token_id=0, pad_token_id=0, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    (output / "steps" / STEP / "step.json").write_text("{}")
    return output


@pytest.mark.parametrize("flags", [(), ("--chat",)])
def test_without_a_length_a_short_context_is_no_error(cli: Cli, store: Path, flags: tuple[str, ...]) -> None:
    answer = cli("generate", "0123", "def", f"--output={store}", *flags)
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.strip()


def test_an_explicit_length_is_strict(cli: Cli, store: Path) -> None:
    answer = cli("generate", "0123", "def", f"--output={store}", "--max-new-tokens", "128")
    assert (answer.code, answer.out) == (2, "")
    assert "exceed the context of 48" in answer.err


def test_output_may_be_a_word_among_the_others(cli: Cli, store: Path) -> None:
    expected = cli("generate", "0123", "def", "--output", str(store), "--seed", "3").out
    word = f"output={store}"
    for line in (["0123", "def", word, "--seed", "3"], [word, "0123", "def", "--seed", "3"], ["0123", word, "--seed", "3", "def"]):
        answer = cli("generate", *line)
        assert (answer.err, answer.out) == ("", expected)
    assert cli("generate", "0123", "def", "--seed", "3", word).out == expected


def test_a_prompt_that_begins_like_the_option_is_a_prompt(cli: Cli, store: Path) -> None:
    answer = cli("generate", "0123", "output=open(", f"--output={store}")
    assert (answer.code, answer.err) == (0, "")
    assert cli("generate", "0123", "output=open(", f"output={store}").code == 0


@pytest.mark.parametrize("words", [("0123",), ("0123", "two", "words"), ("0123", "a", "b", "c")])
def test_words_too_few_or_too_many_are_one_line(cli: Cli, words: tuple[str, ...]) -> None:
    answer = cli("generate", *words)
    assert (answer.code, answer.out, answer.err.count("\n")) == (2, "", 1)


# Runs that end with an adapter, and one adapter in place of another

GREEDY = {"max_new_tokens": 8, "temperature": 0.0, "top_p": 0.95, "seed": 0, "chat": False}
PROMPT = "def add(a"


def expected(output: Path, adapter: str | None) -> str:
    folder = output / "steps" / adapter / "adapter" if adapter else None
    return "".join(generate(output / "steps" / "pretrain-aaaa1111" / "checkpoint", PROMPT, **GREEDY, adapter=folder)) + "\n"


def said(output: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["generate", words[0], PROMPT, *words[1:], "--max-new-tokens", "8", "--temperature", "0", f"output={output}"]) == 0
    return capsys.readouterr().out


def test_what_the_run_made_last_speaks(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run ends with an adapter, whose base is found."""
    adapted, plain = expected(output, "sft-bbbb2222"), expected(output, None)
    assert adapted != plain
    assert said(output, capsys, "20260101-000000-sft") == adapted
    assert said(output, capsys, "bbbb") == adapted
    assert said(output, capsys, str(output / "steps" / "sft-bbbb2222" / "adapter")) == adapted
    assert said(output, capsys, "aaaa") == plain
    assert said(output, capsys, str(output / "steps" / "pretrain-aaaa1111" / "checkpoint")) == plain


@pytest.mark.parametrize("run", ["20260101-000000-sft", "aaaa"])
def test_one_adapter_for_another(output: Path, capsys: pytest.CaptureFixture[str], run: str) -> None:
    other = expected(output, "sft-cccc3333")
    assert other not in (expected(output, "sft-bbbb2222"), expected(output, None))
    assert said(output, capsys, run, "--adapter", "cccc") == other
    assert said(output, capsys, run, "--adapter", str(output / "steps" / "sft-cccc3333" / "adapter")) == other


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["zzzz"], "no such run, step or digest"),
        (["aaaa", "--adapter", "zzzz"], "no such run, step or digest"),
        (["aaaa", "--adapter", "aaaa"], "made no adapter"),
        (["org/name"], "a hub id is not generated from directly"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(output: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    assert main(["generate", words[0], PROMPT, *words[1:], f"output={output}"]) == 2
    found = capsys.readouterr()
    assert says in found.err
    assert found.err.strip().count("\n") == 0
    assert found.out == ""
