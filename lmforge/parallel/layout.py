"""Arithmetic of meshes, without torch: who holds which part of which weight.

Ranks are numbered with the last axis fastest. A tensor that does not divide is cut as torch.chunk cuts it: the first ranks get the larger parts,
the last may get nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
ONE = dict.fromkeys(AXES, 1)


@dataclass(frozen=True)
class Spread:
    """What an engine is told besides its own keys."""

    accelerator: str  # cpu or cuda
    mesh: Mapping[str, int]
    compute_dtype: str  # of matrix products, by its torch name
    reduce_dtype: str  # in which ranks sum gradients
    gradient_clipping: float | None  # the largest global norm
    micro_batch_size: int  # rows of a rank and pass
    accumulation: int  # passes of an optimizer step
    splits: Mapping[str, str]  # how tensor parallel splits the model's modules, by name


class Ranks:
    """This rank's place in the mesh, for whoever reads rows or adds up figures."""

    def __init__(self, rank: int, mesh: Mapping[str, int]) -> None:
        self.at = coordinate(rank, mesh)
        self.data_degree = data_degree(mesh)
        self.data_rank = data_rank(self.at, mesh)
        # Of the ranks that work on the same rows one speaks: the first along tp and cp in the last stage, which alone knows the loss.
        self.speaks = self.at["tp"] == self.at["cp"] == 0 and self.at["pp"] == mesh["pp"] - 1


def coordinate(rank: int, mesh: Mapping[str, int]) -> dict[str, int]:
    """Where a rank lies on each axis."""
    found = {}
    for axis in reversed(AXES):
        rank, found[axis] = divmod(rank, mesh[axis])
    return {axis: found[axis] for axis in AXES}


def data_degree(mesh: Mapping[str, int]) -> int:
    """How many ranks read rows of their own."""
    return mesh.get("dp_replicate", 1) * mesh.get("dp_shard", 1)


def data_rank(at: Mapping[str, int], mesh: Mapping[str, int]) -> int:
    """Which share of the rows the rank at a coordinate reads."""
    return at["dp_replicate"] * mesh["dp_shard"] + at["dp_shard"]


def chunk(size: int, parts: int, index: int) -> int:
    """Rows of part `index` of `size` rows cut into `parts`, as torch.chunk and DTensor cut them."""
    each = -(-size // parts)
    return max(0, min(size, (index + 1) * each) - index * each)


@functools.lru_cache(maxsize=256)
def stages(layers: int, pp: int) -> tuple[range, ...]:
    """The layers of each pipeline stage, as equal as can be. Of what is left over the first and the last stage get theirs last: they hold the embedding
    and the head."""
    extra = layers % pp
    order = sorted(range(pp), key=lambda stage: (stage in (0, pp - 1), stage == pp - 1, stage))
    sizes = [layers // pp + (stage in order[:extra]) for stage in range(pp)]
    starts = [sum(sizes[:stage]) for stage in range(pp)]
    return tuple(range(start, start + size) for start, size in zip(starts, sizes, strict=True))


def layouts(sizes: Mapping[str, int | None], devices: int) -> str:
    """The nearest layouts that fit, as a person types them: one axis at a time changed."""
    found = []
    for axis, size in sizes.items():
        others = math.prod(other for name, other in sizes.items() if name != axis and other is not None)
        if size is not None and devices % others == 0 and (size > 1 or axis == "dp_shard"):
            fits = [one for one in range(1, devices // others + 1) if devices // others % one == 0] if None in sizes.values() else [devices // others]
            found.append(f"parallel.{axis}={min(fits, key=lambda one: (abs(one - size), one))}")
    fixed = math.prod(size for size in sizes.values() if size is not None)
    if fixed <= devices:
        found.append(f"parallel.devices={fixed * (devices // fixed) if None in sizes.values() else fixed}")
    return " or ".join(found)
