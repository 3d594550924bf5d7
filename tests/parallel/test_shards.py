"""What a plan says of shards and of bytes sent, against closed forms; tests/parallel/test_scale.py holds both against torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lmforge.errors import PlanError
from lmforge.parallel.layout import ONE
from lmforge.parallel.shards import Cut
from lmforge.plan import Cost, Plan

PlanOf = Callable[..., Plan]
SEVEN_B, NANO = 7_298_617_344, 2048 * 64 + 4 * (4 * 64 * 64 + 3 * 64 * 176 + 2 * 64) + 64
BATCH = "stage.pretrain.optimizer.global_batch_tokens"


def cost(plan_of: PlanOf, *words: str) -> Cost:
    return plan_of(*words).step(words[0].removeprefix("stage=")).cost


@pytest.mark.parametrize(
    ("parallel", "sent"),
    [
        ("ddp", {"all_reduce": 2 * 7 * SEVEN_B * 4 // 8}),
        ("fsdp", {"all_gather": 2 * 8 * 7 * SEVEN_B // 8 * 4, "reduce_scatter": 8 * 7 * SEVEN_B // 8 * 4}),
        ("fsdp_zero2", {"all_gather": 8 * 7 * SEVEN_B // 8 * 4, "reduce_scatter": 8 * 7 * SEVEN_B // 8 * 4}),
        ("hsdp", {"all_gather": 2 * 8 * 3 * SEVEN_B // 4 * 4, "reduce_scatter": 8 * 3 * SEVEN_B // 4 * 4, "all_reduce": SEVEN_B // 4 * 4}),
        ("deepspeed_zero2", {"all_gather": 7 * SEVEN_B // 8 * 4, "reduce_scatter": 8 * 7 * SEVEN_B // 8 * 4}),
        ("deepspeed_zero3", {"all_gather": 2 * 8 * 7 * SEVEN_B // 8 * 4, "reduce_scatter": 8 * 7 * SEVEN_B // 8 * 4}),
    ],
)
def test_bytes_sent_in_a_step_of_eight_micro_batches(parallel: str, sent: dict[str, int], plan_of: PlanOf) -> None:
    """Every tensor of 7B divides by eight, so that nothing is padded."""
    memory = "hardware.memory_bytes=1e12"
    assert cost(plan_of, "stage=dpo", "model=7b", f"parallel={parallel}", "hardware=h100x8", "parallel.micro_batch_size=1", memory).communication == sent


def test_one_device_sends_nothing(plan_of: PlanOf) -> None:
    assert cost(plan_of, "stage=pretrain").communication == {}


def test_a_pipeline_sends_hidden_states_both_ways(plan_of: PlanOf) -> None:
    """A stage in the middle has two neighbours: 16 micro-batches of 4 rows of 256 tokens, 64 wide, in float32."""
    words = ("stage=pretrain", "parallel=pp", "parallel.devices=4", "hardware=cpu", "model.tie_word_embeddings=false", "parallel.micro_batch_size=4")
    assert cost(plan_of, *words).communication == {"send": 2 * 16 * 4 * 256 * 64 * 4}


def test_the_plan_says_what_a_rank_holds(plan_of: PlanOf) -> None:
    step = plan_of(
        "stage=pretrain", "model=70b", "parallel=3d", "parallel.pp=3", "parallel.devices=384", "hardware=h100x512", "eval=none", f"{BATCH}=1572864"
    ).step("pretrain")
    assert "each rank holds up to 27 of 80 layers, 1/2 of each matrix, 1/64 of that" in step.arithmetic


def test_a_batch_for_a_pipeline_is_one_that_keeps_its_stages_busy(plan_of: PlanOf) -> None:
    words = ("stage=pretrain", "model=70b", "parallel=3d", "hardware=h100x512", "precision=bf16", "eval=none")
    with pytest.raises(PlanError) as caught:
        plan_of(*words)
    (problem,) = caught.value.problems
    typed = problem.instead.split("type ")[1].split(",")[0]
    assert plan_of(*words, f"{problem.where}={typed}").step("pretrain").placement.accumulation == 2


def test_models_beside_the_trained_one_are_whole_on_every_device(plan_of: PlanOf) -> None:
    """PPO's starting policy is opened by each rank for itself; policy and value model are sharded."""
    words = ("stage=[pretrain,sft,grpo]", "model=nano", "hardware=h100x8")
    one, eight = (plan_of(*words, f"parallel={name}").step("grpo").cost.peak_bytes_per_device for name in ("single", "fsdp"))
    beside = (one.params or 0) - 4 * NANO
    assert beside % (4 * NANO) == 0
    assert beside > 0
    assert eight.params == 4 * NANO // 8 + beside
    assert eight.grads == 4 * NANO // 8


def test_ends_of_a_pipeline_and_whole_norms() -> None:
    cut = Cut(ONE | {"pp": 2, "tp": 2, "dp_shard": 4}, {"lm_head": "column_gathered", "model.layers.{layer}.mlp.down_proj": "row"}, 5)
    tensors: list[Any] = [
        Tensor("model.embed_tokens.weight", (97, 8), 1),
        Tensor("model.layers.{layer}.mlp.down_proj.weight", (8, 20), 5),
        Tensor("model.layers.{layer}.mlp.down_proj.bias", (8,), 5),
        Tensor("model.norm.weight", (8,), 1),
        Tensor("lm_head.weight", (97, 8), 1),
    ]
    first, last = ({one.name.removeprefix("model."): (one.shape, one.count) for one in cut.held(tensors, rank)} for rank in (0, 15))
    assert first == {"embed_tokens.weight": ((25, 8), 1), "layers.{layer}.mlp.down_proj.weight": ((2, 10), 3), "layers.{layer}.mlp.down_proj.bias": ((2,), 3)}
    # 97 = 49 + 48 over tp, 48 = 4 x 12 over dp_shard
    assert last == {
        "layers.{layer}.mlp.down_proj.weight": ((2, 10), 2),
        "layers.{layer}.mlp.down_proj.bias": ((2,), 2),
        "norm.weight": ((2,), 1),
        "lm_head.weight": ((12, 8), 1),
    }


class Tensor:
    def __init__(self, name: str, shape: tuple[int, ...], count: int) -> None:
        self.name, self.shape, self.count = name, shape, count
