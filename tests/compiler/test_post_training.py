"""Post-training in the plan: what each stage takes and makes follows from its keys, and what cannot work is refused before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lmforge.errors import LmforgeError
from lmforge.plan import Plan

PlanOf = Callable[..., Plan]
NANO = ("model=nano", "hardware=cpu", "track=none")


def wiring(plan: Plan) -> dict[str, tuple[list[str], str]]:
    return {step.name: ([one.step for one in step.inputs], step.produces) for step in plan.steps}


def test_rlhf_takes_the_policy_from_sft_and_the_reward_from_the_reward_model(plan_of: PlanOf, rows: Path) -> None:
    made = wiring(plan_of("stage=[pretrain,sft,reward,ppo]", *NANO, "data=text", f"data.path={rows}", "eval=none"))
    assert made["reward"] == (["sft", "tokens.preference"], "reward_model")
    assert made["ppo"] == (["sft", "tokens.prompt", "reward"], "checkpoint")


def test_a_verifiable_reward_needs_no_reward_model(plan_of: PlanOf, rows: Path) -> None:
    data = ("data=text", f"data.path={rows}", "eval=none")
    made = wiring(plan_of("stage=[pretrain,sft,ppo]", "stage.ppo.reward=python_parses", *NANO, *data))
    assert made["ppo"] == (["sft", "tokens.prompt"], "checkpoint")
    assert wiring(plan_of("stage=[pretrain,sft,grpo]", *NANO, *data))["grpo"] == (["sft", "tokens.prompt"], "checkpoint")
    with pytest.raises(LmforgeError, match="consumes 'reward_model', which no earlier stage makes; put reward before it"):
        plan_of("stage=[pretrain,sft,ppo]", *NANO, *data)
    with pytest.raises(LmforgeError, match="reward_model"):  # the value model asked for is the reward model's
        plan_of("stage=[pretrain,sft,ppo]", "stage.ppo.reward=python_parses", "stage.ppo.value_init=reward", *NANO, *data)


def test_a_sum_needs_what_its_parts_need(plan_of: PlanOf, rows: Path) -> None:
    data = ("data=text", f"data.path={rows}", "eval=none")
    parts = ("stage.grpo.reward=sum", "+reward@stage.grpo.reward.rewards.rm=model", "stage.grpo.reward.weights.rm=1")
    with pytest.raises(LmforgeError, match="reward_model"):
        plan_of("stage=[pretrain,sft,grpo]", *parts, *NANO, *data)


def test_an_adapter_is_merged_only_where_weights_are_needed(plan_of: PlanOf, rows: Path) -> None:
    data = ("data=text", f"data.path={rows}")
    evaluated = wiring(plan_of("stage=[pretrain,sft,dpo]", "adapter=lora", *NANO, *data))
    assert evaluated["sft"] == (["pretrain", "tokens.chat"], "adapter")
    assert evaluated["sft.merge"] == (["pretrain", "sft"], "checkpoint")
    # The reference policy is the base with the adapter off: the very weights that DPO starts from.
    assert evaluated["dpo.reference"][0][0] == evaluated["dpo"][0][0] == "sft.merge"
    assert evaluated["eval.dpo"][0][0] == "dpo.merge"
    plain = wiring(plan_of("stage=[pretrain,sft,dpo]", "adapter=lora", *NANO, *data, "eval=none"))
    assert "sft.merge" in plain
    assert "dpo.merge" not in plain


def test_one_stage_may_train_an_adapter_and_another_the_weights(plan_of: PlanOf, rows: Path) -> None:
    made = wiring(plan_of("stage=[pretrain,sft,dpo]", "stage.dpo.adapter=lora", *NANO, "data=text", f"data.path={rows}", "eval=none"))
    assert (made["sft"][1], made["dpo"][1]) == ("checkpoint", "adapter")


def test_trainable_parameters_are_the_adapters(plan_of: PlanOf, rows: Path) -> None:
    plan = plan_of("stage=[pretrain,sft]", "adapter=lora", "adapter.r=4", "adapter.target_modules=[q_proj]", *NANO, "data=text", f"data.path={rows}")
    cost = plan.step("sft").cost
    assert cost.params_trainable == 4 * (4 * 64 + 64 * 4)  # 4 layers, r=4 on 64 x 64
    assert cost.peak_bytes_per_device.grads == 4 * cost.params_trainable
    assert cost.peak_bytes_per_device.params == 4 * (cost.params_total + cost.params_trainable)


def test_ppo_holds_policy_and_value_and_the_frozen_ones(plan_of: PlanOf, rows: Path) -> None:
    data = ("data=text", f"data.path={rows}", "eval=none")
    plan = plan_of("stage=[pretrain,sft,reward,ppo]", *NANO, *data)
    total = plan.step("ppo").cost.params_total
    score = total + 64  # tied embeddings: a scalar head on top
    assert plan.step("reward").cost.params_trainable == score
    assert plan.step("ppo").cost.params_trainable == total + score
    assert plan.step("ppo").cost.peak_bytes_per_device.params == 4 * (2 * total + 2 * score)  # policy, value, reference, reward model


def test_the_rollouts_are_shown(plan_of: PlanOf, rows: Path) -> None:
    plan = plan_of("stage=[pretrain,sft,grpo]", *NANO, "data=text", f"data.path={rows}", "stage.grpo.minibatches=2", "stage.grpo.epochs=3")
    lines = "\n".join(plan.step("grpo").arithmetic)
    assert "a rollout = 2 x 64 rows = 128 answers, used for 3 x 2 = 6 steps" in lines
    assert "200 steps = 34 rollouts" in lines


REFUSED = [
    (("stage=[pretrain,sft,grpo]", "stage.grpo.group_size=7"), "stage.grpo.group_size", "no whole number of groups of 7"),
    (("stage=[pretrain,sft,grpo]", "stage.grpo.max_new_tokens=255"), "stage.grpo.max_new_tokens", "leave no room for a prompt"),
    (("stage=[pretrain,sft,sample]", "stage.sample.max_new_tokens=300"), "stage.sample.max_new_tokens", "leave no room for a prompt"),
    (("stage=[pretrain,sft,grpo]", "stage.grpo.clip_high=0.1"), "stage.grpo.clip_high", "below clip_low"),
    (("stage=[pretrain,sft,dpo]", "adapter=prompt_tuning"), "stage.dpo", "soft prompt, which cannot be merged"),
    (("stage=[pretrain,sft]", "adapter=prompt_tuning", "quantize=int8"), "quantize", "soft prompt"),
    (("stage=[pretrain,sft]", "adapter=lora", "adapter.target_modules=[q_porj]"), "adapter.target_modules", "q_proj"),
    (("stage=[pretrain]", "adapter=lora"), "adapter", "no stage of this plan"),
    (("stage=[pretrain,sft,dpo]", "stage.dpo.bta=1"), "stage.dpo.bta", "did you mean 'beta'"),
    (("stage=[pretrain,sft,ppo]", "stage.ppo.reward=python_prases"), "stage.ppo.reward", "python_parses"),
]


@pytest.mark.parametrize(("words", "where", "what"), REFUSED, ids=[" ".join(words) for words, _, _ in REFUSED])
def test_what_cannot_work_is_refused(plan_of: PlanOf, rows: Path, words: tuple[str, ...], where: str, what: str) -> None:
    with pytest.raises(LmforgeError) as caught:
        plan_of(*words, *NANO, "data=text", f"data.path={rows}")
    assert any(where in problem.where and what in str(problem) for problem in caught.value.problems), caught.value


def test_kto_takes_pairs_where_there_are_no_labels(plan_of: PlanOf, rows: Path) -> None:
    made = wiring(plan_of("stage=[pretrain,kto]", *NANO, "data=text", f"data.path={rows}", "eval=none"))
    assert made["kto"] == (["pretrain", "tokens.feedback", "kto.feedback_reference"], "checkpoint")
    assert made["kto.feedback_reference"] == (["pretrain", "tokens.feedback"], "feedback_reference")


def test_weights_from_outside_replace_an_adapter_that_is_not_merged_yet(plan_of: PlanOf, rows: Path, tmp_path: Path) -> None:
    """Without evaluation nobody has asked for SFT's weights when DPO starts from others: the adapter must not be merged into those."""
    folder = tmp_path / "weights"
    folder.mkdir()
    sizes = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 2, "max_position_embeddings": 256}
    kind = {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}
    (folder / "config.json").write_text(json.dumps(kind | sizes))
    words = ("stage=[pretrain,sft,dpo]", "adapter=lora", f"stage.dpo.init_from={folder}", *NANO, "data=text", f"data.path={rows}", "eval=none")
    made = wiring(plan_of(*words))
    assert "sft.merge" not in made
    assert made["dpo"][0][0] == "weights"
