"""Golden plans: a reviewer sees in the diff of tests/golden/ what a change does to a plan. UPDATE_GOLDEN=1 rewrites them.

Each is a plan on committed fixture rows for a stated machine, as a person reads it (.txt) and as its steps are in JSON (.json).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lmforge.__main__ import main

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
GOLDEN = Path(__file__).resolve().parents[1] / "golden"
DATA = ("data=text", "data.path=corpus")
LARGE = ("precision=bf16", "stage.pretrain.optimizer.global_batch_tokens=4194304", "stage.pretrain.budget.tokens=300e9", "eval=none", *DATA)
PLANS: dict[str, tuple[str, ...]] = {
    "quickstart": ("experiment=quickstart", *DATA, "hardware=cpu"),
    "anneal": ("experiment=anneal_nano", *DATA, "hardware=cpu", "eval=none"),
    "dpo_7b_fsdp": ("stage=dpo", "model=7b", "parallel=fsdp", *DATA, "hardware=h100x8"),
    "assistant_1b": ("experiment=assistant_1b", *DATA, "hardware=h100x8"),
    "pretrain_400m": ("experiment=pretrain_400m", *DATA, "hardware=a100x8"),
    "gpt3_zero3_offloaded": (
        "stage=pretrain",
        "model=gpt3_175b",
        "parallel=deepspeed_zero3",
        "parallel.offload_optimizer=true",
        "parallel.offload_parameters=true",
        "precision=bf16",
        "stage.pretrain.budget.tokens=300e9",
        "eval=none",
        *DATA,
        "hardware=h200x8",
    ),
    "pretrain_70b_3d": ("stage=pretrain", "model=70b", "parallel=3d", *LARGE, "hardware=h100x512"),
    "gpt3_hsdp": ("stage=pretrain", "model=gpt3_175b", "parallel=hsdp", *LARGE, "hardware=h100x1024"),
    "rlhf": ("stage=[pretrain,sft,reward,ppo]", "model=nano", *DATA, "hardware=cpu"),
    "grpo": ("stage=[pretrain,sft,grpo]", "model=nano", *DATA, "hardware=cpu"),
    "dpo_lora": ("stage=[pretrain,sft,dpo]", "adapter=lora", "model=nano", *DATA, "hardware=cpu"),
    "sft_qlora_7b": ("stage=sft", "adapter=qlora", "model=7b", *DATA, "hardware=a100x1", "eval=none"),
    "sample": ("stage=[sft,reward,sample]", "model=1b", *DATA, "hardware=h100x1", "eval=none"),
    **{name: (f"stage={name}", "model=1b", *DATA, "hardware=h100x8", "eval=none") for name in ("kto", "ipo", "hinge", "orpo", "simpo")},
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("form", ["txt", "json"])
def test_a_plan_is_as_it_was(name: str, form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(FIXTURES)  # so that the path in the plan is the same everywhere
    assert main(["plan", *(["--json"] if form == "json" else []), *PLANS[name]]) == 0
    text = capsys.readouterr().out
    if form == "json":
        text = json.dumps([step_of(step) for step in json.loads(text)["steps"]], indent=1, ensure_ascii=False) + "\n"
    file = GOLDEN / f"{name}.{form}"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8"), f"tests/golden/{file.name} differs; look at it, and rewrite it with UPDATE_GOLDEN=1"


def step_of(step: dict[str, Any]) -> dict[str, Any]:
    """A step without the root groups that every stage repeats in full; its digest covers what decides the result."""
    spec = {key: value for key, value in step["spec"].items() if key not in ("data", "model")}
    return step | {"spec": spec}


def test_no_golden_plan_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(PLANS)
