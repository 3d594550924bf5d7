"""`lmforge.stage.rl.train` with the stages' real nodes: folders in, a folder and held-out figures out."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_rl
import tiny_run
import torch
import yaml
from safetensors.torch import load_file

import lmforge.stage.rl as rl
from lmforge.adapter.nodes import Adapter
from lmforge.codec import decode
from lmforge.precision.nodes import Precision
from lmforge.registry import register
from lmforge.reward.nodes import Episodes, Reward
from lmforge.stage.base import Budget
from lmforge.stage.nodes import Grpo, Ppo
from lmforge.step import Context

CONF = Path(__file__).parents[2] / "conf"
HELDOUT = {"heldout_reward_start", "heldout_reward", "heldout_reward_gain", "heldout_reward_gain_standard_error", "heldout_kl_per_token",
           "heldout_response_length", "heldout_ended"}  # fmt: skip


@register("reward", "tests_share")
class Share(Reward):
    """The share of one token; a test's own."""

    def scorer(self, inputs: Mapping[str, Path], where: str) -> Any:
        return tiny_rl.share


def option(kind: Any, path: str, **changes: Any) -> Any:
    return decode(kind, {**yaml.safe_load((CONF / path).read_text()), **changes})


def stage(kind: str, adapter: str = "none", steps: int = 24, **changes: Any) -> Any:
    """A short stage: 8 answers of at most 6 tokens a step."""
    keys: dict[str, Any] = {
        "seed": 3, "init_from": None, "seq_len": 12, "budget": Budget(tokens=None, steps=steps, flops=None, tokens_per_parameter=None), "data": None,
        "optimizer": replace(tiny_run.adamw(lr=2e-2), global_batch_tokens=8 * 12), "precision": option(Precision, "precision/fp32.yaml"),
        "parallel": tiny_run.parallel(), "log_every": 4, "save_every_s": 1e9, "adapter": option(Adapter, f"adapter/{adapter}.yaml"), "reward": Share(),
        "max_new_tokens": 6, "temperature": 1.0, "epochs": 2, "minibatches": 2, "reward_from": None,
        "missing_eos_penalty": None, "eval_prompts": 20, "sample_every": 8,
    }  # fmt: skip
    own = tiny_rl.OPTIONS[kind]
    return Ppo(**{**keys, **own, "value_init": None, **changes}) if kind == "ppo" else Grpo(**{**keys, **own, **changes})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Prompts, a policy and a reward model of the same tokenizer, as folders."""
    from lmforge.model import build

    folder = tmp_path_factory.mktemp("inputs")
    prompts = tiny_rl.write_prompts(folder / "prompts")
    build.save(tiny_run.tiny_llama(), prompts / "tokenizer", folder / "checkpoint")
    scorer: Any = build.scorer_from_folder(folder / "checkpoint")
    torch.nn.init.normal_(scorer.score.weight, std=0.2, generator=torch.Generator().manual_seed(0))
    scorer.config.pad_token_id = 0
    scorer.save_pretrained(folder / "reward_model")
    shutil.copytree(prompts / "tokenizer", folder / "reward_model", dirs_exist_ok=True)
    return {"tokens:prompt": prompts, "checkpoint": folder / "checkpoint", "reward_model": folder / "reward_model"}


def run(node: Any, inputs: dict[str, Path], folder: Path) -> tuple[dict[str, Any], tiny_rl.Tables]:
    report = tiny_rl.Tables()
    given = {kind: inputs[kind] for kind in node.takes()}
    metrics = rl.train(node, Context(step=node.type, folder=folder, out=folder / node.makes(), inputs=given, report=report))
    return metrics, report


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_a_policy_comes_out_that_earns_more(kind: str, inputs: dict[str, Path], tmp_path: Path) -> None:
    from lmforge.inference.checkpoint import open_model, open_tokenizer

    metrics, report = run(stage(kind, steps=48), inputs, tmp_path)
    assert metrics.keys() >= HELDOUT | {"reward/mean", "kl", "loss"}
    assert metrics["heldout_reward_gain"] > 3 * metrics["heldout_reward_gain_standard_error"] > 0
    assert metrics["heldout_reward_gain"] == pytest.approx(metrics["heldout_reward"] - metrics["heldout_reward_start"], abs=1e-6)
    assert 0 < metrics["heldout_kl_per_token"] < 5
    saved, start = open_model(tmp_path / "checkpoint"), load_file(inputs["checkpoint"] / "model.safetensors")
    assert type(saved).__name__ == "LlamaForCausalLM"
    assert any(not torch.equal(value, start[name]) for name, value in saved.state_dict().items() if name in start)
    assert open_tokenizer(tmp_path / "checkpoint").eos_token == "<|end|>"
    titles = [title for title, _, _ in report.tables]
    assert titles == ["generations"] * 6 + ["held-out generations"]


@pytest.mark.parametrize(("value_init", "begins"), [(None, "checkpoint"), ("policy", "checkpoint"), ("reward", "reward_model")])
def test_what_the_value_model_starts_from(value_init: str | None, begins: str, inputs: dict[str, Path], tmp_path: Path) -> None:
    """The reward model's weights, head included; or the policy's, with values of 0 everywhere."""
    critic = rl._critic(stage("ppo", value_init=value_init), Context(step="ppo", folder=tmp_path, out=tmp_path, inputs=inputs))
    saved = load_file(inputs[begins] / "model.safetensors")
    found = critic.scorer.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in found.items() if not name.startswith("score"))
    assert torch.equal(found["score.weight"], saved.get("score.weight", torch.zeros(1, 32)))


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_values_start_in_the_rewards_units(adapter: str, inputs: dict[str, Path], tmp_path: Path) -> None:
    """After an answer's last token the value is the very reward; from the policy, or under another reward, there is nothing to shift."""
    reward = option(Reward, "reward/model.yaml", shift=0.7, scale=-3.0)
    context = Context(step="ppo", folder=tmp_path, out=tmp_path, inputs=inputs)
    critic = rl._critic(stage("ppo", adapter, reward=reward), context).eval()
    ids = torch.tensor([[5, 9, 11, 3]])
    batch = {"input_ids": ids, "position_ids": torch.arange(4)[None], "keep": torch.tensor([3])}
    [expected] = reward.open(inputs)(Episodes([""], [""], [None], ids.tolist(), [1]))
    with torch.no_grad():
        assert float(critic(batch)) == pytest.approx(expected, rel=1e-5)
    assert stage("ppo", reward=reward, value_init="policy").value_affine == (0.0, 1.0)
    assert stage("ppo", value_init="reward").value_affine == (0.0, 1.0)


