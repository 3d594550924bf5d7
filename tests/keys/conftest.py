"""The world of the tests of keys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.keys.world import COMMITS, World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Iterator[World]:
    """Two of everything that a key may name, and a hub cache with two commits of one model."""
    root = tmp_path_factory.mktemp("world")
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 2048,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }

    def write(path: Path, text: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    for name, layers_ in (("weights", 4), ("other_weights", 3)):
        write(root / name / "config.json", json.dumps(config | {"num_hidden_layers": layers_}))
        write(root / name / "tokenizer.json", json.dumps({"name": name}))
    repository = root / "hub" / "models--known--model"
    for commit, width in zip(COMMITS, (64, 128), strict=True):
        write(repository / "snapshots" / commit / "config.json", json.dumps(config | {"hidden_size": width}))
    write(root / "hub" / "models--other--model" / "snapshots" / COMMITS[0] / "config.json", json.dumps(config | {"hidden_size": 32}))
    write(root / "tasks" / "mine.yaml", "task: mine\n")
    text, other_text = write(root / "text.txt", "A sentence.\n\n" * 30), write(root / "other.txt", "Another sentence.\n\n" * 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_CACHE", str(root / "hub"))
        patch.chdir(root)
        yield World(rows, text, other_text, root / "weights", root / "other_weights", root / "tasks")
