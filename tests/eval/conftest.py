"""Real held-out data and a real checkpoint, small enough to make in a test: a corpus, its tokens, a 0.02M Llama and a byte-level BPE."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lmforge.formats.tokens import Meta, SplitWriter, write_meta

WORDS = ["def", "return", "for", "in", "range", "print", "class", "self", "import", "open", "read", "write", "add", "value", "item", "list"]
VOCAB, SEQ_LEN = 300, 32


def _documents(seed: int, count: int) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choice(WORDS) for _ in range(chance.randint(3, 60))) + "\n" for _ in range(count)]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for seed, (split, count) in enumerate((("train", 60), ("heldout", 12))):
        rows = {
            "text": [{"text": text, "source": "test"} for text in _documents(seed, count)],
            "preference": [
                {"prompt": f"{a[:20]} ", "chosen": b[:25], "rejected": c[:18], "source": "test"}
                for a, b, c in zip(*(_documents(seed + 10 * part, count) for part in (1, 2, 3)), strict=True)
            ],
        }
        for view, lines in rows.items():
            (folder / view).mkdir(exist_ok=True)
            (folder / view / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder


def _rows(corpus: Path, view: str, split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (corpus / view / f"{split}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def tokenizer(corpus: Path) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator((row["text"] for row in _rows(corpus, "text", "train")), vocab_size=VOCAB, special_tokens=["<eos>"], show_progress=False)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<eos>")
    made.chat_template = "{% for m in messages %}Q: {{ m.content }}{% endfor %}{% if add_generation_prompt %} A: {% endif %}"
    return made


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Weights of a large spread: a leak between documents, or a wrong position, moves every loss."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=128, initializer_range=0.3, bos_token_id=None, eos_token_id=0, pad_token_id=0, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _write(folder: Path, view: str, examples: dict[str, Sequence[tuple[list[int], list[int]]]], texts: dict[str, str]) -> Path:
    sizes, supervised = {}, {}
    for split, pairs in examples.items():
        with SplitWriter(folder, split, VOCAB) as writer:
            writer.extend([ids for ids, _ in pairs], [mask for _, mask in pairs])
        sizes[split], supervised[split] = writer.tokens, writer.supervised
    rows = {split: len(pairs) for split, pairs in examples.items()}
    meta: Meta = {
        "view": view,
        "seq_len": SEQ_LEN,
        "vocab_size": VOCAB,
        "read": rows,
        "rows": rows,
        "tokens": sizes,
        "supervised": supervised,
        "bytes": {split: len(text.encode()) for split, text in texts.items()},
        "truncated": 0,
        "dropped": {},
        "eos_token_id": 0,
        "stop_token_ids": [0],
    }
    write_meta(folder, meta)
    return folder


@pytest.fixture(scope="session")
def text_tokens(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    texts = {split: [row["text"] for row in _rows(corpus, "text", split)] for split in ("train", "heldout")}
    examples = {split: [((ids := [*tokenizer(one)["input_ids"], 0]), [1] * len(ids)) for one in many] for split, many in texts.items()}
    return _write(tmp_path_factory.mktemp("text"), "text", examples, {split: "".join(many) for split, many in texts.items()})


@pytest.fixture(scope="session")
def preference_tokens(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    examples: dict[str, list[tuple[list[int], list[int]]]] = {}
    for split in ("train", "heldout"):
        examples[split] = []
        for row in _rows(corpus, "preference", split):
            prompt = tokenizer(row["prompt"])["input_ids"]
            for answer in (row["chosen"], row["rejected"]):
                ids = [*tokenizer(answer)["input_ids"], 0]
                examples[split].append((prompt + ids, [0] * len(prompt) + [1] * len(ids)))
    return _write(tmp_path_factory.mktemp("preference"), "preference", examples, {"train": "x", "heldout": "x"})


@pytest.fixture(scope="session")
def chat_tokens(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The chosen answers as conversations: the prompt masked, the answer and its end supervised."""
    examples: dict[str, list[tuple[list[int], list[int]]]] = {}
    for split in ("train", "heldout"):
        examples[split] = []
        for row in _rows(corpus, "preference", split):
            prompt, answer = tokenizer(row["prompt"])["input_ids"], [*tokenizer(row["chosen"])["input_ids"], 0]
            examples[split].append((prompt + answer, [0] * len(prompt) + [1] * len(answer)))
    return _write(tmp_path_factory.mktemp("chat"), "chat", examples, {"train": "x", "heldout": "x"})
