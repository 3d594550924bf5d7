"""Memory and values for what a rank holds of a model that was laid out without either."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from lmforge.parallel.engine.base import Part, Parts


@torch.no_grad()
def fill(model: Any, parts: Parts, device: torch.device) -> None:
    """Give each parameter on the meta device memory on `device`, and of what `parts` reads the values that are this rank's; in place.

    Values take the parameter's dtype. Shared parameters stay shared, real ones (an adapter's) and buffers are left as they are.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type == "meta":
                places.setdefault(parameter, []).append((module, leaf))
    for parameter, here in places.items():
        real = nn.Parameter(_filled(parameter, parts[names[parameter]], device), requires_grad=parameter.requires_grad)
        for module, leaf in here:
            module._parameters[leaf] = real


def _filled(parameter: Tensor, part: Part, device: torch.device) -> Tensor:
    held = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    made = torch.empty_like(held, device=device, requires_grad=False)
    if made.numel():
        made.copy_(part(_slices(parameter)))
    if not isinstance(parameter, DTensor):
        return made
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(made, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())


def _slices(parameter: Tensor) -> tuple[slice, ...]:
    """Where the values of this rank lie in the whole tensor: tensor parallel has cut it first, then FSDP what was left, each as torch.chunk does.

    torch's own compute_local_shape_and_global_offset is a row off where tensor parallel cuts unevenly and FSDP cuts the same dimension (torch 2.13).
    """
    bounds = [(0, size) for size in parameter.shape]
    if isinstance(parameter, DTensor):
        at, mesh = parameter.device_mesh.get_coordinate(), parameter.device_mesh
        assert at is not None
        # FSDP2 says by _StridedShard that another axis of the mesh, further in, has cut the dimension before it.
        for axis, placement in sorted(enumerate(parameter.placements), key=lambda one: isinstance(one[1], _StridedShard)):
            if isinstance(placement, (Shard, _StridedShard)):
                begin, end = bounds[placement.dim]
                each = -(-(end - begin) // mesh.size(axis))
                begin = min(begin + at[axis] * each, end)
                bounds[placement.dim] = begin, min(begin + each, end)
    return tuple(slice(*pair) for pair in bounds)
