"""Every combination that `list parallel` says yes to runs on two ranks, in the precision asked for, and gives the figures of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from combinations import COMBINED

from lmforge.compiler.capability import refused, table
from tests.runtime.conftest import corpus  # noqa: F401  # a fixture

SCRIPT, ROOT = Path(__file__).with_name("cells.py"), Path(__file__).parents[2]
TINY = (
    "model=nano model.hidden_size=32 model.intermediate_size=64 model.num_hidden_layers=2 model.num_attention_heads=4 model.vocab_size=512 "
    "model.max_position_embeddings=64 model.tie_word_embeddings=false eval=none data=text"
)
OPTION = {"ddp": "ddp", "fsdp": "fsdp", "tp": "tp", "pp": "pp", "deepspeed": "deepspeed_zero3"}
RL = " stage.{name}.max_new_tokens=8 stage.{name}.eval_prompts=4 stage.{name}.reward=length stage.{name}.optimizer.global_batch_tokens=1024"
PRECISION = {"fp32": "precision=fp32", "bf16": "precision=bf16", "fp16": "precision=fp16", "bfloat16 weights": "precision=bf16 precision.param_dtype=bfloat16"}


def steps(name: str) -> str:
    return f"stage.{name}.budget.steps=3 stage.{name}.log_every=1 stage.{name}.optimizer.lr=1e-3"


def overrides(kind: str, value: str) -> str:
    """A short plan whose last training step shows the value."""
    if kind == "stage" and value != "pretrain":
        return f"stage=[pretrain,{value}] stage.pretrain.budget.steps=4 {steps(value)}" + (RL.format(name=value) if value in ("ppo", "grpo") else "")
    if kind == "adapter":
        return f"stage=[pretrain,sft] stage.pretrain.budget.steps=4 adapter={value} {steps('sft')}"
    more = {"precision": PRECISION.get(value, ""), "optimizer": f"optimizer={value}", "guard": "optimizer.max_skips=2"}.get(kind, "")
    return f"stage=pretrain {steps('pretrain')} {more}"


def cells() -> Iterator[tuple[str, str, str]]:
    """(name, option of parallel, overrides) of each yes, and of combinations of several."""
    for stage, option, more in COMBINED:
        yield f"{stage} {more}", f"parallel={option}", f"{TINY} {overrides('stage', stage)} {more}"
    for row in list(table())[1:]:
        kind, _, value = row[0].partition("=")
        for way, option in OPTION.items():
            if refused(kind, value, (way,)) is None:
                yield f"{row[0]} with {way}", f"parallel={option}", f"{TINY} {overrides(kind, value)}"


def apart(name: str) -> float:
    """How far figures may be apart: rounding of the format. Muon's iteration makes more of it, under DDP as much as elsewhere; and where it moves the
    draw of a token over its edge, one of some thousand tokens of GRPO's is another."""
    if "fp16" in name or "bf" in name:
        return 2e-2
    return 1e-3 if "muon" in name or "8bit" in name or "grpo" in name else 1e-5


def dtypes(option: str, words: str) -> tuple[list[str], list[str]]:
    """Of the matrix products, and of what ranks sum: gradients (of linear layers alone, under ZeRO, in less than float32), and under tensor parallel
    activations: of products, and of the embedding, in the dtype of its weights. Stages of a pipeline sum nothing.
    """
    compute = "bfloat16" if "=bf16" in words else "float16" if "=fp16" in words else "float32"
    weights, reduce = ("bfloat16" if f"{key}=bfloat16" in words else "float32" for key in ("param_dtype", "reduce_dtype"))
    sums = {"pp": set(), "tp": {compute, weights}, "deepspeed": {reduce, "float32"}}
    return [compute], sorted(next((dtypes for way, dtypes in sums.items() if f"={way}" in option), {reduce}))


def rows(file: Path) -> dict[str, Any]:
    return {f"{row['cell']}|{row['parallel']}": row for row in map(json.loads, file.read_text().splitlines())}


@pytest.mark.timeout(900)
def test_every_yes_runs_and_gives_the_figures_of_one_process(corpus: Path, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("deepspeed")
    pytest.importorskip("bitsandbytes")
    wanted = {f"{name}|{option}": f"{name}|{option}|{words} data.path={corpus}" for name, option, words in cells()}
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    (tmp_path / "cells.txt").write_text("\n".join(wanted.values()))
    alone = subprocess.run([sys.executable, str(SCRIPT), "one", str(tmp_path)], env=env, capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr[-3000:]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT), "many", str(tmp_path)]
    done = subprocess.run(launch, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    found, others = (rows(tmp_path / f"found-{rank}.jsonl") for rank in (0, 1))
    assert found.keys() == others.keys() == wanted.keys()
    worst = {name: (row["apart"]["loss"], row["apart"]["grad_norm"]) for name, row in found.items()}
    assert {name: both for name, both in worst.items() if max(both) > apart(name)} == {}
    told = {f"{name}|{option}": dtypes(option, words) for name, option, words in cells() if "precision" in words}
    for seen in (found, others):
        assert {name: (seen[name]["products"], seen[name]["sums"]) for name in told} == told
