"""Where log-probs are compared with those of a policy without dropout, training has none either; elsewhere the model keeps its own."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_rl
import tiny_run
import torch

from lmforge.formats.tokens import Tokens
from lmforge.stage.reference import answer_scores, pair_scores
from lmforge.training.dropout import switch_off
from lmforge.training.fit import fit
from lmforge.training.losses.preference import dpo
from lmforge.training.objective import Objective
from lmforge.training.objectives.causal_lm import CausalLM
from lmforge.training.objectives.kto import Kto
from lmforge.training.objectives.preference import Preference
from lmforge.training.objectives.reward import BradleyTerry

DPO = partial(dpo, beta=0.3, label_smoothing=0.0, length_normalized=False)


def objective(kind: str, folder: Path, policy: Any) -> Objective:
    """Over tokens of its own, with this policy as the reference."""
    view = {"dpo": "preference", "kto": "feedback", "sft": "chat"}[kind]
    tokens = tiny_run.write_tokens(folder, view)
    if kind == "sft":
        return CausalLM(tokens, 16)
    for name, values in (pair_scores if kind == "dpo" else answer_scores)(policy, Tokens(tokens, "train")):
        np.save(folder / f"train{name}.npy", values)
    return Preference(tokens, folder, DPO) if kind == "dpo" else Kto(tokens, folder, 0.3, 1.0, 1.0)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
@pytest.mark.parametrize("activation_checkpointing", ["none", "full"])
def test_log_ratios_begin_at_0_under_dropout(kind: str, activation_checkpointing: str, tmp_path: Path) -> None:
    model = tiny_run.tiny_model(dropout=0.1)
    loss = objective(kind, tmp_path, model)
    recipe = tiny_run.recipe(steps=1, log_every=1, parallel=tiny_run.parallel(activation_checkpointing=activation_checkpointing))
    metrics = fit(recipe, loss, model, tiny_run.context(tmp_path), lambda trained: None)
    assert metrics["rewards/chosen"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["rewards/rejected"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["loss"] == pytest.approx(math.log(2) if kind == "dpo" else 0.5, abs=1e-5)
    assert model.config.resid_pdrop == 0.1  # what is saved keeps it


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_ratios_to_the_rollouts_policy_begin_at_1_under_dropout(kind: str, tmp_path: Path) -> None:
    """GRPO with GPT-2's modules; PPO with a Llama, whose attention holds a number."""
    policy = tiny_run.tiny_model(dropout=0.1) if kind == "grpo" else tiny_run.tiny_llama()
    if kind == "ppo":
        for layer in policy.model.layers:
            layer.self_attn.attention_dropout = 0.3
    prompts = tiny_rl.write_prompts(tmp_path / "prompts")
    metrics, _ = tiny_rl.train(kind, tmp_path, prompts, policy=policy, recipe={"steps": 1, "log_every": 1})
    assert metrics["grad_norm"] > 1e-3
    assert metrics["approx_kl"] == pytest.approx(0.0, abs=1e-9)
    assert metrics["clip_fraction"] == 0


@pytest.mark.parametrize(("kind", "off"), [("dpo", True), ("kto", True), ("sft", False)])
def test_an_adapters_dropout_is_off_where_there_is_a_reference_and_on_in_sft(kind: str, off: bool, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    ends = []
    for share in (0.0, 0.5):
        loss = objective(kind, tmp_path / str(share), tiny_run.tiny_llama())
        torch.manual_seed(1)
        model = get_peft_model(tiny_run.tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=share))
        fit(tiny_run.recipe(steps=3), loss, model, tiny_run.context(tmp_path / str(share)), lambda trained: None)
        ends.append({name.replace(".lora_dropout", ""): value.clone() for name, value in model.state_dict().items() if "lora_" in name})
    assert any(float(value.abs().max()) > 0 for name, value in ends[0].items() if "lora_B" in name)
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items()) == off


def test_a_reward_model_keeps_its_dropout() -> None:
    assert getattr(BradleyTerry(Path(), 0.0, 0.0), "dropout", True)
    assert getattr(CausalLM(Path(), 16), "dropout", True)


def test_nothing_is_drawn_in_training_mode() -> None:
    models = [tiny_run.tiny_model(dropout=0.5), tiny_run.tiny_llama()]
    for layer in models[1].model.layers:
        layer.self_attn.attention_dropout = 0.5
    ids = torch.randint(1, tiny_run.VOCABULARY, (2, 9))
    for model in models:
        model.train()
        assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
        switch_off(model)
        assert model.training
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
