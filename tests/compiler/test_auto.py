"""parallel=auto: the fastest that fits, of all that one could type; its words give the same plan; what cannot work says so."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lmforge.compiler import compile
from lmforge.compiler.auto import Open
from lmforge.compiler.cut import placed
from lmforge.compiler.verdict import Verdict, verdict
from lmforge.errors import LmforgeError, PlanError
from lmforge.experiment import Experiment
from lmforge.parallel.nodes import CHECKPOINTING, DDP, Mesh, Parallel, Single
from lmforge.plan import Plan, Step
from lmforge.stage.base import TrainingStage
from tests.conftest import FIXTURES, Answer, compose

PlanOf = Callable[..., Plan]
BASE = ("stage=pretrain", "eval=none", "data=text", f"data.path={FIXTURES / 'corpus'}", "precision=bf16")
WIDE = ("model=nano", "model.num_hidden_layers=8", "model.num_attention_heads=8", "model.hidden_size=256", "model.tie_word_embeddings=false")
FOUR = (*BASE, *WIDE, "optimizer.global_batch_tokens=8192", "hardware=h100x8", "hardware.devices=4")
BIG = (*BASE, "hardware=h100x1024", "optimizer.global_batch_tokens=4194304")


def trained(plan: Plan) -> Step:
    return next(step for step in plan.steps if isinstance(step.spec, TrainingStage))


def said(plan: Plan) -> list[str]:
    """What auto says of the first training step."""
    return [line.removeprefix("auto: ") for line in trained(plan).arithmetic if line.startswith("auto: ")]


def words(line: str) -> list[str]:
    """The words to type that a line has."""
    return [word.rstrip(":") for word in line.split() if "=" in word and "parallel" in word]


def opened(plan: Plan) -> Open:
    """The search that a plan leads to."""
    return Open(trained(plan), plan.experiment.model.config(), plan.experiment.hardware.machine(), "parallel")


def everything(experiment: Experiment, devices: int) -> Iterator[Parallel]:
    """Every way one could type for so many devices, some of which nothing takes."""
    typed = experiment.stages[0].stage.parallel  # type: ignore[attr-defined]
    assert isinstance(typed, Mesh)
    several = {field.name: getattr(typed, field.name) for field in dataclasses.fields(DDP)}
    one = {field.name: getattr(typed, field.name) for field in dataclasses.fields(Single)}
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    for rows, again in itertools.product((1, 2, 4, 8, 16, 32), CHECKPOINTING):
        keys: dict[str, Any] = {"micro_batch_size": rows, "activation_checkpointing": again}
        yield Single(**(one | keys))
        yield DDP(**(several | keys))
        for pp, tp, replicate, shard in itertools.product(sizes, sizes, sizes, sizes):
            if pp * tp * replicate * shard == devices:
                for reshard, offload in itertools.product((False, True), (False, True)):
                    axes = {"pp": pp, "tp": tp, "dp_replicate": replicate, "dp_shard": shard}
                    yield dataclasses.replace(typed, **keys, **axes, reshard_after_forward=reshard, cpu_offload=offload)


def verdicts(experiment: Experiment, devices: int) -> Iterator[Verdict]:
    """Each of them planned by itself."""
    config, machine = experiment.model.config(), experiment.hardware.machine()
    named = experiment.stages[0]
    for parallel in everything(experiment, devices):
        stage = dataclasses.replace(named.stage, parallel=parallel)  # type: ignore[call-arg]
        try:
            plan = compile(dataclasses.replace(experiment, stages=(dataclasses.replace(named, stage=stage),)), until="resolve")
            yield verdict(placed(trained(plan), machine.devices), config, machine)
        except LmforgeError:
            continue


@pytest.mark.parametrize("gib", [80.0, 0.75, 0.62], ids=str)
def test_it_is_the_fastest_of_all_that_fit(gib: float, plan_of: PlanOf) -> None:
    """Held against every way that can be typed for four devices, with much memory, and with less."""
    more = f"hardware.memory_bytes={int(gib * 2**30)}"
    planned = list(verdicts(compose(*FOUR, more, "parallel=fsdp"), 4))
    fitting = [one.seconds for one in planned if one.fits and one.seconds is not None]
    assert len(planned) > 300
    print(f"{gib} GiB: {len(fitting)} of {len(planned)} fit")
    chosen = trained(plan_of(*FOUR, more, "parallel=auto"))
    assert chosen.cost.step_seconds is not None
    assert chosen.cost.step_seconds.expected == min(fitting)
    assert (chosen.cost.peak_bytes_per_device.total or 0) <= gib * 2**30


@pytest.mark.parametrize(
    "more",
    [
        (*WIDE, "hardware=h100x8"),
        ("model=7b", "hardware=h100x8"),
        ("model=7b", "hardware=h100x8", "parallel.tp=2", "parallel.activation_checkpointing=full"),
        ("model=70b", "hardware=h100x8"),
        ("model=gpt3_175b", "hardware=h100x1024"),
        ("model=nano", "hardware=here"),
        ("model=nano", "hardware=h100x8", "optimizer=adafactor"),
        ("model=7b", "hardware=h100x8", "stage=[pretrain,dpo]"),
    ],
    ids=lambda more: " ".join(word for word in more if "model." not in word),
)
def test_the_words_it_says_give_the_same_plan(more: tuple[str, ...], plan_of: PlanOf) -> None:
    """In the plan it is as if the choice had been typed: the same nodes, placements, costs and digests."""
    plan = plan_of(*BASE, "parallel=auto", *more)
    given = [word for word in more if not word.startswith("parallel.")]
    for step in plan.steps:
        if isinstance(step.spec, TrainingStage):
            choice = next(line for line in step.arithmetic if line.startswith("auto: ") and "parallel=" in line)
            given += words(choice)
            assert step.spec.parallel.micro_batch_size == step.placement.micro_batch_size
    typed = plan_of(*BASE, *given)
    for ours, theirs in zip(plan.steps, typed.steps, strict=True):
        assert ours.spec == theirs.spec
        assert ours.placement == theirs.placement
        assert ours.cost == theirs.cost
        assert ours.digest == theirs.digest


def test_it_says_the_same_twice_and_why_the_others_lost(plan_of: PlanOf) -> None:
    """The choice, then up to four: faster ones name what is too large, slower ones what grew."""
    lines = said(plan_of(*BASE, "model=7b", "hardware=h100x8", "parallel=auto"))
    assert lines == said(plan_of(*BASE, "model=7b", "hardware=h100x8", "parallel=auto"))
    print("\n".join(lines))
    assert 2 <= len(lines) <= 5
    assert "s a step" in lines[0]
    assert "GiB of 79.6 GiB" in lines[0]
    assert all("slower (" in line or "faster, but needs" in line for line in lines[1:])


@pytest.mark.parametrize("model", ["70b", "gpt3_175b"])
def test_a_thousand_devices_take_few_questions(model: str, plan_of: PlanOf) -> None:
    """Times are asked of some hundreds, of which memory is asked of fewer, where there are many thousands."""
    found = opened(plan_of(*BIG, f"model={model}", "parallel=auto", until="resolve"))
    ranking = found.ranking()
    print(f"{model}: {len(found.times)} times, {ranking.asked} peaks")
    assert ranking.best
    assert len(found.times) < 1500
    assert ranking.asked < 1000


@pytest.mark.parametrize("more", [FOUR, (*BASE, "model=7b", "hardware=h100x8")], ids=["4 small", "8"])
def test_what_the_search_builds_on_holds(more: tuple[str, ...], plan_of: PlanOf) -> None:
    """Every step of `Space.after` takes as long or longer; more rows and all kin of `Space.least` need as much or more."""
    found = opened(plan_of(*more, "parallel=auto", until="resolve"))
    pending = [one for meshes in found.meshes.values() for mesh in meshes for one in found.space.micro_batches(mesh)]
    seen = set()
    while pending:
        one = pending.pop()
        assert one not in seen  # each comes from one other only
        seen.add(one)
        for child in found.space.after(one):
            before, after = found.time(one), found.time(child)
            assert before is not None
            assert after is not None
            assert after.total >= before.total * (1 - 1e-9), (one, child)
            assert found.space.order(child) > found.space.order(one)
            pending.append(child)
    assert len(seen) > 300
    for one in seen:
        assert found.verdict(found.space.least(one)).need <= found.verdict(one).need, one
    for _, kin in itertools.groupby(sorted(seen, key=lambda one: (one.kind, one.rows)), key=lambda one: one.kind):
        needs = [found.verdict(one).need for one in kin]
        assert needs == sorted(needs)


def test_without_times_the_simplest_that_fits_is_taken(plan_of: PlanOf) -> None:
    """GPUs are all used; on a CPU one process has all cores already. The plan names what is not known."""
    gpus = plan_of(*BASE, *WIDE, "hardware=h100x8", "hardware.units=null", "parallel=auto")
    assert words(said(gpus)[0])[0] == "parallel=ddp"
    assert trained(gpus).placement.devices == 8
    assert "hardware.units is not known" in said(gpus)[0]
    cpu = plan_of(*BASE, *WIDE, "hardware=cpu", "hardware.memory_bandwidth=null", "parallel=auto")
    assert words(said(cpu)[0])[0] == "parallel=single"
    small = plan_of(*BASE, "model=7b", "hardware=h100x8", "hardware.units=null", "parallel=auto")
    assert {word.partition("=")[0] for word in words(said(small)[0])} >= {"parallel.dp_shard", "parallel.micro_batch_size"}


def test_keys_that_are_typed_are_kept(plan_of: PlanOf) -> None:
    """Those that it searches, and those that it does not."""
    keys = {"tp": 2, "micro_batch_size": 2, "activation_checkpointing": "full", "cpu_offload": True, "reshard_after_forward": False, "prefetch": 1}
    keys |= {"data_workers": 3, "compile": True, "timeout_s": 5.0, "devices": 4, "dp_replicate": 2}
    chosen = trained(plan_of(*BASE, *WIDE, "hardware=h100x8", "parallel=auto", *(f"parallel.{key}={str(value).lower()}" for key, value in keys.items())))
    assert isinstance(chosen.spec, TrainingStage)
    assert isinstance(chosen.spec.parallel, Mesh)
    assert {key: getattr(chosen.spec.parallel, key) for key in keys} == keys


def test_devices_that_rows_do_not_reach_are_left_idle(plan_of: PlanOf) -> None:
    """64 rows of a model that nobody can split further are for 64 devices, and the plan says so."""
    plan = plan_of(*BASE, "model=gpt3_175b", "hardware=h100x1024", "parallel=auto")
    assert said(plan)[0] == "64 of 1,024 devices: no mesh of more takes 64 rows"
    assert trained(plan).placement.devices == 64


BAD = {
    "parallel.devices=3": "optimizer.global_batch_tokens: 64 rows do not split over 3 data-parallel ranks; type",
    "parallel.tp=3": "parallel: tp 3 = 3, and that does not divide 8 devices; type parallel.tp=2",
    "parallel.pp=4 parallel.dp_shard=4": "parallel: pp 4 x dp_shard 4 = 16, and there are 8 devices; type",
    "parallel.micro_batch_size=5": "parallel.micro_batch_size: 5 does not divide the 8 rows a device has; type",
    "parallel.devices=1 parallel.cpu_offload=true": "one device alone has nobody to shard with",
    "parallel.devices=16": "16 devices asked",
    "stage=[pretrain,sft] adapter=lora stage.sft.parallel.tp=2": "adapter=lora does not run with tp",
    "hardware.memory_bytes=1e8": "nothing fits: the least is",
}


@pytest.mark.parametrize("more", BAD)
def test_what_cannot_work_is_refused_in_a_line(more: str, cli: Callable[..., Answer]) -> None:
    """Exit code 2, where and what, and what instead."""
    answer = cli("plan", *BASE, *WIDE, "hardware=h100x8", "parallel=auto", *more.split())
    assert answer.code == 2
    assert BAD[more] in answer.err
    assert len(answer.err.strip().splitlines()) == 1
    assert answer.out == ""


def test_where_nothing_fits_the_smallest_hardware_is_named(plan_of: PlanOf) -> None:
    """An option of conf/hardware that it fits on, or what a device would have to hold."""
    with pytest.raises(PlanError, match=r"nothing fits: the least is .* parallel=single .*; the smallest that something fits on is hardware=\w+") as caught:
        plan_of(*BASE, "model=7b", "hardware=a10gx1", "parallel=auto")
    option = str(caught.value).rpartition("=")[2]
    assert trained(plan_of(*BASE, "model=7b", f"hardware={option}", "parallel=auto"))
    with pytest.raises(PlanError, match=r"a device of at least [\d.]+ GiB would do"):
        plan_of(*BASE, "model=gpt3_175b", "parallel.devices=1", "hardware=a10gx1", "parallel=auto")
