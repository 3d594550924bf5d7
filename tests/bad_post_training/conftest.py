"""The folder of broken things that the tests here name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.bad_post_training.broken import TEMPLATE, TEMPLATES
from tests.conftest import FIXTURES


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints, adapters, steps and rows that the tables name."""
    root = tmp_path_factory.mktemp("files")
    shutil.copy(FIXTURES / "corpus" / "text.jsonl", root)
    shutil.copy(FIXTURES / "corpus" / "chat.jsonl", root)
    _weights(root)
    _adapters(root)
    _steps(root)
    return root


def _weights(root: Path) -> None:
    from tests.adapter import tiny

    tokenizer = tiny.tokenizer_folder(root / "tokenizer")
    (tokenizer / "chat_template.jinja").write_text(TEMPLATE)
    for seed, name in enumerate(("base", "other", *TEMPLATES)):
        tiny.checkpoint_folder(root / name, tokenizer, seed, **({"hidden_size": 64} if name == "wider" else {}))
        if name in TEMPLATES:
            (root / name / "chat_template.jinja").write_text(TEMPLATES[name])
    tiny.checkpoint_folder(root / "wider", tokenizer, 0, hidden_size=64)


def _adapters(root: Path) -> None:
    from lmforge.model import build
    from tests.adapter import tiny

    node = tiny.adapter("lora", r=2)
    model = tiny.learn(node.attach(build.from_folder(root / "base"), 0))
    node.save(model, root / "tokenizer", root / "adapter", root / "base")
    for name in ("cut_adapter", "odd_adapter", "lost_adapter"):
        shutil.copytree(root / "adapter", root / name)
    weights = root / "cut_adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    _edit(root / "odd_adapter" / "adapter_config.json", peft_type="IA3")
    _edit(root / "lost_adapter" / "adapter_config.json", base_model_name_or_path=str(root / "gone"))


def _edit(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def _steps(root: Path) -> None:
    """A store with a step that trained an adapter and one that drew samples."""
    from lmforge.formats import samples
    from lmforge.formats.samples import Answer, Sampled

    trained, drawn = root / "store/steps/sft-aaaa000011112222", root / "store/steps/sample-bbbb000011112222"
    for step in (trained, drawn):
        step.mkdir(parents=True)
        (step / "step.json").write_text(json.dumps({"step": {"inputs": []}}))
    shutil.copytree(root / "adapter", trained / "adapter")
    (drawn / "samples").mkdir()
    samples.write(drawn / "samples", [Sampled("train-0", "a", (Answer("b", 2, True, -1.0), Answer("c", 2, True, -2.0)))], {"seed": 0})
    shutil.copytree(root / "tokenizer", drawn / "samples" / "tokenizer")
