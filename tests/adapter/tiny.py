"""Models, folders and adapters small enough for a test, and the batches to compare them on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from lmforge.adapter.nodes import Adapter
from lmforge.codec import decode
from lmforge.model import build

CONF = Path(__file__).parents[2] / "conf" / "adapter"
SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
GROUPED = {**SIZES, "num_key_value_heads": 2}
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
FAMILIES: list[dict[str, Any]] = [
    {"model_type": "llama", **GROUPED},
    {"model_type": "mistral", **GROUPED},
    {"model_type": "mixtral", **GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    {"model_type": "qwen2", **GROUPED},
    {"model_type": "qwen3", **GROUPED},
    {"model_type": "qwen3_moe", **GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    {"model_type": "gemma2", **GROUPED, "head_dim": 8},
    {"model_type": "olmo2", **GROUPED},
    {"model_type": "gpt2", "vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    {"model_type": "gpt_neox", **SIZES},
]
LLAMA = {"model_type": "llama", **GROUPED, "vocab_size": 300, "tie_word_embeddings": False, **IDS, "initializer_range": 0.2}
TEXT = ["def add(a, b):\n    return a + b\n", "for i in range(10):\n    print(i)\n", "class Point:\n    pass\n"]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"


def by_family(config: dict[str, Any]) -> str:
    return str(config["model_type"])


def adapter(name: str, **keys: Any) -> Adapter:
    """An option of conf/adapter with some keys changed."""
    plain = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    made: Adapter = decode(Adapter, plain | keys, "adapter")
    return made


def model(config: dict[str, Any], seed: int = 0) -> Any:
    """Fresh weights of a large spread, in eval mode."""
    return build.from_scratch({**config, **IDS, "initializer_range": 0.2}, seed).eval()


def batch(rows: int = 2, length: int = 12, vocabulary: int = 97) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "position_ids": torch.arange(length).expand(rows, -1)}


@torch.no_grad()
def learn(attached: Any, seed: int = 0) -> Any:
    """Move every trained weight, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in attached.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return attached


def tokenizer_folder(folder: Path, words: list[str] = TEXT) -> Path:
    """A byte-level BPE of 300 entries with a chat template."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(words, vocab_size=300, special_tokens=["<eos>", "<|user|>", "<|assistant|>", "<|end|>"], show_progress=False)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<eos>", additional_special_tokens=["<|end|>"])
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    return folder


def checkpoint_folder(folder: Path, tokenizer: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: Any) -> Path:
    """A Llama on disk."""
    build.save(build.from_scratch({**LLAMA, **sizes}, seed).to(dtype), tokenizer, folder)
    return folder


def loss(attached: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    from lmforge.inference.forward import logits

    found = logits(attached, given)[:, :-1]
    return torch.nn.functional.cross_entropy(found.flatten(0, 1).float(), given["input_ids"][:, 1:].flatten())
