"""A spread model made whole again on rank 0, a tensor at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def skeleton(model: Any) -> Any:
    """A copy of a whole model without its parameters' memory; shared parameters stay shared, buffers are copied."""
    memo = {id(one): nn.Parameter(torch.empty_like(one, device="meta"), requires_grad=one.requires_grad) for one in model.parameters()}
    return copy.deepcopy(model, memo)


@torch.no_grad()
def gathered(model: Any, bones: Any, mesh: DeviceMesh) -> Any:
    """`bones` with the weights of `model` on the CPU, on rank 0; None on others. Every rank calls it, and holds one whole tensor at a time."""
    return fill(bones, _reader(model, shapes(bones), mesh), model.training)


@torch.no_grad()
def some(model: Any, known: Mapping[str, Tensor], mesh: DeviceMesh, names: Sequence[str]) -> dict[str, Tensor]:
    """Some weights of `model` by name, whole, on the CPU of rank 0; nothing on others. `known` are its `shapes`. Every rank calls it alike."""
    whole, first, found = _reader(model, known, mesh), dist.get_rank() == 0, dict[str, Tensor]()
    for name in names:
        value = whole(name)
        if first:
            found[name] = value.to("cpu", copy=True)
    return found


def shapes(bones: Any) -> dict[str, Tensor]:
    """The parameters of a model without memory by all their names."""
    return dict(bones.named_parameters(remove_duplicate=False))


def _reader(model: Any, known: Mapping[str, Tensor], mesh: DeviceMesh) -> Callable[[str], Tensor]:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward without backward leaves the root's weights gathered
    mine = shapes(model)
    return lambda name: _whole(mine.get(name), known[name], mesh)


@torch.no_grad()
def fill(bones: Any, whole: Callable[[str], Tensor], training: bool) -> Any:
    """`bones` with the tensors that `whole` gives for each name, on rank 0; None on others, which ask for the same tensors in the same order."""
    first = dist.get_rank() == 0
    filled: dict[int, nn.Parameter] = {}
    for name, bone in bones.named_parameters():
        value = whole(name)
        if first:
            filled[id(bone)] = nn.Parameter(value.cpu().clone(), requires_grad=bone.requires_grad)
    if not first:
        return None
    for module in bones.modules():
        for name, bone in module._parameters.items():
            if bone is not None and id(bone) in filled:
                module._parameters[name] = filled[id(bone)]
    return bones.train(training)


def _whole(mine: Tensor | None, bone: Tensor, mesh: DeviceMesh) -> Tensor:
    """One parameter, whole, on every rank; where stages of a pipeline hold different ones, its holder sends it to the others of the pipeline."""
    whole = mine.full_tensor() if isinstance(mine, DTensor) else mine
    if mesh["pp"].size() == 1:
        assert whole is not None
        return whole
    group, device = mesh["pp"].get_group(), torch.device(mesh.device_type, torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    holder = torch.tensor(mesh["pp"].get_local_rank() if whole is not None else -1, device=device)
    dist.all_reduce(holder, op=dist.ReduceOp.MAX, group=group)
    sent = whole.to(device).contiguous() if whole is not None else torch.empty(bone.shape, dtype=bone.dtype, device=device)
    dist.broadcast(sent, group=group, group_src=int(holder))
    return sent
