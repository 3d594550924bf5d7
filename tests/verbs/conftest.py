"""An output folder as a pipeline with an adapter leaves it: a checkpoint, an adapter trained on it, and a run that names both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmforge.model import build
from tests.adapter import tiny


def adapt(base: Path, tokenizer: Path, out: Path, name: str = "lora", seed: int = 0) -> Path:
    node = tiny.adapter(name)
    node.save(tiny.learn(node.attach(build.from_folder(base).eval()), seed), tokenizer, out, base)
    return out


@pytest.fixture(scope="session")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("outputs")
    tokenizer = tiny.tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))
    steps = {
        "pretrain-aaaa1111": [],
        "sft-bbbb2222": [{"step": "pretrain", "kind": "checkpoint"}],
        "sft-cccc3333": [{"step": "pretrain", "kind": "checkpoint"}],
    }
    base = tiny.checkpoint_folder(root / "steps" / "pretrain-aaaa1111" / "checkpoint", tokenizer)
    adapt(base, tokenizer, root / "steps" / "sft-bbbb2222" / "adapter")
    adapt(base, tokenizer, root / "steps" / "sft-cccc3333" / "adapter", "prompt_tuning", seed=1)
    for name, inputs in steps.items():
        (root / "steps" / name / "step.json").write_text(json.dumps({"name": name[:-9], "digest": name[-8:], "step": {"inputs": inputs}}))
    run = root / "runs" / "20260101-000000-sft"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"experiment": "sft", "steps": ["pretrain-aaaa1111", "sft-bbbb2222"], "metrics": {}}))
    return root
