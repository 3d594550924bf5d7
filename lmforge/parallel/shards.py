"""Exactly what each rank of a mesh holds, from names and shapes alone: a plan says it without torch, as the engines do it.

The order is theirs. A pipeline gives a stage whole layers, the embedding to the first and the final norm and the head to the last (engine/pipeline.py).
Tensor parallel cuts what a family's `splits` names, the rest stays whole over tp (engine/tensor.py). FSDP2 cuts dimension 0 of what is then left
(engine/shard.py: DTensor's strided sharding, Zhao et al. 2023), and HSDP keeps a copy of that for each group of dp_replicate. Uneven parts are those of
`layout.chunk`: the first rank along tp and dp_shard always holds most.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from lmforge.parallel.layout import ONE, chunk, coordinate, stages

ENDS = {"embed_tokens": 0, "norm": -1, "lm_head": -1}  # modules that one stage of a pipeline holds, by the last part of their name
DIMENSIONS = {  # which dimension of a weight and of a bias a split cuts; None leaves it whole
    "column": (0, 0),
    "column_gathered": (0, 0),
    "vocabulary": (0, None),
    "row": (1, None),
    "row_from_whole": (1, None),
}


class Sized(Protocol):
    """A tensor by name and shape; `{layer}` in the name stands for `count` layers."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def count(self) -> int: ...


@dataclass(frozen=True)
class Shard:
    """What one rank holds of a tensor: its local shape, in `count` layers."""

    name: str
    shape: tuple[int, ...]
    count: int

    @property
    def numel(self) -> int:
        """Elements in all of the rank's layers."""
        return math.prod(self.shape) * self.count


@dataclass(frozen=True)
class Cut:
    """How tensors of a model with `layers` layers lie on a mesh. `splits` says how tensor parallel splits modules, by name."""

    mesh: Mapping[str, int]
    splits: Mapping[str, str]
    layers: int

    def held(self, tensors: Iterable[Sized], rank: int) -> list[Shard]:
        """What `rank` holds; tensors of other stages are left out, tensors that have no row for it are there with none."""
        return self.held_at(tensors, coordinate(rank, self.mesh))

    def held_at(self, tensors: Iterable[Sized], at: Mapping[str, int]) -> list[Shard]:
        """What the rank at a coordinate holds."""
        counted = ((one, self._layers_of(one, at["pp"])) for one in tensors)
        return [Shard(one.name, self._local(one, at), count) for one, count in counted if count]

    def gradients_at(self, tensors: Sequence[Sized], at: Mapping[str, int]) -> list[Shard]:
        """What the rank at a coordinate holds of their gradients: as much as of themselves, but for an embedding that tp alone splits.

        DTensor's backward of one makes whole gradients on every rank; FSDP2 would cut them as it hands them out.
        """
        whole = self.mesh["dp_replicate"] * self.mesh["dp_shard"] == 1
        embedding = {f"{module}.weight" for module, style in self.splits.items() if style == "vocabulary" and whole}
        shapes = {one.name: one.shape for one in tensors}
        return [Shard(one.name, shapes[one.name] if one.name in embedding else one.shape, one.count) for one in self.held_at(tensors, at)]

    def first_ranks(self) -> Iterator[dict[str, int]]:
        """The coordinate of each stage's first rank: it holds as much as any of its stage, so the fullest of all is among them."""
        for stage in range(self.mesh["pp"]):
            yield dict.fromkeys(ONE, 0) | {"pp": stage}

    def _layers_of(self, tensor: Sized, stage: int) -> int:
        """In how many layers of a stage the tensor is."""
        if "{layer}" in tensor.name:
            return len(stages(self.layers, self.mesh["pp"])[stage]) if self.mesh["pp"] > 1 else tensor.count
        module = tensor.name.rpartition(".")[0].rpartition(".")[2]
        elsewhere = module in ENDS and stage != ENDS[module] % self.mesh["pp"]
        return 0 if elsewhere else tensor.count

    def _local(self, tensor: Sized, at: Mapping[str, int]) -> tuple[int, ...]:
        shape = list(tensor.shape)
        cut = self.split_dimension(tensor.name)
        if cut is not None:
            shape[cut] = chunk(shape[cut], self.mesh["tp"], at["tp"])
        shape[0] = chunk(shape[0], self.mesh["dp_shard"], at["dp_shard"])
        return tuple(shape)

    def split_dimension(self, name: str) -> int | None:
        """Which dimension tensor parallel cuts a parameter of that name along."""
        module, _, kind = name.rpartition(".")
        style = self.splits.get(module) if self.mesh["tp"] > 1 else None
        return DIMENSIONS[style][kind == "bias"] if style else None

    def said(self) -> str:
        """What the fullest rank holds, for people: `each rank holds 40 of 80 layers, 1/2 of each matrix, 1/128 of that`; empty where it is all."""
        parts = []
        if self.mesh["pp"] > 1:
            sizes = {len(one) for one in stages(self.layers, self.mesh["pp"])}
            parts.append(f"{'up to ' if len(sizes) > 1 else ''}{max(sizes)} of {self.layers} layers")
        if self.mesh["tp"] > 1:
            parts.append(f"1/{self.mesh['tp']} of each matrix")
        if self.mesh["dp_shard"] > 1:
            parts.append(f"1/{self.mesh['dp_shard']} of {'that' if parts else 'each tensor'}")
        return f"each rank holds {', '.join(parts)}" if parts else ""
