"""Reading a state: every file is compared with the index first, then each rank reads what it needs, from whatever layout wrote it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor

from lmforge.errors import CheckpointError
from lmforge.training.state.index import Index, broken, flaw, read_index, strays
from lmforge.training.state.storage import chunk_of
from lmforge.training.state.together import agree, gathered, rank, world
from lmforge.training.state.tree import Path, paths, unflatten

WEIGHTS, OPTIMIZER = "weights", "optimizer"  # the keys of a tree under which lie the model's tensors and what the optimizer keeps, by the tensors' names


@dataclass(frozen=True)
class Held:
    """What a state holds under a path: a tensor of this shape, over all ranks."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return str(self.shape)


_whole: set[tuple[File, str]] = set()  # states whose files this process has compared by `check`: the folder, and the index's own checksum


def check(folder: File, devices: int) -> None:
    """Compare the state in `folder`, if there is one, with its index, before weights are opened and ranks have met: each of `devices` ranks its share.

    CheckpointError as of `open_state`, on the rank that finds it, whose failure ends the others. `open_state` does not hash those files again.
    """
    index = read_index(folder)
    if index is None:
        return
    first = int(os.environ["RANK"]) if devices > 1 else 0
    for problem in (*strays(folder, index), *_flaws(folder, index, first, devices)):
        if problem:
            raise problem
    _whole.add((folder.resolve(), index["check"]))


def _flaws(folder: File, index: Index, first: int, step: int) -> Iterator[CheckpointError | None]:
    """What is wrong with each file of a rank's share."""
    ordered = sorted(index["files"], key=lambda name: -index["files"][name]["bytes"])
    return (flaw(folder, index, name) for name in ordered[first::step])


def open_state(folder: File) -> Saved | None:
    """The state last saved in `folder`, None where none was; called by every rank.

    CheckpointError, on every rank the same, where the index or a file that it names is missing, cut, changed or not the one written. The ranks share
    the hashing; no tensor is read yet.
    """
    index, problem = None, None
    try:
        index = read_index(folder)
    except CheckpointError as error:
        problem = error
    agree(problem)
    checks = gathered(index["check"] if index else None)
    if len(set(checks)) > 1:
        raise broken(folder, "is not the same folder on every rank", folder)
    if index is None:
        return None
    agree(next(strays(folder, index), None))
    unknown = () if (folder.resolve(), index["check"]) in _whole else _flaws(folder, index, rank(), world())
    agree(next((one for one in unknown if one), None))
    return Saved(folder, index)


class Saved:
    """A state whose files are whole."""

    def __init__(self, folder: File, index: Index) -> None:
        self.folder, self.index = folder, index
        self.step = index["step"]
        self._names = dict(paths(index["tree"]))

    def keys(self) -> dict[Path, Held]:
        """Every tensor's path, global shape and dtype."""
        held = {name: Held(tuple(shape), getattr(torch, dtype)) for name, (dtype, shape) in self.index["tensors"].items()}
        return {path: held[name] for path, name in self._names.items()}

    def tree(self, into: Mapping[Path, Tensor] | None = None, only: Collection[Path] | None = None) -> Any:
        """What was saved; called by every rank. Tensors at the paths of `into` are read in place, a DTensor's own shards alone; others are made on the CPU.

        With `only`, tensors at or below those paths; the others are left out of dicts, and None in lists. CheckpointError where a target is not there
        or differs in shape or dtype.
        """
        into = into or {}
        agree(self._unlike(into, only or ()))
        held, chosen = self.keys(), {()} if only is None else set(only)
        wanted = {path: self._names[path] for path in held if path in into or any(path[:end] in chosen for end in range(len(path) + 1))}
        tensors = {name: into[path] if path in into else torch.empty(held[path].shape, dtype=held[path].dtype) for path, name in wanted.items()}
        self._read(tensors)
        return unflatten(self.index["tree"], tensors)

    def like(self, weights: Mapping[str, Tensor]) -> Any:
        """What this rank needs of a state of {"weights": {name: tensor}, "optimizer": {name: {key: value}}, ...}; called by every rank.

        Its weights are read in place; what the optimizer keeps for each element of one becomes a tensor laid out alike, what else it keeps a whole tensor
        on the same device; the rest is on the CPU.
        CheckpointError where the weights of all ranks are not those of the state.
        """
        held, known = self.keys(), {name for names in gathered(list(weights)) for name in names}
        left = next((path for path in held if path[0] == WEIGHTS and path[1] not in known), None)
        agree(self._another(left, f"is {held[left]}, not None") if left else None)
        into: dict[Path, Tensor] = {(WEIGHTS, name): value for name, value in weights.items()}
        mine = [path for path in held if path[0] not in (WEIGHTS, OPTIMIZER) or path[1] in weights]
        for path in (path for path in mine if path[0] == OPTIMIZER):
            weight, kept = weights[str(path[1])], held[path]
            alike = kept.shape == tuple(weight.shape)
            into[path] = (
                torch.empty_like(weight, dtype=kept.dtype, requires_grad=False) if alike else torch.empty(kept.shape, dtype=kept.dtype, device=weight.device)
            )
        return self.tree(into, only=mine)

    def _unlike(self, into: Mapping[Path, Tensor], only: Collection[Path]) -> CheckpointError | None:
        held = self.keys()
        for path, target in into.items():
            found = held.get(path)
            if found is None or found.shape != tuple(target.shape):
                return self._another(path, f"is {found}, not {tuple(target.shape)}")
            if found.dtype != target.dtype:
                return self._another(path, f"is {found.dtype}, not {target.dtype}")
        known = {path[:end] for path in held for end in range(len(path) + 1)}
        return next((self._another(path, "is not in it") for path in only if path not in known), None)

    def _another(self, path: Path, what: str) -> CheckpointError:
        name = ".".join(str(key) for key in path)
        return CheckpointError(str(self.folder), f"was made by another model: {name} {what}", f"remove the folder {self.folder}")

    def _read(self, tensors: Mapping[str, Tensor]) -> None:
        """Each rank for itself: the planning needs no other rank, and ranks may want different tensors."""
        if not tensors:
            return
        targets = {name: _storable(value) for name, value in tensors.items()}
        planner = Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            reader = HuggingFaceStorageReader(str(self.folder / self.index["folder"]))
            load(targets, storage_reader=reader, planner=planner, no_dist=True)


class Planner(DefaultLoadPlanner):
    """DCP's planner, with a DTensor's part where it lies: see `share`."""

    def create_local_plan(self) -> LoadPlan:
        plan, wanted, held = super().create_local_plan(), self.state_dict, self.metadata
        assert held is not None
        items = [one for one in plan.items if not isinstance(wanted[one.dest_index.fqn], DTensor)]
        for name, value in wanted.items():
            if isinstance(value, DTensor):
                items += create_read_items_for_chunk_list(name, cast(TensorStorageMetadata, held.state_dict_metadata[name]), [chunk_of(value)])
        return LoadPlan(items)


def _storable(value: Tensor) -> Tensor:
    """As `storage` holds it: a tensor of no dimension as one of a dimension, sharing its memory."""
    if value.dim():
        return value
    return (value.to_local() if isinstance(value, DTensor) else value).detach().view(1)
