"""resolve, place and estimate: the arithmetic, against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from lmforge.compiler.cut import largest_divisor
from lmforge.errors import PlanError
from lmforge.plan import Plan

PlanOf = Callable[..., Plan]

# nano: V 2048, d 64, f 176, L 4, tied; written out so that it is no copy of the code
NANO = 2048 * 64 + 4 * (4 * 64 * 64 + 3 * 64 * 176 + 2 * 64) + 64
NANO_FLOPS_PER_TOKEN = 6 * NANO + 6 * 4 * 64 * 256


def trained(plan: Plan, name: str = "pretrain") -> Any:
    return plan.step(name).spec


@pytest.mark.parametrize(
    ("typed", "steps"),
    [
        ("steps=7", 7),
        ("tokens=1", 1),
        ("tokens=16384", 1),
        ("tokens=16385", 2),
        ("tokens=200e3", 13),
        ("tokens_per_parameter=20", math.ceil(20 * NANO / 16384)),
        ("tokens_per_parameter=0.001", 1),
        (f"flops={NANO_FLOPS_PER_TOKEN * 16384 * 5}", 5),
        (f"flops={NANO_FLOPS_PER_TOKEN * 16384 * 5.5}", 6),
        ("flops=1", 1),
    ],
)
def test_a_budget_is_spent_in_whole_steps(typed: str, steps: int, plan_of: PlanOf) -> None:
    """64 rows of 256 tokens are 16,384 tokens a step."""
    plan = plan_of("stage=pretrain", f"stage.pretrain.budget.{typed}")
    assert trained(plan).budget.steps == steps
    assert plan.step("pretrain").cost.tokens == steps * 16384
    assert any(f"= {steps:,} steps" in line or line.startswith(f"{steps:,} steps") for line in plan.step("pretrain").arithmetic)


def test_two_ways_to_say_a_budget_are_one_step(plan_of: PlanOf) -> None:
    ways = ["tokens=163840", "tokens=163839", "steps=10", f"flops={NANO_FLOPS_PER_TOKEN * 163840}"]
    found = {plan_of("stage=pretrain", f"stage.pretrain.budget.{way}").step("pretrain").digest for way in ways}
    assert len(found) == 1
    assert plan_of("stage=pretrain", "stage.pretrain.budget.steps=11").step("pretrain").digest not in found


def test_what_is_left_open_follows_and_says_so_in_one_digest(plan_of: PlanOf) -> None:
    """A null that resolves to a number is the number."""
    left = plan_of("stage=pretrain")
    said = plan_of("stage=pretrain", "stage.pretrain.seq_len=256", "optimizer.global_batch_tokens=16384", "model.num_key_value_heads=2")
    assert trained(left).seq_len == 256
    assert trained(left).optimizer.global_batch_tokens == 64 * 256
    assert {step.name: step.digest for step in left.steps} == {step.name: step.digest for step in said.steps}


def test_a_pair_is_a_row_of_two_sequences(plan_of: PlanOf) -> None:
    plan = plan_of("stage=[pretrain,sft,dpo]", "stage.dpo.optimizer.global_batch_tokens=8192")
    assert plan.step("dpo").placement.micro_batch_size * plan.step("dpo").placement.accumulation == 8192 // (2 * 256)  # type: ignore[operator]


@pytest.mark.parametrize("batch", [255, 257, 1000])
def test_a_batch_of_no_whole_rows_names_the_nearest(batch: int, plan_of: PlanOf) -> None:
    nearest = max(1, round(batch / 256)) * 256
    with pytest.raises(PlanError, match=rf"the nearest is {nearest}\b"):
        plan_of("stage=pretrain", f"optimizer.global_batch_tokens={batch}")


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("rows", [8, 24, 64])
def test_rows_are_devices_times_micro_batch_times_accumulation(devices: int, rows: int, plan_of: PlanOf) -> None:
    overrides = ("stage=pretrain", "parallel=ddp", f"parallel.devices={devices}", "hardware=cpu", f"optimizer.global_batch_tokens={rows * 256}")
    placement = plan_of(*overrides).step("pretrain").placement
    assert placement.devices == devices == placement.mesh["dp_replicate"]
    assert placement.devices * placement.micro_batch_size * placement.accumulation == rows  # type: ignore[operator]
    assert placement.micro_batch_size * 256 <= 8192  # type: ignore[operator]


def test_a_batch_that_does_not_split_names_one_that_does(plan_of: PlanOf) -> None:
    with pytest.raises(PlanError) as caught:
        plan_of("stage=pretrain", "parallel=ddp", "parallel.devices=3", "hardware=cpu")
    (problem,) = caught.value.problems
    typed = int(problem.instead.split("type ")[1].split(",")[0])
    plan_of("stage=pretrain", "parallel=ddp", "parallel.devices=3", "hardware=cpu", f"optimizer.global_batch_tokens={typed}")


def test_a_micro_batch_is_taken_or_refused(plan_of: PlanOf) -> None:
    assert plan_of("stage=pretrain", "parallel.micro_batch_size=16").step("pretrain").placement.accumulation == 4
    with pytest.raises(PlanError, match="5 does not divide the 64 rows a device has; type 4 or 8"):
        plan_of("stage=pretrain", "parallel.micro_batch_size=5")


@pytest.mark.parametrize(
    ("number", "limit", "expected"), [(64, 32, 32), (64, 33, 32), (7, 3, 1), (12, 5, 4), (1, 0, 1), (9, 100, 9), (10**18, 32, 32), (6, -1, 1)]
)
def test_largest_divisor(number: int, limit: int, expected: int) -> None:
    assert largest_divisor(number, limit) == expected


def test_a_huge_batch_is_placed_at_once(plan_of: PlanOf) -> None:
    """Divisors are not looked for one by one up to the number."""
    assert plan_of("stage=pretrain", f"optimizer.global_batch_tokens={2**32}", "hardware=h200x1").step("pretrain").placement.micro_batch_size == 32
    with pytest.raises(PlanError, match=r"needs 22\d{9}\.\d GiB"):  # its ids alone, which a step has on its device
        plan_of("stage=pretrain", "optimizer.global_batch_tokens=1e18")


def test_parameters_flops_and_static_memory_of_a_small_model(plan_of: PlanOf) -> None:
    cost = plan_of("stage=pretrain", "stage.pretrain.budget.steps=10").step("pretrain").cost
    assert (cost.params_total, cost.params_active, cost.params_trainable) == (NANO, NANO, NANO)
    assert cost.tokens == 163_840
    assert cost.train_flops == 163_840 * NANO_FLOPS_PER_TOKEN
    peak = cost.peak_bytes_per_device
    assert (peak.params, peak.grads, peak.optimizer) == (4 * NANO, 4 * NANO, 8 * NANO)


def test_what_is_not_estimated_is_null(plan_of: PlanOf) -> None:
    cost = plan_of("stage=pretrain").step("pretrain").cost
    assert (cost.seconds, cost.device_hours, cost.step_seconds) == (None, None, None)
    data = plan_of("stage=pretrain").step("data").cost
    assert (data.params_total, data.tokens, data.train_flops) == (None, None, None)


SEVEN_B = 7_298_617_344


@pytest.mark.parametrize(
    ("parallel", "params", "grads", "optimizer"),
    [
        ("ddp", 1, 1, 1),
        ("deepspeed_zero1", 1, 1, 8),
        ("deepspeed_zero2", 1, 8, 8),
        ("deepspeed_zero3", 8, 8, 8),
        ("fsdp", 8, 8, 8),
    ],
)
def test_sharding_divides_what_it_shards(parallel: str, params: int, grads: int, optimizer: int, plan_of: PlanOf) -> None:
    """ZeRO (Rajbhandari et al. 2020, figure 1), for OLMo 2 7B in float32 with AdamW: 4, 4 and 8 bytes a parameter."""
    plan = plan_of("stage=dpo", "model=7b", f"parallel={parallel}", "hardware=h200x8")
    peak = plan.step("dpo").cost.peak_bytes_per_device
    assert plan.step("dpo").cost.params_total == SEVEN_B
    assert (peak.params, peak.grads, peak.optimizer) == (4 * SEVEN_B // params, 4 * SEVEN_B // grads, 8 * SEVEN_B // optimizer)


def test_offloading_takes_a_part_off_the_device(plan_of: PlanOf) -> None:
    words = ("stage=dpo", "model=7b", "parallel=deepspeed_zero3", "hardware=h100x8", "parallel.offload_optimizer=true", "parallel.offload_parameters=true")
    peak = plan_of(*words).step("dpo").cost.peak_bytes_per_device
    assert (peak.params, peak.grads, peak.optimizer) == (0, 4 * SEVEN_B // 8, 0)


@pytest.mark.parametrize(("optimizer", "bytes_each"), [("sgd", 0), ("momentum", 4), ("adam", 8), ("adamw", 8)])
def test_optimizer_states_by_the_parameter(optimizer: str, bytes_each: int, plan_of: PlanOf) -> None:
    peak = plan_of("stage=pretrain", f"optimizer={optimizer}").step("pretrain").cost.peak_bytes_per_device
    assert peak.optimizer == bytes_each * NANO


def test_muon_keeps_one_buffer_for_hidden_matrices_and_two_for_the_rest(plan_of: PlanOf) -> None:
    hidden = 4 * (4 * 64 * 64 + 3 * 64 * 176)
    peak = plan_of("stage=pretrain", "optimizer=muon").step("pretrain").cost.peak_bytes_per_device
    assert peak.optimizer == 4 * hidden + 8 * (NANO - hidden)


def test_parameters_kept_in_bfloat16_take_half(plan_of: PlanOf) -> None:
    peak = plan_of("stage=pretrain", "precision=bf16", "precision.param_dtype=bfloat16").step("pretrain").cost.peak_bytes_per_device
    assert (peak.params, peak.grads) == (2 * NANO, 2 * NANO)


def test_a_model_that_does_not_fit_is_refused_with_both_figures(plan_of: PlanOf) -> None:
    with pytest.raises(PlanError, match=r"needs 120\.3 GiB of 79\.6 GiB on one device of NVIDIA H100 80GB HBM3 \(optimizer 54\.4 GiB"):
        plan_of("stage=dpo", "model=7b", "hardware=h100x1")
    plan_of("stage=dpo", "model=7b", "hardware=h100x8", "parallel=fsdp")


def test_ranks_on_a_cpu_share_its_memory(plan_of: PlanOf) -> None:
    """0.39e9 parameters x 16 bytes are 5.8 GiB: once on a 16 GiB laptop, not four times."""
    plan_of("stage=pretrain", "model=400m", "hardware=cpu")
    with pytest.raises(PlanError, match="4 device"):
        plan_of("stage=pretrain", "model=400m", "hardware=cpu", "parallel=ddp", "parallel.devices=4")


def test_no_time_is_below_what_the_stated_peak_allows(plan_of: PlanOf) -> None:
    """6ND over eight H100s at their dense peak."""
    cost = plan_of("experiment=pretrain_400m", "hardware=h100x8").step("pretrain").cost
    assert cost.train_flops is not None
    assert cost.seconds is not None
    assert cost.train_flops / (8 * 989.5e12) < cost.seconds


def test_a_machine_that_nobody_measured_has_no_time(plan_of: PlanOf) -> None:
    step = plan_of("stage=pretrain", "hardware=here").step("pretrain")
    assert (step.cost.seconds, step.cost.step_seconds, step.cost.money) == (None, None, None)
    assert any(line.startswith("no time: hardware.peak_flops.float32") and line.endswith("lmforge calibrate") for line in step.arithmetic)
