"""What a plan says of memory, without running anything."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))

from memory_cells import Cell, job
from tiny_models import FAMILIES, llama

from lmforge.predict import answers, passes, static
from lmforge.predict.memory import HELD_OUT, PARTS, Peak, peak, peaks
from lmforge.predict.tensors import heads, walk
from lmforge.stage import reinforcement

GPU: Any = SimpleNamespace(accelerator="cuda", name="NVIDIA H100")
CPU: Any = SimpleNamespace(accelerator="cpu", name="here")
STAGES = ("pretrain", "sft", "dpo", "ipo", "hinge", "simpo", "orpo", "kto", "reward", "ppo", "grpo")
CACHES = (walk.layer, walk.without_gradient, heads.head, heads.scalar_head)


def said(cell: Cell, machine: Any = GPU) -> Peak:
    found = peak(job(cell), machine)
    assert found is not None
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", STAGES)
def test_every_family_and_stage_has_a_peak(family: str, stage: str) -> None:
    for checkpointing in ("none", "full"):
        found = said(Cell(FAMILIES[family], stage, 64, 2, checkpointing=checkpointing, compute_dtype="bfloat16"))
        assert set(found.parts) == set(PARTS)
        assert all(size >= 0 for size in found.parts.values()), found
        assert found.total == sum(found.parts.values()) == found.tensors + found.parts["reserve"]
        assert found.parts["params"] + found.parts["base"] > 0


def test_zero3_casts_weights_anew_for_every_product() -> None:
    """Two real ranks hold 4,526,592 bytes more at the loss without checkpointing than with, counted tensor by tensor: activations, and no copy of a weight."""
    deep = llama(256, 12, 4, 4, 2048, 1024, tied=False)

    def at_loss(checkpointing: str) -> int:
        cell = Cell(deep, "pretrain", 16, 1, layout="deepspeed_zero3", devices=2, compute_dtype="bfloat16", checkpointing=checkpointing)
        return next(one.total for one in peaks(job(cell), CPU) if one.moment == "loss, forward")

    assert at_loss("none") - at_loss("full") == 4_526_592


def walks(cell: Cell) -> int:
    """How many layers and heads are walked for a plan."""
    for one in CACHES:
        one.cache_clear()
    said(cell)
    return sum(one.cache_info().misses for one in CACHES)


def test_work_does_not_grow_with_layers_or_devices() -> None:
    small = Cell(llama(128, 4, 4, 4, 256, 2048, tied=False), "pretrain", 128, 2)
    large = Cell(llama(8192, 80, 64, 8, 28672, 128256, tied=False), "pretrain", 4096, 1, layout="3d", devices=512, accumulation=8)
    assert walks(small) == 2
    assert walks(large) <= 2 * walks(small)  # in a pipeline with gradients there, and without


def test_more_rows_and_less_checkpointing_never_take_less() -> None:
    for config in (FAMILIES["llama"], FAMILIES["gpt2"], FAMILIES["mixtral"]):
        totals = [[said(Cell(config, "pretrain", 128, rows, checkpointing=mode)).total for mode in ("full", "selective", "none")] for rows in (1, 2, 4)]
        assert all(line == sorted(line) for line in totals), totals
        assert all(list(line) == sorted(line) for line in zip(*totals, strict=True)), totals


def test_pairs_of_unknown_prompts_take_no_less_than_any() -> None:
    unknown = said_without_prompt(Cell(FAMILIES["llama"], "dpo", 256, 2))
    for prompt in (1, 26, 52, 128, 250):
        assert said(Cell(FAMILIES["llama"], "dpo", 256, 2, prompt=prompt)).total <= unknown


def said_without_prompt(cell: Cell) -> int:
    found = peak(dataclasses.replace(job(cell), given=None), GPU)
    assert found is not None
    return found.total


def test_what_nobody_has_followed_is_not_estimated() -> None:
    assert peak(job(Cell({**FAMILIES["gpt2"], "attn_pdrop": 0.1}, "pretrain", 64, 2)), CPU) is None
    assert peak(job(Cell({**FAMILIES["gpt2"], "attn_pdrop": 0.1}, "dpo", 64, 2)), CPU) is not None  # which trains without dropout
    assert peak(job(Cell({**FAMILIES["qwen3_moe"], "mlp_only_layers": [0]}, "pretrain", 64, 2)), CPU) is None
    assert peak(job(Cell(FAMILIES["gpt_neox"], "pretrain", 64, 2, changes={"parallel": {"compile": True}})), CPU) is None


def test_offloaded_state_is_not_on_the_device() -> None:
    cell = Cell(FAMILIES["llama"], "pretrain", 64, 2, layout="fsdp", devices=4)
    away = dataclasses.replace(cell, changes={"parallel": {"cpu_offload": True}})
    assert static.fullest(job(away), "cuda").total == 0 < static.fullest(job(away), "cpu").total
    assert said(away).total < said(cell).total


def test_a_step_ends_with_answers_compared_where_a_policy_is_trained() -> None:
    found = {one.moment: one for one in peaks(job(Cell(FAMILIES["llama"], "ppo", 128, 2)), CPU)}
    assert found[HELD_OUT].parts["optimizer"] == 0
    assert found["drawing answers"].parts["cache"] > 0


def test_figures_that_torch_code_has_too_are_the_same() -> None:
    """They are written down again, for that code imports torch."""
    other = {
        "lmforge.training.losses.tokens": ("CHUNK_BYTES", heads.CHUNK_BYTES),
        "lmforge.training.shared_prompt": ("WORTH", passes.WORTH),
        "lmforge.inference.rollout": ("ROWS", reinforcement.ROWS),
        "lmforge.training.rl.heldout": ("ANSWERS_AT_ONCE", answers.AT_ONCE),
    }
    for module, (name, value) in other.items():
        assert getattr(importlib.import_module(module), name) == value, module
