"""Jobs of hundreds of ranks without hundreds of ranks: torch's fake process group lets one process be any rank of any world.

Models are built at full width on the meta device and laid out by the engine's own functions; what a rank then holds is what `shards` says, and the
fullest rank's bytes are the plan's. Tiny models run a real step there, and what they send is what `traffic` says.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sent import Sent
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from lmforge.compiler.emit import emit
from lmforge.errors import PlanError
from lmforge.model import opening
from lmforge.model.build import from_scratch, on_meta
from lmforge.model.weights import sizes, splits, weights
from lmforge.optimizer.nodes import AdamW
from lmforge.parallel.engine.base import changing
from lmforge.parallel.engine.fill import fill
from lmforge.parallel.engine.mesh import by_mesh, lay_out
from lmforge.parallel.layout import AXES, ONE, Spread, coordinate
from lmforge.parallel.shards import Cut
from lmforge.parallel.traffic import Moved, Traffic, by_kind
from lmforge.parallel.traffic import mesh as mesh_traffic
from lmforge.plan import Plan, Step
from lmforge.stage.train import recipe
from lmforge.training.lowering import lower
from lmforge.training.state.storage import Planner as StatePlanner

PlanOf = Callable[..., Plan]
BATCH = "stage.pretrain.optimizer.global_batch_tokens=4194304"
JOBS = {
    "dpo_7b": ("stage=dpo", "model=7b", "parallel=fsdp", "hardware=h100x8"),
    "70b_on_512": ("stage=pretrain", "model=70b", "parallel=3d", "hardware=h100x512", "precision=bf16", "eval=none", BATCH),
    "175b_on_1024": ("stage=pretrain", "model=gpt3_175b", "parallel=fsdp", "hardware=h100x1024", "precision=bf16", "eval=none", BATCH),
    "175b_hsdp": ("stage=pretrain", "model=gpt3_175b", "parallel=hsdp", "parallel.dp_replicate=16", "hardware=h100x1024", "precision=bf16", "eval=none", BATCH),
}
TINY = {
    "num_hidden_layers": 3, "num_key_value_heads": 2, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "max_position_embeddings": 64,
    "bos_token_id": 0, "eos_token_id": 0, "vocab_size": 97, "n_inner": 40, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64,
}  # fmt: skip
OPTIONS = {"pp_schedule": "1f1b", "reshard_after_forward": True, "prefetch": 0, "cpu_offload": False}


@contextlib.contextmanager
def rank_of(rank: int, mesh: Mapping[str, int]) -> Iterator[DeviceMesh]:
    """This process as one rank of a mesh that has no others."""
    world = torch.Size(mesh.values()).numel()
    _clear_sharding_prop_cache()  # it remembers meshes: a DTensor would be given an equal one, in which this process is another rank
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield init_device_mesh("cpu", tuple(mesh.values()), mesh_dim_names=tuple(mesh))
    finally:
        dist.destroy_process_group()


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def folded(name: str) -> str:
    """The name with `{layer}` for its layer's number, as `weights` has it."""
    return re.sub(r"\.(layers|h)\.\d+\.", r".\1.{layer}.", name)


def held_by(model: nn.Module) -> Counter[tuple[str, tuple[int, ...]]]:
    """What the engine left of a model: how many layers have a parameter of that local shape."""
    return Counter((folded(name), tuple(local(parameter).shape)) for name, parameter in model.named_parameters())


def size(model: nn.Module) -> int:
    """Bytes of its parameters on this rank."""
    return sum(local(parameter).numel() * parameter.element_size() for parameter in model.parameters())


def job(plan: Plan, name: str, folder: Path) -> Step:
    """The step of the emitted job."""
    return next(one.step for one in emit(plan, lambda step: folder / step.name) if one.step.name == name)


def spread_of(step: Step, config: Mapping[str, Any]) -> Spread:
    """What `fit` tells the engine."""
    stage: Any = step.spec
    micro, accumulation = step.placement.micro_batch_size or 0, step.placement.accumulation or 0
    told = (stage.precision.compute_dtype, stage.precision.reduce_dtype, stage.optimizer.grad_clip, micro, accumulation)
    return Spread("cpu", step.placement.mesh, *told, splits(config))