def test_a_trained_reward_model_as_the_reward_and_the_values_start(inputs: dict[str, Path], tmp_path: Path) -> None:
    node = stage("ppo", steps=80, reward=option(Reward, "reward/model.yaml"), kl_coef=0.0, kl_target=None)
    metrics, _ = run(node, inputs, tmp_path)
    assert node.takes() == ("checkpoint", "tokens:prompt", "reward_model")
    assert metrics["heldout_reward_gain"] > 3 * metrics["heldout_reward_gain_standard_error"] > 0


@pytest.mark.parametrize(("kind", "adapter"), [("ppo", "lora"), ("grpo", "lora"), ("grpo", "prompt_tuning"), ("ppo", "prompt_tuning")])
def test_an_adapter_comes_out(kind: str, adapter: str, inputs: dict[str, Path], tmp_path: Path) -> None:
    """The reference is the base with the adapter off; what is saved opens on its base and is the policy that was measured."""
    node = stage(kind, adapter)
    metrics, _ = run(node, inputs, tmp_path)
    assert sorted(path.name for path in (tmp_path / "adapter").glob("adapter_*")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert metrics["heldout_kl_per_token"] > 0
    assert metrics["heldout_reward_gain"] > 0
    from lmforge.model import build

    policy = node.adapter.open(build.from_folder(inputs["checkpoint"]), tmp_path / "adapter")
    rollouts = rl.Rollouts(inputs["tokens:prompt"], "heldout", tiny_rl.share, rl.Sampling(6, 1.0))
    again, _ = rl.compare(policy, rl.adapter_off(node.adapter.off), rollouts, 20, seed=3)
    assert again["heldout_reward"] == pytest.approx(metrics["heldout_reward"])
    assert again["heldout_kl_per_token"] == pytest.approx(metrics["heldout_kl_per_token"], rel=1e-3)
