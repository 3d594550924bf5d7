"""Memory and values for what a rank holds of a model that was laid out without either."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lmforge.parallel.engine.base import Part, Parts
from lmforge.parallel.engine.shares import share


@torch.no_grad()
def fill(model: Any, parts: Parts, device: torch.device) -> None:
    """Give each parameter on the meta device memory on `device`, and of what `parts` reads the values that are this rank's; in place.

    Where `parts` has None for a name, its values come later. Values take the parameter's dtype. Shared parameters stay shared, real ones (an adapter's)
    and buffers are left as they are.
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


def _filled(parameter: Tensor, part: Part | None, device: torch.device) -> Tensor:
    held = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    made = torch.empty_like(held, device=device, requires_grad=False)
    if made.numel() and part is not None:
        made.copy_(part(share(parameter)))
    if not isinstance(parameter, DTensor):
        return made
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(made, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())
