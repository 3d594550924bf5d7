"""What is settled where keys are null, and what is refused with which way out: each found again by typing every value."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmforge.errors import PlanError
from lmforge.hardware import calibration
from lmforge.parallel.nodes import CHECKPOINTING
from lmforge.plan import Plan, Step

PlanOf = Callable[..., Plan]
BATCH = "optimizer.global_batch_tokens=4194304"
JOBS = {
    "7b_on_8": ("stage=sft", "model=7b", "parallel=fsdp", "precision=bf16", "hardware=a100_40x8", "eval=none"),
    "1b_on_one": ("stage=sft", "model=1b", "adapter=lora", "precision=bf16", "hardware=rtx4090x1", "eval=none"),
    "dpo": ("stage=dpo", "model=7b", "parallel=fsdp", "hardware=h100x8", "eval=none"),
}
REFUSED = {
    "weights": ("stage=sft", "model=7b", "precision=bf16", "hardware=a100x1", "eval=none"),
    "ddp": ("stage=sft", "model=13b", "precision=bf16", "parallel=ddp", "hardware=a100x8", "eval=none"),
    "typed_both": (*JOBS["7b_on_8"], "parallel.micro_batch_size=8", "parallel.activation_checkpointing=selective"),
    "typed_none": (*JOBS["7b_on_8"], "parallel.activation_checkpointing=none"),
    "offload": ("stage=pretrain", "model=70b", "precision=bf16", "parallel=fsdp", "hardware=h100x8", "eval=none"),
}


def trained(plan: Plan) -> Step:
    (step,) = [one for one in plan.steps if one.cost.params_trainable]
    return step


def refusal(plan_of: PlanOf, words: tuple[str, ...]) -> Any:
    with pytest.raises(PlanError) as caught:
        plan_of(*words)
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize("name", JOBS)
def test_null_keys_are_settled_by_the_fastest_that_fits(name: str, plan_of: PlanOf) -> None:
    settled = trained(plan_of(*JOBS[name]))
    spec, room = settled.spec, plan_of(*JOBS[name]).experiment.hardware.machine().memory_per_device(settled.placement.devices)
    assert (settled.cost.peak_bytes_per_device.total or 0) <= room
    seconds, refused = {}, []
    for again, rows in itertools.product(CHECKPOINTING, (1, 2, 4, 8)):
        typed = (f"parallel.activation_checkpointing={again}", f"parallel.micro_batch_size={rows}")
        try:
            found = trained(plan_of(*JOBS[name], *typed))
        except PlanError as error:
            refused.append(str(error))
            continue
        assert found.cost.step_seconds is not None
        seconds[again, rows] = found.cost.step_seconds.expected
    assert all("needs" in one or "does not divide" in one for one in refused)
    assert settled.cost.step_seconds is not None
    assert settled.cost.step_seconds.expected == pytest.approx(min(seconds.values()))
    assert (spec.parallel.activation_checkpointing, settled.placement.micro_batch_size) in seconds  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_refusal_suggests_fits(name: str, plan_of: PlanOf) -> None:
    """With the memory that it says."""
    problem = refusal(plan_of, REFUSED[name])
    ways = re.findall(r"((?:[\w.]+=\S+ )+)\((\S+) GiB", problem.instead)
    assert 1 <= len(ways) <= 4
    for words, said in ways:
        typed = {one.partition("=")[0]: one for one in (*REFUSED[name], *words.split())}
        step = trained(plan_of(*typed.values()))
        assert f"{(step.cost.peak_bytes_per_device.total or 0) / 2**30:.1f}" == said


def test_a_refusal_names_the_largest_parts_of_the_least_that_was_tried(plan_of: PlanOf) -> None:
    problem = refusal(plan_of, REFUSED["weights"])
    assert problem.where == "stage.sft"
    assert re.search(r"needs 1\d\d\.\d GiB of 80\.0 GiB on one device .*\(optimizer 54\.4 GiB, params 27\.2 GiB, grads 27\.2 GiB\)", problem.what)


def test_where_nothing_near_fits_the_smallest_hardware_is_named(plan_of: PlanOf) -> None:
    words = ("stage=pretrain", "model=1b", "eval=none", "precision=bf16")
    problem = refusal(plan_of, (*words, "hardware=a10gx1", "parallel.activation_checkpointing=full", "parallel.micro_batch_size=1"))
    assert problem.instead.startswith(("type ", "nothing near it fits; plan for hardware="))


@pytest.mark.parametrize(("words", "named", "way"), [
    (("stage=pretrain", "model=13b", "parallel=fsdp", "precision=bf16", "hardware=h100x8"), "eval.pretrain", "eval.untrained=false"),
    (("stage=pretrain", "model=70b", "parallel=fsdp", "precision=bf16", "hardware=h100x512", BATCH), "eval.pretrain", "eval=none"),
])  # fmt: skip
def test_an_evaluation_that_does_not_fit_can_be_left_out(words: tuple[str, ...], named: str, way: str, plan_of: PlanOf) -> None:
    problem = refusal(plan_of, words)
    assert problem.where == named
    assert problem.instead.startswith(f"type {way}; or ")
    assert plan_of(*words, way)


def test_a_reference_pass_needs_the_whole_model_in_float32(plan_of: PlanOf) -> None:
    """7,298,617,344 parameters x 4 bytes are 27.2 GiB, whatever the adapter and precision of training."""
    problem = refusal(plan_of, ("stage=dpo", "model=7b", "adapter=qlora", "precision=bf16", "hardware=rtx4090x1", "eval=none"))
    assert problem.where == "dpo.reference"
    assert "params 27.2 GiB" in problem.what


def test_prompts_may_be_shorter_than_the_longest(plan_of: PlanOf) -> None:
    """64 prompts that fill the context would not fit; nobody knows that they do."""
    step = plan_of("stage=[sft,sample]", "model=1b", "hardware=h100x1", "eval=none").step("sample")
    peak = step.cost.peak_bytes_per_device
    assert (peak.total or 0) > 80e9
    assert "if there are 64 of 3,968 tokens" in (peak.moment or "")


def test_another_machines_calibration_is_named_and_left_aside(plan_of: PlanOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from lmforge.__main__ import main

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs" / "calibration"
    folder.mkdir(parents=True)
    known = json.loads((Path(__file__).parents[1] / "fixtures" / "calibration.json").read_text())
    (folder / f"{known['fingerprint']}.json").write_text(json.dumps(known))
    assert main(["plan", "stage=pretrain", "model=nano", "eval=none"]) == 0
    told = capsys.readouterr()
    assert told.err.startswith(f"warning: outputs/calibration/{known['fingerprint']}.json was measured on {known['name']}")
    assert "no time: " in told.out
    assert calibration.read(folder / f"{known['fingerprint']}.json").name == known["name"]


def test_offloading_frees_nothing_on_a_cpu(plan_of: PlanOf) -> None:
    """A host's devices are its memory."""
    words = ("stage=pretrain", "model=7b", "hardware=cpu", "eval=none")
    assert "nothing fits" in refusal(plan_of, (*words, "parallel=auto")).what
    assert "needs" in refusal(plan_of, (*words, "parallel=fsdp", "parallel.devices=2", "parallel.cpu_offload=true")).what


def test_what_a_gpu_offloads_is_told_of_its_host(plan_of: PlanOf) -> None:
    """16 bytes of each of 13,716,198,400 parameters, over one node."""
    words = ("stage=sft", "model=13b", "precision=bf16", "parallel=fsdp", "parallel.cpu_offload=true", "hardware=a100_40x8", "eval=none")
    assert "offloaded: 204.4 GiB in each node's host memory, of which no more is known" in trained(plan_of(*words)).arithmetic


def test_a_search_without_times_says_what_it_would_need(plan_of: PlanOf) -> None:
    words = ("stage=pretrain", "model=70b", "precision=bf16", "parallel=auto", "hardware=h100x8", "hardware.links.host=null", "eval=none")
    chosen = next(line for line in trained(plan_of(*words)).arithmetic if line.startswith("auto: "))
    assert "without times, for hardware.links.host is not known" in chosen


def test_a_hosts_hours_are_those_of_all_its_cores(plan_of: PlanOf) -> None:
    """One process computes with all of them."""
    cost = trained(plan_of("stage=pretrain", "model=nano", "hardware=cpu", "eval=none")).cost
    assert cost.device_hours == pytest.approx(8 * (cost.seconds or 0) / 3600)
