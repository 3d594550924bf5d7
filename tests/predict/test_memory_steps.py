"""Predicted peaks beside the tensor bytes of real training steps: through `fit`, on batches of known lengths."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))

from memory_cells import Cell
from tiny_models import FAMILIES, llama
from tracked_steps import compared, on_ranks

SMALL, DEEP = llama(128, 4, 4, 2, 256, 2048, tied=False), llama(256, 6, 4, 4, 704, 1024, tied=False)
TIED, FLAT = llama(128, 4, 4, 4, 256, 2048), llama(256, 1, 4, 4, 1024, 64)
ONCE = {"stage": {"epochs": 1, "minibatches": 1, "group_size": 2}}
CELLS = [
    Cell(SMALL, "pretrain", 256, 2, documents=4),
    Cell(TIED, "pretrain", 64, 2, checkpointing="selective", compute_dtype="bfloat16", accumulation=2),
    Cell(SMALL, "sft", 128, 2, adapter="lora", checkpointing="full", compute_dtype="bfloat16"),
    Cell(SMALL, "sft", 128, 2, adapter="qlora"),
    Cell(SMALL, "sft", 128, 2, adapter="prompt_tuning"),
    Cell(SMALL, "dpo", 128, 2, adapter="dora"),
    Cell(SMALL, "orpo", 128, 2, prompt=4, changes={"stage": {"nll_over_prompt": True}}),
    Cell(SMALL, "kto", 128, 2),
    Cell(SMALL, "reward", 128, 2),
    Cell(SMALL, "ppo", 64, 4, changes={"stage": {"epochs": 1, "minibatches": 1, "entropy_coef": 0.1}}),
    Cell(SMALL, "grpo", 64, 4, changes=ONCE),
    Cell(llama(64, 8, 2, 2, 64, 512), "grpo", 256, 16, prompt=240, checkpointing="full", changes=ONCE),  # fullest while prompts are read
    Cell(FLAT, "pretrain", 8, 1, optimizer="muon"),  # fullest while weights are updated
    Cell(FLAT, "pretrain", 8, 1, optimizer="adafactor"),
    *(Cell(FAMILIES[name], "pretrain", 128, 2) for name in ("qwen2", "qwen3", "olmo2", "gemma2", "gpt_neox", "gpt2", "mixtral", "qwen3_moe")),
]
SPREAD = [
    Cell(SMALL, "pretrain", 128, 2, layout="ddp", devices=2),
    Cell(DEEP, "pretrain", 64, 1, layout="fsdp", devices=2),
    Cell(DEEP, "sft", 64, 2, adapter="lora", layout="fsdp", devices=2),
    Cell(SMALL, "pretrain", 128, 2, layout="tp", devices=2),
    Cell(FAMILIES["qwen3"], "pretrain", 128, 2, layout="tp", devices=2),
    Cell(SMALL, "pretrain", 128, 2, layout="pp", devices=2, accumulation=4),
    Cell(SMALL, "pretrain", 128, 2, layout="pp", devices=2, accumulation=4, changes={"parallel": {"pp_schedule": "gpipe"}}),
]


@pytest.mark.parametrize("cell", CELLS, ids=Cell.said)
def test_a_step_takes_what_was_said(cell: Cell, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        line = compared(cell, tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert -0.01 <= line["error"] <= 0.05, line


def test_ranks_take_what_was_said(tmp_path: Path) -> None:
    """On the fullest rank, within what gloo keeps for a moment longer."""
    for line in on_ranks(SPREAD, tmp_path, 2):
        assert -0.03 <= line["error"] <= 0.05, line