@pytest.mark.parametrize("name", JOBS)
def test_every_rank_of_a_large_job_holds_what_the_plan_says(name: str, plan_of: PlanOf, tmp_path: Path) -> None:
    stage = JOBS[name][0].removeprefix("stage=")
    plan = plan_of(*JOBS[name])
    step, config = job(plan, stage, tmp_path), plan.experiment.model.config()
    spec: Any = step.spec
    tensors, mesh, peak = weights(config), step.placement.mesh, step.cost.peak_bytes_per_device
    cut = Cut(mesh, splits(config), sizes(config).num_hidden_layers)
    found = {}
    for rank in (0, step.placement.devices // 2 - 1, step.placement.devices - 1):
        model: Any = on_meta(config)
        lower(model, recipe(spec))
        with rank_of(rank, mesh) as ranks:
            lay_out(model, ranks, spec.parallel, spread_of(step, config), torch.device("cpu"))
            said = cut.held(tensors, rank)
            assert held_by(model) == Counter({(one.name, one.shape): one.count for one in said}), f"rank {rank}"
            found[rank] = size(model)
            assert found[rank] == sum(one.numel for one in said) * spec.precision.param_bytes
    # the fullest rank is one of these: both ends of a pipeline, and the middle's
    assert max(found.values()) == peak.params == peak.grads
    assert peak.optimizer == 2 * peak.params  # AdamW's two moments
    whole = sum(one.numel for one in Cut(ONE, {}, cut.layers).held(tensors, 0)) * spec.precision.param_bytes
    parts = mesh["pp"] * mesh["tp"] * mesh["dp_shard"]
    assert whole / parts <= peak.params < 1.02 * whole / parts  # it is as even as that


def test_a_family_without_a_plan_is_not_split_over_tp(plan_of: PlanOf) -> None:
    with pytest.raises(PlanError, match="gpt2"):
        plan_of("stage=pretrain", "model=gpt3_175b", "parallel=3d", "hardware=h100x1024", BATCH)


def test_a_base_under_an_adapter_is_sharded_with_it(plan_of: PlanOf, tmp_path: Path) -> None:
    plan = plan_of("stage=[pretrain,sft]", "adapter=lora", "model=nano", "parallel=fsdp", "parallel.dp_replicate=2", "hardware=h100x8")
    step, config = job(plan, "sft", tmp_path), plan.experiment.model.config()
    spec: Any = step.spec
    model: Any = spec.adapter.attach(on_meta(config), 0)
    with rank_of(0, step.placement.mesh) as ranks:
        lay_out(model, ranks, spec.parallel, spread_of(step, config), torch.device("cpu"))
    peak = step.cost.peak_bytes_per_device
    assert size(model) == peak.params
    assert 4 * sum(local(one).numel() for one in model.parameters() if one.requires_grad) == peak.grads == (peak.optimizer or 0) / 2


@pytest.mark.parametrize("family", ["llama", "olmo2", "qwen2", "qwen3"])
@pytest.mark.parametrize("axes", [{"pp": 2, "dp_shard": 3, "tp": 2}, {"dp_replicate": 2, "dp_shard": 7}, {"pp": 3, "tp": 2}])
def test_ranks_of_small_models_hold_uneven_parts(family: str, axes: dict[str, int]) -> None:
    """40 units over 2 x 3, 97 words over 2, 3 layers over 2 stages, 7 ranks for few rows: every rank, to the last that holds nothing of a tensor."""
    config, mesh = {**TINY, "model_type": family}, ONE | axes
    options: Any = SimpleNamespace(**OPTIONS)
    cut, total = Cut(mesh, splits(config), 3), 0
    for rank in range(torch.Size(mesh.values()).numel()):
        model: Any = on_meta(config)
        with rank_of(rank, mesh) as ranks:
            lay_out(model, ranks, options, Spread("cpu", mesh, "float32", "float32", None, 1, 1, splits(config)), torch.device("cpu"))
            said = cut.held(weights(config), rank)
            assert held_by(model) == Counter({(one.name, one.shape): one.count for one in said}), coordinate(rank, mesh)
        total += sum(one.numel for one in said)
    fullest = max(sum(one.numel for one in cut.held_at(weights(config), at)) for at in cut.first_ranks())
    assert total <= fullest * torch.Size(mesh.values()).numel()


@pytest.mark.parametrize("axes", [{"pp": 2, "dp_shard": 3, "tp": 2}, {"dp_replicate": 2, "dp_shard": 7}, {"dp_shard": 3, "tp": 4}])
@pytest.mark.parametrize("family", ["llama", "olmo2", "qwen2", "qwen3"])
def test_ranks_read_the_parts_that_make_the_whole(family: str, axes: dict[str, int]) -> None:
    """Every rank fills what it holds, and never has more than that and one tensor; put together it is the model that one rank opens."""
    config, mesh = {**TINY, "num_key_value_heads": 4, "model_type": family, "tie_word_embeddings": False}, ONE | axes
    options: Any = SimpleNamespace(**OPTIONS)
    whole = {name: parameter.detach() for name, parameter in from_scratch(config, 0).named_parameters()}
    found = {name: torch.full_like(value, torch.nan) for name, value in whole.items()}
    largest, total = (function(value.nbytes for value in whole.values()) for function in (max, sum))
    for rank in range(torch.Size(mesh.values()).numel()):
        unread, model, peak = opening.from_scratch(config, 0), None, 0

        def watched(name: str, slices: tuple[slice, ...]) -> Tensor:
            nonlocal peak
            value = unread.parts[name](slices)  # noqa: B023  # called within this turn
            found[name][slices] = value
            peak = max(peak, real(unread.model) + value.nbytes)  # noqa: B023
            return value

        with rank_of(rank, mesh) as ranks:
            model = unread.model
            assert real(model) == 0
            lay_out(model, ranks, options, Spread("cpu", mesh, "float32", "float32", None, 1, 1, splits(config)), torch.device("cpu"))
            assert real(model) == 0
            fill(model, {name: partial(watched, name) for name in whole}, torch.device("cpu"))
            assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
            assert size(model) <= peak <= size(model) + largest < total
    assert all(torch.equal(found[name], value) for name, value in whole.items())


def real(model: nn.Module) -> int:
    """Bytes of its parameters that have memory on this rank."""
    return sum(local(parameter).nbytes for parameter in model.parameters() if parameter.device.type != "meta")


@pytest.mark.parametrize("axes", [{"dp_shard": 3, "tp": 2}, {"dp_shard": 4, "tp": 2}, {"dp_replicate": 2, "dp_shard": 2, "tp": 2}, {"pp": 3, "dp_shard": 2}])
def test_a_state_has_every_number_once_where_its_rank_holds_it(axes: dict[str, int]) -> None:
    """97 words over 2, and each half over 3 or 4: torch's own offsets are a row off there."""
    config, mesh = {**TINY, "model_type": "llama"}, ONE | axes
    options: Any = SimpleNamespace(**OPTIONS)
    found: dict[str, Counter[tuple[int, ...]]] = {}
    for rank in range(torch.Size(mesh.values()).numel()):
        model: Any = on_meta(config)
        with rank_of(rank, mesh) as ranks:
            lay_out(model, ranks, options, Spread("cpu", mesh, "float32", "float32", None, 1, 1, splits(config)), torch.device("cpu"))
            planner = StatePlanner({}, changing(model))  # type: ignore[arg-type]
            planner.is_coordinator = rank == 0
            for item in planner.create_local_plan().items:
                assert item.tensor_data is not None
                chunk = item.tensor_data.chunk
                assert chunk.sizes == local(planner.tensors[item.index.fqn]).shape, (rank, item.index.fqn)
                cells = itertools.product(*(range(begin, begin + size) for begin, size in zip(chunk.offsets, chunk.sizes, strict=True)))
                found.setdefault(item.index.fqn, Counter()).update(cells)
    copies = mesh["dp_replicate"]
    for name, parameter in on_meta(config).named_parameters():
        assert len(found[name]) == parameter.numel(), name
        assert max(found[name].values()) <= copies * mesh["dp_shard"] * mesh["tp"], name


def tiny_step(family: str, mesh: Mapping[str, int], micro_batches: int, **change: Any) -> tuple[Traffic, Traffic, nn.Module, int]:
    """One step of a tiny model as rank 0: bytes sent as torch's collectives say, bytes sent as the plan would say, the model, and its optimizer's bytes."""
    config, tokens = {**TINY, "model_type": family}, 16
    change = {"compute": "bfloat16", "reduce": "float32", "checkpointing": "none"} | OPTIONS | change
    told = Spread("cpu", mesh, change["compute"], change["reduce"], None, 1, micro_batches, splits(config))
    options: Any = SimpleNamespace(**{key: change[key] for key in OPTIONS})
    model: Any = from_scratch(config, 0)
    parallel = SimpleNamespace(checkpointing=change["checkpointing"], compile=False)
    lower(model, SimpleNamespace(param_dtype="float32", buffer_dtype="float32", parallel=parallel))  # type: ignore[arg-type]
    sent = Sent()
    with rank_of(0, mesh) as ranks:
        _, sharded = lay_out(model, ranks, options, told, torch.device("cpu"))
        for index in range(micro_batches):
            for part in sharded:
                part.set_requires_all_reduce(index == micro_batches - 1)
            with sent:
                with torch.autocast("cpu", dtype=getattr(torch, change["compute"]), enabled=change["compute"] != "float32"):
                    loss = model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False).logits.float().logsumexp(-1).sum()
                loss.backward()
        optimizer = torch.optim.AdamW([{"params": group} for group in by_mesh(list(model.parameters()))])
        optimizer.step()
    states = sum(local(value).numel() * value.element_size() for one in optimizer.state.values() for value in one.values() if value.ndim)
    compute, reduce = (getattr(torch, change[key]).itemsize for key in ("compute", "reduce"))
    moved = Moved(weights(config), (), micro_batches, tokens, 32, change["checkpointing"] != "none", 4, compute, reduce)
    return sent.bytes, by_kind(mesh_traffic(Cut(mesh, splits(config), 3), moved, reshards=change["reshard_after_forward"])), model, states


