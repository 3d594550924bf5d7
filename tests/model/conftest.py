"""A small tokenizer folder with special ids and a chat template, as a pipeline's tokenizer step would leave it."""

from __future__ import annotations

from pathlib import Path

import pytest

SPECIAL = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>")
TEMPLATE = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\n' }}{% endfor %}"


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=270, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    core.train_from_iterator(["def f(x): return x\n"] * 3, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", bos_token="<|endoftext|>", pad_token="<|pad|>")
    made.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save_pretrained(folder)
    return folder
