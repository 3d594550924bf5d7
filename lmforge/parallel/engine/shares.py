"""Which part of a tensor a rank holds."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard


def share(parameter: Tensor) -> tuple[slice, ...]:
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