CASES: list[tuple[str, dict[str, int], int, dict[str, Any]]] = [
    ("llama", {"dp_shard": 4}, 3, {}),
    ("llama", {"dp_shard": 4}, 3, {"reshard_after_forward": False, "reduce": "bfloat16"}),
    ("gpt2", {"dp_replicate": 2, "dp_shard": 3}, 2, {}),
    ("llama", {"tp": 2}, 2, {}),
    ("llama", {"tp": 2}, 1, {"compute": "float32", "checkpointing": "full"}),
    ("llama", {"tp": 2}, 1, {"checkpointing": "selective"}),
    ("olmo2", {"tp": 2}, 1, {}),
    ("olmo2", {"tp": 2}, 1, {"checkpointing": "full"}),
    ("qwen3", {"dp_shard": 3, "tp": 2}, 2, {}),
    ("qwen2", {"dp_replicate": 2, "dp_shard": 2, "tp": 2}, 2, {"checkpointing": "selective"}),
]


@pytest.mark.parametrize(("family", "axes", "micro_batches", "change"), CASES)
def test_a_step_sends_and_keeps_what_the_plan_says(family: str, axes: dict[str, int], micro_batches: int, change: dict[str, Any]) -> None:
    mesh = ONE | axes
    sent, said, model, states = tiny_step(family, mesh, micro_batches, **change)
    assert sent == said
    config = {**TINY, "model_type": family}
    cut, first = Cut(mesh, splits(config), 3), dict.fromkeys(AXES, 0)
    held = cut.held_at(weights(config), first)
    assert size(model) == 4 * sum(one.numel for one in held)
    grads = sum(local(one.grad).numel() * one.grad.element_size() for one in model.parameters() if one.grad is not None)
    assert grads == 4 * sum(one.numel for one in cut.gradients_at(weights(config), first))
    assert states == sum(AdamW.state_bytes(None, one.shape, one.name, 4) * one.count for one in held)  # type: ignore[arg-type]
